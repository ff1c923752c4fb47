"""Models, scopes, initialisation and training."""

import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramtree as pt
from paramtree import initializers as init
from paramtree import nn
from paramtree.core.arrays import dtype_of, shape_of
from paramtree.core.tree import flatten
from paramtree.initializers.keys import path_words


def mlp(p: Any, x: jax.Array) -> jax.Array:
    x = nn.Dense(6, activation="relu")(p.hidden, x)
    scale = p.param("scale", (), init.One())
    return scale * nn.Dense(2)(p.out, x)


X = jnp.ones((3, 4))


def test_names_come_in_the_order_of_first_use(key: jax.Array) -> None:
    params = pt.init(mlp, key, X)
    assert list(pt.collect(params)) == [
        "hidden_weight",
        "hidden_bias",
        "scale",
        "out_weight",
        "out_bias",
    ]
    assert mlp(params, X).shape == (3, 2)


def test_the_order_is_that_of_the_declarations_and_not_of_reading(key: jax.Array) -> None:
    def model(p: Any, x: jax.Array) -> jax.Array:
        x = nn.Dropout(0.5)(p.drop, x)
        return nn.Dense(2)(
            p.out, nn.Dense(3)(p.deep.hidden, x) + p.after.param("b", (1, 3), init.One())
        )

    params = pt.init(model, key, X)
    assert list(params) == ["drop", "deep", "after", "out"]


def test_abstract_has_the_structure_shapes_and_dtypes_of_init(key: jax.Array) -> None:
    params, shapes = pt.init(mlp, key, X), pt.abstract(mlp, X)
    assert flatten(params)[0] is flatten(shapes)[0]
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(shapes), strict=True):
        assert isinstance(b, jax.ShapeDtypeStruct)
        assert (shape_of(a), dtype_of(a)) == (shape_of(b), dtype_of(b))
    same = pt.abstract(mlp, jax.ShapeDtypeStruct(X.shape, X.dtype))
    assert flatten(same)[0] is flatten(shapes)[0]


def test_init_does_no_arithmetic_on_the_inputs(key: jax.Array) -> None:
    def model(p: Any, x: jax.Array) -> Any:
        assert isinstance(x, jax.core.Tracer)
        return nn.Dense(2)(p.d, x)

    pt.init(model, key, X)
    pt.init(model, key, jax.ShapeDtypeStruct((10**6, 10**4), jnp.float32))  # 40 GB, were it there


def test_other_inputs_stay_what_they_are(key: jax.Array) -> None:
    def model(p: Any, x: Any, deep: bool, name: str, *, width: int, extra: Any = None) -> Any:
        assert deep is True and name == "a" and extra == {"flag": None}
        return nn.Dense(width)(p[name], x["x"])

    params = pt.init(model, key, {"x": X}, True, "a", width=5, extra={"flag": None})
    assert params.a.weight.shape == (5, 4)


def test_init_works_under_jit_and_vmap(key: jax.Array) -> None:
    eager = pt.init(mlp, key, X)
    for jitted in (
        jax.jit(lambda k: pt.init(mlp, k, X))(key),
        jax.jit(pt.init, static_argnums=0)(mlp, key, X),
    ):
        jax.tree.map(np.testing.assert_array_equal, eager, jitted)
    keys = jax.random.split(key, 3)
    stacked = jax.vmap(lambda k: pt.init(mlp, k, X))(keys)
    for i in range(3):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
        jax.tree.map(np.testing.assert_array_equal, one, pt.init(mlp, keys[i], X))


def test_leaves_that_are_alike_share_one_compiled_function(key: jax.Array) -> None:
    traces = []

    def counting(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        traces.append(shape)
        return jax.random.normal(key, shape, dtype)

    net = nn.Sequential(*(nn.Dense(4, weight_initializer=counting) for _ in range(30)))
    params = pt.init(net, key, X)
    assert traces == [(4, 4)] * 3  # two of them for the check that it is pure
    assert len({float(w[0, 0]) for w in pt.collect(params, ".*weight").values()}) == 30
    jax.jit(lambda k: pt.init(net, k, X)).lower(key)
    assert len(traces) <= 5


def test_keys_come_from_64_bits_of_the_delimited_path() -> None:
    assert path_words(("a", "bc")).tolist() != path_words(("ab", "c")).tolist()
    assert path_words(("dense0", "weight")).tolist() == [4081219357, 4117170533]
    code = "from paramtree.initializers.keys import path_words; print(path_words(('dense0', 'weight')).tolist())"
    for seed in ("0", "1"):
        run = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert run.stdout.strip() == "[4081219357, 4117170533]"


def test_old_keys_and_custom_initializers(key: jax.Array) -> None:
    def halves(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> Any:
        return np.full(shape, 0.5)  # float64: floats are cast to the dtype that was asked for

    params = pt.init(nn.Dense(2, weight_initializer=halves), jax.random.PRNGKey(0), X)
    assert params.weight.dtype == jnp.float32 and float(params.weight[0, 0]) == 0.5
    unhashable = type(
        "Unhashable", (), {"__call__": lambda self, k, s, d: jnp.ones(s, d), "__hash__": None}
    )()
    rules = {".*weight": unhashable}
    assert pt.init(nn.Dense(2), key, X, rules=rules).weight.sum() == 8
    assert pt.init(lambda p: p.param("w", (3,), unhashable), key).w.sum() == 3
    with pytest.raises(TypeError, match="Dense: the field `weight_initializer` .* cannot be hashed"):
        nn.Dense(2, weight_initializer=unhashable)


def test_two_leaves_never_share_a_buffer(key: jax.Array) -> None:
    array = jnp.ones((4, 4))
    net = nn.Sequential(*(nn.Dense(4, weight_initializer=init.Constant(array)) for _ in range(3)))
    params = pt.init(net, key, X)
    jax.jit(lambda p: jax.tree.map(lambda x: x * 2, p), donate_argnums=0)(params)
    assert not array.is_deleted()


@pytest.mark.parametrize(
    ("initializer", "kind", "text"),
    [
        (
            lambda k, s, d: jnp.ones((1,), d),
            pt.MismatchError,
            r"`d_weight`: the initializer .* gave float32\(1,\)",
        ),
        (lambda k, s, d: jnp.ones(s, jnp.int32), pt.MismatchError, "gave int32"),
    ],
)
def test_an_initializer_that_gives_something_else(
    initializer: Any, kind: type, text: str, key: jax.Array
) -> None:
    with pytest.raises(kind, match=text):
        pt.init(lambda p, x: nn.Dense(2, weight_initializer=initializer)(p.d, x), key, X)


def test_an_error_inside_an_initializer_names_the_leaf(key: jax.Array) -> None:
    with pytest.raises(ValueError, match="needs a shape") as raised:
        pt.init(lambda p, x: p.d.param("scale", (3,), init.Xavier()), key, X)
    assert any(
        "While initialising `d_scale`, (3,), by Xavier" in note for note in raised.value.__notes__
    )


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda k: pt.init(mlp, 0, X), TypeError, "expected a PRNG key, such as jax.random.key.0., but found int"),
        (lambda k: pt.init(mlp, X, k), TypeError, "The order is pt.init"),
        (lambda k: pt.init(mlp, k, X, rules={"hiden.*": init.Zero()}), pt.RuleError, "'hiden.*' matches no name"),
        (lambda k: pt.init(mlp, k, X, rules={".*": 0}), pt.RuleError, "'.*' gives 0. Expected functions"),
        (lambda k: pt.init(mlp, k, X, ties={"out": "hidden"}), pt.MismatchError, "different shapes"),
        (lambda k: pt.reinit(pt.init(mlp, k, X), k, {"weight": init.Zero()}), pt.RuleError, "only a part of"),
        (lambda k: pt.reinit(pt.from_tree({"a": None}), k, {"a": init.Zero()}), pt.MismatchError, "`a` is a NoneType"),
    ],
)  # fmt: skip
def test_init_and_reinit_refuse(call: Any, kind: type, text: str, key: jax.Array) -> None:
    with pytest.raises(kind, match=text):
        call(key)


def test_rules_ties_and_reinit_by_name(key: jax.Array) -> None:
    def model(p: Any, ids: jax.Array) -> jax.Array:
        h = nn.Embedding(5, 4)(p.embed, ids)
        return nn.Dense(5, flatten=False)(p.decoder, h)

    ids = jnp.arange(3)
    rules = {".*bias": "ones", ".*weight": init.Normal(1.0)}
    params = pt.init(model, key, ids, rules=rules, ties={"decoder/weight": "embed/weight"})
    assert params.decoder.weight is params.embed.weight and float(params.decoder.bias[0]) == 1
    again = pt.reinit(pt.abstract(model, ids, ties={"decoder/weight": "embed/weight"}), key, rules)
    jax.tree.map(np.testing.assert_array_equal, params, again)
    plain = pt.reinit({"w": jnp.zeros((2, 3)), "f": jax.nn.relu}, key, {"w": init.One()})
    assert plain["w"].sum() == 6 and plain["f"] is jax.nn.relu


# The recorder inside transforms


def inner(p: Any, x: jax.Array) -> jax.Array:
    return nn.Dense(4)(p, x)


def in_scan(p: Any, x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda h, _: (jnp.tanh(inner(p.cell, h)), None), x, None, length=3)[0]


def in_cond(p: Any, x: jax.Array) -> jax.Array:
    return jax.lax.cond(x.sum() > 0, lambda x: inner(p.yes, x), lambda x: inner(p.no, x), x)


def in_while(p: Any, x: jax.Array) -> jax.Array:
    return jax.lax.while_loop(lambda x: x.sum() > 1e6, lambda x: inner(p.body, x), x)


def in_vmap(p: Any, x: jax.Array) -> jax.Array:
    return jax.vmap(lambda row: inner(p.row, row))(x)


def in_vmap_as_argument(p: Any, x: jax.Array) -> jax.Array:
    return jax.vmap(inner, in_axes=(None, 0))(p.row, x)


def in_jit(p: Any, x: jax.Array) -> jax.Array:
    return jax.jit(lambda x: inner(p.a, x))(x) + jax.jit(inner)(p.b, x)


def in_checkpoint(p: Any, x: jax.Array) -> jax.Array:
    return jax.checkpoint(lambda x: inner(p.a, x))(x) + jax.checkpoint(inner)(p.b, x)


def in_grad(p: Any, x: jax.Array) -> jax.Array:
    return jax.grad(lambda x: inner(p.a, x).sum())(x)


def in_map_and_fori(p: Any, x: jax.Array) -> jax.Array:
    x = jax.lax.map(lambda row: inner(p.a, row), x)
    return jax.lax.fori_loop(0, 2, lambda i, x: inner(p.b, x), x)


def in_custom_jvp(p: Any, x: jax.Array) -> jax.Array:
    return jax.nn.relu(jax.jit(jax.checkpoint(lambda x: jax.vmap(lambda r: inner(p.a, r))(x)))(x))


INSIDE = [in_scan, in_cond, in_while, in_vmap, in_vmap_as_argument, in_jit, in_checkpoint, in_grad,
          in_map_and_fori, in_custom_jvp]  # fmt: skip


@pytest.mark.parametrize("model", INSIDE)
@pytest.mark.parametrize(
    ("wrap", "leaks"),
    [
        pytest.param(lambda f: f, False, id="plain"),
        # The search for leaks turns jax's caches off, which makes a test ten times as long.
        pytest.param(lambda f: f, True, id="leaks", marks=pytest.mark.slow),
        pytest.param(jax.jit, True, id="jit", marks=pytest.mark.slow),
        pytest.param(jax.checkpoint, True, id="checkpoint", marks=pytest.mark.slow),
    ],
)
def test_models_may_use_transforms(model: Any, wrap: Any, leaks: bool, key: jax.Array) -> None:
    with jax.check_tracer_leaks(leaks):
        params = pt.init(wrap(model), key, X)
        for path in params:
            assert params[path].weight.shape == (4, 4)
        assert jax.jit(model)(params, X).shape == X.shape
        assert flatten(pt.init(wrap(model), key, X))[0] is flatten(params)[0]
        if model is not in_while:
            grads = jax.grad(lambda p: model(p, X).sum())(params)
            assert flatten(grads)[0] is flatten(params)[0]


def test_init_inside_jit_of_a_model_with_transforms(key: jax.Array) -> None:
    with jax.check_tracer_leaks():
        params = jax.jit(lambda k, x: pt.init(in_scan, k, x))(key, X)
    jax.tree.map(np.testing.assert_array_equal, params, pt.init(in_scan, key, X))


def test_the_same_scope_twice_is_shared_and_must_agree(key: jax.Array) -> None:
    def twice(p: Any, x: jax.Array) -> jax.Array:
        return inner(p.d, inner(p.d, x))

    assert len(jax.tree.leaves(pt.init(twice, key, X))) == 2
    with pytest.raises(
        pt.MismatchError, match=r"`d_weight` was declared as param \(4, 3\) float32 and now as"
    ):
        pt.init(lambda p, x: inner(p.d, inner(p.d, x)), key, X[:, :3])


def test_a_leaf_that_was_declared_can_be_read(key: jax.Array) -> None:
    def model(p: Any, ids: jax.Array) -> jax.Array:
        h = nn.Embedding(5, 4)(p.embed, ids)
        return h @ p.embed.weight.T + p["embed/weight"].sum()

    params = pt.init(model, key, jnp.arange(3))
    assert list(pt.collect(params)) == ["embed_weight"]
    assert model(params, jnp.arange(3)).shape == (3, 5)


@pytest.mark.parametrize(
    ("model", "kind", "text"),
    [
        (lambda p, x: x @ p.embed.weight.T, pt.MissingError, "`embed_weight` is used as an array before"),
        (lambda p, x: p.items.param("w", (), init.One()), pt.ParamTreeError, r"write p\['items'\]"),
        (lambda p, x: p.param("a/b", (), init.One()), pt.ParamTreeError, "'a/b' cannot name a leaf"),
        (lambda p, x: p[0], pt.ParamTreeError, "read by name"),
        (lambda p, x: p.d.param("w", (x.sum(),), init.One()), pt.MismatchError, "`d_w` is declared with shape"),
        (lambda p, x: p.d.param("w", (-1,), init.One()), pt.MismatchError, "`d_w` is declared with shape"),
        (lambda p, x: p.d.param("w", (2,), 0.5), TypeError, "the initializer of `d_w` is 0.5; expected a function"),
        (lambda p, x: (p.w.param("a", (), init.One()), p.param("w", (), init.One())), pt.MismatchError,
         "`w` is declared as a leaf, and is also a level"),
        (lambda p, x: (p.param("w", (), init.One()), p["w/a"]), pt.MismatchError, "`w` is a leaf: it has no `a`"),
        (lambda p, x: (p.param("w", (), init.One()), p.state("w", (), init.One())), pt.MismatchError,
         "declared as param .* now as state"),
        (lambda p, x: p.bn.update("mean", x), pt.MissingError, "`bn_mean` is written before it is declared"),
    ],
)  # fmt: skip
def test_mistakes_in_a_model_are_named(model: Any, kind: type, text: str, key: jax.Array) -> None:
    with pytest.raises(kind, match=text):
        pt.init(model, key, X)


# Calling with the wrong tree


def test_a_wrong_tree_is_named(key: jax.Array) -> None:
    net = nn.Sequential(nn.Sequential(nn.Dense(6), nn.Dense(5)), nn.Dense(2))
    params = pt.init(net, key, X)
    full = r"the model needs a leaf `sequential0_dense1_weight` of shape \(5, 6\)"
    with pytest.raises(pt.MissingError, match=full):
        net(pt.from_tree({"sequential0": {"dense0": params[0][0]}}), X)
    with pytest.raises(
        pt.MismatchError, match=r"`sequential0_dense0_weight` has shape \(6, 4\).*needs \(6, 3\)"
    ):
        net(params, X[:, :3])
    with pytest.raises(
        pt.MismatchError, match=r"`sequential0_dense1_weight` has shape \(5, 6\).*needs \(5, 4\)"
    ):
        nn.Dense(5)(params.sequential0.dense1, X)
    for swapped in (lambda: net(X, params), lambda: net(params.to_dict(), X)):
        with pytest.raises(TypeError, match="its parameters first.*pt.from_tree"):
            swapped()
    with pytest.raises(TypeError, match="parameters first"):
        nn.Dense(2)(X, params)
    with pytest.raises(pt.MissingError, match="`weight` is a level, not a leaf"):
        nn.Dense(2)(pt.from_tree({"weight": {"x": 1}}), X)
    with pytest.raises(TypeError, match="called with a parameter tree first, but found dict"):
        pt.training(net)({}, X)


# Training


class Counter(nn.Layer):
    """Counts its calls in training."""

    def __call__(self, p: Any, x: jax.Array) -> jax.Array:
        count = p.state("count", (), init.Zero(), jnp.int32)
        if p.training:
            p.update("count", count + 1)
        return x


def test_training_returns_what_was_written(key: jax.Array) -> None:
    net = nn.Sequential(nn.Dense(4), Counter(), counter := Counter(), counter)
    params = pt.init(net, key, X)
    assert list(pt.collect(params, kind="state")) == ["counter0_count", "counter1_count"]
    step = jax.jit(pt.training(net))
    for _ in range(3):
        _, params = step(params, X)
    assert int(params.counter0.count) == 3
    assert int(params.counter1.count) == 6  # tied: written twice a call, and read back in between
    y = net(params, X)
    np.testing.assert_allclose(y, step(params, X)[0], rtol=1e-6)
    (loss, new), grads = jax.value_and_grad(
        lambda w, p: (lambda y, q: (y.sum(), q))(
            *pt.training(net)(pt.replace(p, {"dense0_weight": w}), X)
        ),
        has_aux=True,
    )(params.dense0.weight, params)
    assert int(new.counter0.count) == 4 and flatten(new)[0] is flatten(params)[0]


def test_equal_models_share_a_compiled_training_step(key: jax.Array) -> None:
    assert pt.training(nn.Dense(3)) == pt.training(nn.Dense(3))
    assert hash(pt.training(nn.Dense(3))) == hash(pt.training(nn.Dense(3)))


def test_a_sub_tree_trains_by_itself(key: jax.Array) -> None:
    net = nn.Sequential(nn.Dense(4), Counter())
    params = pt.init(net, key, X)
    _, counter = pt.training(Counter())(params.counter0, X)
    assert int(counter.count) == 1 and list(counter) == ["count"]


def test_dropout_survives_transforms_as_argument_and_closure(key: jax.Array) -> None:
    drop = nn.Dropout(0.5)

    def model(p: Any, x: jax.Array) -> jax.Array:
        a = jax.checkpoint(drop)(p.a, x)
        b = jax.lax.cond(True, lambda x: drop(p.b, x), lambda x: x, x)
        c = pt.scan(lambda p, c, _: (drop(p, c), None), p.c, x, length=1)[0]
        return jnp.stack([a, b, c])

    x = jnp.ones((8, 8))
    params = pt.init(model, key, x)
    y, _ = pt.training(model)(params, x, key=key)
    assert ((y == 0) | (y == 2)).all()
    assert len({tuple(np.asarray(one).ravel()) for one in y}) == 3
    assert (model(params, x) == 1).all()
    np.testing.assert_array_equal(y, jax.jit(pt.training(model))(params, x, key=key)[0])


@pytest.mark.parametrize(
    "inside",
    [
        lambda f, x: jax.lax.scan(lambda c, _: (f(c), None), x, None, length=2)[0],
        lambda f, x: jax.checkpoint(f)(x),
        lambda f, x: jax.jit(f)(x),
        lambda f, x: jax.vmap(f)(x),
        lambda f, x: jax.lax.cond(True, f, f, x),
    ],
    ids=["scan", "checkpoint", "jit", "vmap", "cond"],
)
def test_a_write_that_cannot_get_out_is_an_error(inside: Any, key: jax.Array) -> None:
    def model(p: Any, x: jax.Array) -> jax.Array:
        return inside(lambda x: Counter()(p.counter, x), x)

    params = pt.init(model, key, X)
    model(params, X)
    for call in (pt.training(model), jax.jit(pt.training(model))):
        with pytest.raises(pt.ScopeError, match="`counter_count` is written inside a jax transform"):
            call(params, X)
    with pytest.raises(pt.ScopeError, match="`counter_count` is written inside a jax transform"):
        pt.training(lambda p, x: jax.checkpoint(Counter())(p.counter, x))(params, X)


def test_writing_and_drawing_where_one_cannot(key: jax.Array) -> None:
    writes = lambda p, x: p.bn.update("mean", x)  # noqa: E731  # a model in one line
    params = pt.from_tree({"bn": {"mean": jnp.zeros(2)}})
    with pytest.raises(pt.ScopeError, match=r"`bn_mean` cannot be written.*pt.training\(model\)"):
        writes(params, jnp.ones(2))
    assert pt.training(writes)(params, jnp.ones(2))[1].bn.mean.sum() == 2
    with pytest.raises(pt.ScopeError, match="`bn` draws random numbers.*key=key"):
        (lambda p: p.bn.key())(params)
    with pytest.raises(pt.ScopeError, match="`bn` draws random numbers, but no key was given"):
        pt.training(lambda p: p.bn.key())(params)
    with pytest.raises(
        pt.MismatchError, match=r"`bn_mean` holds float32\(2,\) and cannot be given float32\(3,\)"
    ):
        pt.training(writes)(params, jnp.ones(3))
    with pytest.raises(pt.MissingError, match="`bn_var` is not in `bn`"):
        pt.training(lambda p: p.bn.update("var", 0))(params)
    with pytest.raises(TypeError, match="expected a PRNG key"):
        pt.training(mlp)(params, X, key=3)


def test_a_training_scope_reads_like_the_tree(key: jax.Array) -> None:
    def model(p: Any, x: jax.Array) -> jax.Array:
        assert p.training and p.hidden.training
        assert list(p) == ["hidden", "scale", "out"] and "hidden/weight" in p and len(p) == 3
        assert p[0].weight is p.hidden.weight and repr(p.hidden).startswith("Parameter hidden_weight")
        with pytest.raises(pt.ImmutableError, match="cannot be assigned"):
            p.scale = 1
        return mlp(p, x)

    params = pt.init(mlp, key, X)
    y, same = pt.training(model)(params, X)
    np.testing.assert_array_equal(y, mlp(params, X))
    assert flatten(same)[0] is flatten(params)[0] and same.scale is params.scale


def test_a_key_from_outside_of_a_traced_function() -> None:
    net = pt.nn.Sequential(pt.nn.Dense(3), pt.nn.Dense(3, bias_initializer=pt.initializers.Constant(2)))
    key = jax.random.key(0)
    wanted = pt.collect(net.init(key, X))
    for found in (
        jax.jit(lambda x: net.init(key, x))(X),
        jax.vmap(lambda x: net.init(key, x))(X[None]),
    ):
        for name, leaf in pt.collect(found).items():
            np.testing.assert_allclose(leaf.reshape(wanted[name].shape), wanted[name], rtol=1e-6)
    shapes = jax.eval_shape(lambda: net.init(key, X))
    assert shapes.dense1.bias == jax.ShapeDtypeStruct((3,), jnp.float32)
