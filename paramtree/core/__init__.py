"""The core: the tree and its structure, the walker over pytrees, and the selection by name."""
