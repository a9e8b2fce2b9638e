"""Every private name of detectron2, fvcore and iopath that d2kd relies on, and what breaks if it goes.

They may change without notice. ``tests/test_private.py`` checks that each is there, and that there are no
others.
"""

from detectron2.data.build import _train_loader_from_config as train_loader_from_config

#: "module:qualified.name" by name, and what breaks without it.
PRIVATE_NAMES = {
    "detectron2.data.build:_train_loader_from_config": "the training loader of YAML configs reads no data",
    "detectron2.engine.defaults:DefaultTrainer._trainer": "Trainer runs no step: DefaultTrainer passes steps on to it",
    "detectron2.modeling.meta_arch.dense_detector:DenseDetector._ema_update": "SYNC_NORMALIZER has no effect",
    "detectron2.modeling.meta_arch.dense_detector:DenseDetector._transpose_dense_predictions": "GFL, ATSS and FCOS "
    "detect nothing",
    "detectron2.modeling.meta_arch.retinanet:RetinaNetHead._num_features": "a LazyConfig with the "
    "wrong number of levels fails in the first iteration",
    "detectron2.modeling.backbone.fpn:FPN._out_features": "LateralFPN returns no features",
    "detectron2.modeling.backbone.fpn:FPN._fuse_type": "LateralFPN cannot average levels",
    "detectron2.checkpoint.detection_checkpoint:DetectionCheckpointer._load_file": "files may run code when loaded",
    "detectron2.checkpoint.detection_checkpoint:DetectionCheckpointer._load_model": "weights that do not fit load "
    "without an error",
    "detectron2.checkpoint.detection_checkpoint:DetectionCheckpointer._parsed_url_during_load": "after a failed load "
    "the next one is refused",
    "iopath.common.file_io:PathHandler._check_kwargs": "torchvision:// cannot be opened",
    "fvcore.common.checkpoint:Checkpointer._log_incompatible_keys": "missing weights are logged key by key",
}

__all__ = ["PRIVATE_NAMES", "train_loader_from_config"]
