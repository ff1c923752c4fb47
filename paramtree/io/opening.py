"""Opening a file of any format: by its content, in a folder, or through an index of several files."""

import contextlib
import json
import os
import re
import stat
from typing import Any, NoReturn

from paramtree.io import formats
from paramtree.io.formats.format import Format
from paramtree.io.layout import Layout
from paramtree.io.source import Source, Stored, fail, read_layout

__all__ = ["INDEX", "KEY", "open_source"]

INDEX = ".index.json"  # the ending of an index of several files
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")  # in the name of one of several files
KEY = "paramtree"  # the key of a layout in the metadata of an index
_TRIES = 100  # to open a model that another process keeps replacing
HEAD = 512  # bytes by which a file is recognised


def open_source(path: str) -> Source:
    """Opens a file of any supported format. Use it in a ``with`` statement.

    Raises:
      LoadError: the file is damaged, or its format is not supported.
      FileNotFoundError: there is no such file.
    """
    path = path.rstrip(os.sep) or path
    for _ in range(_TRIES):
        with contextlib.suppress(_Replaced):
            return _open(path)
    return fail(path, "", "is replaced by another process again and again: load it when that is done.")


class _Replaced(Exception):  # noqa: N818  # no error: there is a newer model
    """The files of an index are gone, since another process has saved a newer model."""


def _open(path: str) -> Source:
    with contextlib.ExitStack() as files:
        if os.path.isdir(path):
            source = _open_folder(path, files)
        elif path.endswith(INDEX):
            source = _open_index(path, files)
        else:
            try:
                source = _open_file(path, files)
            except FileNotFoundError:
                index = os.path.realpath(path) + INDEX  # what max_shard_size has written
                sharded = None
                if os.path.exists(index):
                    with contextlib.suppress(FileNotFoundError):  # it may go before it is opened
                        sharded = _open_index(index, files)
                if sharded is None:
                    if _is_either(index.removesuffix(INDEX), index):
                        raise _Replaced from None
                    raise
                source = sharded
        # The source closes what was opened for it.
        own = source.files.pop_all()
        source.files.enter_context(files.pop_all())
        source.files.enter_context(own)
        return source


def _is_either(*paths: str) -> bool:
    """Whether one of several files of a folder exists, though another process changes between them."""
    # Asking for one after another may miss both; a listing sees the folder at one moment.
    with contextlib.suppress(OSError):
        return not {*map(os.path.basename, paths)}.isdisjoint(os.listdir(os.path.dirname(paths[0])))
    return False


def _open_file(path: str, files: contextlib.ExitStack, expected: Format | None = None) -> Source:
    if not stat.S_ISREG(os.stat(path).st_mode):
        fail(path, "", "is not a file, but a device, a pipe or a socket.")
    file = files.enter_context(open(path, "rb"))  # noqa: SIM115  # closed with the source
    head = file.read(HEAD)
    file.seek(0)
    form = next((form for form in formats.FORMATS if form.recognises(path, head)), None)
    if form is None and expected is not None:
        fail(path, "", f"is not a {expected.name} file.")
    if form is None:
        _unknown(path, head)
    return form.read(path, file)


def _open_folder(path: str, files: contextlib.ExitStack) -> Source:
    """Opens an Orbax checkpoint, or the model in a folder as those of a hub."""
    for form in formats.FORMATS:
        if form.recognises(path, b""):
            return form.read(path, None)
    names = sorted(os.listdir(path))
    for form in formats.FORMATS:  # a hub has the same model in several formats: the first is taken
        endings = (*form.endings, *(ending + INDEX for ending in form.endings))
        models = [name for name in names if name.lower().endswith(endings)]
        models = _preferred([name for name in models if not _SHARD.search(name)])
        if len(models) == 1:
            model = os.path.join(path, models[0])
            try:
                return open_source(model)
            except FileNotFoundError:
                if os.path.lexists(model):  # a link that leads nowhere
                    raise
                raise _Replaced from None
        if models:
            fail(path, "", f"has several models, {', '.join(models[:5])}: name one of them.")
    return fail(
        path,
        "",
        "is a folder without a finished Orbax checkpoint. It has no model either, as a folder of a hub "
        f"has, such as model.safetensors; it has {', '.join(names[:5]) or 'nothing'}.",
    )


def _preferred(models: list[str]) -> list[str]:
    """Returns the model that a hub calls so, if it is among others, such as an optimiser's state."""
    usual = [name for name in models if name.split(".")[0] in ("model", "pytorch_model", "flax_model")]
    return usual if len(usual) == 1 else models


def _index(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns which file each name is in, by an index, and the metadata of the index.

    Raises:
      LoadError: it is no index.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        listed, metadata = content["weight_map"], content.get("metadata") or {}
        sorted(set(listed.values()))
        dict(metadata)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        fail(path, "", f"is not an index of {_expected(path).name} files: {error!r}.")
    return listed, metadata


def _still_lists(path: str, listed: dict[str, Any]) -> bool:
    """Whether an index is the one that was read."""
    try:
        return _index(path)[0] == listed
    except FileNotFoundError:
        return False


def _expected(index: str) -> Format:
    """Returns the format of the files that an index lists, by its name."""
    named = index.lower().removesuffix(INDEX)
    return next((form for form in formats.FORMATS if named.endswith(form.endings)), formats.DEFAULT)


def _open_index(path: str, files: contextlib.ExitStack) -> Source:
    """Opens the files that an index lists, as Hugging Face splits large models.

    Raises:
      FileNotFoundError: there is no index.
      LoadError: the index is damaged, lists a file in another folder, or disagrees with a file.
    """
    listed, about = _index(path)
    arrays: dict[str, Stored] = {}
    metadata: dict[str, str] = {}
    ties: dict[str, str] = {}
    opened, sources = [], []
    for part in sorted(set(listed.values())):
        if not isinstance(part, str) or part in ("", ".", "..") or re.search(r"[/\\\0]", part):
            fail(path, repr(part), "is not the name of a file next to the index.")
        where = os.path.join(os.path.dirname(path), part)
        try:
            source = _open_file(where, files, _expected(path))
        except (FileNotFoundError, UnicodeEncodeError):
            if not _still_lists(path, listed):
                raise _Replaced from None
            fail(path, repr(part), "is in the index, but not next to it.")
        opened.append(where)
        sources.append(source)
        files.enter_context(source.files)
        metadata |= source.metadata
        firsts: dict[str, str] = {}  # of its names, those that the index lists
        for name, origin in [*((name, name) for name in source.arrays), *source.ties.items()]:
            if listed.get(name) != part:
                continue
            if firsts.setdefault(origin, name) == name:
                arrays[name] = source.arrays[origin]
            else:
                ties[name] = firsts[origin]
    if lost := sorted(set(listed) - set(arrays) - set(ties)):
        fail(path, repr(lost[0]), f"and {len(lost) - 1} more are in the index, but not in the files.")
    if not sources:
        fail(path, "", "lists no files.")
    layout: Layout | None = read_layout(path, f"the metadata {KEY!r}", about.get(KEY), arrays)
    return Source(
        path,
        sources[0].format,
        arrays,
        layout,
        unordered=True,
        ties=ties,
        metadata=metadata,
        parts=opened,
    )


# What users have in place of a model, by how it begins, and what to say of it.
_MISTAKEN = (
    (b"version https://git-lfs", "is a pointer of Git LFS, not the file itself: run `git lfs pull`."),
    (b"<!doctype html", "is an HTML page: the download gave a page in place of the file."),
    (b"<html", "is an HTML page: the download gave a page in place of the file."),
    (b"<?xml", "is an XML page: the download gave an error in place of the file."),
    (b"\x93numpy", "holds one array without a name. Write it with numpy.savez."),
    (b"gguf", "is a GGUF file: convert it to safetensors."),
    (b"\x1f\x8b", "is compressed by gzip: unpack it first."),
    (b"ustar", "is a tar archive: unpack it first."),
)


def _unknown(path: str, head: bytes) -> NoReturn:
    start = head.lstrip().lower()
    if not head:
        fail(path, "", "is empty.")
    for magic, problem in _MISTAKEN:
        if start.startswith(magic):
            fail(path, "", problem)
    *known, last = (form.name for form in formats.FORMATS)
    fail(path, "", f"is neither {', '.join(known)} nor {last}.")
