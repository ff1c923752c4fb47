"""A tree as treescope draws it, for those who look at everything with treescope.

treescope draws the levels and arrays itself; what only a tree knows, ties and holes, is put in their
places as text.
"""

from collections.abc import Callable
from typing import Any

from paramtree.core.arrays import join, short
from paramtree.core.structure import HOLE, Node
from paramtree.core.tree import ParamTree

__all__ = ["treescoped"]


class _Remark:
    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def treescoped(
    tree: ParamTree, path: str | None, subtree_renderer: Any, level: Callable[[ParamTree], Any]
) -> Any:
    """Returns treescope's rendering of one level, which draws what ``level`` makes of those below."""
    from treescope.repr_lib import render_dictionary_wrapper  # type: ignore[import-untyped]

    structure = tree._structure
    node = tree._node or structure.root
    children: dict[str, Any] = {}
    for name, found in node.children.items():
        shown = short(name, 200)
        if isinstance(found, Node):
            children[shown] = level(tree._view(found))
        elif found == HOLE or tree._leaves[found] is None:
            children[shown] = _Remark("<hole>")
        elif structure.canonical[found] != (*node.path, name):
            first = short(join((*tree._place, *structure.canonical[found])), 200)
            children[shown] = _Remark(f"<tied to {first}>")
        else:
            children[shown] = tree._leaves[found]
    return render_dictionary_wrapper(
        object_type=ParamTree, wrapped_dict=children, path=path, subtree_renderer=subtree_renderer
    )
