"""Tiny detectors and batches for tests."""

from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from d2kd.config import load_config

CONFIGS = Path(__file__).parent.parent / "configs"


def small_config(*opts: Any) -> CfgNode:
    """The plain quick config on the CPU."""
    return load_config(str(CONFIGS / "quick_retinanet.yaml"), [str(x) for x in opts])


def save_teacher(path: Path, *opts: Any, seed: int = 0) -> Path:
    """Writes random weights of the quick config with some overrides, as a teacher's checkpoint."""
    torch.manual_seed(seed)
    model = build_model(small_config(*opts))
    with torch.no_grad():  # away from the prior, so that scores differ from anchor to anchor
        model.head.cls_score.weight.normal_(std=0.3)
        model.head.bbox_pred.weight.normal_(std=0.1)
    torch.save({"model": model.state_dict()}, path)
    return path


def distill_config(
    teacher: Path, *opts: Any, methods: Sequence[str] = ("CrossKD",), teacher_opts: Sequence[str] = ()
) -> CfgNode:
    """The quick CrossKD config with a given teacher file."""
    return load_config(
        str(CONFIGS / "quick_crosskd_retinanet.yaml"),
        ["MODEL.DISTILL.TEACHER.WEIGHTS", str(teacher), "MODEL.DISTILL.METHODS", repr(tuple(methods))]
        + ["MODEL.DISTILL.TEACHER.OPTS", repr(list(teacher_opts))]
        + [str(x) for x in opts],
    )


def build(cfg: CfgNode, seed: int = 1) -> nn.Module:
    """A model in training mode with the same random weights for the same seed."""
    torch.manual_seed(seed)
    return build_model(cfg).train()


def batch(
    sizes: Sequence[Tuple[int, int]] = ((96, 128), (80, 112)), boxes: Optional[Sequence[int]] = None
) -> List[Dict]:
    """Random images with ground truth.

    Args:
        sizes: height and width of each image.
        boxes: number of boxes of each image; 2 each by default.
    """
    generator = torch.Generator().manual_seed(7)
    out = []
    for i, (height, width) in enumerate(sizes):
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        count = 2 if boxes is None else boxes[i]
        corner = torch.rand(count, 2, generator=generator) * torch.tensor([width / 2, height / 2])
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.cat([corner, corner + 24.0], dim=1))
        instances.gt_classes = torch.arange(count) % 3
        out.append({"image": image, "instances": instances, "height": height, "width": width})
    return out


def step(model: nn.Module, inputs: List[Dict]) -> Dict[str, Tensor]:
    """One forward in training mode."""
    with EventStorage():
        return model(inputs)


def gradients(model: nn.Module, losses: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Gradients of the sum of losses by parameter name."""
    model.zero_grad()
    sum(losses.values()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
