"""Files: trees into safetensors, npz, MXNet's and Orbax's formats, and back onto a tree by name."""

from paramtree.io.loading import LoadReport as LoadReport
from paramtree.io.loading import load as load
from paramtree.io.saving import save as save
