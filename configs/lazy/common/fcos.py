"""FCOS as trained and distilled by CrossKD's authors, equivalent to Base-FCOS.yaml: 24 epochs at two scales."""

from detectron2.config import LazyCall as L

from d2kd.methods import CrossKD
from d2kd.modeling import FCOS, FCOSHead

from .dense import ITERATIONS_PER_EPOCH, dataloader, detector, optimizer, schedule, train

model = detector(
    FCOS,
    FCOSHead,
    box_exp=True,
    center_sampling_radius=0.0,
    box_reg_loss_type="iou_log",
    loss_normalizer="batch",
    score_rule="product",
    clip_before_nms=True,
    test_score_thresh=0.05,
    test_nms_thresh=0.5,
)
model.backbone.top_block.relu = True
model.head.box_exp = "${..box_exp}"
model.head.box_scales = model.head.ctrness_on_cls = True
model.head.tower_bias = False

crosskd = L(CrossKD)(
    cut=2,
    cls_weight=0.4,
    box_weight=0.75,
    box_loss="iou_log",
    normalizer="centerness",
    centerness_weight=0.0,
    mask_padding=False,
)

optimizer.params.base_lr = "${..lr}"
optimizer.params.bias_lr_factor = 2.0
optimizer.params.weight_decay_bias = 0.0
dataloader.train.mapper.augmentations[0].short_edge_length = [640, 800]
lr_multiplier = schedule(24, [16, 22], warmup_method="constant", warmup_factor=0.3333)
train.max_iter = 24 * ITERATIONS_PER_EPOCH
