"""A packed tree is the same tree to everybody but jit and optimisers, which see a few arrays."""

import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]
import pytest
from hypothesis import given
from hypothesis import strategies as st

import paramtree as pt
from paramtree.core.tree import flatten
from paramtree.packed import Packed
from tests.catalogue import CATALOGUE, tied
from tests.nn.test_layers import kinds_of_trees, setup


def net_and_params() -> tuple[Any, pt.ParamTree, jax.Array]:
    shared = pt.nn.Dense(8, activation="tanh")
    net = pt.nn.Sequential(pt.nn.Dense(8), shared, shared, pt.nn.Dense(40), pt.nn.Dense(3))
    x = jax.random.normal(jax.random.key(1), (2, 5))
    return net, pt.init(net, jax.random.key(0), x), x


def same(a: Any, b: Any, rtol: float = 0.0) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(
            np.asarray(one, float), np.asarray(other, float), rtol=rtol, atol=1e-7
        )


@pytest.mark.parametrize("name", CATALOGUE)
@pytest.mark.parametrize("most", [0, 9, 1000])
def test_packing_and_unpacking_gives_the_tree_back(name: str, most: int) -> None:
    tree = CATALOGUE[name]()
    packed = pt.pack(tree, max_bytes=most)
    back = pt.unpack(packed)
    assert type(back) is pt.ParamTree
    same(back, tree)
    assert repr(packed) == repr(back) == repr(tree)
    small = {
        (leaf.dtype, kind) for leaf, kind in zip(*whole_leaves(tree), strict=True) if leaf.nbytes < most
    }
    large = [leaf for leaf in whole_leaves(tree)[0] if leaf.nbytes >= most]
    assert len(jax.tree.leaves(packed)) == len(small) + len(large)


def whole_leaves(tree: pt.ParamTree) -> tuple[list[Any], Any]:
    leaves, structure = jax.tree.flatten(tree)
    return leaves, flatten(jax.tree.unflatten(structure, leaves))[0].kinds


@given(st.integers(0, 200))
def test_a_leaf_is_packed_if_it_has_fewer_bytes_than_the_bound(most: int) -> None:
    tree = pt.from_tree({f"w{i}": jnp.ones(i) for i in range(0, 40, 5)})
    packed = pt.pack(tree, max_bytes=most)
    small = sum(4 * i < most for i in range(0, 40, 5))
    assert len(jax.tree.leaves(packed)) == 8 - small + (small > 0)


def test_it_reads_like_the_tree() -> None:
    _, params, _ = net_and_params()
    packed = pt.pack(params, max_bytes=600)
    assert isinstance(packed, Packed)
    assert list(packed) == list(params)
    assert repr(packed) == repr(params)
    assert pt.ties(packed) == pt.ties(params)
    assert packed["dense1/weight"] is packed.dense1.weight is packed.dense2.weight is packed[1][0]
    same(pt.collect(packed, ".*weight"), pt.collect(params, ".*weight"))
    same(packed.dense3, pt.unpack(params).dense3)
    assert pt.count(packed) == pt.count(params)
    assert repr(pt.show(packed)) == repr(pt.show(params))


def test_values_and_gradients_are_those_of_the_tree() -> None:
    net, params, x = net_and_params()
    packed = pt.pack(params)

    def loss(tree: Any) -> Any:
        return jnp.sum(net(tree, x) ** 2)

    np.testing.assert_allclose(jax.jit(net)(packed, x), net(params, x), rtol=1e-5)
    for made in (jax.grad(loss), jax.jit(jax.grad(loss)), pt.grad(loss)):
        grads = made(packed)
        assert jax.tree.structure(grads) == jax.tree.structure(packed)
        same(pt.unpack(grads), jax.grad(loss)(params), rtol=1e-5)


def test_a_gradient_is_one_split_and_one_concatenation() -> None:
    net, params, x = net_and_params()
    packed = pt.pack(params)
    assert len(jax.tree.leaves(packed)) == 1
    text = str(jax.make_jaxpr(jax.grad(lambda tree: net(tree, x).sum()))(packed))
    assert text.count(" split[") == 1
    assert text.count(" concatenate[") == 1


def test_second_derivatives_and_forward_mode() -> None:
    net, params, x = net_and_params()

    def loss(tree: Any) -> Any:
        return jnp.sum(jnp.tanh(net(tree, x)))

    def curvature(tree: Any) -> Any:
        return jax.jvp(jax.grad(loss), (tree,), (tree,))[1]

    same(pt.unpack(curvature(pt.pack(params))), curvature(params), rtol=1e-4)


def test_under_vmap_there_is_one_more_axis() -> None:
    net, params, x = net_and_params()
    packed = pt.pack(params)
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), packed)
    assert many.dense3.weight.shape == (2, 40, 8)
    outputs = jax.vmap(net, (0, None))(many, x)
    np.testing.assert_allclose(outputs[0], net(params, x), rtol=1e-5)
    stacked = pt.unpack(many)
    np.testing.assert_array_equal(
        stacked.dense1.bias, jnp.stack([params.dense1.bias, 2 * params.dense1.bias])
    )


@pytest.mark.parametrize(
    "make", [optax.adam, optax.sgd, lambda rate: optax.chain(optax.clip(1.0), optax.adam(rate))]
)
def test_an_optimiser_makes_the_same_steps_with_a_few_arrays(make: Any) -> None:
    net, params, x = net_and_params()
    tx = make(0.01)

    def train(tree: Any) -> Any:
        @jax.jit
        def step(tree: Any, state: Any) -> Any:
            grads = jax.grad(lambda tree: jnp.sum(net(tree, x) ** 2))(tree)
            updates, state = tx.update(grads, state, tree)
            return optax.apply_updates(tree, updates), state

        with jax.numpy_dtype_promotion("standard"):
            state = tx.init(tree)
            for _ in range(3):
                tree, state = step(tree, state)
        return tree, state

    packed, state = train(pt.pack(params))
    plain, plain_state = train(params)
    same(pt.unpack(packed), plain, rtol=1e-4)
    same(pt.unpack(state), plain_state, rtol=1e-4)
    assert len(jax.tree.leaves(state)) <= 4


def test_it_is_traced_once_and_may_be_donated() -> None:
    net, params, x = net_and_params()
    traces = 0

    def step(tree: Any) -> Any:
        nonlocal traces
        traces += 1
        grads = jax.grad(lambda tree: net(tree, x).sum())(tree)
        return jax.tree.map(lambda a, b: a - 0.1 * b, tree, grads)

    stepped = jax.jit(step, donate_argnums=0)
    packed = pt.pack(params)
    for _ in range(3):
        packed = stepped(packed)
    stepped(pt.pack(pt.init(net, jax.random.key(7), x)))
    assert traces == 1
    assert np.isfinite(packed.dense0.bias).all()


def test_no_tracer_leaks_from_a_tree_that_is_closed_over() -> None:
    net, params, x = net_and_params()
    packed = pt.pack(params)
    with jax.checking_leaks():
        y = jax.jit(lambda x: net(packed, x))(x)
        z = jax.grad(lambda x: jax.jit(lambda x: net(packed, x).sum())(x))(x)
    np.testing.assert_allclose(y, net(packed, x), rtol=1e-6)
    assert z.shape == x.shape

    def scanned(tree: Any) -> Any:
        return jax.lax.scan(
            lambda c, _: (c + net(tree, x).sum() + tree.dense0.bias[0], None), 0.0, None, 2
        )[0]

    np.testing.assert_allclose(jax.jit(scanned)(packed), scanned(params), rtol=1e-5)


def test_training_gives_a_packed_tree_with_the_new_state_back() -> None:
    net = pt.nn.Sequential(pt.nn.Dense(4), pt.nn.BatchNorm())
    x = jnp.arange(6.0).reshape(2, 3)
    params = pt.init(net, jax.random.key(0), x)
    packed = pt.pack(params)
    assert len(jax.tree.leaves(packed)) == 2  # what is trained, and state
    _, after = pt.training(net)(packed, x)
    _, expected = pt.training(net)(params, x)
    assert jax.tree.structure(after) == jax.tree.structure(packed)
    same(pt.unpack(after), expected)


def test_verbs_by_name_work_on_it() -> None:
    _, params, _ = net_and_params()
    packed = pt.pack(params)
    replaced = pt.replace(packed, {"dense0_bias": jnp.ones(8)})
    assert jax.tree.structure(replaced) == jax.tree.structure(packed)
    assert replaced.dense0.bias.tolist() == [1.0] * 8
    half = pt.cast(packed, {".*bias": None, ".*": jnp.bfloat16})
    assert isinstance(half, Packed) and len(jax.tree.leaves(half)) == 2
    trainable, frozen = pt.partition(packed, "dense3_.*")
    assert list(pt.collect(trainable)) == ["dense3_weight", "dense3_bias"]
    merged = pt.merge(trainable, frozen)
    assert jax.tree.structure(merged) == jax.tree.structure(packed)
    same(pt.unpack(merged), params)
    assert not pt.diff(packed, params)


def test_files_hold_the_leaves(tmp_path: Any) -> None:
    _, params, _ = net_and_params()
    packed = pt.pack(params)
    pt.save(tmp_path / "a.safetensors", packed)
    same(pt.load(tmp_path / "a.safetensors"), params)
    again = pt.load(tmp_path / "a.safetensors", like=packed)
    assert jax.tree.structure(again) == jax.tree.structure(packed)
    same(again, packed)


def test_it_can_be_pickled_made_of_shapes_and_made_under_jit() -> None:
    net, params, x = net_and_params()
    packed = pt.pack(params)
    again = pickle.loads(pickle.dumps(packed))
    assert jax.tree.structure(again) == jax.tree.structure(packed)
    same(again, packed)
    shapes = pt.pack(pt.abstract(net, x))
    assert jax.tree.structure(shapes) == jax.tree.structure(packed)
    assert shapes.dense0.weight.shape == (8, 5)
    same(jax.jit(pt.pack)(params), packed)
    same(jax.jit(lambda key: pt.pack(pt.init(net, key, x)))(jax.random.key(0)), packed)


def test_key_paths_say_what_a_buffer_is() -> None:
    packed = pt.pack(tied(), max_bytes=10)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(packed)[0]]
    assert paths == ["['embed/weight']", "['packed param float32']"]


def test_other_pytrees_keys_and_objects() -> None:
    packed = pt.pack({"a": np.ones(3, np.float32), "key": jax.random.key(0), "n": jnp.arange(2)})
    assert packed["a"].tolist() == [1.0, 1.0, 1.0]
    assert jnp.issubdtype(packed["key"].dtype, jax.dtypes.prng_key)
    assert len(jax.tree.leaves(packed)) == 3
    assert len(jax.tree.leaves(pt.pack({}))) == 0


def test_what_is_put_in_place_of_a_buffer_must_be_one() -> None:
    _, params, _ = net_and_params()
    packed = pt.pack(params)
    wrong = jax.tree.map(lambda x: x[:-1], packed)
    with pytest.raises(pt.MismatchError, match="`packed param float32`.*pt.unpack the tree before"):
        _ = wrong.dense0.bias
    assert jax.tree.leaves(pt.mask(packed)) == [True] and pt.mask(packed).dense3.bias is True
    with pytest.raises(
        pt.MismatchError, match="`dense0_weight` and `dense0_bias` share the buffer.*pt.partition"
    ):
        pt.mask(packed, ".*weight")
    with pytest.raises(ValueError, match="max_bytes must be a non-negative integer, but found -1"):
        pt.pack(params, max_bytes=-1)
    with pytest.raises(AttributeError, match="`dense0_wieght` is not in `dense0`"):
        _ = packed.dense0.wieght
    with pytest.raises(pt.ImmutableError, match="pt.replace"):
        packed.dense0 = 3


# The law: for every layer, gradients, optimizer states and parts are packed in the same way


@kinds_of_trees
@jax.numpy_dtype_promotion("standard")  # optax raises a Python float to an int32 count
def test_for_every_layer_gradients_and_states_are_packed(row: str) -> None:
    layer, params, inputs = setup(row)
    packed = pt.pack(params)
    structure = jax.tree.structure

    def loss(tree: Any) -> Any:
        return sum(jnp.sum(jnp.abs(y) ** 2) for y in jax.tree.leaves(layer(tree, *inputs)))

    trained = pt.select(packed, kind="param")
    assert pt.unpack(trained) is not trained
    same(pt.unpack(trained), pt.select(params, kind="param"))
    grads, expected = jax.jit(lambda *trees: tuple(map(pt.grad(loss), trees)))(packed, params)
    floats = [
        p
        for p in pt.collect(params, sep="/", kind="param").values()
        if jnp.issubdtype(p.dtype, jnp.inexact)
    ]
    assert isinstance(grads, Packed) and len(pt.collect(grads, sep="/")) == len(floats)
    same(pt.unpack(grads), expected, rtol=1e-4)
    assert structure(grads) == structure(trained) or len(floats) < len(pt.collect(trained, sep="/"))
    tx = optax.adam(1e-2)
    state = tx.init(grads)
    assert structure(state[0].mu) == structure(grads)
    updates, state = tx.update(grads, state)
    assert structure(updates) == structure(state[0].nu) == structure(grads)
    for kind in ("param", "state", None):
        parts = pt.partition(packed, kind=kind)
        assert all(isinstance(part, Packed) for part in parts)
        merged = pt.merge(*parts)
        assert structure(merged) == structure(packed)
        assert all(
            a is b for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(packed), strict=True)
        )
    _, after = pt.training(layer)(packed, *inputs, key=jax.random.key(1))
    assert structure(after) == structure(packed)
    assert structure(pt.pack(pt.abstract(layer, *inputs))) == structure(packed)


def test_a_step_of_sgd_with_batch_norm_trains() -> None:
    net = pt.nn.Sequential(pt.nn.Dense(4), pt.nn.BatchNorm(), pt.nn.Dense(2))
    x = jax.random.normal(jax.random.key(0), (8, 3))
    packed = pt.pack(pt.init(net, jax.random.key(1), x))
    trained, rest = pt.partition(packed, kind="param")
    tx = optax.sgd(0.1, momentum=0.9)
    traces = []

    @jax.jit
    def step(trained: Any, rest: Any, state: Any) -> Any:
        traces.append(1)

        def loss(trained: Any) -> Any:
            y, new = pt.training(net)(pt.merge(trained, rest), x)
            return jnp.mean(y**2), pt.select(new, kind="state")

        (value, rest_), grads = jax.value_and_grad(loss, has_aux=True)(trained)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(trained, updates), rest_, state, value

    state, values = tx.init(trained), []
    for _ in range(4):
        trained, rest, state, value = step(trained, rest, state)
        values.append(float(value))
    assert len(traces) == 1 and values[-1] < values[0]
    assert jax.tree.structure(pt.merge(trained, rest)) == jax.tree.structure(packed)


def test_parts_of_kinds_copy_no_buffer() -> None:
    net = pt.nn.Sequential(pt.nn.Dense(4), pt.nn.BatchNorm())
    packed = pt.pack(pt.init(net, jax.random.key(1), jnp.ones((2, 3))))
    jaxpr = jax.make_jaxpr(lambda t: pt.merge(*pt.partition(t, kind="param")))(packed).jaxpr
    assert not any(eqn.primitive.name == "concatenate" for eqn in jaxpr.eqns)
    assert list(jaxpr.outvars) == list(jaxpr.invars)


def test_threads_that_pack_one_tree_get_one_treedef() -> None:
    import threading
    from concurrent.futures import ThreadPoolExecutor

    barrier = threading.Barrier(8)
    tree = pt.from_tree({f"only_in_this_test{i}": np.ones(i + 1, np.float32) for i in range(200)})

    def packed(_: int) -> Any:
        barrier.wait()
        return jax.tree.structure(pt.pack(tree))

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(packed, range(8)))
    assert all(treedef == found[0] and hash(treedef) == hash(found[0]) for treedef in found)


def test_a_layout_that_was_forgotten_is_equal_to_a_new_one() -> None:
    tree = pt.from_tree({"a": jnp.ones(2), "b": jnp.ones(3)})
    first = pt.pack(tree)
    for i in range(100):
        pt.mask(tree, f"a|b|x{i}")
        pt.collect(tree, sep=str(i))
    assert jax.tree.structure(pt.pack(tree)) == jax.tree.structure(first)
    jax.tree.map(jnp.add, first, pt.pack(tree))


@jax.numpy_dtype_promotion("standard")
@pytest.mark.parametrize(
    ("tx", "alike"),
    [
        (optax.sgd(0.1, momentum=0.9), True),
        (optax.adamw(0.1), True),
        (optax.rmsprop(0.1), True),
        (optax.lion(0.1), True),
        (optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.1)), True),
        (optax.lamb(0.1), False),
        (optax.lars(0.1), False),
        (optax.adafactor(0.1, min_dim_size_to_factor=2), False),
        (optax.chain(optax.adaptive_grad_clip(0.01), optax.sgd(0.1)), False),
        (optax.chain(optax.clip_by_block_rms(0.01), optax.sgd(0.1)), False),
    ],
)  # fmt: skip
def test_which_optimizers_give_the_same_numbers_is_documented(tx: Any, alike: bool) -> None:
    params = pt.from_tree(
        {"a": jnp.arange(6.0).reshape(2, 3) + 1, "b": jnp.ones(3), "c": jnp.full(2, 5.0)}
    )
    grads = jax.tree.map(lambda x: x**2, params)
    updates, _ = tx.update(grads, tx.init(params), params)
    packed_updates, _ = tx.update(pt.pack(grads), tx.init(pt.pack(params)), pt.pack(params))
    close = all(
        np.allclose(a, b, rtol=1e-5)
        for a, b in zip(
            jax.tree.leaves(updates), jax.tree.leaves(pt.unpack(packed_updates)), strict=True
        )
    )
    assert close == alike
    if not alike:
        for name in (
            "lamb",
            "lars",
            "adafactor",
            "muon",
            "adaptive_grad_clip",
            "clip_by_block_rms",
            "ndim",
        ):
            assert name in pt.pack.__doc__


def test_packed_trees_in_a_container_are_read_by_name() -> None:
    _, params, _ = net_and_params()
    box = {"p": pt.pack(params), "step": jnp.int32(1)}
    assert list(pt.collect(box, "p_dense3.*")) == ["p_dense3_weight", "p_dense3_bias"]
    new = pt.replace(box, {"p_dense3_bias": jnp.ones_like(params.dense3.bias)})
    assert isinstance(new["p"], Packed) and float(new["p"].dense3.bias[0]) == 1
    state = optax.adam(1e-3).init(box["p"])
    assert "0_mu_dense0_weight" in pt.collect(state)
    mesh = jax.sharding.AbstractMesh((1,), ("data",))
    assert jax.tree.structure(pt.shardings(state, mesh, {".*": None})) == jax.tree.structure(state)


def test_what_a_packed_tree_cannot_hold_is_said() -> None:
    net, params, x = net_and_params()
    packed = pt.pack(params)
    assert type(pt.untie(packed)) is Packed and pt.ties(pt.untie(packed)) == {}
    with pytest.raises(pt.MismatchError, match="share the buffer .* get different values, 'a' and 'b'"):
        pt.labels(packed, {".*weight": "a", ".*": "b"})
    first, second = pt.partition(params, ".*weight")
    packed_labels = pt.labels(pt.pack(first), {".*": "a"})
    assert jax.tree.leaves(packed_labels) == ["a"] and pt.pack(second) is not None
    with pytest.raises(pt.ScopeError, match="Pack the tree that it is called with"):
        pt.training(lambda p, x: pt.pack(p))(params, x)
