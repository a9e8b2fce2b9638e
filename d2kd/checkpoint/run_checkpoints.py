"""Checkpoints of a run: written atomically, and skipped on resume if they are damaged."""

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
    """Returns the paths of a run's checkpoints: the one in ``last_checkpoint`` first, then by time, newest first."""
    if not os.path.isdir(folder):
        return []
    found = [path for path in Path(folder).iterdir() if _NAME.fullmatch(path.name)]
    pointer = Path(folder, "last_checkpoint")
    named = pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.is_file() else ""
    return [str(path) for path in sorted(found, key=lambda p: (p.name == named, p.lstat().st_mtime_ns), reverse=True)]


@contextmanager
def report_write_errors(path: str) -> Iterator[None]:
    """Converts an OSError while writing ``path`` to a D2kdError. Existing files are not changed."""
    try:
        yield
    except OSError as error:
        raise D2kdError(
            f"{path} could not be written ({error.strerror}); free some space or fix the folder, then --resume "
            "continues from its last checkpoint"
        ) from error


# The base class loads MODEL.WEIGHTS. On resume, StrictCheckpointer loads the checkpoint.
class RunCheckpointer(SafeCheckpointer):
    """Saves atomically, ``last_checkpoint`` last. Resumes from the newest checkpoint that can be read."""

    def save(self, name: str, **kwargs: Any) -> None:
        """Saves a checkpoint, see the base class.

        Raises:
            D2kdError: the disk is full, or the folder cannot be written to.
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
        """Writes the file ``last_checkpoint``, see the base class."""
        files.write_text(os.path.join(self.save_dir, "last_checkpoint"), last_filename_basename)

    def has_checkpoint(self) -> bool:
        """Returns whether there is anything to resume from; ``last_checkpoint`` is not required."""
        return bool(checkpoints_in(self.save_dir))

    def newest_readable(self) -> str:
        """Returns the path of the newest readable checkpoint as rank 0 sees it, or "" if there are no checkpoints.

        Raises:
            D2kdError: there are checkpoints, but none can be read.
        """
        found = _newest_readable(self.save_dir) if comm.is_main_process() else ""
        newest = comm.all_gather(found)[0]
        if not newest and self.has_checkpoint():
            raise D2kdError(f"none of the checkpoints in {self.save_dir} can be read; move them away to start over")
        return newest

    def resume_or_load(self, path: str, *, resume: bool = True) -> Dict[str, Any]:
        """Resumes from the newest readable checkpoint if ``resume`` and there is one; else loads weights from a path.

        Raises:
            D2kdError: none of the checkpoints can be read, or it does not fit the model.
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
            reason = f"{path} only has weights"
        except D2kdError as error:
            reason = str(error)
        logging.getLogger(__name__).warning("Trying the previous checkpoint: %s", reason)
    return ""
