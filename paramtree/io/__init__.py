"""Files: trees into safetensors, npz, MXNet's and Orbax's formats, and back onto a tree by name."""

from paramtree.io.checkpoints import Checkpoints as Checkpoints
from paramtree.io.exporting import load_model as load_model
from paramtree.io.exporting import save_model as save_model
from paramtree.io.heading import peek as peek
from paramtree.io.loading import LoadReport as LoadReport
from paramtree.io.loading import load as load
from paramtree.io.saving import save as save
