"""Images that cannot be read: errors name them, and where training replaces them they are counted."""

import logging
from typing import Any, Callable, Dict, List, Optional, Sequence

from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..errors import D2kdError
from .images import check_image, image_fault, reads_as_detectron2

#: Key of a sample: what is wrong with each image that it replaces, by file name. Key of the metrics: their number.
BAD_IMAGES = "bad_images"


class EvaluationMapper:
    """A mapper for evaluation, which skips no image: its error names an image that cannot be read.

    Args:
        mapper: converts a dataset dict to a sample.
    """

    def __init__(self, mapper: Callable[[Any], Any]) -> None:
        self.mapper = mapper

    def __call__(self, entry: Any) -> Any:
        try:
            if reads_as_detectron2(self.mapper):
                check_image(entry)
            return self.mapper(entry)
        except Exception as error:
            fault = image_fault(entry, error)
            if not fault:
                raise
            raise D2kdError(f"{fault}; fix the file or its entry, since the results depend on all images") from error


class BadImages(HookBase):
    """Logs each replaced image once, and writes their number so far to the metrics.

    It sees the batches of all processes, and its state is saved in every checkpoint of the run.
    """

    def __init__(self) -> None:
        self.faults: Dict[str, str] = {}
        self._new: Dict[str, str] = {}
        self._handle: Optional[RemovableHandle] = None

    def before_train(self) -> None:
        self._handle = self.trainer.model.register_forward_pre_hook(self._look)

    def after_train(self) -> None:
        if self._handle is not None:
            self._handle.remove()

    def after_step(self) -> None:
        for new in comm.all_gather(self._new):
            self._add(new)
        self._new = {}
        self.trainer.storage.put_scalar(BAD_IMAGES, len(self.faults), smoothing_hint=False)

    def state_dict(self) -> Dict[str, Any]:
        return {"faults": self.faults}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        self.faults = dict(state_dict["faults"])

    def _look(self, _: nn.Module, inputs: Sequence[List[Any]]) -> None:
        for sample in inputs[0]:
            self._new.update(sample.get(BAD_IMAGES, {}))

    def _add(self, faults: Dict[str, str]) -> None:
        for path, fault in faults.items():
            if path not in self.faults and comm.is_main_process():
                logging.getLogger(__name__).warning("Replaced an image by another one: %s", fault)
            self.faults[path] = fault
