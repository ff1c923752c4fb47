"""Model transforms compose, in every order, and a model in training goes on training in all."""

import itertools
from typing import Any

import jax
import numpy as np
import pytest

import paramtree as pt
from paramtree import nn
from paramtree import parametrizations as par

pytestmark = pytest.mark.slow

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (4, 8))
BLOCK = nn.Sequential(nn.Dense(8), nn.Dropout(0.2))
NET = nn.Sequential(nn.Dense(8), nn.BatchNorm(), nn.Dropout(0.5), nn.Repeat(BLOCK, 2), nn.Dense(3))
RULES = {".*weight": par.WeightNorm()}
TRANSFORMS: dict[str, Any] = {
    "training": pt.training,
    "reparametrize": lambda f: pt.reparametrize(f, RULES),
    "capture": lambda f: pt.capture(f, "dropout0"),
    "intervene": lambda f: pt.intervene(f, {"dense0": double}),
}


def double(name: str, value: Any) -> Any:
    return 2 * value


@pytest.mark.parametrize("order", [*itertools.permutations(TRANSFORMS)], ids="-".join)
def test_all_four_in_every_order(order: tuple[str, ...]) -> None:
    plain = pt.init(NET, KEY, X)
    params = pt.expand(plain, RULES)
    f: Any = NET
    for name in order:
        f = TRANSFORMS[name](f)
    assert jax.tree.structure(pt.abstract(f, X)) == jax.tree.structure(params)
    outputs = jax.jit(f)(params, X, key=KEY)
    trees = [
        leaf
        for leaf in jax.tree.leaves(outputs, is_leaf=lambda v: isinstance(v, pt.ParamTree))
        if isinstance(leaf, pt.ParamTree)
    ]
    assert [type(tree) for tree in trees] == [pt.ParamTree] * 2  # the new parameters, and activations
    new, acts = sorted(trees, key=len, reverse=True)
    assert np.any(acts.dropout0.output == 0)
    assert np.any(new.batchnorm0.running_mean != 0)
    y = next(leaf for leaf in jax.tree.leaves(outputs) if leaf.shape == (4, 3))
    doubled = pt.intervene(NET, {"dense0": double})
    np.testing.assert_allclose(y, pt.training(doubled)(plain, X, key=KEY)[0], rtol=1e-4, atol=1e-5)
