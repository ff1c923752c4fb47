"""The core: a tree, its structure, the walker over any pytree, and rules by name."""
