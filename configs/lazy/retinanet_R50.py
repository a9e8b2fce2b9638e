"""RetinaNet R50, 1x on COCO: detectron2's own recipe."""

from detectron2 import model_zoo

_zoo = model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.py")
model, train, optimizer = _zoo.model, _zoo.train, _zoo.optimizer
dataloader, lr_multiplier = _zoo.dataloader, _zoo.lr_multiplier
train.output_dir = "output/lazy_retinanet_R50"
