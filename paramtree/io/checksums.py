"""Checksums of the files of a folder, in one file beside them: damage is found before it is used."""

import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from paramtree.io.layout import CLIMBS
from paramtree.io.processes import check_together
from paramtree.io.source import fail

__all__ = ["CHECKSUMS", "Checksums", "write_checksums"]

CHECKSUMS = "paramtree.checksums.json"
_PIECE = 2**26  # bytes with a checksum of their own, so that threads share large files
_BUFFER = 2**20
_SMALL = 2**22  # bytes of a file that is checked before it is read
_THREADS = 4


def write_checksums(folder: str) -> None:
    """Writes the checksums of all files below a folder."""
    names = sorted(
        os.path.relpath(os.path.join(root, name), folder).replace(os.sep, "/")
        for root, _, found in os.walk(folder)
        for name in found
    )
    with ThreadPoolExecutor(_THREADS) as pool:
        files = dict(zip(names, pool.map(lambda name: _measure(folder, name), names), strict=True))
    text = _text(files)
    with open(os.path.join(folder, CHECKSUMS), "w", encoding="utf-8") as file:
        file.write(f'{{"files":{text},"checksum":{zlib.crc32(text.encode())}}}')


class Checksums:
    """The checksums in a folder.

    Args:
      path: what the user has named, for messages.
      folder: the folder.
      expected: whether something else says that there are checksums.

    Raises:
      LoadError: they are damaged, or missing.
    """

    def __init__(self, path: str, folder: str, expected: bool = False) -> None:
        self._path, self._folder = path, folder
        self._files: dict[str, tuple[int, list[int]]] = {}
        self._checked: set[str] = set()
        try:
            with open(os.path.join(folder, CHECKSUMS), encoding="utf-8") as file:
                content = json.load(file)
            self._files = content["files"]
            if zlib.crc32(_text(self._files).encode()) != content["checksum"]:
                raise ValueError("its own checksum differs")
            for name, (size, checksums) in self._files.items():
                if CLIMBS.search(name) or len(checksums) != len(_starts(size)):
                    raise ValueError(f"{name!r:.80} is not a file with checksums")
        except FileNotFoundError:
            if expected:
                fail(path, CHECKSUMS, "is missing, so the checkpoint is not complete.")
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            RecursionError,
            OverflowError,
        ) as error:
            fail(path, CHECKSUMS, f"is damaged: {error}. Load another checkpoint.")

    def __len__(self) -> int:
        return len(self._files)

    def check(self, wanted: Callable[[str, int], bool]) -> None:
        """Checks the files that are wanted, by their names and sizes.

        Raises:
          LoadError: one is damaged or missing.
        """
        names = {name for name, (size, _) in self._files.items() if wanted(name, size)}
        if problem := self._problem(self._pieces(names)):
            fail(self._path, *problem)
        self._checked |= names

    def check_rest(self, read: Callable[[], Any]) -> None:
        """Checks the files that are not yet, while a function reads them; small ones before that.

        Each process of jax checks a part of the files, and all raise what one has found.

        Raises:
          LoadError: one is damaged or missing, whatever the function makes of that.
        """
        names = self._files.keys() - self._checked
        if not names:
            read()
            return
        small = {name for name in names if self._files[name][0] < _SMALL}
        self._fail_together(self._problem(self._share(small)))
        with ThreadPoolExecutor(1) as pool:
            checked = pool.submit(self._problem, self._share(names - small))
            try:
                read()
            except Exception:
                self._fail_together(checked.result())
                raise
            self._fail_together(checked.result())
        self._checked |= names

    def _fail_together(self, problem: tuple[str, str] | None) -> None:
        where, _, text = check_together("\0".join(problem or ())).partition("\0")
        if where:
            fail(self._path, where, text)

    def _share(self, names: set[str]) -> Iterator[tuple[str, int]]:
        """Returns the pieces that this process checks."""
        pieces = self._pieces(names)
        return itertools.islice(pieces, jax.process_index(), None, jax.process_count())

    def _pieces(self, names: set[str]) -> Iterator[tuple[str, int]]:
        for name in sorted(names):
            yield from ((name, at) for at in _starts(self._files[name][0]))

    def _problem(self, pieces: Iterator[tuple[str, int]]) -> tuple[str, str] | None:
        with ThreadPoolExecutor(_THREADS) as pool:
            return next(filter(None, pool.map(self._problem_at, pieces)), None)

    def _problem_at(self, piece: tuple[str, int]) -> tuple[str, str] | None:
        name, at = piece
        size, expected = self._files[name]
        path = os.path.join(self._folder, *name.split("/"))
        try:
            found = os.path.getsize(path)
            if found != size:
                return name, f"is damaged: it has {found:,} bytes instead of {size:,}."
            if _checksum(path, at) == expected[at // _PIECE]:
                return None
        except FileNotFoundError:
            return name, "is missing, so the checkpoint is not complete."
        except OSError as error:
            return name, f"cannot be read: {error}."
        return name, "is damaged: its checksum is not the one that was saved. Load another checkpoint."


def _text(files: Any) -> str:
    return json.dumps(files, separators=(",", ":"))


def _measure(folder: str, name: str) -> tuple[int, list[int]]:
    path = os.path.join(folder, name)
    size = os.path.getsize(path)
    return size, [_checksum(path, at) for at in _starts(size)]


def _starts(size: int) -> range:
    """Returns where the pieces of a file begin; an empty file has one."""
    return range(0, max(size, 1), _PIECE)


def _checksum(path: str, at: int) -> int:
    """Returns the checksum of a piece of a file."""
    checksum, left = 0, _PIECE
    buffer = memoryview(bytearray(_BUFFER))
    with open(path, "rb", buffering=0) as file:
        file.seek(at)
        while left and (count := file.readinto(buffer[:left])):
            checksum = zlib.crc32(buffer[:count], checksum)
            left -= count
    return checksum
