"""Reparametrised parts that are shared, tied, in training, in dicts; rules that do not fit the tree."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramtree as pt
from paramtree import initializers as init
from paramtree import nn
from paramtree import parametrizations as par

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(9), (4, 4))
DENSE = nn.Dense(4)
POSITIVE = pt.reparametrize(DENSE, {"bias": par.Positive()})
NORMED = pt.reparametrize(DENSE, {"weight": par.WeightNorm()})
NET = nn.Sequential(nn.Dense(4, activation="tanh"), nn.Dense(4))


def twice(p: Any, x: Any, part: Any) -> Any:
    return part(p.d, part(p.d, x))


def in_a_branch(p: Any, x: Any, part: Any) -> Any:
    return jax.lax.cond(x.sum() > 0, lambda x: part(p.d, x), lambda x: part(p.d, 2 * x), x)


def tied(p: Any, x: Any, part: Any) -> Any:
    return part(p.d, part(p.other, x))


@pytest.mark.parametrize("part", [POSITIVE, NORMED], ids=["one leaf", "two parts"])
@pytest.mark.parametrize("model", [twice, in_a_branch, tied])
def test_a_part_that_is_used_twice_is_expanded_once(model: Any, part: Any) -> None:
    ties = {"other": "d"} if model is tied else None
    rules: Any = {".*bias": init.One(), ".*": init.Uniform(0.5)}
    plain = pt.init(lambda p, x: model(p, x, DENSE), KEY, X, rules=rules, ties=ties)
    params = pt.init(lambda p, x: model(p, x, part), KEY, X, rules=rules, ties=ties)
    np.testing.assert_allclose(model(params, X, part), model(plain, X, DENSE), rtol=1e-5, atol=1e-6)
    folded = pt.fold(params, {f".*{name}": how for name, how in part.rules})
    assert jax.tree.structure(folded) == jax.tree.structure(plain)
    if part is POSITIVE:
        np.testing.assert_allclose(jax.nn.softplus(params.d.bias), 1.0, rtol=1e-6)


def test_a_part_within_a_part_is_one_of_its_own() -> None:
    rules = {"weight": par.Positive()}
    inner = pt.reparametrize(DENSE, rules)
    outer = pt.reparametrize(inner, rules)
    start: Any = {".*weight": init.Constant(1.0)}
    params = pt.init(outer, KEY, X, rules=start)
    np.testing.assert_allclose(jax.nn.softplus(jax.nn.softplus(params.weight)), 1.0, rtol=1e-6)
    np.testing.assert_allclose(outer(params, X), DENSE(pt.init(DENSE, KEY, X, rules=start), X), 1e-5)


@pytest.mark.parametrize("how", [par.Positive(), par.WeightNorm(), par.SpectralNorm()])
def test_training_inside_is_training_outside(how: Any) -> None:
    net = nn.Sequential(nn.Dense(4), nn.BatchNorm())
    rules = {"dense0_weight": how}
    start: Any = {".*weight": init.Uniform(1.0) if not isinstance(how, par.Positive) else init.One()}
    inside = pt.reparametrize(pt.training(net), rules)
    outside = pt.training(pt.reparametrize(net, rules))
    assert inside == outside and hash(inside) == hash(outside)
    seen = pt.reparametrize(pt.capture(pt.training(net)), rules)
    params = pt.init(outside, KEY, X, rules=start)
    assert jax.tree.structure(pt.init(seen, KEY, X, rules=start)) == jax.tree.structure(params)
    (y, new), acts = seen(params, X)
    expected, other = outside(params, X)
    pt.testing.assert_trees_equal(new, other)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(acts.output, y)
    assert np.any(new.batchnorm0.running_mean != 0)

    def by_hand(p: Any, x: Any) -> Any:
        return pt.training(net)(p, x)

    with pytest.raises(pt.ScopeError, match=r"write pt.training\(pt.reparametrize\(f, rules\)\)"):
        pt.reparametrize(by_hand, rules)(params, X)


@dataclasses.dataclass(frozen=True)
class Wrong:
    """One whose update writes what is trained, or nothing sensible."""

    returned: Any
    kinds = ("s",)

    def split(self, value: Any, key: Any = None) -> Any:
        return {"z": value, "s": jnp.zeros(())}

    def join(self, parts: Any) -> Any:
        return parts["z"]

    def update(self, parts: Any) -> Any:
        return self.returned

    def __hash__(self) -> int:
        return 0


@pytest.mark.parametrize("returned", [{"z": np.zeros((4, 4))}, {"other": 1}, None, 3])
def test_an_update_writes_only_parts_that_are_state(returned: Any) -> None:
    rules = {"dense0_weight": Wrong(returned)}
    params = pt.expand(pt.init(NET, KEY, X), rules)
    model = pt.reparametrize(NET, rules)
    model(params, X)
    with pytest.raises(pt.MismatchError, match="update of `dense0_weight` returned .*are state, s"):
        pt.training(model)(params, X)


def test_a_fresh_layer_among_parametrised_ones_is_an_error() -> None:
    rules = {".*weight": par.SpectralNorm()}
    some = pt.expand(pt.init(NET, KEY, X), {"dense0_weight": par.SpectralNorm()}, KEY)
    model = pt.reparametrize(NET, rules)
    for call in (lambda: model(some, X), lambda: pt.fold(some, rules)):
        with pytest.raises(pt.RuleError, match="`dense1_weight` does not fit.*pt.expand") as error:
            call()
        assert "dense0" not in str(error.value)
    shadowing = {".*weight": par.SpectralNorm(), "dense1_.*": par.Positive()}
    with pytest.raises(pt.RuleError, match="`dense1_weight` does not fit: SpectralNorm"):
        pt.fold(some, shadowing)
    mixed = pt.expand(pt.init(NET, KEY, X), {"dense0_weight": par.LoRA(2)}, KEY)
    with pytest.raises(pt.RuleError, match="`dense0_weight` does not fit: WeightNorm.*other parts"):
        pt.fold(mixed, {"dense0_weight": par.WeightNorm()})
    advised = pt.expand(some, {"dense1_weight": par.SpectralNorm()}, KEY)
    assert model(advised, X).shape == (4, 4)


@pytest.mark.parametrize(
    "rules",
    [
        {".*weight": par.WeightNorm(), "dense0_weight": par.LoRA(2)},
        {".*weight": par.WeightNorm(), ".*": None},
        {".*bias": None, "dense0_bias": par.Frozen(), ".*": par.WeightNorm()},
        {lambda n, a: a.ndim > 1: par.WeightNorm(), ".*_weight": par.Frozen()},
    ],
)
def test_rules_that_others_win_over_are_no_error(rules: Any) -> None:
    params = pt.init(NET, KEY, X)
    expanded = pt.expand(params, rules, KEY)
    model = pt.reparametrize(NET, rules)
    np.testing.assert_allclose(model(expanded, X), NET(params, X), rtol=1e-5, atol=1e-5)
    pt.testing.assert_trees_close(pt.fold(expanded, rules), params, rtol=1e-5, atol=1e-6)
    assert jax.tree.structure(pt.init(model, KEY, X)) == jax.tree.structure(expanded)


def whole(p: Any, x: Any) -> Any:
    return NET(p.part, x)


def test_names_and_keys_are_those_of_the_tree_that_is_given() -> None:
    part = pt.init(whole, KEY, X).part
    for rules in (
        {"dense0_weight": par.LoRA(2)},
        {lambda n, a: n == "dense0_bias": None, ".*bias": par.Frozen()},
    ):
        expanded = pt.expand(part, rules, KEY)
        jitted = jax.jit(lambda tree, rules=rules: pt.expand(tree, rules, KEY))(part)
        for name, leaf in pt.collect(expanded).items():
            assert np.array_equal(
                leaf, [*pt.collect(jitted).values()][list(pt.collect(expanded)).index(name)]
            )
        pt.testing.assert_trees_equal(pt.fold(expanded, rules), part)
        np.testing.assert_array_equal(pt.reparametrize(NET, rules)(expanded, X), NET(part, X))


def test_what_casts_and_values_leave_as_parts() -> None:
    params = pt.init(NET, KEY, X)
    for how in (par.Quantized(dtype="bfloat16"), par.LoRA(2), par.WeightNorm(), par.Frozen()):
        rules = {".*weight": how}
        half = pt.cast(pt.expand(params, rules, KEY), "bfloat16")
        y = pt.reparametrize(NET, rules)(half, X.astype("bfloat16"))
        assert y.dtype == jnp.bfloat16
        np.testing.assert_allclose(y.astype("float32"), NET(params, X), rtol=0.1, atol=0.1)
    rules = {".*weight": par.Masked(lambda value: np.abs(value) > 0.02)}  # numpy needs values
    pruned = pt.expand(params, rules)
    assert np.any(pt.fold(pruned, rules).dense0.weight == 0)
    assert pt.reparametrize(NET, rules)(pruned, X).shape == (4, 4)


def test_plain_dicts_fold_too() -> None:
    params = pt.init(NET, KEY, X)
    for how in (par.LoRA(2), par.SpectralNorm(), par.Frozen(), par.Quantized()):
        rules = {"dense0_weight": how}
        expanded = pt.expand(params.to_dict(), rules, KEY)
        folded = pt.fold(expanded, rules)
        assert isinstance(folded, dict)
        expected = pt.fold(pt.expand(params, rules, KEY), rules)
        pt.testing.assert_trees_equal(folded, expected.to_dict())


def test_a_level_of_the_model_may_look_like_parts() -> None:
    tree = pt.from_tree({"norm": {"g": jnp.ones((4, 1)), "v": jnp.ones((4, 3))}, "w": jnp.ones((3, 3))})
    rules = {"norm_.*": None, ".*": par.WeightNorm()}
    pt.testing.assert_trees_close(pt.fold(pt.expand(tree, rules), rules), tree)


def test_an_update_in_a_checkpoint_says_what_to_write_and_it_works() -> None:
    model = pt.reparametrize(NET, {"dense0_weight": par.SpectralNorm()})

    def closed(p: Any, x: Any) -> Any:
        return jax.checkpoint(model)(p.part, x)

    def advised(p: Any, x: Any) -> Any:
        y, new = jax.checkpoint(pt.training(model))(p["part"], x)
        p.update("part", new)
        return y

    params = pt.init(closed, KEY, X)
    text = "y, new = jax.checkpoint(pt.training(model))(p['part'], x)`, and then `p.update('part', new)"
    with pytest.raises(pt.ScopeError, match=re.escape(text)):
        pt.training(closed)(params, X)
    _, new = pt.training(advised)(params, X)
    assert np.any(new.part.dense0.weight.u != params.part.dense0.weight.u)


def test_a_text_is_no_parametrisation() -> None:
    with pytest.raises(pt.RuleError, match="'.*weight' gives 'x'. Expected a parametrisation"):
        pt.reparametrize(NET, {".*weight": "x"})


class Blend(nn.Layer):
    """A layer with a field that is called as a method of a transform might be."""

    over: nn.Layer
    f: nn.Layer

    def __call__(self, p: Any, x: Any) -> Any:
        return self.over(p.over, x) + self.f(p.f, x)


def test_a_layer_may_have_any_fields() -> None:
    net, rules = Blend(nn.Dense(4), nn.Dense(4)), {".*weight": par.WeightNorm()}
    params = pt.init(net, KEY, X)
    model = pt.reparametrize(net, rules)
    np.testing.assert_allclose(model(pt.expand(params, rules), X), net(params, X), rtol=1e-5, atol=1e-5)


def test_a_predicate_behind_a_rule_that_a_level_does_not_fit() -> None:
    rules: Any = {".*": par.Frozen(), lambda name, leaf: leaf.ndim > 1: par.WeightNorm()}
    params = pt.init(NET, KEY, X)
    for tree in (pt.expand(params, rules), {"dense0": {"w": jnp.ones((2, 2))}}):
        expanded = pt.expand(tree, rules) if isinstance(tree, dict) else tree
        pt.fold(expanded, rules)
    with pytest.raises(pt.RuleError, match="`dense0_weight` does not fit: Frozen"):
        pt.fold(params, rules)
