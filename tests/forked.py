"""Runs of train_net.py in processes of their own, which start at once: forked where everything is imported already."""

import multiprocessing
import os
import signal
import sys
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, List

import torch.multiprocessing

from d2kd.engine import main
from d2kd.engine.launch import end_with

_FORKSERVER = multiprocessing.get_context("forkserver")
_FORKSERVER.set_forkserver_preload(["d2kd.engine.main"])


def start(command: List[str], log: Path, on_sigint: Any = signal.SIG_IGN, method: str = "fork") -> BaseProcess:
    """Starts a run in its own process group; its output is appended to a file. It ends with the caller.

    Args:
        command: arguments of train_net.py.
        log: the file.
        on_sigint: what it does on SIGINT; what scripts start in the background ignores it, with or without nohup.
        method: how it starts its own processes; ``spawn`` is what users get.
    """
    process = _FORKSERVER.Process(target=_run, args=(command, str(log), on_sigint, method))
    process.start()
    return process


def _run(command: List[str], log: str, on_sigint: Any, method: str) -> None:
    end_with(os.getppid())
    os.setsid()
    signal.signal(signal.SIGINT, on_sigint)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(output, stream.fileno())
    multiprocessing.set_start_method("fork", force=True)  # of loading processes
    torch.multiprocessing.start_processes = partial(torch.multiprocessing.start_processes, start_method=method)
    sys.exit(main(command))
