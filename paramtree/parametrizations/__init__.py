"""Parametrisations: how a parameter is stored, and what a model reads in its place.

A parametrisation is a small hashable object. ``split(value, key)`` returns what is stored for a
value, an array or a dict of named parts; ``join(parts)`` returns the value; ``update(parts)``, if
there is one, returns what a training call writes to parts of kind state, which ``kinds`` names.
"""

from paramtree.parametrizations.stored import Cast as Cast
from paramtree.parametrizations.stored import Frozen as Frozen
from paramtree.parametrizations.stored import LoRA as LoRA
from paramtree.parametrizations.stored import Masked as Masked
from paramtree.parametrizations.stored import Quantized as Quantized
from paramtree.parametrizations.weights import Orthogonal as Orthogonal
from paramtree.parametrizations.weights import Positive as Positive
from paramtree.parametrizations.weights import SpectralNorm as SpectralNorm
from paramtree.parametrizations.weights import WeightNorm as WeightNorm
from paramtree.parametrizations.weights import WeightStandardization as WeightStandardization
