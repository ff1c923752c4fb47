"""Files: trees into safetensors, npz, MXNet's and Orbax's formats, and back onto a tree by name."""
