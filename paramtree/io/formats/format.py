"""What a file format is: how it is called, recognised, read and written, and what it keeps.

A format is one object. Loading, saving, ``pt.peek``, the command, the table in the README and the tests
ask the list ``paramtree.io.formats.FORMATS`` and know no format by name; ``docs/extending/format.md``
adds one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from paramtree.core.errors import ParamTreeError
from paramtree.core.structure import Structure
from paramtree.io.source import Source

__all__ = ["Content", "Format"]


@dataclass(frozen=True)
class Content:
    """What is saved.

    Attributes:
      arrays: arrays of native dtypes, or of all if the format has none of its own, by name in the file.
      layout: the structure of the tree as text, for formats that keep it (see ``io/layout.py``).
      structure: the structure itself.
      metadata: texts of the user's, for formats that keep them.
    """

    arrays: Mapping[str, Any]
    layout: str
    structure: Structure
    metadata: Mapping[str, str] = field(default_factory=dict)


class Format:
    """A file format; a subclass sets the fields, and overrides ``recognises``, ``read`` and ``write``.

    Attributes:
      name: what reports call it.
      endings: the endings of its files, the usual one first.
      native: the names of the dtypes that it holds by itself.
      keeps: what survives in it, besides names and values of native dtypes. ``"layout"`` is order,
        ties, kinds, stacks, holes and all dtypes, together as a text; ``"metadata"`` are the user's
        texts; ``"slices"`` says that parts of an array are read alone, and ``"shards"`` that several
        files with an index are one model.
      writes: whether ``pt.save`` writes it.
      extra: what to install for it, as in ``paramtree[h5]``.
    """

    name: ClassVar[str]
    endings: ClassVar[tuple[str, ...]] = ()
    native: ClassVar[frozenset[str]] = frozenset()
    keeps: ClassVar[frozenset[str]] = frozenset()
    writes: ClassVar[bool] = True
    extra: ClassVar[str] = ""

    def recognises(self, path: str, head: bytes) -> bool:
        """Returns whether a path is a file of this format.

        Args:
          path: the file or folder.
          head: the first bytes of a file, up to ``HEAD`` of them; empty for a folder.
        """
        raise NotImplementedError

    def read(self, path: str, file: Any) -> Source:
        """Returns the contents of a file, which are not trusted; arrays are read later.

        Args:
          path: the file or folder.
          file: the file, opened for reading bytes, which stays open; None for a folder.

        Raises:
          LoadError: the file is damaged.
        """
        raise NotImplementedError

    def write(self, path: str, content: Content) -> None:
        """Writes a file, atomically."""
        raise ParamTreeError(f"{path} was not written: {self.name} is only read.")
