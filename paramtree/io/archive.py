"""Zip files, as numpy and PyTorch write them: what is checked before a member is read."""

import zipfile
from collections.abc import Sequence

from paramtree.io.source import fail

__all__ = ["check_members"]

_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def check_members(path: str, members: Sequence[zipfile.ZipInfo], size: int) -> None:
    """Raises LoadError if members are encrypted, or together larger than ``size``, that of the file."""
    left = size
    for member in members:
        if member.compress_type not in _METHODS or member.flag_bits & 1:
            fail(path, repr(member.filename), "is encrypted, or compressed with an unsupported method.")
        if member.compress_type == zipfile.ZIP_STORED and member.file_size != member.compress_size:
            fail(path, repr(member.filename), "is not compressed, but its two sizes differ.")
        left -= member.compress_size
        if left < 0:
            fail(path, repr(member.filename), "and the members before it are larger than the file.")
