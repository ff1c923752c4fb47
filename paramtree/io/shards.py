"""A tree in several files with an index, as Hugging Face splits large models.

The files get new names each time, and the index is replaced last: so a reader, or whoever comes after a
save that was killed, finds the old model or the new one. Files that no index names any more are then
deleted, if their names are of the form that this module gives.
"""

import contextlib
import json
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from paramtree.core.errors import ParamTreeError
from paramtree.io.atomic import locked, replacing
from paramtree.io.formats.format import Content, Format
from paramtree.io.opening import INDEX, KEY

__all__ = ["bytes_of", "forget", "nbytes_of", "write_shards"]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def bytes_of(size: Any) -> int:
    """Returns a number of bytes, as of 5_000_000_000 or "5GB".

    Raises:
      ValueError: it is neither, or not positive.

    Example:
      >>> bytes_of("1.5MB"), bytes_of("2MiB"), bytes_of(100)
      (1500000, 2097152, 100)
    """
    found = (
        re.fullmatch(r"([0-9.]+)\s*([KMGT]?)(i?)B", size.strip(), re.IGNORECASE)
        if (isinstance(size, str))
        else None
    )
    count = 0
    if isinstance(size, int) and not isinstance(size, bool):
        count = size
    elif found is not None:
        with contextlib.suppress(ValueError):
            unit = _UNITS[found[2].upper()]
            binary = 1024 ** list(_UNITS.values()).index(unit)
            count = int(float(found[1]) * (binary if found[3] else unit))
    if count < 1:
        raise ValueError(f"max_shard_size is a number of bytes, or a text such as '5GB', not {size!r}.")
    return count


def write_shards(
    path: str, form: Format, content: Content, most: int, count: Callable[[int], None]
) -> None:
    """Writes a tree to ``path.index.json`` and files of at most ``most`` bytes of arrays next to it.

    An array that is larger has a file of its own. If all fits in one file, it is written to ``path``.
    ``count`` is told how many bytes each file has.

    Raises:
      ParamTreeError: the format is not written in shards.
    """
    if "shards" not in form.keeps:
        raise ParamTreeError(f"{path} was not written: {form.name} has no shards; safetensors has.")
    path = os.path.realpath(path)  # as when a single file is replaced
    groups = _groups(content.arrays, most)
    if len(groups) == 1:
        form.write(path, content)
        forget(path)
        return
    # Two writers at once would delete each other's files: the second waits for the first.
    with locked(os.path.dirname(path) or "."):
        _write_all(path, form, content, groups, count)


def _write_all(
    path: str,
    form: Format,
    content: Content,
    groups: list[list[str]],
    count: Callable[[int], None],
) -> None:
    folder, name = os.path.split(path)
    stem, ending = os.path.splitext(name)
    token = secrets.token_hex(4)
    files = [f"{stem}-{token}-{i:05}-of-{len(groups):05}{ending}" for i in range(1, len(groups) + 1)]
    try:
        for file, group in zip(files, groups, strict=True):
            arrays = {key: content.arrays[key] for key in group}
            form.write(os.path.join(folder, file), replace(content, arrays=arrays, layout=""))
            count(sum(map(nbytes_of, arrays.values())))
        total = sum(map(nbytes_of, content.arrays.values()))
        index = {
            "metadata": {"total_size": total, KEY: content.layout},
            "weight_map": {key: f for f, group in zip(files, groups, strict=True) for key in group},
        }
        with replacing(path + INDEX) as new, open(new, "w", encoding="utf-8") as out:
            json.dump(index, out, indent=2)
    except BaseException:
        for file in files:
            with contextlib.suppress(OSError):
                os.remove(os.path.join(folder, file))
        raise
    with contextlib.suppress(FileNotFoundError):  # the index takes its place
        os.remove(path)
    _clean(path, files)


def forget(path: str) -> None:
    """Deletes the index and the shards that were saved for a path before it became a single file.

    If another process has saved shards since, the file is gone and they are the newer model: they stay.
    """
    path = os.path.realpath(path)
    index = path + INDEX
    if not os.path.exists(index) and not _shards(path):
        return
    with locked(os.path.dirname(path) or "."):
        if not os.path.exists(path):
            return
        with contextlib.suppress(OSError, ValueError, AttributeError, KeyError, TypeError):
            with open(index, encoding="utf-8") as file:
                own = KEY in json.load(file)["metadata"]
            if own:
                os.remove(index)
        _clean(path, [])


def _clean(path: str, keep: Sequence[str]) -> None:
    """Deletes shards of earlier saves to a path, and of saves that were killed."""
    folder = os.path.dirname(path)
    named = {*keep}
    for other in os.listdir(folder or "."):  # such as a copy of the index
        if other.endswith(INDEX):
            with (
                contextlib.suppress(OSError, ValueError, AttributeError, KeyError, TypeError),
                open(os.path.join(folder, other), encoding="utf-8") as file,
            ):
                named.update(map(str, json.load(file)["weight_map"].values()))
    for shard in _shards(path):
        if shard not in named:
            with contextlib.suppress(OSError):
                os.remove(os.path.join(folder, shard))


def _shards(path: str) -> list[str]:
    """Returns the names of the files next to a path that are named as its shards are here."""
    folder, name = os.path.split(path)
    stem, ending = os.path.splitext(name)
    form = re.compile(rf"{re.escape(stem)}-[0-9a-f]{{8}}-\d{{5}}-of-\d{{5}}{re.escape(ending)}")
    return [other for other in os.listdir(folder or ".") if form.fullmatch(other)]


def _groups(arrays: Mapping[str, Any], most: int) -> list[list[str]]:
    """Returns the names of the arrays in each file, in order."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, array in arrays.items():
        if groups[-1] and size + nbytes_of(array) > most:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes_of(array)
    return groups


def nbytes_of(array: Any) -> int:
    """Returns the size of an array or a number, in bytes."""
    return int(array.nbytes) if hasattr(array, "nbytes") else np.asarray(array).nbytes
