"""Narrow students."""

from detectron2.layers import ShapeSpec


def narrow(model, channels):
    """Sets the channels of a detector's FPN and head."""
    model.backbone.out_channels = model.backbone.top_block.out_channels = channels
    if isinstance(model.backbone.top_block.in_channels, str):
        model.backbone.top_block.in_channels = channels
    model.head.input_shape = [ShapeSpec(channels=channels)] * len(model.head.input_shape)
    model.head.conv_dims = [channels] * len(model.head.conv_dims)
