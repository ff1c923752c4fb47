"""The structure of a tree as JSON, for formats that can hold metadata.

It records what the arrays alone would lose: order, nesting, ties, kinds, stacks, empty levels, holes,
and dtypes that the format lacks.
"""

import json
import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from paramtree.core.errors import ParamTreeError
from paramtree.core.structure import EMPTY, PARAM, STATE, Path, Stack, Structure, build

__all__ = ["CLIMBS", "DEEPEST", "LONGEST_SEP", "Layout", "decode_layout", "encode_layout", "odd_parts"]

_VERSION = 1
DEEPEST = 128  # levels; a hostile name could otherwise ask for millions
# A path component that is empty, "." or ".."; or a character that utf-8 or a zip file cannot hold.
CLIMBS = re.compile(r"(^|[/\\])\.{0,2}([/\\]|$)|\0|[\ud800-\udfff]")
LONGEST_SEP = 16  # joining many paths with a long one takes much more memory than the file


class Layout(NamedTuple):
    """A structure, with the name in the file of each slot, and the dtype tags (see ``wire.encode``)."""

    structure: Structure
    names: tuple[str, ...]
    tags: dict[str, str]  # by name, of the arrays that have one
    sep: str

    def aliases(self) -> dict[str, list[str]]:
        """Returns all names of each stored leaf, canonical first, joined as in the file."""
        aliases: dict[str, list[str]] = {name: [] for name in self.names}
        for path, slot in self.structure.entries():
            aliases[self.names[slot]].append(self.sep.join(path))
        return aliases


def encode_layout(structure: Structure, names: Sequence[str], tags: Sequence[str], sep: str) -> str:
    """Returns a structure as JSON, for ``decode_layout``."""
    full = structure.full
    text = {
        "version": _VERSION,
        "sep": sep,
        "paths": full.paths,
        "slots": full.slots,
        "kinds": full.kinds,
        **({"stacks": full.stacks} if full.stacks else {}),
        "kept": structure.kept,
        "names": names,
        "dtypes": {str(slot): tag for slot, tag in enumerate(tags) if tag},
    }
    return json.dumps(text, separators=(",", ":"), ensure_ascii=False)


def decode_layout(text: str) -> Layout:
    """Returns what ``encode_layout`` wrote. The text is untrusted, so everything in it is checked.

    Raises:
      ValueError: the text is not a valid layout; the message says why.
    """
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON: {error}") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("version"), int):
        raise ValueError("it has no version")
    if fields["version"] != _VERSION:
        raise ValueError(
            f"it has version {fields['version']}, and this paramtree reads version {_VERSION}: "
            "use the paramtree that wrote it"
        )
    paths = [_path(segments) for segments in _list(fields, "paths")]
    if odd := odd_parts(paths):
        raise ValueError(f"a path is not a list of names: {odd[0]!r} cannot be in one")
    slots, kinds, kept, names = (_list(fields, key) for key in ("slots", "kinds", "kept", "names"))
    tags, sep = fields.get("dtypes"), fields.get("sep")
    if not isinstance(sep, str) or not 0 < len(sep) <= LONGEST_SEP or not isinstance(tags, dict):
        raise ValueError("its separator or dtypes are missing or invalid")
    if len(paths) != len(slots) or not all(type(s) is int and EMPTY <= s < len(kinds) for s in slots):
        raise ValueError("its slots do not match its paths")
    if any(kind not in (PARAM, STATE) for kind in kinds):
        raise ValueError("a kind is neither param nor state")
    in_range = all(type(slot) is int and 0 <= slot < len(kinds) for slot in kept)
    if not in_range or kept != sorted(set(kept)):
        raise ValueError("its list of stored leaves does not match its paths")
    if len(names) != len(kept) or len(set(map(str, names))) != len(names):
        raise ValueError("its leaves do not have one distinct name each")
    if not all(isinstance(name, str) for name in names):
        raise ValueError("a name is not a string")
    numbers = {str(slot) for slot in range(len(kept))}
    if not tags.keys() <= numbers or not all(isinstance(tag, str) for tag in tags.values()):
        raise ValueError("its dtypes do not match its leaves")
    try:
        items = [(p, None if s == EMPTY else s) for p, s in zip(paths, slots, strict=True)]
        structure, order = build(items, kinds, _stacks(fields, paths))
    except ParamTreeError as error:
        raise ValueError(str(error)) from None
    if structure.paths != tuple(paths) or order != tuple(range(len(kinds))):
        raise ValueError("its paths are not in order")
    by_name = {names[int(slot)]: tag for slot, tag in tags.items()}
    return Layout(structure.keep(kept), tuple(names), by_name, sep)


def odd_parts(paths: Sequence[Path]) -> list[str]:
    """Returns the segments that no file may contain.

    Only a flat tree, such as ``pt.collect(tree, sep="/")``, may have "/" in its names. In a nested one
    "a/b" could mean a leaf of that name or the leaf "b" in "a".
    """
    nested = any(len(path) > 1 for path in paths)
    return [name for path in paths for name in path if CLIMBS.search(name) or ("/" in name and nested)]


def _list(fields: dict[str, Any], key: str) -> list[Any]:
    value = fields.get(key)
    if not isinstance(value, list):
        raise ValueError(f"its {key} are missing")
    return value


def _path(segments: Any) -> Path:
    is_list = isinstance(segments, list) and 0 < len(segments) <= DEEPEST
    if not is_list or not all(isinstance(name, str) and name for name in segments):
        raise ValueError("a path is not a list of names")
    return tuple(map(sys.intern, segments))  # even a large tree has few distinct segments


def _stacks(fields: dict[str, Any], paths: Sequence[Path]) -> dict[Path, Stack]:
    """Returns the stacks of the paths; files of version 0.1 have none."""
    stacks = _list(fields, "stacks") if "stacks" in fields else []
    if stacks and len(stacks) != len(paths):
        raise ValueError("its stacks do not match its paths")
    valid: dict[Path, Stack] = {}
    for path, stack in zip(paths, stacks, strict=False):
        is_list = isinstance(stack, list) and len(stack) <= DEEPEST
        if not is_list or not all(_is_axis(pair, len(path)) for pair in stack):
            raise ValueError("a stack is not a list of positions and sizes")
        if stack:
            valid[path] = tuple((position, size) for position, size in stack)
    return valid


def _is_axis(pair: Any, levels: int) -> bool:
    numbers = isinstance(pair, list) and [type(number) for number in pair] == [int, int]
    return numbers and 0 <= pair[0] < levels and pair[1] >= 0
