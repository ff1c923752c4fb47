"""One scope: whatever a model does with its scope, a model in training never stops training in silence."""

import copy
import functools
import hashlib
import itertools
import pickle
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramtree as pt
from paramtree import initializers as init
from paramtree import nn

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (4, 6, 8))


def weights(name: str, leaf: Any) -> bool:
    return name.endswith(("weight", "gamma"))


LAYERS: dict[str, Any] = {
    "dropout": nn.Sequential(nn.Dense(8, flatten=False), nn.Dropout(0.5)),
    "batchnorm": nn.Sequential(nn.Dense(8, flatten=False), nn.BatchNorm()),
    "cache": nn.Sequential(nn.MultiHeadAttention(2, causal=True, cache=16)),
}

KEEPING: dict[str, Callable[[Any], Any]] = {
    "cast": lambda p: pt.cast(p, {".*": None}),
    "cast to what it is": lambda p: pt.cast(p, jnp.float32),
    "replace": lambda p: pt.replace(p, {}),
    "map_named": lambda p: pt.map_named(lambda name, leaf: leaf, p),
    "map_named of a pattern": lambda p: pt.map_named(lambda name, leaf: leaf, p, ".*"),
    "tree.map": lambda p: jax.tree.map(lambda leaf: leaf, p),
    "tree.map of two": lambda p: jax.tree.map(lambda a, b: b, p, p),
    "select": lambda p: pt.select(p, ".*"),
    "merge and partition": lambda p: pt.merge(*pt.partition(p, weights)),
    "merge, the other way": lambda p: pt.merge(*reversed(pt.partition(p, ".*weight"))),
    "merge and partition by kind": lambda p: pt.merge(*pt.partition(p, kind="param")),
    "tie": lambda p: pt.tie(p, {}),
    "untie": lambda p: pt.untie(p),
    "in a dict": lambda p: pt.cast({"a": p}, {".*": None})["a"],
    "unpack": lambda p: pt.unpack(p),
    "mask": lambda p: jax.tree.map(lambda leaf, keep: leaf if keep else 0, p, pt.mask(p, ".*")),
    "labels": lambda p: jax.tree.map(lambda leaf, _: leaf, p, pt.labels(p, {".*": "all"})),
    "copy": copy.copy,
}

# These change names or values, or take a scope for a tree: each may raise, but not stop training.
CHANGING: dict[str, Callable[[Any], Any]] = {
    "stop_gradient": jax.lax.stop_gradient,
    "deepcopy": copy.deepcopy,
    "collect": lambda p: pt.collect(p),
    "collect by path": lambda p: pt.collect(p, sep="/"),
    "rename": lambda p: pt.rename(p, [("0", "0")]),
    "rename away": lambda p: pt.rename(pt.rename(p, [("0/", "9/")]), [("9/", "0/")]),
    "drop": lambda p: pt.drop(p, ".*bias"),
    "insert": lambda p: pt.insert(p, {"extra": jnp.ones(2)}),
    "from_tree": pt.from_tree,
    "from_tree of a dict": lambda p: pt.from_tree({"a": p}).a,
    "pack": lambda p: pt.pack(p),
    "unpack and pack": lambda p: pt.unpack(pt.pack(p)),
    "stack and unstack": lambda p: pt.stack(pt.unstack(p, ".*"), ".*"),
    "pickle": lambda p: pickle.loads(pickle.dumps(p)),
    "reinit": lambda p: pt.reinit(p, KEY, {".*": lambda key, shape, dtype: jnp.zeros(shape, dtype)}),
}


def in_checkpoint(model: Any) -> Any:
    return lambda p, x: jax.checkpoint(model)(p, x)


def in_scan(model: Any) -> Any:
    return lambda p, x: pt.scan(lambda p, c, _: (model(p, c), None), p, x, length=2)[0]


def in_grad(model: Any) -> Any:
    def call(p: Any, x: Any) -> Any:
        return jax.grad(lambda x: model(p, x).sum())(x)

    return call


WITHIN: dict[str, Callable[[Any], Any]] = {
    "itself": lambda model: model,
    "checkpoint": in_checkpoint,
    "grad": in_grad,
    "Repeat": lambda model: nn.Repeat(model, 2),
    "Vmap": lambda model: nn.Vmap(model, 2, in_axes=None, out_axes=1),
    "scan": in_scan,
}


def traced(run: Callable[..., Any], *args: Any) -> Any:
    """The program of a run, or the error that it may raise."""
    try:
        return str(jax.make_jaxpr(run)(*args))
    except pt.ScopeError as error:
        return error


RUNS: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "inference": lambda model: lambda params, x, key: model(params, x),
    "training": lambda model: lambda params, x, key: pt.training(model)(params, x, key=key),
    "training in jit": lambda model: jax.jit(
        lambda params, x, key: pt.training(model)(params, x, key=key)
    ),
    "training in grad": lambda model: (
        lambda params, x, key: pt.grad(
            lambda p: (lambda y, new: (y.sum(), new))(*pt.training(model)(p, x, key=key)), has_aux=True
        )(params)
    ),
}


RARE = pytest.mark.slow  # each is another way through code that the others go through, too


@pytest.mark.parametrize(
    "within",
    [pytest.param(w, marks=RARE) if w in ("checkpoint", "Vmap", "grad", "scan") else w for w in WITHIN],
)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_verb_on_a_scope_keeps_its_run(layer: str, within: str) -> None:
    """The programs are the same, equation for equation, or an error says what to write."""
    net, around = LAYERS[layer], WITHIN[within]
    params = pt.abstract(around(net), X)
    expected = {name: traced(run(around(net)), params, X, KEY) for name, run in RUNS.items()}
    if within in ("itself", "Repeat", "Vmap", "scan"):
        assert not any(isinstance(program, pt.ScopeError) for program in expected.values())
        assert len({*expected.values()}) == len(RUNS)  # training is not inference
    for verb, apply in KEEPING.items():
        model = around(lambda p, x, apply=apply: net(apply(p), x))
        assert jax.tree.structure(pt.abstract(model, X)) == jax.tree.structure(params), verb
        for name, run in RUNS.items():
            found = traced(run(model), params, X, KEY)
            if isinstance(expected[name], pt.ScopeError):
                assert isinstance(found, pt.ScopeError), (verb, name)
            else:
                assert found == expected[name], (verb, name)
    for verb, apply in CHANGING.items():
        model = around(lambda p, x, apply=apply: net(apply(p), x))
        for name, run in RUNS.items():
            try:
                found = traced(run(model), params, X, KEY)
            except (pt.ParamTreeError, TypeError):
                continue
            if not isinstance(found, pt.ScopeError):
                assert trains(found, layer) == (name != "inference"), (verb, name)


def trains(program: str, layer: str) -> bool:
    marks = {
        "dropout": "random_bits",
        "batchnorm": r"mul 0\.1",
        "cache": "dynamic_update_slice|scatter",
    }
    return re.search(marks[layer], program) is not None


# Draws and writes in transforms

DROP = nn.Dropout(0.5)
ONES = jnp.ones((64,))


def drop(p: Any) -> Any:
    return DROP(p, ONES)


@jax.custom_vjp
def with_rule(mask: jax.Array) -> jax.Array:
    return mask


with_rule.defvjp(lambda mask: (mask, None), lambda _, g: (g,))


def twice(transform: Callable[..., Any], argument: bool) -> Callable[[Any], Any]:
    """A function that is called twice, with the scope as its argument or closed over."""

    def model(p: Any) -> Any:
        if argument:
            f = transform(drop)
            return jnp.stack([f(p), f(p)])
        f = transform(lambda x: DROP(p, x))
        return jnp.stack([f(ONES), f(ONES)])

    return model


def fori(p: Any) -> Any:
    return jax.lax.fori_loop(0, 2, lambda i, ys: ys.at[i].set(drop(p)), jnp.zeros((2, 64)))


def while_loop(p: Any) -> Any:
    def step(state: Any) -> Any:
        i, ys = state
        return i + 1, ys.at[i].set(drop(p))

    return jax.lax.while_loop(lambda s: s[0] < 2, step, (0, jnp.zeros((2, 64))))[1]


def scan(body: Callable[..., Any], n: int = 3) -> Any:
    return jax.lax.scan(lambda c, x: (c, body(x)), 0, jnp.arange(n))[1]


def both(p: Any, branch: Callable[..., Any]) -> Any:
    return jnp.stack([branch(p), branch(p)])


DRAWS: dict[str, tuple[Callable[[Any], Any], bool]] = {  # a model, and whether it works
    "twice": (lambda p: both(p, drop), True),
    "scan": (lambda p: scan(lambda _: drop(p)), False),
    "scan in scan": (lambda p: scan(lambda _: scan(lambda _: drop(p))).reshape(9, 64), False),
    "cond in scan": (
        lambda p: scan(lambda i: jax.lax.cond(i > 0, lambda: drop(p), lambda: drop(p))),
        False,
    ),
    "jit in scan, as argument": (lambda p: scan(lambda _: jax.jit(drop)(p)), False),
    "map": (lambda p: jax.lax.map(lambda _: drop(p), jnp.arange(3)), False),
    "fori_loop": (fori, False),
    "while_loop": (while_loop, False),
    "vmap": (lambda p: jax.vmap(lambda _: drop(p))(jnp.arange(3)), False),
    "vmap with the scope as argument": (
        lambda p: jax.vmap(lambda p, _: drop(p), in_axes=(None, 0))(p, jnp.arange(3)),
        False,
    ),
    "jit, closed over": (twice(jax.jit, False), False),
    "jit, as argument": (twice(jax.jit, True), True),
    "checkpoint, closed over": (twice(jax.checkpoint, False), False),
    "checkpoint, as argument": (twice(jax.checkpoint, True), True),
    "jit, a mapped scope closed over": (
        lambda p: both(p, lambda p: jax.jit(lambda x: DROP(jax.tree.map(jnp.abs, p), x))(ONES)),
        False,
    ),
    "jit in jit, as argument": (lambda p: both(p, jax.jit(jax.jit(drop))), True),
    "jit in checkpoint, closed over": (
        lambda p: both(p, jax.checkpoint(lambda p: jax.jit(lambda x: DROP(p, x))(ONES))),
        False,
    ),
    "Repeat": (
        lambda p: jnp.stack([nn.Repeat(DROP, 2)(p.a, ONES), nn.Repeat(DROP, 2)(p.a, ONES)]),
        True,
    ),
    "Vmap": (lambda p: nn.Vmap(DROP, 3, in_axes=None)(p.a, ONES), True),
    "Vmap twice": (
        lambda p: jnp.concatenate([nn.Vmap(DROP, 3, in_axes=None)(p.a, ONES) for _ in range(2)]),
        True,
    ),
    "pt.scan": (lambda p: pt.scan(lambda p, c, _: (c, drop(p)), p, 0, length=3)[1], True),
    "pt.scan in pt.scan": (
        lambda p: pt.scan(
            lambda p, c, _: pt.scan(lambda p, c, _: (c, drop(p)), p, c, length=2), p, 0, length=2
        )[1].reshape(4, 64),
        True,
    ),
    "scan in pt.scan": (
        lambda p: pt.scan(lambda p, c, _: (c, scan(lambda _: drop(p))), p, 0, length=2)[1],
        False,
    ),
    "cond": (lambda p: both(p, lambda p: jax.lax.cond(True, drop, drop, p)), True),
    "cond, closed over": (
        lambda p: both(p, lambda p: jax.lax.cond(True, lambda: drop(p), lambda: ONES)),
        True,
    ),
    "switch": (lambda p: both(p, lambda p: jax.lax.switch(jnp.int32(1), [drop, drop], p)), True),
    "custom_vjp": (lambda p: both(p, lambda p: with_rule(drop(p))), True),
    "grad": (lambda p: both(p, lambda p: jax.grad(lambda x: DROP(p, x).sum())(ONES)), True),
    "value_and_grad of checkpoint": (
        lambda p: both(p, lambda p: jax.grad(lambda x: jax.checkpoint(DROP)(p, x).sum())(ONES)),
        True,
    ),
    "pt.grad": (
        lambda p: both(p, lambda p: pt.grad(lambda q: (q.w * drop(q)).sum())(p).w),
        True,
    ),
}


def draws(p: Any, name: str) -> Any:
    p.param("w", (64,), init.One())
    return DRAWS[name][0](p)


@pytest.mark.parametrize(
    "how",
    [
        "eager",
        "jit",
        "vmap",
        *(pytest.param(how, marks=RARE) for how in ("grad", "training inside jit of jit")),
    ],
)
@pytest.mark.parametrize("name", DRAWS)
def test_every_draw_differs_or_raises(name: str, how: str) -> None:
    params = pt.from_tree({"w": jnp.ones(64), "a": {}})
    trained = pt.training(draws)

    def run(params: Any, key: Any) -> Any:
        return trained(params, name, key=key)[0]

    calls: dict[str, Callable[[], Any]] = {
        "eager": lambda: run(params, KEY),
        "jit": lambda: jax.jit(run)(params, KEY),
        "grad": lambda: jax.jacrev(lambda x: run(params, KEY) * x)(1.0),
        "vmap": lambda: jax.vmap(run, (None, 0))(params, jax.random.split(KEY, 2)),
        "training inside jit of jit": lambda: jax.jit(jax.jit(run))(params, KEY),
    }
    works = DRAWS[name][1]
    if how == "vmap" and name == "pt.grad":
        works = True
    if not works:
        with pytest.raises(pt.ScopeError, match="draws random numbers inside a jax transform"):
            calls[how]()
        return
    masks = calls[how]()
    masks = np.asarray(masks).reshape(-1, 64)
    assert len(masks) >= 2
    for a, b in itertools.combinations(masks, 2):
        assert (a != b).any()
    for mask in masks:
        assert 0 < (mask != 0).sum() < 64


def test_a_draw_folds_its_path_and_number_in_once() -> None:
    def model(p: Any) -> Any:
        return [jax.random.key_data(key) for key in (p.a.key(), p.a.b.key(), p.a.key())]

    def digest(name: str) -> Any:
        return np.uint32(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()[:4]))

    keys = pt.training(model)(pt.from_tree({"a": {"b": {}}}), key=KEY)[0]
    for key, name in zip(keys, ("a/1", "a/b/1", "a/2"), strict=True):
        want = jax.random.fold_in(KEY, digest(name))
        np.testing.assert_array_equal(key, jax.random.key_data(want))
    folds = str(
        jax.make_jaxpr(lambda key: pt.training(model)(pt.from_tree({"a": {"b": {}}}), key=key))(KEY)
    )
    assert folds.count("random_fold_in") == 3


def test_draws_whose_hashes_collide_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    last = np.array([2**32 - 1, 0], np.uint32)
    monkeypatch.setattr("paramtree.initializers.keys.path_words", lambda path: last)

    def model(p: Any) -> Any:
        return jnp.stack([jax.random.key_data(q.key()) for q in (p.a, p.b, p.a, p.b)])

    params = pt.from_tree({"a": {}, "b": {}})
    keys = np.asarray(pt.training(model)(params, key=KEY)[0])
    assert len({key.tobytes() for key in keys}) == 4
    np.testing.assert_array_equal(keys, jax.jit(pt.training(model))(params, key=KEY)[0])


def test_a_draw_in_a_custom_rule_raises_or_differs() -> None:
    def model(p: Any) -> Any:
        @jax.custom_vjp
        def dropped(x: Any) -> Any:
            return DROP(p, x)

        dropped.defvjp(lambda x: (DROP(p, x), None), lambda _, g: (g,))
        return jnp.stack([dropped(ONES), dropped(ONES)])

    for run in (pt.training(model), jax.jit(pt.training(model))):
        try:
            masks = np.asarray(run(pt.from_tree({}), key=KEY)[0])
        except pt.ScopeError as error:
            message = str(error)
        else:
            message = "draws random numbers" if (masks[0] != masks[1]).any() else "one mask"
        assert "draws random numbers" in message


def test_an_inner_function_is_traced_anew_in_each_training_call() -> None:
    inner = jax.jit(drop)
    model = pt.training(lambda p: inner(p))
    empty = pt.from_tree({})
    masks = [model(empty, key=jax.random.key(i))[0] for i in range(4)]
    for a, b in itertools.combinations(masks, 2):
        assert (a != b).any()
    assert (model(empty, key=jax.random.key(0))[0] == masks[0]).all()


def test_what_an_error_about_a_draw_advises_works() -> None:
    empty = pt.from_tree({"block": {}})

    def run(model: Any) -> Any:
        return pt.training(model)(empty, key=KEY)[0]

    with pytest.raises(pt.ScopeError, match=r"there is pt\.scan\(body, p, carry, xs\)"):
        run(lambda p: scan(lambda _: drop(p.block)))
    run(lambda p: pt.scan(lambda p, c, x: (c, drop(p)), p.block, 0, jnp.arange(3)))
    with pytest.raises(pt.ScopeError, match=r"nn\.Vmap"):
        run(lambda p: jax.vmap(lambda _: drop(p.block))(jnp.arange(3)))
    run(lambda p: nn.Vmap(DROP, 3, in_axes=None)(p.block, ONES))
    with pytest.raises(pt.ScopeError, match=r"as an argument, as in `jit\(layer\)\(p\['block'\], x\)`"):
        run(lambda p: jax.jit(lambda x: DROP(p.block, x))(ONES))
    run(lambda p: jax.jit(DROP)(p["block"], ONES))
    with pytest.raises(pt.ScopeError, match=r"`checkpoint\(layer\)\(p\['block'\], x\)`"):
        run(lambda p: jax.checkpoint(lambda x: DROP(p.block, x))(ONES))
    run(lambda p: jax.checkpoint(DROP)(p["block"], ONES))


@pytest.mark.parametrize("transform", [jax.checkpoint, jax.jit], ids=["checkpoint", "jit"])
def test_what_an_error_about_a_write_advises_works(transform: Any) -> None:
    norm = nn.BatchNorm()

    def plain(p: Any, x: Any) -> Any:
        return transform(norm)(p.block, x)

    def advised(p: Any, x: Any) -> Any:
        y, new = transform(pt.training(norm))(p["block"], x)
        p.update("block", new)
        return y

    params = pt.init(plain, KEY, X)
    with pytest.raises(pt.ScopeError, match="written inside a jax transform") as info:
        pt.training(plain)(params, X)
    name = transform.__name__.replace("remat", "checkpoint")
    assert f"`y, new = {name}(pt.training(layer))(p['block'], x)`" in str(info.value)
    assert "`p.update('block', new)`" in str(info.value)
    assert jax.tree.structure(pt.init(advised, KEY, X)) == jax.tree.structure(params)
    y, new = pt.training(advised)(params, X)
    want, expected = pt.training(lambda p, x: norm(p.block, x))(params, X)
    np.testing.assert_allclose(y, want, rtol=1e-6)
    pt.testing.assert_trees_close(new, expected)
    with pytest.raises(pt.ScopeError, match="called for inference"):
        advised(params, X)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: jax.lax.scan(lambda c, _: (f(), None), X, None, length=2)[0],
        lambda f: jax.lax.fori_loop(0, 2, lambda i, c: f(), X),
        lambda f: jax.vmap(lambda i: f())(jnp.arange(2)),
        lambda f: jax.lax.cond(True, f, f),
        lambda f: jax.checkpoint(f)(),
        lambda f: jax.jit(f)(),
        lambda f: jax.grad(lambda s: (f() * s).sum())(1.0),
    ],
    ids=["scan", "fori", "vmap", "cond", "checkpoint", "jit", "grad"],
)
def test_a_write_that_cannot_get_out_raises(transform: Any) -> None:
    norm = nn.BatchNorm()
    params = pt.init(norm, KEY, X)
    with pytest.raises(pt.ScopeError, match="`running_mean` is written inside a jax transform"):
        pt.training(lambda p, x: transform(lambda: norm(p, x)))(params, X)


# Recording


def test_verbs_at_init_take_effect_when_a_leaf_is_read() -> None:
    def low(p: Any, x: Any) -> Any:
        p = pt.cast(p, {"norm_.*": None, ".*": jnp.bfloat16})
        h = nn.Dense(4, flatten=False)(p.dense, x.astype(jnp.bfloat16))  # promotion is strict
        return nn.BatchNorm()(p.norm, h.astype(jnp.float32))

    params = pt.init(low, KEY, X)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert list(pt.collect(params)) == [
        "dense_weight", "dense_bias", "norm_gamma", "norm_beta", "norm_running_mean", "norm_running_var",
    ]  # fmt: skip
    _, new = pt.training(low)(params, X)
    assert new.norm.running_mean.dtype == jnp.float32
    assert (new.norm.running_mean != params.norm.running_mean).all()

    def mapped(p: Any, x: Any) -> Any:
        p = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), p)
        return nn.Dense(4, flatten=False)(p.dense, x.astype(jnp.bfloat16))

    assert pt.init(mapped, KEY, X).dense.weight.dtype == jnp.float32


def test_a_pattern_that_matches_nothing_raises_at_init() -> None:
    net = nn.Sequential(nn.Dense(4), nn.Dense(2))
    for verb in (
        lambda p: pt.cast(p, {".*weigth": jnp.bfloat16}),
        lambda p: pt.select(p, ".*weigth"),
        lambda p: pt.replace(p, {"dense0_weigth": 1.0}),
        lambda p: pt.map_named(p, {".*weigth": lambda name, leaf: leaf}),
    ):
        with pytest.raises(pt.RuleError, match="weigth"):
            pt.init(lambda p, x, verb=verb: net(verb(p), x), KEY, X)


def test_a_model_that_ties_is_initialised_with_the_tie() -> None:
    def model(p: Any, x: Any) -> Any:
        p = pt.tie(p, {"b": "a"})
        return nn.Dense(8, flatten=False)(p.b, nn.Dense(8, flatten=False)(p.a, x))

    params = pt.init(model, KEY, X)
    assert pt.ties(params) == {"b_weight": "a_weight", "b_bias": "a_bias"}
    assert model(params, X).shape == X.shape


def test_one_trace_is_enough_without_verbs() -> None:
    traces = []

    def model(p: Any, x: Any) -> Any:
        traces.append(None)
        return jax.checkpoint(nn.Dense(8, flatten=False))(p.dense, x)

    pt.init(model, KEY, X)
    assert len(traces) == 1


def scaled(scale: float, key: Any, shape: Any, dtype: Any) -> Any:
    return scale * jnp.ones(shape, dtype)


def test_initializers_of_one_leaf_must_agree() -> None:
    def twice(one: Any, other: Any) -> Any:
        def model(p: Any) -> Any:
            return p.param("w", (2,), one) + p.param("w", (2,), other)

        return model

    pt.init(twice(init.Normal(0.1), init.Normal(0.1)), KEY)
    pt.init(twice("zeros", init.Zero()), KEY)
    for make in (
        lambda scale: lambda key, shape, dtype: scale * jnp.ones(shape, dtype),
        lambda scale: jax.nn.initializers.normal(scale),
        lambda scale: functools.partial(scaled, scale),
    ):
        pt.init(twice(make(2.0), make(2.0)), KEY)
    with pytest.raises(pt.MismatchError, match=r"`w` was declared with the initializer Normal.*Zero"):
        pt.init(twice(init.Normal(0.1), init.Zero()), KEY)
    with pytest.raises(pt.MismatchError, match="`w` was declared with the initializer"):
        pt.init(twice(lambda k, s, d: jnp.ones(s, d), lambda k, s, d: jnp.zeros(s, d)), KEY)
    with pytest.raises(pt.MismatchError, match="`w` was declared with the initializer"):
        pt.init(twice(jax.nn.initializers.normal(1.0), jax.nn.initializers.normal(2.0)), KEY)


# Names of children


@pytest.mark.parametrize(
    "name", ["write", "can_draw", "make", "_x", "run", "cells", "children", "repeated"]
)
def test_a_child_may_have_any_name(name: str) -> None:
    def model(p: Any, x: Any) -> Any:
        return nn.Dense(3)(getattr(p, name), x)

    params = pt.init(model, KEY, X)
    assert list(params) == [name]
    want = model(params, X)
    np.testing.assert_array_equal(pt.training(model)(params, X)[0], want)


@pytest.mark.parametrize(
    "name", ["param", "state", "items", "keys", "values", "to_dict", "key", "update"]
)
def test_a_child_with_the_name_of_a_method_is_read_by_item(name: str) -> None:
    def by_attribute(p: Any, x: Any) -> Any:
        return nn.Dense(3)(getattr(p, name), x)

    def by_item(p: Any, x: Any) -> Any:
        return nn.Dense(3)(p[name], x)

    params = pt.init(by_item, KEY, X)
    want = by_item(params, X)
    np.testing.assert_array_equal(pt.training(by_item)(params, X)[0], want)
    calls = [lambda: pt.init(by_attribute, KEY, X), lambda: pt.training(by_attribute)(params, X)]
    if name not in ("key", "update"):  # these are children of a tree
        calls.append(lambda: by_attribute(params, X))
    for call in calls:
        with pytest.raises(pt.ParamTreeError, match=rf"write p\['{name}'\]"):
            call()


def test_an_attention_layer_has_a_child_called_key() -> None:
    net = nn.Sequential(nn.MultiHeadAttention(2))
    params = pt.init(net, KEY, X)
    assert params.multiheadattention0.key.weight.shape == (8, 8)


# Other cases


def test_state_written_through_one_scope_is_not_read_stale_from_another() -> None:
    net = LAYERS["cache"]
    params = pt.init(net, KEY, X)

    def stale(p: Any, x: Any) -> Any:
        half = pt.cast(p, jnp.float32)
        net(p, x[:, :3])
        return net(half, x[:, 3:])

    def fresh(p: Any, x: Any) -> Any:
        net(pt.cast(p, jnp.float32), x[:, :3])
        return net(pt.cast(p, jnp.float32), x[:, 3:])

    def one(p: Any, x: Any) -> Any:
        half = pt.cast(p, jnp.float32)
        net(half, x[:, :3])
        return net(half, x[:, 3:])

    with pytest.raises(pt.ScopeError, match="was written after a verb"):
        pt.training(stale)(params, X)
    want = net(params, X)[:, 3:]
    for model in (fresh, one):
        np.testing.assert_allclose(pt.training(model)(params, X)[0], want, rtol=1e-4, atol=1e-5)


def test_state_is_written_in_its_own_dtype() -> None:
    norm = nn.BatchNorm()
    params = pt.init(norm, KEY, X)
    _, new = pt.training(lambda p, x: norm(pt.cast(p, jnp.bfloat16), x))(params, X)
    assert new.running_mean.dtype == jnp.float32
    assert (new.running_mean != 0).all()


def test_a_frozen_encoder_trains_only_its_head() -> None:
    encoder, head = nn.Sequential(nn.Dense(8), nn.BatchNorm(), nn.Dropout(0.5)), nn.Dense(2)

    def model(p: Any, x: Any) -> Any:
        return head(p.head, encoder(jax.lax.stop_gradient(p.encoder), x))

    params = pt.init(model, KEY, X)

    def loss(params: Any) -> Any:
        y, new = pt.training(model)(params, X, key=KEY)
        return y.sum(), new

    grads, new = jax.grad(loss, has_aux=True, allow_int=True)(params)
    assert not np.any(grads.encoder.dense0.weight)
    assert np.any(grads.head.weight)
    assert np.any(new.encoder.batchnorm0.running_mean != 0)


def test_a_scope_may_be_returned_from_a_jitted_model() -> None:
    net = LAYERS["batchnorm"]
    params = pt.init(net, KEY, X)

    def model(p: Any, x: Any) -> Any:
        net(p, x)
        return p

    for returned in (jax.jit(pt.training(model))(params, X)[0], pt.training(model)(params, X)[0]):
        assert list(pt.collect(returned)) == list(pt.collect(params))


def test_a_model_may_have_a_keyword_called_key() -> None:
    def model(p: Any, x: Any, key: Any = None, f: Any = None) -> Any:
        return nn.Dense(3)(p.dense, x) if key is None else x

    assert list(pt.init(model, KEY, X, key=None, f=1)) == ["dense"]
    assert list(pt.abstract(model, X, key=None, f=1)) == ["dense"]


# Functions that close over a scope, and whose traces jax keeps


@pytest.mark.parametrize(
    "inner",
    [
        lambda p: lambda x: jax.checkpoint(DROP)(p, x),
        lambda p: lambda x: jax.jit(DROP)(p, x),
        lambda p: lambda x: jax.lax.cond(True, DROP, DROP, p, x),
        lambda p: lambda x: jax.checkpoint(nn.Repeat(DROP, 2))(p.a, x),
        lambda p: lambda x: jax.checkpoint(pt.training(DROP))(p, x)[0],
        lambda p: lambda x: DROP(pt.merge(*pt.partition(p, "w")), x),
    ],
    ids=["checkpoint", "jit", "cond", "Repeat", "nested training", "verbs"],
)
@pytest.mark.parametrize("outer", [jax.jit, jax.checkpoint], ids=["jit", "checkpoint"])
def test_an_argument_of_an_inner_transform_is_still_closed_over_by_the_outer(
    outer: Any, inner: Any
) -> None:
    params = pt.from_tree({"w": jnp.ones(64), "a": {}})
    with pytest.raises(pt.ScopeError, match="draws random numbers inside a jax transform"):
        pt.training(lambda p: outer(inner(p))(ONES))(params, key=KEY)


def test_leaves_passed_by_hand_are_no_scope_passed_as_an_argument() -> None:
    def by_hand(p: Any) -> Any:
        leaves, treedef = jax.tree.flatten(p)
        f = jax.jit(lambda leaves: DROP(treedef.unflatten(leaves), ONES))
        return jnp.stack([f(leaves), f(leaves)])

    with pytest.raises(pt.ScopeError, match="draws random numbers inside a jax transform, jit"):
        pt.training(by_hand)(pt.from_tree({"w": ONES}), key=KEY)


def test_state_that_a_kept_function_closes_over_cannot_be_written_afterwards() -> None:
    params = pt.from_tree({"a": {"s": jnp.float32(1)}}, kinds={".*": "state"})

    def model(p: Any, use: Any) -> Any:
        f = use(p.a)
        before = f(p.a)
        p.a.update("s", before + 1)
        return f(p.a)

    def closed(transform: Any) -> Any:
        return lambda p: transform(lambda _: p.s * 2)

    for transform in (jax.jit, jax.checkpoint):
        with pytest.raises(pt.ScopeError, match="`a_s` is written after it was read inside a jax"):
            pt.training(lambda p, t=transform: model(p, closed(t)))(params)
        argument = transform(lambda p: p.s * 2)
        for key in (None, KEY):
            y, new = pt.training(lambda p, f=argument: model(p, lambda _: f))(params, key=key)
            assert float(y) == 6
            assert float(new.a.s) == 3


def test_decoding_with_a_jitted_step() -> None:
    attend = nn.MultiHeadAttention(2, causal=True, cache=8)
    params = pt.init(lambda p, x: attend(p.a, x), KEY, X[:, :1])

    def decode(p: Any, x: Any) -> Any:
        step, ys = jax.jit(pt.training(attend)), []
        for i in range(4):
            y, new = step(p.a, x[:, i : i + 1])
            p.update("a", new)
            ys.append(y)
        return jnp.concatenate(ys, 1)

    y, new = pt.training(decode)(params, X[:, :4])
    assert new.a.cache_index == 4
    np.testing.assert_allclose(y, attend(params.a, X[:, :4]), rtol=1e-4, atol=1e-5)


def test_parameters_are_written_where_the_call_returns_them_and_nowhere_else() -> None:
    def layer(p: Any, x: Any) -> Any:
        w = p.param("w", (), init.One())
        if p.training:
            p.update("w", w + 1)
        return x * w

    params = pt.from_tree({"w": 1.0, "b": {"w": jnp.float32(1)}})
    params = pt.replace(params, {"w": jnp.float32(1)})
    assert float(pt.training(layer)(params, X)[1].w) == 2
    for copies in (nn.Repeat(layer, 2), nn.Vmap(layer, 2, in_axes=None)):
        stacked = pt.init(copies, KEY, X)
        assert pt.training(copies)(stacked, X)[1].w.tolist() == [2, 2]
    for model in (
        lambda p, x: pt.scan(lambda p, c, _: (layer(p, c), None), p, x, length=2)[0],
        lambda p, x: pt.training(layer)(p.b, x)[0],
    ):
        with pytest.raises(pt.ScopeError, match="w` cannot be written, as it is a parameter"):
            pt.training(model)(params, X)


def test_two_calls_from_one_state_do_not_lose_a_write() -> None:
    norm = nn.BatchNorm()
    params = pt.init(lambda p, x: norm(p.norm, x), KEY, X)

    def model(p: Any, x: Any) -> Any:
        y, a = pt.training(norm)(p.norm, x)
        z, b = pt.training(norm)(p.norm, x + 1)
        p.update("norm", a)
        p.update("norm", b)
        return y + z

    with pytest.raises(pt.ScopeError, match="was written after"):
        pt.training(model)(params, X)

    def stale(p: Any, x: Any) -> Any:
        flat = pt.collect(p, sep="/")
        norm(p.norm, x)
        return flat["norm/running_mean"]

    with pytest.raises(pt.ScopeError, match="was written after"):
        pt.training(stale)(params, X)


def test_gradients_of_a_scope_are_scopes() -> None:
    net = LAYERS["dropout"]
    params = pt.init(net, KEY, X)
    for grad in (pt.grad, jax.grad):

        def model(p: Any, x: Any, grad: Any = grad) -> Any:
            g = grad(lambda q: net(q, x).sum())(p)
            return net(jax.tree.map(lambda g, p: p - 0.1 * g, g, p), x)

        y, _ = pt.training(model)(params, X, key=KEY)
        assert np.any(y == 0)


def test_what_copies_do_not_write_is_not_written() -> None:
    block = nn.Repeat(nn.Sequential(nn.LayerNorm(scale=False), nn.Dropout(0.5)), 2)  # gamma is state
    model = lambda p, x: jax.checkpoint(block)(p.r, x)  # noqa: E731
    y, _ = pt.training(model)(pt.init(model, KEY, X), X, key=KEY)
    assert np.any(y == 0)


def test_scopes_of_one_structure_are_mapped_together() -> None:
    params = pt.from_tree({"a": {"w": ONES}, "b": {"w": 3 * ONES}})

    def model(p: Any) -> Any:
        return drop(jax.tree.map(lambda a, b: (a + b) / 2, p.a, p.b))

    assert np.any(pt.training(model)(params, key=KEY)[0] == 0)


def test_values_that_are_no_arrays_are_written_as_arrays() -> None:
    params = pt.from_tree({"s": jnp.float32(0)}, kinds={"s": "state"})

    def write(value: Any) -> Any:
        def model(p: Any) -> Any:
            p.update("s", value)

        return pt.training(model)(params)[1].s

    for value in (0.5, np.float32(0.5)):
        assert isinstance(write(value), jax.Array)
    for value in (3, [1.0]):
        with pytest.raises(pt.MismatchError, match="`s` holds float32"):
            write(value)


def test_a_path_is_written_and_names_of_arrays_are_children() -> None:
    norm = nn.BatchNorm()

    def model(p: Any, x: Any) -> Any:
        y = norm(p["shape"], x)
        p.update("shape/running_mean", 0 * p["shape"].running_mean)
        return y

    params = pt.init(model, KEY, X)
    assert list(params) == ["shape"]
    assert not np.any(pt.training(model)(params, X)[1]["shape"].running_mean)
    with pytest.raises(pt.MissingError, match="used as an array"):
        pt.init(lambda p, x: p.w.shape, KEY, X)


def test_a_recursive_initializer_is_compared() -> None:
    def make() -> Any:
        def f(key: Any, shape: Any, dtype: Any) -> Any:
            return jnp.ones(shape, dtype) if shape else f(key, shape, dtype)

        return f

    params = pt.init(lambda p: p.param("w", (2,), make()) + p.param("w", (2,), make()), KEY)
    assert (params.w == 1).all()
