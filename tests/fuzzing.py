"""Runs train_net.py with broken input in this process, and sorts how it ends: a run, a mistake, or a bug."""

import contextlib
import io
import os
import random
import re
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Sequence

import pytest
import yaml

from d2kd.engine import main

#: Seed and number of examples of each fuzz test; the terminal summary prints the seed.
SEED = int(os.environ.get("D2KD_FUZZ_SEED") or random.SystemRandom().randrange(10**6))
EXAMPLES = int(os.environ.get("D2KD_FUZZ_EXAMPLES") or 40)
TIMEOUT = 60  # seconds of computing in one example
# Names of exceptions that Python and torch raise; a message with one of them was not written for users.
CLASS_NAME = re.compile(r"\b(Key|Assertion|Type|Index|Attribute|Runtime|ZeroDivision|Overflow|UnboundLocal)Error\b")


class TookTooLong(BaseException):
    """An example ran longer than :data:`TIMEOUT`."""


class Ends:
    """Counts how examples end, and keeps those that end in a bug.

    Attributes:
        runs: ended with status 0.
        mistakes: messages of those that ended with status 2.
        bugs: how the others ended, by the last line of their traceback.
    """

    def __init__(self) -> None:
        self.runs = 0
        self.mistakes: List[str] = []
        self.bugs: Dict[str, str] = {}

    def add(self, example: Any, args: Sequence[Any]) -> None:
        """Runs train_net.py with some arguments; ``example`` says in a report what was broken."""
        status, errors = run(args)
        if (self.runs + len(self.mistakes)) % 50 == 49:
            print(self, flush=True)
        messages = re.findall("^error: (.*)$", errors, re.MULTILINE)
        if status == 0 and not messages:
            self.runs += 1
        elif status == 2 and len(messages) == 1 and not fault(errors, messages[0]):
            self.mistakes.append(messages[0])
        else:
            why = fault(errors, messages[0]) if status == 2 and messages else ""
            report = f"{example}\nexit status {status} {why}\n{errors[-5000:]}"
            self.bugs.setdefault(signature(errors), report)
            print(f"---- UNKNOWN END: {report}", flush=True)

    def __str__(self) -> str:
        return f"{self.runs} runs, {len(self.mistakes)} mistakes, {len(self.bugs)} unknown ends"


def run(args: Sequence[Any]) -> "tuple[Any, str]":
    """Exit status of train_net.py and what it wrote to stderr."""
    out, err = io.StringIO(), io.StringIO()

    def stop(*_: Any) -> None:
        raise TookTooLong

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, TIMEOUT)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status: Any = main([str(x) for x in args])
    except (TookTooLong, SystemExit) as error:
        status = repr(error)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    return status, err.getvalue()


def fault(errors: str, message: str) -> str:
    """Why a message is not one sentence for users; "" if it is."""
    if errors.count(message) != 1 or not errors.rstrip("\n").endswith(message):
        return "the message is not the last line"
    if CLASS_NAME.search(message) or "Traceback" in errors:
        return "the message names an exception"
    return "" if re.search(r"\w\W+\w", message) else "the message says nothing"


def signature(errors: str) -> str:
    """Innermost frame and exception of a traceback, with which the same ends are told apart."""
    frames = re.findall(r'^  File "(.*)", line (\d+), in', errors, re.MULTILINE)
    lines = [line for line in errors.splitlines() if re.match(r"[\w.]+(Error|Exception)\b", line)]
    return f"{':'.join(frames[-1]) if frames else ''} {lines[-1] if lines else errors[-300:]}"


def fuzz(examples: Callable[[Ends], None], record_property: Callable[[str, object], None], request: Any) -> None:
    """Runs a fuzz test: reports its figures and its seed in the terminal summary, and fails on any unknown end.

    Args:
        examples: adds all examples to the ends.
        record_property: pytest's fixture.
        request: likewise.
    """
    ends = Ends()
    try:
        examples(ends)
    finally:
        again = f"D2KD_FUZZ_SEED={SEED} D2KD_FUZZ_EXAMPLES={EXAMPLES} pytest {request.node.nodeid}"
        record_property("fuzz", f"{request.node.name}: {ends}; repeat by {again}")
    assert not ends.bugs, "\n\n".join(ends.bugs.values())


def _value(config: Any, *keys: str, default: Any = None) -> Any:
    """What detectron2's own gives, which turns a whole CfgNode into a DictConfig first."""
    for key in keys:
        node = config
        for part in key.split("."):
            node = node.get(part, None) if isinstance(node, Mapping) else None
        if node is not None:
            return node
    return default


def fresh(folder: Path) -> Path:
    """An empty place for a run."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


@contextlib.contextmanager
def cheap_runs() -> Iterator[None]:
    """Makes runs of train_net.py quick without changing what they do: libyaml, no fsync, no collected versions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yaml, "SafeLoader", getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        patch.setattr(yaml, "SafeDumper", getattr(yaml, "CSafeDumper", yaml.SafeDumper))
        patch.setattr(os, "fsync", lambda _: None)
        patch.setattr("detectron2.engine.defaults.collect_env_info", lambda: "", raising=False)
        patch.setattr("detectron2.engine.defaults._highlight", lambda code, _: code, raising=False)
        patch.setattr("detectron2.engine.defaults._try_get_key", _value, raising=False)
        yield
