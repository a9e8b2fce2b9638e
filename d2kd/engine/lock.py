"""The lock of a run's folder: one process writes there at a time."""

import errno
import fcntl
import logging
import os
import socket
import time
from contextlib import contextmanager
from typing import Iterator

from ..errors import D2kdError

NAME = "run.lock"
#: Seconds in which the processes of a run that was killed have ended.
WAIT = 3.0
# Errors that say that another process holds the lock; all others, such as those of a file system without locks, do not.
_HELD = (errno.EACCES, errno.EAGAIN)


@contextmanager
def locked(folder: str, hint: str) -> Iterator[None]:
    """Holds the lock of a folder, which the system gives back when this process ends, however it ends.

    It is a POSIX record lock: unlike ``flock``, it is not inherited by data-loading processes, which may live a little
    longer, and holds between machines on NFS. Where the file system has no locks or fails, a warning says so.

    Args:
        folder: of the run.
        hint: what to do if another process holds it.

    Raises:
        D2kdError: another process has held it for WAIT seconds.
    """
    with open(os.path.join(folder, NAME), "a+", encoding="utf-8") as file:
        deadline = time.monotonic() + WAIT
        while not _acquire(file.fileno(), folder):
            if time.monotonic() > deadline:
                raise D2kdError(f"{folder} is in use by another run ({_owner(file.name)}); {hint}")
            time.sleep(0.1)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _acquire(descriptor: int, folder: str) -> bool:
    """Whether the lock is ours now, or the folder cannot be locked."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        logging.getLogger(__name__).warning(
            "The folder %s cannot be locked (%s): make sure that no other run uses it.", folder, error.strerror
        )
    return True


def _owner(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read(200) or "it has just started"
