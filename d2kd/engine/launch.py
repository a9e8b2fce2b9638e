"""Starting a run's processes: one, several on one or more machines, or those that torchrun has started."""

import multiprocessing
import os
import signal
import socket
import threading
import time
from contextlib import contextmanager
from multiprocessing.context import SpawnProcess
from multiprocessing.process import BaseProcess
from typing import Any, Callable, Iterator, TypeVar
from urllib.parse import urlparse
from uuid import uuid4

import torch
from detectron2.utils import comm

from ..errors import D2kdError

Result = TypeVar("Result")

# Key of the name of the current attempt in torchrun's store.
ATTEMPT = "d2kd_attempt"
# Seconds in which processes have to save themselves after SIGTERM.
LEAVE_WITHIN = 600
# Seconds in which processes have to end after Ctrl-C.
END_WITHIN = 5.0
# Seconds after which a process notices that the one that started it has ended.
NOTICE_WITHIN = 0.5


def under_torchrun() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def join_torchrun() -> None:
    """Joins the process group that torchrun describes in the environment.

    torchrun gives a restarted run the store of the first attempt, which holds the addresses of processes that are gone
    (pytorch issue 135712). So each attempt writes below a name of its own.
    """
    end_with(os.getppid())
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, world_size = next(torch.distributed.rendezvous("env://"))
    if rank == 0:
        store.set(ATTEMPT, uuid4().hex)
    own_part = torch.distributed.PrefixStore(store.get(ATTEMPT).decode(), store)
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo", store=own_part, rank=rank, world_size=world_size)
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    comm.synchronize()
    if rank == 0:  # all have read it, and the next attempt must wait for its own
        store.delete_key(ATTEMPT)


def once_per_machine(check: Callable[[], Result]) -> Result:
    """Runs a check in the first process of each machine, while the others wait for what it finds.

    Args:
        check: returns what can be pickled.

    Raises:
        D2kdError: the check did, on any machine.
    """
    found: Any = None
    if comm.get_local_rank() == 0:
        try:
            found = check()
        except D2kdError as error:
            found = error
    everywhere = comm.all_gather(found)
    for one in everywhere:
        if isinstance(one, D2kdError):
            raise D2kdError(one)
    return everywhere[comm.get_rank() - comm.get_local_rank()]


@contextmanager
def sigterm_for_children() -> Iterator[None]:
    """Passes SIGTERM on to the processes that this one has started, waits for them, and kills them if they hang.

    A process that waits for another in a collective cannot handle it: no Python handler runs there.
    """

    def pass_on(signum: int, _: Any) -> None:
        for child in multiprocessing.active_children():
            if signum == signal.SIGALRM:
                child.kill()
            else:
                child.terminate()
        signal.alarm(LEAVE_WITHIN)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGALRM)}
    try:
        yield
    finally:
        signal.alarm(0)
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def ctrl_c_ends_children() -> Iterator[None]:
    """Ends the processes that this one has started when Ctrl-C ends it.

    A terminal sends SIGINT to all of them. One that is still importing would end with a traceback, so processes start
    with it blocked; see :func:`end_with_launcher`.
    """
    start = SpawnProcess.start

    def start_blocked(process: BaseProcess) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            start(process)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    SpawnProcess.start = start_blocked  # type: ignore[assignment, method-assign]
    try:
        yield
    except KeyboardInterrupt:
        _end_children()
        raise
    finally:
        SpawnProcess.start = start  # type: ignore[method-assign]


def _end_children() -> None:
    deadline = time.monotonic() + END_WITHIN
    for child in multiprocessing.active_children():
        child.join(max(0.0, deadline - time.monotonic()))
        child.kill()


def end_with_launcher() -> None:
    """Makes a process that :func:`detectron2.engine.launch` has started end when its parent does; else does nothing.

    torch sends such a process SIGINT, which is ignored under nohup. From here on it heeds Ctrl-C.
    """
    launcher = multiprocessing.parent_process()
    if launcher is not None and launcher.pid is not None:
        end_with(launcher.pid)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def end_with(parent: int) -> None:
    """Makes this process end soon after its parent has ended, even by kill -9.

    Args:
        parent: its process id.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(NOTICE_WITHIN)
        os._exit(1)

    threading.Thread(target=watch, name="end_with_parent", daemon=True).start()


def check_address(url: str, num_machines: int, machine_rank: int) -> None:
    """Raises D2kdError if the processes cannot meet at ``--dist-url``."""
    if url == "auto" and num_machines > 1:
        raise D2kdError("several machines need --dist-url tcp://<address of the first>:<free port>, the same on all")
    address = urlparse(url)
    if address.scheme != "tcp" or machine_rank > 0:
        return
    try:
        port = address.port or 0
        socket.create_server(("", port)).close()
    except (OSError, ValueError) as error:
        raise D2kdError(
            f"--dist-url {url}: the port cannot be used ({error}), perhaps by another run; leave it out or name another"
        ) from error
