"""Gluon's initializers and jax's, as small hashable functions ``(key, shape, dtype) -> Array``."""

from paramtree.initializers.by_name import Load as Load
from paramtree.initializers.by_name import Mixed as Mixed
from paramtree.initializers.by_name import get as get
from paramtree.initializers.fans import MSRAPrelu as MSRAPrelu
from paramtree.initializers.fans import VarianceScaling as VarianceScaling
from paramtree.initializers.fans import Xavier as Xavier
from paramtree.initializers.values import Bilinear as Bilinear
from paramtree.initializers.values import Constant as Constant
from paramtree.initializers.values import Initializer as Initializer
from paramtree.initializers.values import LSTMBias as LSTMBias
from paramtree.initializers.values import Normal as Normal
from paramtree.initializers.values import One as One
from paramtree.initializers.values import Orthogonal as Orthogonal
from paramtree.initializers.values import TruncNorm as TruncNorm
from paramtree.initializers.values import Uniform as Uniform
from paramtree.initializers.values import Zero as Zero
