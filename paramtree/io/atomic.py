"""Writing a file so that at every moment the old one or the new one is there, whole."""

import contextlib
import os
import secrets
from collections.abc import Iterator

__all__ = ["replacing"]

try:
    import fcntl
except ImportError:  # only to clean up after processes that were killed
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def replacing(path: str) -> Iterator[str]:
    """Gives the path of a new file beside ``path``, and puts it in its place at the end.

    The new file is on the disk before it takes the name, and the name is on the disk before this
    returns. If anything goes wrong before, the new file is deleted and the old one stays.

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
    prefix = f".{name[:150]}.unfinished-"
    _clean(folder, prefix)
    new, descriptor = _create(os.path.join(folder, prefix))
    try:
        yield new
        with contextlib.suppress(FileNotFoundError):
            os.chmod(new, os.stat(path).st_mode & 0o7777)
        os.fsync(descriptor)
        os.replace(new, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(new)
        raise
    finally:
        os.close(descriptor)
    sync_folder(folder)


def _create(prefix: str) -> tuple[str, int]:
    """Returns the path and descriptor of a new file, locked for as long as this process has it open."""
    while True:
        path = prefix + secrets.token_hex(8)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not os.fstat(descriptor).st_nlink:  # cleaned away before it was locked
                os.close(descriptor)
                continue
        return path, descriptor


def sync_folder(folder: str) -> None:
    """Waits until the names in a folder are on the disk."""
    with contextlib.suppress(OSError):  # not every system opens folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _clean(folder: str, prefix: str) -> None:
    """Deletes unfinished files that nobody writes any more: those whose lock is free."""
    if fcntl is None:
        return
    for name in os.listdir(folder):
        if name.startswith(prefix):
            with contextlib.suppress(OSError):
                descriptor = os.open(os.path.join(folder, name), os.O_RDWR)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(os.path.join(folder, name))
                finally:
                    os.close(descriptor)
