"""The public names of paramtree, each once; ``paramtree`` itself loads them on first use."""

from paramtree import initializers as initializers
from paramtree import nn as nn
from paramtree.errors import ImmutableError as ImmutableError
from paramtree.errors import LoadError as LoadError
from paramtree.errors import MismatchError as MismatchError
from paramtree.errors import MissingError as MissingError
from paramtree.errors import NameCollisionError as NameCollisionError
from paramtree.errors import ParamTreeError as ParamTreeError
from paramtree.errors import RuleError as RuleError
from paramtree.errors import ScopeError as ScopeError
from paramtree.inspect import count as count
from paramtree.inspect import nbytes as nbytes
from paramtree.model import abstract as abstract
from paramtree.model import init as init
from paramtree.model import reinit as reinit
from paramtree.names import from_tree as from_tree
from paramtree.selection import collect as collect
from paramtree.selection import map_named as map_named
from paramtree.selection import replace as replace
from paramtree.train import training as training
from paramtree.tree import ParamTree as ParamTree
from paramtree.tying import tie as tie
from paramtree.tying import ties as ties
from paramtree.tying import untie as untie
