"""The structure of a tree as text, for formats that have a place for it.

Everything that a file of arrays alone would lose is in it: the order, the nesting, ties, kinds, levels
that hold nothing, holes, and dtypes that the format does not have.
"""

import json
import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from paramtree.core.errors import ParamTreeError
from paramtree.core.structure import EMPTY, PARAM, STATE, Path, Structure, build

__all__ = ["CLIMBS", "DEEPEST", "LONGEST_SEP", "Layout", "decode_layout", "encode_layout", "odd_parts"]

_VERSION = 1
DEEPEST = 128  # levels; a hostile name could otherwise ask for millions
# A part between separators of folders that is empty, "." or ".."; or what utf-8 or a zip file has not.
CLIMBS = re.compile(r"(^|[/\\])\.{0,2}([/\\]|$)|\0|[\ud800-\udfff]")
LONGEST_SEP = 16  # a long one, often repeated, would take much more memory than the file


class Layout(NamedTuple):
    """A structure, the name in the file of each of its slots, and what ``wire.encode`` said of it."""

    structure: Structure
    names: tuple[str, ...]
    tags: tuple[str, ...]
    sep: str

    def aliases(self) -> dict[str, list[str]]:
        """Returns all names of every stored leaf, canonical first, joined as in the file."""
        found: dict[str, list[str]] = {name: [] for name in self.names}
        for path, slot in self.structure.entries():
            found[self.names[slot]].append(self.sep.join(path))
        return found


def encode_layout(structure: Structure, names: Sequence[str], tags: Sequence[str], sep: str) -> str:
    """Returns a structure as JSON; ``decode_layout`` reads it."""
    whole = structure.whole
    text = {
        "version": _VERSION,
        "sep": sep,
        "paths": whole.paths,
        "slots": whole.slots,
        "kinds": whole.kinds,
        "kept": structure.kept,
        "names": names,
        "dtypes": {str(slot): tag for slot, tag in enumerate(tags) if tag},
    }
    return json.dumps(text, separators=(",", ":"), ensure_ascii=False)


def decode_layout(text: str) -> Layout:
    """Returns what ``encode_layout`` wrote. The text is untrusted: nothing in it is believed.

    Raises:
      ValueError: it is not such a text; it says why.
    """
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no JSON: {error}") from None
    if not isinstance(given, dict) or not isinstance(given.get("version"), int):
        raise ValueError("it has no version")
    if given["version"] != _VERSION:
        raise ValueError(
            f"it is of version {given['version']}, and this paramtree reads version {_VERSION}: "
            "use the paramtree that wrote it"
        )
    paths = [_path(item) for item in _list(given, "paths")]
    if odd := odd_parts(paths):
        raise ValueError(f"a path is not a list of names: {odd[0]!r} cannot be part of one")
    slots = _list(given, "slots")
    kinds = _list(given, "kinds")
    kept = _list(given, "kept")
    names = _list(given, "names")
    tags = given.get("dtypes")
    sep = given.get("sep")
    if not isinstance(sep, str) or not 0 < len(sep) <= LONGEST_SEP or not isinstance(tags, dict):
        raise ValueError("its separator or dtypes are missing")
    if len(paths) != len(slots) or not all(type(s) is int and EMPTY <= s < len(kinds) for s in slots):
        raise ValueError("its slots are not those of its paths")
    if any(kind not in (PARAM, STATE) for kind in kinds):
        raise ValueError("a kind is neither param nor state")
    if not all(type(slot) is int and 0 <= slot < len(kinds) for slot in kept) or kept != sorted(
        set(kept)
    ):
        raise ValueError("the leaves that it says it has are not among those of its paths")
    if len(names) != len(kept) or len(set(map(str, names))) != len(names):
        raise ValueError("it does not give each leaf a name of its own")
    if not all(isinstance(name, str) for name in names):
        raise ValueError("a name is not a string")
    if not all(isinstance(tag, str) and _in(key, len(kept)) for key, tag in tags.items()):
        raise ValueError("its dtypes are not those of its leaves")
    try:
        items = [(p, None if s == EMPTY else s) for p, s in zip(paths, slots, strict=True)]
        structure, order = build(items, kinds)
    except ParamTreeError as error:
        raise ValueError(str(error)) from None
    if structure.paths != tuple(paths) or order != tuple(range(len(kinds))):
        raise ValueError("its paths are not in order")
    filled = tuple(tags.get(str(slot), "") for slot in range(len(kept)))
    return Layout(structure.keep(kept), tuple(names), filled, sep)


def odd_parts(paths: Sequence[Path]) -> list[str]:
    """Returns the parts of paths that no file may have.

    Only a tree of one level, such as ``pt.collect(tree, sep="/")`` gives, may have "/" in its names:
    elsewhere the path "a/b" would lead to one leaf by its name, and to another through its levels.
    """
    nested = any(len(path) > 1 for path in paths)
    return [part for path in paths for part in path if CLIMBS.search(part) or ("/" in part and nested)]


def _list(given: dict[str, Any], key: str) -> list[Any]:
    found = given.get(key)
    if not isinstance(found, list):
        raise ValueError(f"its {key} are missing")
    return found


def _path(item: Any) -> Path:
    parts = isinstance(item, list) and item and all(isinstance(part, str) and part for part in item)
    if not parts or len(item) > DEEPEST:
        raise ValueError("a path is not a list of names")
    return tuple(map(sys.intern, item))  # a large tree has few different ones


def _in(key: str, count: int) -> bool:
    return key.isascii() and key.isdigit() and len(key) < 19 and int(key) < count
