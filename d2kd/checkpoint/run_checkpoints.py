"""Checkpoints of a run: never half written, and a damaged one does not end it."""

import logging
import os
import re
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List

from detectron2.utils import comm

from ..errors import D2kdError
from . import SafeCheckpointer, StrictCheckpointer, files

_NAME = re.compile(r"model_(\d+|final)\.pth")


def checkpoints_in(folder: str) -> List[str]:
    """Paths of a run's checkpoints, the newest first: what ``last_checkpoint`` names, then by time of writing."""
    if not os.path.isdir(folder):
        return []
    found = [path for path in Path(folder).iterdir() if _NAME.fullmatch(path.name)]
    pointer = Path(folder, "last_checkpoint")
    named = pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.is_file() else ""
    return [str(path) for path in sorted(found, key=lambda p: (p.name == named, p.stat().st_mtime_ns), reverse=True)]


@contextmanager
def report_write_errors(path: str) -> Iterator[None]:
    """Turns an OSError while ``path`` is written into a D2kdError; files that are there already stay as they are."""
    try:
        yield
    except OSError as error:
        raise D2kdError(
            f"{path} could not be written ({error.strerror}); make room or mend the folder, then --resume goes on from "
            "the last checkpoint there"
        ) from error


# The parent reads MODEL.WEIGHTS; what it resumes from is read by StrictCheckpointer.
class RunCheckpointer(SafeCheckpointer):
    """Saves atomically, the pointer ``last_checkpoint`` last; resumes from the newest checkpoint that can be read."""

    def save(self, name: str, **kwargs: Any) -> None:
        """See the parent.

        Raises:
            D2kdError: the disk is full, or the folder cannot be written.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        parts = {key: part.state_dict() for key, part in self.checkpointables.items()}
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        with report_write_errors(path):
            files.write(path, {"model": self.model.state_dict(), **parts, **kwargs})
            self.tag_last_checkpoint(os.path.basename(path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """See the parent."""
        files.write_text(os.path.join(self.save_dir, "last_checkpoint"), last_filename_basename)

    def has_checkpoint(self) -> bool:
        """Whether there is anything to resume from; ``last_checkpoint`` need not be there."""
        return bool(checkpoints_in(self.save_dir))

    def newest_readable(self) -> str:
        """Path of the newest whole checkpoint of the run, as rank 0 finds it; "" if there are none at all.

        Raises:
            D2kdError: there are checkpoints, but none can be read.
        """
        found = _newest_readable(self.save_dir) if comm.is_main_process() else ""
        newest = comm.all_gather(found)[0]
        if not newest and self.has_checkpoint():
            raise D2kdError(f"none of the checkpoints in {self.save_dir} can be read; move them away to start anew")
        return newest

    def resume_or_load(self, path: str, *, resume: bool = True) -> Dict[str, Any]:
        """Resumes from the newest readable checkpoint if there is one and ``resume``; else loads weights from a path.

        Raises:
            D2kdError: no checkpoint can be read, or it does not fit the model.
        """
        newest = self.newest_readable() if resume else ""
        if not newest:
            return self.load(path, checkpointables=[])
        strict = StrictCheckpointer(self.model, self.save_dir, save_to_disk=False, **self.checkpointables)
        return strict.load(newest)


def _newest_readable(folder: str) -> str:
    for path in checkpoints_in(folder):
        try:
            if "trainer" in files.read(path):
                return path
            reason = f"{path} holds weights only"
        except D2kdError as error:
            reason = str(error)
        logging.getLogger(__name__).warning("Trying the checkpoint before: %s", reason)
    return ""
