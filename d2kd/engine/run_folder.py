"""The folder of a run. It records config, teacher and data, so that no run overwrites or mixes with another."""

import json
import logging
import os
import shlex
import sys
import tempfile
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, ContextManager, Dict, List, Optional

from ..checkpoint import files
from ..checkpoint.names import some
from ..checkpoint.run_checkpoints import checkpoints_in, report_write_errors
from ..data.own import OwnData
from ..errors import D2kdError
from .lock import locked
from .recipe import Recipe
from .sources import SOURCE_FILES, Sources, changes
from .student_file import STUDENT_FILE, write_student

ALLOW = "--allow-config-change"
CONFIG_FILE = "run.json"
_MISSING = "(absent)"


class RunFolder:
    """The folder of a run, and what the command at hand wants to run in it.

    Args:
        recipe: of the run.
        data: own data that the command line names, if it does.
    """

    def __init__(self, recipe: Recipe, data: Optional[OwnData] = None) -> None:
        self.recipe = recipe
        self.values = {**recipe.values, **(data.identity() if data else {})}
        self.path = recipe.options.output_dir
        self.path_key = recipe.key("OUTPUT_DIR")

    def make(self) -> None:
        """Creates the folder.

        Raises:
            D2kdError: files cannot be written there.
        """
        try:
            os.makedirs(self.path, exist_ok=True)
            tempfile.TemporaryFile(dir=self.path).close()
        except OSError as error:
            raise D2kdError(
                f"the folder {self.path} cannot be written to ({error.strerror}); set {self.path_key} to another one"
            ) from error

    def lock(self) -> ContextManager[None]:
        """Keeps other runs out of the folder; see :func:`locked`."""
        return locked(self.path, f"wait for its end, or set {self.path_key} to another folder")

    def check(self, resume: bool, allow_change: bool, sources: Sources) -> None:
        """Checks that the run does not overwrite or mix with another one. A folder without checkpoints is free.

        Args:
            resume: whether the run continues from the checkpoints there.
            allow_change: whether config, teacher and data may have changed.
            sources: what the run learns from.

        Raises:
            D2kdError: there are checkpoints and ``resume`` is not set, or they belong to another config, teacher or
                data.
        """
        if not checkpoints_in(self.path):
            return
        if not resume:
            raise D2kdError(
                f"{self.path} holds checkpoints of a run: continue it with --resume, set {self.path_key} to another "
                "folder, or delete them"
            )
        if allow_change:
            return
        self._check_config()
        self._check_sources(sources)

    def saved_seed(self) -> int:
        """Seed of the run in the folder; -1 if unknown."""
        seed = _read_json(self._config_file).get(self.recipe.key("SEED"))
        return seed if type(seed) is int else -1

    def record(self, sources: Sources) -> None:
        """Writes run.json (the config), teacher.json, data.json and student.yaml, and adds the command to commands.txt.

        It also removes partial files of a killed process.

        Args:
            sources: what the run learns from.

        Raises:
            D2kdError: the folder cannot be written.
        """
        for partial in Path(self.path).glob(f"*{files.PARTIAL}"):
            partial.unlink()
        for name, value in {CONFIG_FILE: self.values, **sources}.items():
            path = os.path.join(self.path, name)
            with report_write_errors(path):
                files.write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")
        with report_write_errors(os.path.join(self.path, STUDENT_FILE)):
            write_student(self.recipe.config, self.path)
        commands = os.path.join(self.path, "commands.txt")
        with report_write_errors(commands), open(commands, "a", encoding="utf-8") as file:
            command = f"cd {shlex.quote(os.getcwd())} && {shlex.join(['python', *sys.argv])}"
            file.write(f"{command}  # {time.strftime('%Y-%m-%d %H:%M:%S')}\n")

    @property
    def _config_file(self) -> str:
        return os.path.join(self.path, CONFIG_FILE)

    def _check_config(self) -> None:
        saved = _read_json(self._config_file)
        if not saved:
            logging.getLogger(__name__).warning(
                "%s is missing or damaged, so the config is not compared", self._config_file
            )
            return
        changes = [
            f"{key} was {saved.get(key, _MISSING)} and is {self.values.get(key, _MISSING)}"
            for key in self._different_keys(saved)
        ]
        if changes:
            raise D2kdError(
                f"{self.path} holds a run of another config: {some(changes)}; set {self.path_key} to another folder, "
                f"or accept the new values with {ALLOW}"
            )

    def _different_keys(self, saved: Dict[str, Any]) -> List[str]:
        present = self.values
        # Every YAML config has all keys, except those of other versions of the code.
        keys = saved.keys() | present.keys() if self.recipe.is_lazy else saved.keys() & present.keys()
        free = [*self.recipe.may_change, *([self.recipe.key("SEED")] if self.recipe.options.seed < 0 else [])]
        return sorted(
            key
            for key in keys
            if saved.get(key, _MISSING) != present.get(key, _MISSING)
            and not any(fnmatch(key, pattern) for pattern in free)
        )

    def _check_sources(self, present: Sources) -> None:
        saved = {name: _read_json(os.path.join(self.path, name)) for name in SOURCE_FILES}
        for change in changes(saved, present):
            raise D2kdError(f"{change}: put it back, or accept what is there now with {ALLOW}")


def _read_json(path: str) -> Dict[str, Any]:
    """Returns the content of a file, empty if the file is missing or damaged."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
