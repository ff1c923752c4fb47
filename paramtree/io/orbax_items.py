"""What is where in a folder of Orbax: steps, the items of a step, and the trees among the items.

Orbax has had several ways to write a folder, and all are read. A *tree folder* has the arrays of one
tree. A *step* is a tree folder, or it has a folder for each of its items, of which some are trees and
others are texts or the states of iterators. A *manager's folder* has steps, named by their numbers.
"""

import contextlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from paramtree.io.checksums import CHECKSUMS
from paramtree.io.source import fail

__all__ = [
    "DEFAULT",
    "LAYOUT",
    "MARK",
    "METRICS",
    "Step",
    "is_checkpoint",
    "is_finished",
    "is_leftover",
    "is_one_array",
    "is_tree",
    "locate",
]

MARK = "_CHECKPOINT_METADATA"  # older steps lack it
LAYOUT = "paramtree"  # the key of the structure of a tree in the user's part of that file
DEFAULT, METRICS = "default", "metrics"  # items of a step that pt.Checkpoints, or a manager, writes
_TREE = ("_METADATA", "manifest.ocdbt")  # either is in the folder of a tree
_AGGREGATE = "checkpoint"  # the file with the structure of an old tree, and sometimes with its arrays
_UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of what Orbax is still writing
_STEP = re.compile(r"(?:(.+)_)?(\d+)", re.ASCII)


@dataclass(frozen=True)
class Step:
    """A step of a checkpoint.

    Attributes:
      folder: its folder.
      trees: the folders of its trees; the only one has the name "", several have those of their items.
      custom: what was saved with it as metadata.
      notes: what is left out.
    """

    folder: str
    trees: Mapping[str, str]
    custom: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def is_tree(folder: str) -> bool:
    """Whether a folder has the arrays of a tree."""
    if any(os.path.exists(os.path.join(folder, name)) for name in _TREE):
        return True
    with contextlib.suppress(OSError):
        with open(os.path.join(folder, _AGGREGATE), "rb") as file:
            head = file.read(1)
        return bool(head) and (0x80 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF))  # a msgpack mapping
    names = os.listdir(folder) if os.path.isdir(folder) else []
    arrays = (os.path.exists(os.path.join(folder, name, ".zarray")) for name in names)
    return ".zgroup" not in names and any(arrays)


def is_one_array(folder: str) -> bool:
    """Whether a folder has a single array, as an item of its own."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    arrays = [name for name in names if os.path.exists(os.path.join(folder, name, ".zarray"))]
    return arrays == [_AGGREGATE]


def is_finished(folder: str) -> bool:
    """Whether a folder is a step, or a tree, that was written to its end. A damaged one was."""
    if not os.path.isdir(folder):
        return False
    if os.path.exists(os.path.join(folder, CHECKSUMS)):
        return True  # it is written last
    names = os.listdir(folder)
    if any(_UNFINISHED in name for name in (os.path.basename(folder), *names)):
        return False
    items = [name for name in names if os.path.isdir(os.path.join(folder, name))]
    if MARK not in names:
        return is_tree(folder) or any(is_tree(os.path.join(folder, name)) for name in items)
    about = _about(folder)
    if about is None:
        return True  # damaged, as the loader will say
    begun, ended = (about.get(f"{when}_timestamp_nsecs") for when in ("init", "commit"))
    return (ended is not None or begun is None) and (bool(items) or is_tree(folder))


def is_checkpoint(folder: str) -> bool:
    """Whether a folder is a tree, a step or a manager's folder with a finished step."""
    return is_tree(folder) or _is_step(folder) or bool(_steps(folder))


def is_leftover(folder: str) -> bool:
    """Whether a folder is empty, or a step that was not written to its end."""
    names = os.listdir(folder) if os.path.isdir(folder) else ["a file"]
    return not names or MARK in names or any(_UNFINISHED in name for name in names)


def locate(path: str) -> Step:
    """Returns the step that a path means; that of a manager's folder is the latest finished one.

    Raises:
      LoadError: there is none, or there are several.
    """
    path = os.path.abspath(path)
    if is_tree(path) or _is_step(path):
        parent = os.path.dirname(path)
        ours = os.path.exists(os.path.join(parent, CHECKSUMS)) or LAYOUT in _custom(_about(parent))
        # The structure of the tree and the checksums are in the step's folder.
        return _step(parent if ours and os.path.basename(path) == DEFAULT else path)
    steps = _steps(path)
    if not steps:
        fail(path, "", "is a folder without a finished Orbax checkpoint.")
    if len({prefix for prefix, _ in steps}) > 1:
        names = ", ".join(sorted(steps.values())[:5])
        fail(path, "", f"has the steps of several runs, {names}: name one of them.")
    return _step(os.path.join(path, steps[max(steps)]))


def _step(folder: str) -> Step:
    os.stat(folder)  # raises FileNotFoundError if another process has just deleted it
    if not is_finished(folder):
        fail(
            folder,
            "",
            "is a folder without a finished Orbax checkpoint: Orbax did not write it to its end.",
        )
    about = _about(folder)
    if about is None:
        fail(folder, MARK, "is damaged: it is no JSON object. Load another checkpoint.")
    custom = _custom(about)
    if is_tree(folder):
        return Step(folder, {"array" if is_one_array(folder) else "": folder}, custom)
    names = sorted(name for name in os.listdir(folder) if os.path.isdir(os.path.join(folder, name)))
    trees = {name: os.path.join(folder, name) for name in names if is_tree(os.path.join(folder, name))}
    handlers = about.get("item_handlers")
    handlers = handlers if isinstance(handlers, dict) else {}
    others = [name for name in names if name not in (*trees, METRICS) and not name.startswith(".")]
    notes = []
    for name in others:
        kind = str(handlers.get(name, "")).rpartition(".")[2]
        notes.append(
            f"item {name!r:.80} is no tree of arrays and is left out{f' ({kind[:80]})' if kind else ''}"
        )
    if not trees:
        has = "; ".join(notes[:5]) or "it has no items"
        fail(folder, "", f"is an Orbax checkpoint without a tree of arrays: {has}.")
    if len(trees) == 1 and not is_one_array(only := next(iter(trees.values()))):
        trees = {"": only}
    return Step(folder, trees, custom, tuple(notes))


def _steps(folder: str) -> dict[tuple[str, int], str]:
    """Returns the names of the finished steps in a folder, by prefix and number."""
    matches = [match for name in os.listdir(folder) if (match := _STEP.fullmatch(name))]
    steps = {(match[1] or "", int(match[2])): match[0] for match in matches}
    return {step: name for step, name in steps.items() if is_finished(os.path.join(folder, name))}


def _is_step(folder: str) -> bool:
    if any(os.path.exists(os.path.join(folder, name)) for name in (MARK, CHECKSUMS)):
        return True
    old = _STEP.fullmatch(os.path.basename(os.path.abspath(folder)))  # without a file that says so
    return old is not None and any(is_tree(os.path.join(folder, name)) for name in os.listdir(folder))


def _custom(about: dict[str, Any] | None) -> dict[str, Any]:
    custom = (about or {}).get("custom_metadata")
    return custom if isinstance(custom, dict) else {}


def _about(folder: str) -> dict[str, Any] | None:
    """Returns what Orbax says of a step, {} if it says nothing, and None if that is damaged."""
    try:
        with open(os.path.join(folder, MARK), encoding="utf-8") as file:
            about = json.load(file)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError):
        return None
    return about if isinstance(about, dict) else None
