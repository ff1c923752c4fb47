"""Folders that get their names when they are complete, and lose them before they are deleted."""

import contextlib
import ctypes
import os
import re
import secrets
import shutil
from concurrent.futures import ThreadPoolExecutor

from paramtree.io.atomic import sync
from paramtree.io.checksums import write_checksums
from paramtree.io.locks import claiming

__all__ = ["discard", "hidden", "numbered", "publish", "remove_unfinished", "tidy"]

_PATIENCE = 60.0  # seconds to wait for readers of a folder that is replaced or deleted
_HIDDEN = re.compile(r"\.(\d+)\.(saving|deleted|replaced)-")
_OLD = re.compile(r"\d+\.unfinished(\.|$)")  # what earlier versions left behind
_NUMBER = re.compile(r"0|[1-9]\d*", re.ASCII)


def hidden(folder: str, number: int, why: str, token: str = "") -> str:
    """Returns the path of a folder that nobody reads: ``why`` is saving, deleted or replaced."""
    return os.path.join(folder, f".{number}.{why}-{token or secrets.token_hex(4)}")


def numbered(folder: str) -> dict[int, str]:
    """Returns the folders whose names are numbers, finished or not, in increasing order.

    A folder that was being replaced when the process was killed is found as well.
    """
    names = os.listdir(folder)
    aside = {
        int(match[1]): name for name in names if (match := _HIDDEN.match(name)) and match[2][0] == "r"
    }
    found = aside | {int(name): name for name in names if _NUMBER.fullmatch(name)}
    return {number: os.path.join(folder, found[number]) for number in sorted(found)}


def publish(new: str, folder: str, number: int) -> None:
    """Gives a complete folder its name, with checksums and on the disk; it may replace one.

    At every moment the old folder or the new one has the name, or nearly so: where the system cannot
    exchange two folders there is a moment in which ``numbered`` finds the old one under another name.
    """
    write_checksums(new)
    _sync_all(new)
    path = os.path.join(folder, str(number))
    if not os.path.lexists(path):
        os.rename(new, path)
        sync(folder)
        return
    with claiming(path, _PATIENCE):  # who reads it longer is told by the checksums
        old = new
        if not _exchange(new, path):
            old = hidden(folder, number, "replaced")
            os.rename(path, old)
            os.rename(new, path)
    sync(folder)
    shutil.rmtree(old, ignore_errors=True)


def discard(path: str, wait: bool = False) -> None:
    """Deletes a numbered folder; one that is being read stays, unless this is to wait for it."""
    folder, name = os.path.split(path)
    number = int(name) if name.isdigit() else 0
    with claiming(path, _PATIENCE if wait else 0.0) as free:
        if not free and not wait:
            return
        # Without its name it is no checkpoint any more, even if this process is killed while deleting.
        gone = hidden(folder, number, "deleted")
        with contextlib.suppress(FileNotFoundError):
            os.rename(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def remove_unfinished(new: str) -> None:
    """Deletes a folder that was to be published, also if Orbax has not finished it."""
    for leftover in (new, f"{new}.orbax-checkpoint-tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def tidy(folder: str) -> None:
    """Deletes what killed processes left behind. Call it only with the lock of the folder."""
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        match = _HIDDEN.match(name)
        if match and match[2] == "replaced" and not os.path.lexists(os.path.join(folder, match[1])):
            os.rename(path, os.path.join(folder, match[1]))
        elif match or _OLD.match(name):
            shutil.rmtree(path, ignore_errors=True)


def _sync_all(folder: str) -> None:
    """Flushes a folder with all that is in it to disk."""
    paths = [folder]
    for root, folders, files in os.walk(folder):
        paths += [os.path.join(root, name) for name in (*folders, *files)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(sync, paths))


def _exchange(a: str, b: str) -> bool:
    """Exchanges the names of two folders in one step; returns False where the system cannot."""
    first, second = os.fsencode(a), os.fsencode(b)
    try:
        library = ctypes.CDLL(None, use_errno=True)
        if hasattr(library, "renameat2"):  # Linux; -100 is the working folder, 2 means to exchange
            return bool(library.renameat2(-100, first, -100, second, ctypes.c_uint(2)) == 0)
        if hasattr(library, "renamex_np"):  # macOS
            return bool(library.renamex_np(first, second, ctypes.c_uint(2)) == 0)
    except (OSError, TypeError):
        pass  # a system without such a library
    return False
