"""``python -m paramtree FILE``; see ``paramtree.command``."""

import os
import sys

import jax

from paramtree.command import main

if __name__ == "__main__":
    if not os.environ.get("JAX_PLATFORMS"):  # looking at a file needs no accelerator
        jax.config.update("jax_platforms", "cpu")
    sys.exit(main())
