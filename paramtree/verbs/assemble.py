"""Trees taken apart into entries and assembled again, for verbs that edit paths, ties and stacks."""

import functools
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple, TypeVar

from paramtree.core.errors import ParamTreeError
from paramtree.core.pytrees import open_tree
from paramtree.core.structure import EMPTY, HOLE, Path, Stack, build
from paramtree.core.tree import ParamTree, flatten, place_of, unflatten

__all__ = ["Draft", "Entry", "check_no_holes", "for_trees", "take_apart"]

F = TypeVar("F", bound=Callable[..., Any])


class Entry(NamedTuple):
    """A path with the label of its leaf, None for a level; entries of one label are tied."""

    path: Path
    label: Hashable
    stack: Stack = ()


class Draft(NamedTuple):
    """A tree taken apart: its entries, and the kinds and leaves of their labels; holes have no leaf."""

    entries: list[Entry]
    kinds: dict[Any, str]
    leaves: dict[Any, Any]
    place: Path = ()

    def assembled(self, entries: Iterable[Entry]) -> ParamTree:
        """Returns the tree that some entries describe.

        Raises:
          NameCollisionError: a path is given twice, or continues below a leaf.
        """
        entries = list(entries)
        stacks = {entry.path: entry.stack for entry in entries if entry.stack}
        structure, order = build([entry[:2] for entry in entries], self.kinds, stacks)
        kept = [slot for slot, label in enumerate(order) if label in self.leaves]
        leaves = tuple(self.leaves[order[slot]] for slot in kept)
        return unflatten(structure.keep(kept), leaves, self.place)


def take_apart(tree: ParamTree) -> Draft:
    """Returns the entries of a tree, whose labels are the slots of its full structure."""
    structure, leaves = flatten(tree)
    full = structure.full
    stacks = full.stacks or ((),) * len(full.paths)
    entries = [
        Entry(path, None if slot == EMPTY else slot, stack)
        for path, slot, stack in zip(full.paths, full.slots, stacks, strict=True)
    ]
    kinds: dict[Any, str] = dict(enumerate(full.kinds))
    return Draft(entries, kinds, dict(zip(structure.kept, leaves, strict=True)), place_of(tree))


def for_trees(why: str, moves: bool = False) -> Callable[[F], F]:
    """Returns a decorator for verbs that take parameter trees only; its TypeError says ``why``.

    An object that opens as a parameter tree, such as a packed one, comes back in its own form.
    ``moves`` says that the verb gives leaves other paths, in which a scope cannot be written.
    """

    def decorate(verb: F) -> F:
        @functools.wraps(verb)
        def call(tree: Any, *args: Any, **kwargs: Any) -> Any:
            if type(tree) is ParamTree:
                return verb(tree, *args, **kwargs)
            if hasattr(type(tree), "__open__"):
                source = open_tree(tree)
                if source.pending is not None:
                    return source.pending.structural(verb.__name__, tree, *args)
                plain = unflatten(source.structure, source.leaves, source.place)
                edited = verb(plain, *args, **kwargs)
                rebuild = (moves and source.renamed) or source.rebuild
                return rebuild(*flatten(edited)) if isinstance(edited, ParamTree) else edited
            raise TypeError(
                f"{verb.__name__} takes a parameter tree, {why}, but found {type(tree).__name__}: "
                "pt.from_tree(tree) makes one."
            )

        return call  # type: ignore[return-value]  # it has the same signature

    return decorate


def check_no_holes(tree: ParamTree, verb: str) -> None:
    """Raises ParamTreeError if a tree has holes."""
    if HOLE in flatten(tree)[0].slots:
        raise ParamTreeError(
            f"{verb}: the tree has holes, left by select or partition. Fill them with pt.merge first."
        )
