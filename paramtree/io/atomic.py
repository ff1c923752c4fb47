"""Writing a file so that at every moment the old one or the new one is there, whole."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator

__all__ = ["replacing", "sync"]

try:
    import fcntl
except ImportError:  # only to clean up after processes that were killed
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def replacing(path: str) -> Iterator[str]:
    """Gives the path of a new file, in a folder of its own beside ``path``, and moves it to ``path``.

    The new file is on the disk before it takes the name, and the name is on the disk before this
    returns. If anything goes wrong before, the new file is deleted and the old one stays. Whoever
    writes the new file may do it as it likes, by way of another file in the same folder too.

    Raises:
      OSError: the folder is missing, full, or not to be written to.

    Example:
      >>> import pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "a"
      >>> with replacing(str(path)) as new:
      ...     pathlib.Path(new).write_text("all of it")
      9
      >>> path.read_text()
      'all of it'
    """
    path = os.path.realpath(path)  # a link stays a link
    folder, name = os.path.split(path)
    prefix = os.path.join(folder, f".{name[:150]}.unfinished-")
    _clean(prefix)
    own, lock = _create(prefix)
    try:
        new = os.path.join(own, "new")
        os.close(os.open(new, os.O_WRONLY | os.O_CREAT, 0o666))
        mode = os.stat(new).st_mode  # what the umask leaves
        yield new
        with contextlib.suppress(FileNotFoundError):
            mode = os.stat(path).st_mode
        os.chmod(new, mode & 0o7777)
        sync(new)
        os.replace(new, path)
        sync(folder)
    finally:
        shutil.rmtree(own, ignore_errors=True)
        os.close(lock)


def _create(prefix: str) -> tuple[str, int]:
    """Returns a new folder, and its descriptor: a lock for as long as this process runs."""
    for _ in range(20):
        path = prefix + secrets.token_hex(8)
        os.mkdir(path)
        try:
            lock = os.open(path, os.O_RDONLY)
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX)
            os.stat(path)
        except FileNotFoundError:
            continue  # cleaned away before it was locked
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise
        return path, lock
    raise FileNotFoundError(f"somebody else deletes the new files in {os.path.dirname(prefix)}")


def sync(path: str) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        if os.path.isdir(path):
            return  # not every system opens folders
        raise
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _clean(prefix: str) -> None:
    """Deletes the folders of processes that were killed: those whose lock is free."""
    if fcntl is None:
        return
    folder, start = os.path.split(prefix)
    for name in os.listdir(folder):
        if name.startswith(start):
            with contextlib.suppress(OSError):
                lock = os.open(os.path.join(folder, name), os.O_RDONLY)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
                finally:
                    os.close(lock)
