"""Layers: frozen dataclasses whose ``__call__(p, x)`` is the whole layer, with Gluon's names."""

from paramtree.nn.basic import Activation as Activation
from paramtree.nn.basic import Dense as Dense
from paramtree.nn.basic import Dropout as Dropout
from paramtree.nn.basic import Embedding as Embedding
from paramtree.nn.basic import Flatten as Flatten
from paramtree.nn.layer import Lambda as Lambda
from paramtree.nn.layer import Layer as Layer
from paramtree.nn.layer import Sequential as Sequential
