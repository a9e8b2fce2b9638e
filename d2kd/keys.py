"""How the two config styles call the same setting. Messages name settings by YAML's key and print the user's."""

from contextlib import contextmanager
from typing import Any, Dict, Iterator

#: LazyConfig's key of each setting that d2kd reads or names, by YAML's.
LAZY: Dict[str, str] = {
    "OUTPUT_DIR": "train.output_dir",
    "SEED": "train.seed",
    "DATASETS.TRAIN": "dataloader.train.dataset.names",
    "DATASETS.TEST": "dataloader.test.dataset.names",
    "DATALOADER.NUM_WORKERS": "dataloader.train.num_workers",
    "DATALOADER.SKIP_BAD_IMAGES": "train.skip_bad_images",
    "INPUT.FORMAT": "model.input_format",
    "MODEL.DEVICE": "train.device",
    "MODEL.WEIGHTS": "train.init_checkpoint",
    "MODEL.PIXEL_MEAN": "model.pixel_mean",
    "MODEL.PIXEL_STD": "model.pixel_std",
    "MODEL.META_ARCHITECTURE": "model._target_",
    "MODEL.DISTILL.METHODS": "model.methods",
    "MODEL.DISTILL.TEACHER": "model.teacher",
    "MODEL.DISTILL.TEACHER.CONFIG_FILE": "model.teacher.config_file",
    "MODEL.DISTILL.TEACHER.WEIGHTS": "model.teacher.weights",
    "MODEL.DISTILL.TEACHER.OPTS": "model.teacher.opts",
    "MODEL.DISTILL.TEACHER.DTYPE": "model.teacher.dtype",
    "MODEL.DISTILL.TEACHER.FOLD_NORMS": "model.teacher.fold_norms",
    "MODEL.DISTILL.TEACHER.SCALE": "model.teacher.scale",
    "MODEL.DISTILL.LEVELS": "model.levels",
    "MODEL.DISTILL.PREFLIGHT": "train.preflight",
    "MODEL.DISTILL.FEATURES": "model.features",
    "MODEL.DISTILL.CLASS_MAP": "model.class_map",
    "MODEL.DISTILL.INHERIT": "model.inherit",
    "MODEL.DISTILL.SCHEDULE": "model.schedules",
    "MODEL.DISTILL.GRADIENT_PERIOD": "model.gradient_period",
    "MODEL.DISTILL.SYNC_NORMALIZER": "model.sync_normalizer",
    "MODEL.DISTILL.FAST_LOSSES": "model.fast_losses",
    "MODEL.DISTILL.RECOMPUTE": "model.recompute",
    "MODEL.FCOS.BOX_REG_LOSS_TYPE": "model.box_reg_loss_type",
    "MODEL.FCOS.LOSS_NORMALIZER": "model.loss_normalizer",
    "MODEL.FCOS.SCORE_RULE": "model.score_rule",
    "MODEL.RETINANET.BBOX_REG_LOSS_TYPE": "model.box_reg_loss_type",
    "MODEL.TIMM.NAME": "model.backbone.bottom_up.name",
    "MODEL.TIMM.PRETRAINED": "model.backbone.bottom_up.pretrained",
    "MODEL.RESNETS.OUT_FEATURES": "model.backbone.bottom_up.out_features",
    "SOLVER.ACCUMULATE": "train.accumulate",
    "SOLVER.AMP.ENABLED": "train.amp.enabled",
    "SOLVER.AMP.DTYPE": "train.amp.dtype",
    "SOLVER.BASE_LR": "optimizer.lr",
    "SOLVER.CHECKPOINT_PERIOD": "train.checkpointer.period",
    "SOLVER.EMA_DECAY": "train.ema_decay",
    "SOLVER.IMS_PER_BATCH": "dataloader.train.total_batch_size",
    "SOLVER.MAX_ITER": "train.max_iter",
    "SOLVER.STEPS": "lr_multiplier.scheduler.milestones",
    "TEST.DETECTIONS_PER_IMAGE": "model.max_detections_per_image",
    "TEST.EVAL_PERIOD": "train.eval_period",
}

_is_lazy = False


@contextmanager
def lazy_keys(is_lazy: bool) -> Iterator[None]:
    """Within it, :func:`key` and :func:`setting` speak the style of a LazyConfig if ``is_lazy``, else that of YAML."""
    global _is_lazy
    before, _is_lazy = _is_lazy, is_lazy
    try:
        yield
    finally:
        _is_lazy = before


def key(name: str) -> str:
    """The user's name of a setting.

    Args:
        name: its YAML key. One that only YAML has stays as it is.
    """
    return LAZY.get(name, name) if _is_lazy else name


def setting(name: str, value: Any) -> str:
    """A setting as an override on the command line: "KEY value", or "key=value" for a LazyConfig."""
    return f"{key(name)}={value}" if _is_lazy and name in LAZY else f"{name} {value}"
