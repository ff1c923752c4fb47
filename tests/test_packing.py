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
    with pytest.raises(ValueError, match="max_bytes is a number of bytes, 0 or more, but found -1"):
        pt.pack(params, max_bytes=-1)
    with pytest.raises(AttributeError, match="`dense0_wieght` is not in `dense0`"):
        _ = packed.dense0.wieght
    with pytest.raises(pt.ImmutableError, match="pt.replace"):
        packed.dense0 = 3
