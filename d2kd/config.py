"""d2kd's config nodes, and loading of YAML configs with errors that name the key and the mend."""

import os
import re
from pathlib import Path
from typing import Iterator, Optional, Sequence, Tuple, Union

import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from omegaconf import DictConfig

from .errors import D2kdError, nearest
from .methods import Schedule, method_defaults, method_names
from .modeling import add_detector_config

# Set to 1, it lets configs use YAML tags that run code, as those of detectron2's model zoo do.
ALLOW_UNSAFE_YAML = "D2KD_ALLOW_UNSAFE_YAML"
PREFLIGHT_IMAGES = 16
AMP_DTYPE = "float16"


def add_distill_config(cfg: CfgNode) -> None:
    """Adds d2kd's keys to a detectron2 config, in place."""
    distill = CfgNode()
    # CONFIG_FILE: a path, relative to the config that names it, or a name of detectron2's model zoo.
    # OPTS: overrides of the teacher's config, ["KEY", "value", ...].
    distill.TEACHER = CfgNode({"CONFIG_FILE": "", "WEIGHTS": "", "OPTS": []})
    distill.METHODS = ()
    # On how many training images the teacher is checked before the first iteration; 0 for none.
    # LazyConfig: train.preflight.
    distill.PREFLIGHT = PREFLIGHT_IMAGES
    # For the next five, see DistillMetaArch and Schedule.
    distill.GRADIENT_PERIOD = 0
    distill.FEATURES = ()
    distill.CLASS_MAP = ()
    distill.INHERIT = ()
    distill.SCHEDULE = CfgNode(
        {name.upper(): CfgNode({key.upper(): 0 for key in Schedule._fields}) for name in method_names()}
    )
    # See DistillMetaArch: loss normalisers that do not depend on the number of workers.
    distill.SYNC_NORMALIZER = False
    for name in method_names():
        distill[name.upper()] = CfgNode({key.upper(): value for key, value in method_defaults(name).items()})
    cfg.MODEL.DISTILL = distill

    # For the backbone "build_extra_fpn_backbone": ResNets of any width (STEM_OUT_CHANNELS) and number of blocks
    # (BLOCKS, empty: by DEPTH), and the choice of what follows the FPN.
    cfg.MODEL.RESNETS.BLOCKS = ()
    cfg.MODEL.FPN.EXTRA = CfgNode({"IN_FEATURE": "p5", "NUM_LEVELS": 2, "RELU": False})

    add_detector_config(cfg)
    cfg.SOLVER.OPTIMIZER = "SGD"  # or AdamW
    # Decay of an exponential moving average of the weights, evaluated beside them and saved as model_ema_final.pth;
    # 0 for none. LazyConfig: train.ema_decay.
    cfg.SOLVER.EMA_DECAY = 0.0
    # Whether training replaces images that cannot be read by others. LazyConfig: train.skip_bad_images.
    cfg.DATALOADER.SKIP_BAD_IMAGES = False
    # Of SOLVER.AMP.ENABLED: float16 or bfloat16; always bfloat16 on the CPU. LazyConfig: train.amp.dtype.
    cfg.SOLVER.AMP.DTYPE = AMP_DTYPE


def drop_teacher(cfg: Union[CfgNode, DictConfig]) -> None:
    """Makes a config of either style neither build nor need a teacher, as for evaluation, in place."""
    if isinstance(cfg, CfgNode):
        cfg.MODEL.DISTILL.METHODS = cfg.MODEL.DISTILL.INHERIT = ()
    elif "teacher" in cfg.model:
        cfg.model.methods, cfg.model.teacher, cfg.model.inherit = [], None, []


def find_config(name: str, relative_to: Optional[str] = None) -> str:
    """Finds a config file.

    Args:
        name: a path, or a name of detectron2's model zoo such as ``COCO-Detection/retinanet_R_50_FPN_1x.yaml``.
        relative_to: the config that names it; its folder is looked in first.

    Returns:
        The file's path.

    Raises:
        D2kdError: it is nowhere.
    """
    if not name:
        raise D2kdError("no config file is named: set MODEL.DISTILL.TEACHER.CONFIG_FILE, or --config-file for a run")
    places = [Path(relative_to).parent / name] if relative_to else []
    for path in [*places, Path(name)]:
        if path.is_file():
            return str(path.absolute())
    try:
        return model_zoo.get_config_file(name)
    except RuntimeError:
        pass
    folder = (places or [Path(name)])[0].parent
    siblings = [p.name for p in folder.iterdir() if p.suffix in (".yaml", ".py")] if folder.is_dir() else []
    raise D2kdError(
        f"config {name} is no file in {folder.absolute()} or {os.getcwd()} and no model of detectron2's zoo"
        f"{nearest(Path(name).name, siblings)}"
    )


def load_config(config_file: str, opts: Sequence[str] = ()) -> CfgNode:
    """Loads a YAML config with detectron2's and d2kd's keys.

    Args:
        config_file: see :func:`find_config`.
        opts: overrides, ``["KEY", "value", ...]``.

    Returns:
        The config, not frozen; a teacher's CONFIG_FILE that it names relative to itself has become absolute.

    Raises:
        D2kdError: a file is missing, no YAML, or would run code (see ``ALLOW_UNSAFE_YAML``); a key is unknown (names
            the nearest) or a value of the wrong type.
    """
    path = find_config(config_file)
    cfg = get_cfg()
    add_distill_config(cfg)
    try:
        cfg.merge_from_file(path, allow_unsafe=_may_run_code(path))
    except (KeyError, ValueError, AssertionError, AttributeError, OSError, yaml.YAMLError) as error:
        raise D2kdError(f"{config_file}: {_explain(error, cfg)}") from error
    options = [opt for opt in map(str, opts) if opt.startswith("--")]
    if options:
        raise D2kdError(f"{' '.join(options)} must stand before the overrides KEY VALUE of the config")
    if len(opts) % 2:
        raise D2kdError(f"overrides come in pairs KEY VALUE, but there are {len(opts)}: {' '.join(map(str, opts))}")
    try:
        cfg.merge_from_list(list(opts))
    except (KeyError, ValueError, AssertionError, AttributeError) as error:
        raise D2kdError(f"override: {_explain(error, cfg)}") from error
    teacher = cfg.MODEL.DISTILL.TEACHER
    if teacher.CONFIG_FILE:
        teacher.CONFIG_FILE = find_config(teacher.CONFIG_FILE, relative_to=path)
    _check_methods(cfg)
    return cfg


def rates_and_batches(config_file: str, opts: Sequence[str] = ()) -> Iterator[Tuple[float, int]]:
    """Yields SOLVER.BASE_LR and IMS_PER_BATCH as each config of a ``_BASE_`` chain leaves them, and with ``opts``."""
    path = Path(find_config(config_file))
    base = re.search(r"^_BASE_:\s*[\"']?([^\"'\s]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    if base and (path.parent / base.group(1)).is_file():
        yield from rates_and_batches(str(path.parent / base.group(1)))
    for overrides in ([], opts):
        solver = load_config(str(path), overrides).SOLVER
        yield solver.BASE_LR, solver.IMS_PER_BATCH


def _may_run_code(path: str) -> bool:
    """Whether a config may use YAML tags that run code: if the user says so, or detectron2 itself brought it."""
    # Links are not followed: a link to the zoo's file would find its _BASE_ beside the link.
    zoo = Path(model_zoo.__file__).absolute().parent / "configs"
    return os.environ.get(ALLOW_UNSAFE_YAML) == "1" or zoo in Path(os.path.abspath(path)).parents


def detector_node(cfg: CfgNode) -> Optional[str]:
    """Name of the node under MODEL that configures the detector: RETINANET, GFL, ...; None for one unknown here."""
    name = str(cfg.MODEL.META_ARCHITECTURE).removeprefix("Distill").upper()
    return name if "NUM_CLASSES" in cfg.MODEL.get(name, {}) else None


def _check_methods(cfg: CfgNode) -> None:
    for name in cfg.MODEL.DISTILL.METHODS:
        if name not in method_names():
            known = method_names()
            raise D2kdError(
                f"MODEL.DISTILL.METHODS names {name!r}, which is none of {', '.join(known)}{nearest(name, known)}"
            )


def _explain(error: Exception, cfg: CfgNode) -> str:
    """One sentence for what merging said, with the nearest key where one is unknown."""
    text = " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split())
    unknown = re.match(r"Non-existent (?:config )?key: (\S+)", text)
    if unknown:
        key = unknown.group(1)
        return f"there is no config key {key}{nearest(key, _keys(cfg))}"
    mismatch = re.match(r"Type mismatch \(.*\) with values \((.*) vs\. (.*)\) for config key: (\S+)", text)
    if mismatch:
        return "{2} is {1}; it must be of the type of its default, {0}".format(*mismatch.groups())
    if "could not determine a constructor" in text:
        return f"{text}; write the value itself, or set {ALLOW_UNSAFE_YAML}=1 to let configs that you trust run code"
    return text


def _keys(cfg: CfgNode, prefix: str = "") -> Iterator[str]:
    for key, value in cfg.items():
        yield prefix + key
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{prefix}{key}.")
