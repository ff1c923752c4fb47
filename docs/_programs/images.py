"""A batch of small images, (N, C, H, W), for pages on libraries of that layout."""

import numpy as np

_rng = np.random.default_rng(1)
x = _rng.normal(size=(16, 3, 6, 6)).astype(np.float32)
labels = _rng.integers(0, 3, 16)
tokens = _rng.integers(0, 11, (4, 6))
