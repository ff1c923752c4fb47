"""Renders a tree with treescope.

treescope draws the levels and arrays; ties and holes, which only the tree knows, are inserted as text.
"""

from typing import Any

from paramtree.core.arrays import join, short
from paramtree.core.structure import EMPTY, HOLE
from paramtree.core.tree import ParamTree, flatten, place_of

__all__ = ["treescoped"]


class _Remark:
    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


class _Level(dict[str, Any]):
    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        from treescope.repr_lib import render_dictionary_wrapper  # type: ignore[import-untyped]

        return render_dictionary_wrapper(
            object_type=ParamTree, wrapped_dict=dict(self), path=path, subtree_renderer=subtree_renderer
        )


def treescoped(tree: ParamTree, path: str | None, subtree_renderer: Any) -> Any:
    """Returns treescope's rendering of a tree."""
    (structure, leaves), place = flatten(tree), place_of(tree)
    top = _Level()
    for entry, slot in zip(structure.paths, structure.slots, strict=True):
        level, segments = top, [short(segment, 200) for segment in entry]
        for segment in segments if slot == EMPTY else segments[:-1]:
            level = level.setdefault(segment, _Level())
        if slot == HOLE or (slot >= 0 and leaves[slot] is None):
            level[segments[-1]] = _Remark("<hole>")
        elif slot >= 0:
            first = structure.canonical[slot]
            tied = _Remark(f"<tied to {short(join(place + first), 200)}>")
            level[segments[-1]] = leaves[slot] if first == entry else tied
    return top.__treescope_repr__(path, subtree_renderer)
