"""The file formats, one module each. ``FORMATS`` is the only place that knows them all."""

from paramtree.io.formats import flax, keras, mxnet, npz, orbax, safetensors, torch
from paramtree.io.formats.format import Format

__all__ = ["DEFAULT", "FORMATS"]

# In the order in which they are asked whether they recognise a file.
FORMATS: tuple[Format, ...] = (
    safetensors.FORMAT,
    mxnet.FORMAT,
    torch.FORMAT,  # before npz, as its files may be zip files too
    npz.FORMAT,
    orbax.FORMAT,
    flax.FORMAT,
    keras.FORMAT,
)
DEFAULT: Format = safetensors.FORMAT  # of files without a known ending
