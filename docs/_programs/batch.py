"""The batch that both programs of a page train on."""

import numpy as np

_rng = np.random.default_rng(0)
x = _rng.normal(size=(32, 8)).astype(np.float32)
labels = _rng.integers(0, 3, 32)
tokens = _rng.integers(0, 11, (4, 6))
