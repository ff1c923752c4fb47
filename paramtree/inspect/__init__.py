"""Looking at trees."""

from paramtree.inspect.size import count as count
from paramtree.inspect.size import nbytes as nbytes
