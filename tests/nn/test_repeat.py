"""Repeat, Residual and Parallel; stack and unstack; ensembles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

import paramtree as pt
from paramtree import initializers as init
from paramtree import nn
from paramtree.core.tree import flatten
from tests.catalogue import leaf, same, trees

X = jnp.linspace(-1, 1, 6, dtype=jnp.float32).reshape(2, 3)
N = 4
BLOCK = nn.Sequential(
    nn.Dense(5, "tanh", weight_initializer="xavier"), nn.Dense(3), nn.BatchNorm(momentum=0.5)
)


def net(p, x, **options):
    return nn.Dense(2)(p.head, nn.Repeat(BLOCK, N, **options)(p.blocks, x))


def unrolled(p, x):
    for i in range(N):
        x = BLOCK(p.blocks[str(i)], x)
    return nn.Dense(2)(p.head, x)


def close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6)


@pytest.fixture
def params(key):
    return pt.init(net, key, X)


def test_copies_start_as_the_unrolled_layers(params, key):
    loose = pt.init(unrolled, key, X)
    assert same(pt.unstack(params, "blocks"), loose)
    assert same(pt.stack(loose, "blocks"), params)
    assert flatten(pt.abstract(net, X))[0] is flatten(params)[0]
    assert (
        pt.abstract(net, X).blocks.dense0.weight.shape == params.blocks.dense0.weight.shape == (N, 5, 3)
    )
    rules = {".*dense0_weight": init.Normal(1.0), ".*": init.One()}
    with_rules = pt.init(net, key, X, rules=rules)
    assert same(pt.unstack(with_rules, "blocks"), pt.init(unrolled, key, X, rules=rules))
    assert float(with_rules.blocks.dense0.weight.std()) > 0.5


@pytest.mark.parametrize("remat", [False, True, jax.checkpoint_policies.dots_saveable])
def test_output_and_gradient_are_those_of_the_unrolled_layers(params, remat):
    stacked = functools.partial(net, remat=remat)
    loose = pt.unstack(params, "blocks")
    close(stacked(params, X), unrolled(loose, X))
    close(stacked(loose, X), unrolled(loose, X))  # an unstacked tree works too
    grads = jax.grad(lambda p: (stacked(p, X) ** 2).sum())(params)
    close(pt.unstack(grads, "blocks"), jax.grad(lambda p: (unrolled(p, X) ** 2).sum())(loose))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_state_is_kept_for_each_copy(params, wrap):
    loose = pt.unstack(params, "blocks")
    for _ in range(2):
        y, params = wrap(pt.training(net))(params, X)
        z, loose = wrap(pt.training(unrolled))(loose, X)
        close(y, z)
    close(pt.unstack(params, "blocks"), loose)
    means = params.blocks.batchnorm0.running_mean
    assert means.shape == (N, 3) and len(np.unique(means, axis=0)) > 1
    assert list(pt.collect(params, kind="state")) == [
        "blocks_batchnorm0_running_mean", "blocks_batchnorm0_running_var"
    ]  # fmt: skip
    y, after = pt.training(net)(pt.unstack(params, "blocks"), X)  # unstacked
    close(pt.stack(after, "blocks"), pt.training(net)(params, X)[1])


def test_state_and_gradients_at_once(params):
    @jax.jit
    def step(params):
        def loss(p):
            y, after = pt.training(net)(p, X)
            return (y**2).mean(), after

        (_, after), grads = pt.value_and_grad(loss, has_aux=True)(params)
        trained, state = pt.partition(after, "(?!.*running_).*")
        return pt.merge(jax.tree.map(lambda p, g: p - 0.1 * g, trained, grads), state)

    after = step(params)
    assert flatten(after)[0] is flatten(params)[0]
    for name in ("running_mean", "gamma"):
        assert not np.array_equal(after.blocks.batchnorm0[name], params.blocks.batchnorm0[name])


def test_each_copy_draws_its_own_numbers(key):
    block = nn.Dropout(0.5)
    layer = nn.Repeat(lambda p, x: x + block(p, jnp.ones_like(x)), 6)
    params = pt.init(layer, key, jnp.zeros(40))
    y, _ = pt.training(layer)(params, jnp.zeros(40), key=key)
    assert len(set(np.asarray(y).tolist())) > 3  # a shared mask would give only 0 and 12
    again, _ = jax.jit(pt.training(layer))(params, jnp.zeros(40), key=key)
    np.testing.assert_array_equal(y, again)
    assert not np.array_equal(y, pt.training(layer)(params, jnp.zeros(40), key=jax.random.key(7))[0])
    with pytest.raises(pt.ScopeError, match="draws random numbers, but no key was given"):
        pt.training(layer)(params, jnp.zeros(40))


def test_a_repeat_in_a_repeat(key):
    inner = nn.Repeat(nn.Dense(3, "tanh"), 2)
    outer = nn.Repeat(nn.Sequential(inner, nn.Dense(3)), 3)
    params = pt.init(outer, key, X)
    assert params.repeat0.weight.shape == (3, 2, 3, 3)
    loose = pt.unstack(params, "")
    assert list(loose) == ["0", "1", "2"]
    one = pt.unstack(loose, "1/repeat0")
    assert one["1/repeat0/0/weight"].shape == (3, 3)
    # the same values as separate layers
    alone = pt.init(lambda p, x: nn.Dense(3, "tanh")(p["1"]["repeat0"]["0"], x), key, X)
    np.testing.assert_array_equal(one["1/repeat0/0/weight"], alone["1/repeat0/0/weight"])
    directly = nn.Repeat(inner, 3)
    params = pt.init(directly, key, X)
    assert params.weight.shape == (3, 2, 3, 3)
    x = X
    for i in range(3):
        for j in range(2):
            x = nn.Dense(3, "tanh")(
                pt.from_tree({"weight": params.weight[i, j], "bias": params.bias[i, j]}), x
            )
    close(directly(params, X), x)


def test_ties_inside_a_block_are_ties_in_each_copy(key):
    shared = nn.Dense(3)
    layer = nn.Repeat(nn.Sequential(shared, shared), N)
    params = pt.init(layer, key, X)
    assert pt.ties(params) == {"dense1_weight": "dense0_weight", "dense1_bias": "dense0_bias"}
    loose = pt.unstack(params, "")
    assert (
        pt.ties(loose)["2_dense1_weight"] == "2_dense0_weight" and len(jax.tree.leaves(loose)) == 2 * N
    )
    assert same(pt.stack(loose, ""), params)


def test_arguments_are_the_same_for_all_copies(key):
    layer = nn.Repeat(lambda p, x, scale: nn.Dense(3)(p, x) * scale, 2)
    params = pt.init(layer, key, X, jnp.float32(2))
    dense = nn.Dense(3)
    y = dense(pt.unstack(params, "")[0], X) * 2
    close(layer(params, X, jnp.float32(2)), dense(pt.unstack(params, "")[1], y) * 2)


def test_a_hundred_copies_take_no_longer_to_trace(key):
    counts = []

    def block(p, x):
        counts.append(1)
        return nn.Dense(3)(p, x)

    sizes = []
    for n in (2, 100):
        layer = nn.Repeat(block, n)
        params = pt.init(layer, key, X)
        counts.clear()
        jaxpr = jax.make_jaxpr(jax.grad(lambda p, layer=layer: layer(p, X).sum()))(params)
        sizes.append((len(counts), len(str(jaxpr.jaxpr.eqns)) // 100))
    assert sizes[0][0] == sizes[1][0] == 1
    assert abs(sizes[0][1] - sizes[1][1]) <= 3  # the texts differ only in digits


def test_it_runs_under_vmap_jit_checkpoint_and_scan(params):
    batch = jnp.stack([X, 2 * X])
    close(jax.vmap(net, (None, 0))(params, batch)[1], net(params, 2 * X))
    close(jax.jit(jax.checkpoint(net))(params, X), net(params, X))
    with jax.checking_leaks():
        jax.jit(pt.training(net))(params, X)


def test_mistakes_are_named(params, key):
    with pytest.raises(ValueError, match="Repeat: n must be a positive integer, but found 0"):
        nn.Repeat(BLOCK, 0)
    with pytest.raises(TypeError, match="the block of a Repeat is 3; expected a layer"):
        nn.Repeat(3, 2)
    with pytest.raises(pt.MismatchError, match="the block returns .* for an input of .*dtypes equal"):
        pt.init(nn.Repeat(nn.Dense(7), 2), key, X)
    with pytest.raises(
        pt.MismatchError, match=r"`blocks_dense0_weight` has shape \(4, 5, 3\).*leading axis of size 3"
    ):
        nn.Repeat(BLOCK, 3)(params.blocks, X)
    with pytest.raises(
        pt.MissingError, match="`block` is not a level of the tree. Did you mean `blocks`"
    ):
        pt.unstack(params, "block")
    with pytest.raises(
        pt.MismatchError, match="unstack: the leaves below `` are not stacks of one size"
    ):
        pt.unstack(params, "")
    with pytest.raises(
        pt.MismatchError, match="the children of `blocks` are dense0, .*expected copies 0, 1"
    ):
        pt.stack(params, "blocks")
    with pytest.raises(
        pt.MismatchError, match=r"`a/1` is not like `a/0`:\n  `w`: expected shape \(2,\), found \(3,\)."
    ):
        pt.stack(pt.from_tree({"a": {"0": {"w": leaf(0)}, "1": {"w": leaf(0, (3,))}}}), "a")
    with pytest.raises(pt.MismatchError, match="`a/1` is not like `a/0`:\n  `b` is extra"):
        pt.stack(pt.from_tree({"a": {"0": {"w": leaf(0)}, "1": {"w": leaf(0), "b": leaf(0)}}}), "a")
    with pytest.raises(pt.MismatchError, match="`a/0` is a leaf, not a copy of a layer"):
        pt.stack(pt.from_tree({"a": [leaf(0), leaf(1)]}), "a")
    tied = pt.tie(pt.from_tree({"a": {"w": leaf(0)}, "b": leaf(0)}), {"b": "a/w"})
    with pytest.raises(
        pt.ParamTreeError, match="`a_w` has names below `a` and elsewhere.*pt.untie it first"
    ):
        pt.unstack(tied, "a")
    assert len(jax.tree.leaves(pt.unstack(pt.untie(tied), "a"))) == 3
    with pytest.raises(
        pt.ParamTreeError, match="has holes, left by select or partition. Fill them with pt.merge"
    ):
        pt.unstack(pt.select(params, "head_.*"), "blocks")


@given(tree=trees(holes=False))
def test_stack_undoes_unstack(tree):
    many = jax.tree.map(lambda a: np.stack([np.asarray(a)] * 3), tree)
    if not jax.tree.leaves(tree):
        return
    outer = pt.from_tree({"before": leaf(0), "level": many, "after": {}})
    loose = pt.unstack(outer, "level")
    assert same(loose.level["1"], tree)
    stacked = pt.stack(loose, "level")
    pt.testing.assert_trees_equal(stacked.to_dict(), outer.to_dict())
    assert same(pt.unstack(stacked, "level"), loose)
    assert same(pt.stack(pt.unstack(stacked, "level"), "level"), stacked)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), outer)
    assert jax.tree.structure(pt.unstack(shapes, "level")) == jax.tree.structure(loose)
    assert pt.stack(pt.unstack(shapes, "level"), "level") is not None


def test_a_checkpoint_of_either_form_loads_into_either(params, tmp_path):
    file = tmp_path / "a.safetensors"
    loose = pt.unstack(params, "blocks")
    pt.save(file, params)
    assert same(pt.unstack(pt.load(file, like=params), "blocks"), loose)
    assert same(pt.load(file, like=loose), loose)
    pt.save(file, loose)
    assert same(pt.load(file, like=params), params)
    assert same(pt.load(file, like=pt.abstract(net, X)), params)
    pt.save(file, pt.replace(loose, {"blocks/2/dense1/bias": np.zeros(3)}))
    assert (pt.load(file, like=params).blocks.dense1.bias[2] == 0).all()


def test_residual_and_parallel(key):
    layer = nn.Residual(nn.Dense(4, "relu"), nn.Dense(3))
    params = pt.init(layer, key, X)
    close(layer(params, X), X + layer[1](params[1], layer[0](params[0], X)))
    with pytest.raises(ValueError, match=r"Residual adds .*found shapes \(2, 4\) and \(2, 3\)"):
        nn.Residual(nn.Dense(4)).init(key, X)
    both = nn.Parallel(nn.Dense(4), lambda x: 2 * x)
    params = pt.init(both, key, X)
    close(both(params, X), jnp.concatenate([both[0](params[0], X), 2 * X], axis=-1))
    assert (
        len(
            nn.Parallel(nn.Dense(4), nn.Dense(1), axis=None)(
                pt.init(nn.Parallel(nn.Dense(4), nn.Dense(1)), key, X), X
            )
        )
        == 2
    )
    assert repr(both).startswith("Parallel(\n  (0): Dense") and repr(layer).startswith("Residual(")
    assert nn.Sequential(nn.Residual(nn.Dense(3)), nn.Parallel(nn.Dense(3))).names == (
        "residual0",
        "parallel0",
    )
    assert repr(nn.Repeat(nn.Dense(3), 2)) == "Repeat(\n  (2 x): Dense(None -> 3, linear)\n)"


def test_an_ensemble_is_a_vmap_over_keys(key):
    layer = nn.Sequential(nn.Dense(4, "tanh"), nn.Dense(1))
    keys = jax.random.split(key, 3)
    many = jax.vmap(lambda key: pt.init(layer, key, X))(keys)
    assert many.dense0.weight.shape == (3, 4, 3)
    np.testing.assert_allclose(
        many.dense0.weight[1], pt.init(layer, keys[1], X).dense0.weight, rtol=1e-6
    )

    @jax.jit
    def step(many):
        grads = jax.vmap(jax.grad(lambda p: (layer(p, X) ** 2).mean()))(many)
        return jax.tree.map(lambda p, g: p - 0.1 * g, many, grads)

    def losses(many):
        return jax.vmap(lambda p: (layer(p, X) ** 2).mean())(many)

    assert (losses(step(many)) < losses(many)).all()
