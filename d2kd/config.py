"""d2kd's config nodes, and loading of YAML configs with errors that name the key and the fix."""

import logging
import os
import re
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any, Iterator, Optional, Sequence, Tuple

import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode, LazyConfig, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY
from omegaconf import DictConfig, OmegaConf

from .contract import check_distills
from .errors import D2kdError, nearest
from .methods import Schedule, check_method_names, method_defaults, method_names
from .modeling import add_detector_config
from .modeling.timm_models import take_over_pixels
from .yaml_files import check_yaml

# Set to 1, it lets configs use YAML tags that run code, as some of detectron2's model zoo do.
ALLOW_UNSAFE_YAML = "D2KD_ALLOW_UNSAFE_YAML"
PREFLIGHT_IMAGES = 16
AMP_DTYPE = "float16"
# The default of these is None.
MAY_BE_NONE = ("SOLVER.WEIGHT_DECAY_BIAS", "MODEL.TIMM.PRETRAINED")
# d2kd's own configs; there only where it runs from its repository.
OWN_CONFIGS = Path(__file__).absolute().parents[1] / "configs"


def add_distill_config(cfg: CfgNode) -> None:
    """Adds d2kd's keys to a detectron2 config, in place. Keys that are there already keep their values."""
    _add_missing(cfg, _new_keys())


def _new_keys() -> CfgNode:
    """d2kd's keys with their defaults."""
    new = CfgNode({"MODEL": {"DISTILL": _distill_keys()}, "SOLVER": {"AMP": {}}, "DATALOADER": {}})
    # For the backbone "build_extra_fpn_backbone": ResNets of any width (STEM_OUT_CHANNELS) and number of blocks
    # (BLOCKS, empty: by DEPTH), and the levels above the FPN.
    new.MODEL.RESNETS = CfgNode({"BLOCKS": ()})
    new.MODEL.FPN = CfgNode({"EXTRA": {"IN_FEATURE": "p5", "NUM_LEVELS": 2, "RELU": False}})
    add_detector_config(new)
    new.SOLVER.OPTIMIZER = "SGD"  # or AdamW
    # Decay of an exponential moving average of the weights, which is evaluated too and saved as model_ema_final.pth;
    # 0 for none. LazyConfig: train.ema_decay.
    new.SOLVER.EMA_DECAY = 0.0
    # Micro-batches of each process, whose gradients are accumulated before the optimizer's step: k of them are as good
    # as k processes. IMS_PER_BATCH stays the number of images of a step. LazyConfig: train.accumulate.
    new.SOLVER.ACCUMULATE = 1
    # Whether training replaces images that cannot be read by others. LazyConfig: train.skip_bad_images.
    new.DATALOADER.SKIP_BAD_IMAGES = False
    # With SOLVER.AMP.ENABLED: float16 or bfloat16; always bfloat16 on the CPU. LazyConfig: train.amp.dtype.
    new.SOLVER.AMP.DTYPE = AMP_DTYPE
    return new


def _distill_keys() -> CfgNode:
    distill = CfgNode()
    # CONFIG_FILE: a path, relative to the config that names it, or a name of detectron2's model zoo.
    # OPTS: overrides of the teacher's config, ["KEY", "value", ...].
    # DTYPE: float32, bfloat16, float16, or auto, which follows SOLVER.AMP. FOLD_NORMS: see Engine.
    # SCALE: how large the teacher sees the images, relative to the student; see load_teacher.
    distill.TEACHER = CfgNode(
        {"CONFIG_FILE": "", "WEIGHTS": "", "OPTS": [], "DTYPE": "float32", "FOLD_NORMS": False, "SCALE": 1.0}
    )
    distill.METHODS = ()
    # Number of training images on which the teacher is checked before the first iteration; 0 for none.
    # LazyConfig: train.preflight.
    distill.PREFLIGHT = PREFLIGHT_IMAGES
    # For the next six, see DistillMetaArch and Schedule.
    distill.GRADIENT_PERIOD = 0
    distill.LEVELS = ()
    distill.FEATURES = ()
    distill.CLASS_MAP = ()
    distill.INHERIT = ()
    distill.SCHEDULE = CfgNode(
        {name.upper(): CfgNode({key.upper(): 0 for key in Schedule._fields}) for name in method_names()}
    )
    # See DistillMetaArch: loss normalizers that do not depend on the number of workers.
    distill.SYNC_NORMALIZER = False
    # See DistillMetaArch: less time and memory for the losses of RetinaNet.
    distill.FAST_LOSSES = False
    # See DistillMetaArch: less memory for more time.
    distill.RECOMPUTE = False
    for name in method_names():
        distill[name.upper()] = CfgNode({key.upper(): value for key, value in method_defaults(name).items()})
    return distill


def _add_missing(cfg: CfgNode, new: CfgNode) -> None:
    for key, value in new.items():
        if key not in cfg:
            cfg[key] = value
        elif isinstance(value, CfgNode):
            _add_missing(cfg[key], value)


def drop_teacher(cfg: Any) -> None:
    """Makes a config that neither builds nor needs a teacher, in place: for evaluation, or for a teacher's own config.

    Neither needs pretrained weights of a timm backbone, since all weights come from a checkpoint.

    Args:
        cfg: a config node with d2kd's keys, or a LazyConfig with a ``model``.
    """
    if isinstance(cfg, CfgNode):
        cfg.MODEL.DISTILL.METHODS = cfg.MODEL.DISTILL.INHERIT = ()
        cfg.MODEL.TIMM.PRETRAINED = None
        return
    node: Any = cfg.model
    for name in ("backbone", "bottom_up"):
        node = OmegaConf.select(node, name, throw_on_resolution_failure=False) if isinstance(node, DictConfig) else None
    if isinstance(node, DictConfig) and "pretrained" in node:
        node.pretrained = False
    for key, nothing in (("methods", []), ("teacher", None), ("inherit", [])):
        if key in cfg.model:
            cfg.model[key] = nothing


def find_config(name: str, relative_to: Optional[str] = None) -> str:
    """Finds a config file.

    Args:
        name: a path, or a name of detectron2's model zoo such as ``COCO-Detection/retinanet_R_50_FPN_1x.yaml``.
        relative_to: the config that names it; its folder comes first. If it is not known, d2kd's own configs are
            searched as well.

    Returns:
        The path of the file.

    Raises:
        D2kdError: there is no such file.
    """
    if not name:
        raise D2kdError("no config file is named: set MODEL.DISTILL.TEACHER.CONFIG_FILE, or --config-file for a run")
    places = [Path(relative_to).parent / name] if relative_to else []
    for path in [*places, Path(name)]:
        if path.is_file():
            return str(path.absolute())
    if not relative_to and (OWN_CONFIGS / name).is_file():
        logging.getLogger(__name__).warning("There is no %s here: taking %s.", name, OWN_CONFIGS / name)
        return str(OWN_CONFIGS / name)
    try:
        return model_zoo.get_config_file(name)
    except RuntimeError:
        pass
    folder = (places or [Path(name)])[0].parent
    siblings = [p.name for p in folder.iterdir() if p.suffix in (".yaml", ".py")] if folder.is_dir() else []
    advice = "" if relative_to else "; give the whole path, or read the config with d2kd.load_config, which resolves it"
    raise D2kdError(
        f"config {name} is no file in {folder.absolute()} or {os.getcwd()} and no model of detectron2's zoo"
        f"{nearest(Path(name).name, siblings) or advice}"
    )


def load_config(config_file: str, opts: Sequence[str] = (), with_teacher: bool = True) -> CfgNode:
    """Loads a YAML config with detectron2's and d2kd's keys.

    Args:
        config_file: see :func:`find_config`.
        opts: overrides, ``["KEY", "value", ...]``.
        with_teacher: whether the model may distill; False drops the teacher as :func:`drop_teacher` does.

    Returns:
        The config, not frozen. TEACHER.CONFIG_FILE, which may be relative to the config's file, is absolute.

    Raises:
        D2kdError: a file is missing, is not YAML, or would run code (see ``ALLOW_UNSAFE_YAML``); a key is unknown
            (suggests the nearest), a value has the wrong type, or methods are set for a detector that cannot distill.
    """
    path = find_config(config_file)
    cfg = get_cfg()
    add_distill_config(cfg)
    with _merging(config_file, cfg):
        check_yaml(path)
        cfg.merge_from_file(path, allow_unsafe=_may_run_code(path))
    options = [opt for opt in map(str, opts) if opt.startswith("--")]
    if options:
        raise D2kdError(f"{' '.join(options)} must come before the overrides KEY VALUE of the config")
    if len(opts) % 2:
        raise D2kdError(f"overrides come in pairs KEY VALUE, but there are {len(opts)}: {' '.join(map(str, opts))}")
    if "MODEL.TIMM.PRETRAINED" in opts:
        cfg.MODEL.TIMM.PRETRAINED = None  # so that it may change between True and a path
    with _merging("override", cfg):
        cfg.merge_from_list(list(opts))
    empty = [key for key in _keys(cfg) if key not in MAY_BE_NONE and _value(cfg, key) is None]
    if empty:  # yacs takes None for any type
        names = ", ".join(empty)
        raise D2kdError(f"{names}: a value is missing; write one, or leave the key out for its default")
    check_method_names(cfg.MODEL.DISTILL.METHODS)
    take_over_pixels(cfg)
    if not with_teacher:
        drop_teacher(cfg)
        return cfg
    if cfg.MODEL.META_ARCHITECTURE in META_ARCH_REGISTRY:
        check_distills(META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE), cfg.MODEL.DISTILL)
    teacher = cfg.MODEL.DISTILL.TEACHER
    if teacher.CONFIG_FILE:
        teacher.CONFIG_FILE = find_config(teacher.CONFIG_FILE, relative_to=path)
    return cfg


def read_lazy(path: str) -> DictConfig:
    """Runs the file of a LazyConfig.

    Raises:
        D2kdError: the file's own code raises an exception.
    """
    try:
        return LazyConfig.load(path)
    except SyntaxError as error:  # detectron2's own, which names the file, from Python's
        cause = error.__cause__ if isinstance(error.__cause__, SyntaxError) else error
        raise D2kdError(f"{error.msg.rstrip('!')}: line {cause.lineno}, {cause.msg}") from error
    except Exception as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        where = trace.tb_frame.f_code.co_filename if trace is not None else ""
        if trace is None or Path(path).parent not in Path(where).parents:
            raise
        raise D2kdError(f"{where}, line {trace.tb_lineno}: {type(error).__name__}: {error}") from error


def rates_and_batches(config_file: str, opts: Sequence[str] = ()) -> Iterator[Tuple[float, int]]:
    """Yields SOLVER.BASE_LR and IMS_PER_BATCH after each config of a ``_BASE_`` chain, and with ``opts``."""
    path = Path(find_config(config_file))
    base = re.search(r"^_BASE_:\s*[\"']?([^\"'\s]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    if base and (path.parent / base.group(1)).is_file():
        yield from rates_and_batches(str(path.parent / base.group(1)))
    for overrides in ([], opts):
        solver = load_config(str(path), overrides, with_teacher=False).SOLVER
        yield solver.BASE_LR, solver.IMS_PER_BATCH


def _may_run_code(path: str) -> bool:
    """Whether a config may use YAML tags that run code: if the user allows it, or it comes with detectron2."""
    # Do not resolve links: detectron2 looks for the _BASE_ of a linked file next to the link.
    zoo = Path(model_zoo.__file__).absolute().parent / "configs"
    return os.environ.get(ALLOW_UNSAFE_YAML) == "1" or zoo in Path(os.path.abspath(path)).parents


def detector_node(cfg: CfgNode) -> Optional[str]:
    """Name of the node under MODEL that configures the detector: RETINANET, GFL, ...; None if it is not known."""
    name = str(cfg.MODEL.META_ARCHITECTURE).removeprefix("Distill").upper()
    return name if "NUM_CLASSES" in cfg.MODEL.get(name, {}) else None


@contextmanager
def _merging(what: str, cfg: CfgNode) -> Iterator[None]:
    """Turns what yacs and detectron2 raise for a file or overrides that they cannot merge into a D2kdError."""
    try:
        yield
    except D2kdError:
        raise
    except (KeyError, ValueError, AssertionError, OSError, yaml.YAMLError) as error:
        raise D2kdError(f"{what}: {_explain(error, cfg)}") from error
    except (AttributeError, TypeError, RecursionError) as error:  # they take the outline for granted
        raise D2kdError(
            f"{what}: a config has nodes such as MODEL with keys in them, a number as VERSION, and as _BASE_ the name "
            "of another config that does not build on it; check the outline"
        ) from error


def _explain(error: Exception, cfg: CfgNode) -> str:
    """Turns an error of merging into one sentence, with the nearest key if one is unknown."""
    text = " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split())
    unknown = re.match(r"Non-existent (?:config )?key: (\S+)", text)
    if unknown:
        key = unknown.group(1)
        return f"there is no config key {key}{nearest(key, _keys(cfg))}"
    mismatch = re.match(r"Type mismatch \(.*\) with values \((.*) vs\. (.*)\) for config key: (\S+)", text)
    if mismatch:
        default, value, key = mismatch.groups()
        if isinstance(_value(cfg, key), CfgNode):
            return f"{key} is {value}; it must be a node with keys in it"
        return f"{key} is {value}; it must be of the type of its default, {default}"
    if "could not determine a constructor" in text:
        return f"{text}; write the value itself, or set {ALLOW_UNSAFE_YAML}=1 to let configs that you trust run code"
    return text


def _value(cfg: CfgNode, key: str) -> Any:
    """Value of a dotted key."""
    return reduce(lambda node, name: node[name], key.split("."), cfg)


def _keys(cfg: CfgNode, prefix: str = "") -> Iterator[str]:
    for key, value in cfg.items():
        yield prefix + key
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{prefix}{key}.")
