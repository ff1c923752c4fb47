"""Atomic writes: a reader sees the complete old file or the complete new one."""

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator

__all__ = ["locked", "replacing", "sync"]

try:
    import fcntl
except ImportError:  # Windows: folders that killed processes left behind stay there
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def replacing(path: str) -> Iterator[str]:
    """Yields a temporary path to write to, and renames that file to ``path`` on success.

    The temporary file has its own folder next to ``path``, so the writer may create further files
    there. Both the file and its new name are synced to disk. On failure the temporary file is deleted
    and the old file stays.

    Raises:
      OSError: the folder is missing, full or not writable, or ``path`` is a folder, a device, a pipe or
        a socket.

    Example:
      >>> import pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "a"
      >>> with replacing(str(path)) as new:
      ...     pathlib.Path(new).write_text("all of it")
      9
      >>> path.read_text()
      'all of it'
    """
    _check(path)
    path = os.path.realpath(path)  # replace a symlink's target, not the link
    folder, name = os.path.split(path)
    start = name.encode()[:150].decode(errors="ignore")  # a name has at most 255 bytes
    prefix = os.path.join(folder, f".{start}.unfinished-")
    _clean(prefix)
    scratch, lock = _create(prefix)
    try:
        new = os.path.join(scratch, "new")
        os.close(os.open(new, os.O_WRONLY | os.O_CREAT, 0o666))
        mode = os.stat(new).st_mode  # set by the umask
        yield new
        with contextlib.suppress(FileNotFoundError):
            mode = os.stat(path).st_mode
        os.chmod(new, mode & 0o7777)
        sync(new)
        os.replace(new, path)
        sync(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(lock)


def _check(path: str) -> None:
    """Raises OSError if a path cannot be replaced by a file, or must not be."""
    with contextlib.suppress(FileNotFoundError):
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if not stat.S_ISREG(mode):
            problem = "is a device, a pipe or a socket, and is not replaced by a file"
            raise OSError(errno.EINVAL, problem, path)


def _create(prefix: str) -> tuple[str, int]:
    """Creates a folder. Returns it and its descriptor, locked for as long as this process runs."""
    for _ in range(20):
        path = prefix + secrets.token_hex(8)
        os.mkdir(path)
        try:
            lock = os.open(path, os.O_RDONLY)
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX)
            os.stat(path)
        except FileNotFoundError:
            continue  # another process deleted it before it was locked
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise
        return path, lock
    raise FileNotFoundError(f"another process keeps deleting new files in {os.path.dirname(prefix)}")


@contextlib.contextmanager
def locked(folder: str) -> Iterator[None]:
    """Holds the lock of a folder, after waiting for another process that does; a kill frees it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def sync(path: str) -> None:
    """Flushes a file, or the entries of a folder, to disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        if os.path.isdir(path):
            return  # some systems cannot open folders
        raise
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _clean(prefix: str) -> None:
    """Deletes the folders that killed processes left behind: those whose lock is free."""
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
