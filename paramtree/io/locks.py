"""Locks: a folder has one writer at a time, and what a reader has open stays until it is read.

They are locks of the system (``flock``), which are freed when a process ends, also when it is killed.
"""

import contextlib
import os
import socket
import time
import warnings
import weakref
from collections.abc import Iterator

from paramtree.core.errors import ParamTreeError

__all__ = ["Lock", "claiming", "hold"]

try:
    import fcntl
except ImportError:  # Windows: nothing is locked
    fcntl = None  # type: ignore[assignment]

_NAME = ".lock"
_PAUSE = 0.02  # seconds between two tries


class Lock:
    """The right to write to a folder; one holder has it, and a file in the folder names the holder.

    Args:
      folder: the folder, which exists.
    """

    def __init__(self, folder: str) -> None:
        self._folder, self._path = folder, os.path.join(folder, _NAME)
        self._release: weakref.finalize[[int, str], Lock] | None = None
        self._descriptor = -1

    @property
    def held(self) -> bool:
        """Whether this object has the right."""
        return self._release is not None and self._release.alive

    def take(self, seconds: float = 0.0) -> bool:
        """Takes the lock. Returns whether the system can lock at all.

        Args:
          seconds: how long to wait for another holder.

        Raises:
          ParamTreeError: another holder has it still.
        """
        if self.held:
            return True
        if fcntl is None:
            return False
        until = time.monotonic() + seconds
        while True:
            os.makedirs(self._folder, exist_ok=True)  # one whose save has failed may delete it
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(descriptor, 200).decode(errors="replace")
                os.close(descriptor)
                if time.monotonic() >= until:
                    raise ParamTreeError(self._held_by(holder)) from None
                time.sleep(_PAUSE)
                continue
            except OSError as error:
                os.close(descriptor)
                warnings.warn(
                    f"{self._folder} is on a file system without locks ({error}): make sure that only "
                    "one process writes to it at a time.",
                    stacklevel=2,
                )
                return False
            if _is_at(descriptor, self._path):
                break
            os.close(descriptor)  # the previous holder has just deleted it
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()} {socket.gethostname()}".encode())
        self._descriptor = descriptor
        self._release = weakref.finalize(self, _free, descriptor, self._path)
        _HELD.add(self)
        return True

    def release(self) -> None:
        """Frees the lock, if it is held."""
        if self._release is not None:
            self._release()

    def _held_by(self, holder: str) -> str:
        number, _, host = holder.partition(" ")
        who = "another process"
        if number == str(os.getpid()) and host == socket.gethostname():
            who = f"this process ({number}), with an object that is not closed,"
        elif number.isdigit():
            who = f"process {number}" + ("" if host == socket.gethostname() else f" on {host[:80]}")
        return (
            f"{self._folder} was not written: {who} is writing to it, and two writers would overwrite "
            "each other's checkpoints. Wait until it has closed its own or has ended, or use another "
            "folder. Loading needs no lock."
        )

    def _forget(self) -> None:
        """Leaves the lock to the parent, in a process that was forked."""
        if self._release is not None and self._release.detach():
            os.close(self._descriptor)


def _free(descriptor: int, path: str) -> None:
    with contextlib.suppress(OSError):
        if _is_at(descriptor, path):
            os.unlink(path)
    os.close(descriptor)


def _is_at(descriptor: int, path: str) -> bool:
    """Returns whether a file or folder that is open is the one that a path leads to now."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


# A fork has the descriptors of its parent, and would keep the locks of one that is killed.
_HELD: weakref.WeakSet[Lock] = weakref.WeakSet()


def _forget_all() -> None:
    for lock in list(_HELD):
        lock._forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


def hold(folder: str) -> int | None:
    """Opens a folder, so that ``claiming`` waits for the descriptor to be closed.

    Returns None where folders cannot be opened.

    Raises:
      FileNotFoundError: there is no such folder.
    """
    while True:
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except PermissionError:
            return None
        if fcntl is not None:
            with contextlib.suppress(OSError):  # not all file systems have locks
                fcntl.flock(descriptor, fcntl.LOCK_SH)
        if _is_at(descriptor, folder):
            return descriptor
        os.close(descriptor)  # another one has its name now


@contextlib.contextmanager
def claiming(folder: str, seconds: float = 0.0) -> Iterator[bool]:
    """Waits until no reader has a folder open, and says whether that is so; none opens it meanwhile."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except (FileNotFoundError, PermissionError):
        yield True
        return
    until = time.monotonic() + seconds
    free = False
    try:
        while not free and fcntl is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                free = True
            except BlockingIOError:
                if time.monotonic() >= until:
                    break
                time.sleep(_PAUSE)
            except OSError:  # a file system without locks
                free = True
        yield free or fcntl is None
    finally:
        os.close(descriptor)
