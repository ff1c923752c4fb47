"""In a jitted function alike leaves are computed in loops, with the bits that they have by themselves."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramtree as pt
from paramtree import initializers as init
from paramtree import nn
from paramtree.initializers import loops
from paramtree.parametrizations import LoRA

K = jax.random.key(0)
X = jax.ShapeDtypeStruct((2, 8), "float32")

COUNTS = (1, 2, 8)


def alike(p: Any) -> None:
    for kind, count in enumerate(COUNTS):
        for i in range(count):
            p[f"kind{kind}_{i}"].param(
                "w", (3, 2, kind), init.Normal(1.0), ("float32", "bfloat16")[kind % 2]
            )


def same_bits(a: Any, b: Any) -> bool:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("most", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 100))])
def test_portions_are_the_leaves_of_one_loop(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(key: Any) -> Any:
        return pt.init(alike, key)

    eager = run(K)
    monkeypatch.setattr(loops, "_PORTION", 0)
    monkeypatch.setattr(loops, "_LOOPS", most)
    assert (most == 1) == ("dynamic_update_slice" not in str(jax.make_jaxpr(run)(K)))
    assert same_bits(jax.jit(run)(K), eager)
    keys = jax.random.split(K, 2)
    mapped = jax.jit(jax.vmap(run))(keys)
    scanned = jax.lax.scan(lambda _, key: (None, run(key)), None, keys)[1]
    for i, key in enumerate(keys):
        one = run(key)
        assert same_bits(jax.tree.map(lambda a, i=i: a[i], mapped), one)
        assert same_bits(jax.tree.map(lambda a, i=i: a[i], scanned), one)


def test_an_initializer_is_traced_once_for_all_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    traces = []

    def counting(key: Any, shape: Any, dtype: Any) -> Any:
        traces.append(shape)
        return jax.random.normal(key, shape, dtype)

    def run(key: Any) -> Any:
        return pt.init(net, key, jax.ShapeDtypeStruct((1, 4), "float32"))

    monkeypatch.setattr(loops, "_PORTION", 0)
    net = nn.Sequential(*(nn.Dense(4, weight_initializer=counting) for _ in range(30)))
    jaxpr = jax.make_jaxpr(run)(K)
    assert len(traces) == 4  # two to check that it is pure, and one to see whether it needs its key
    assert str(jaxpr).count("dynamic_update_slice") >= 1
    assert same_bits(jax.jit(run)(K), run(K))


def close(found: Any, wanted: Any) -> None:
    np.testing.assert_allclose(found, wanted, rtol=2e-6)


VERBS: dict[str, Any] = {
    "init": lambda net, key: pt.init(net, key, X),
    "rules": lambda net, key: pt.init(net, key, X, rules={".*weight": init.Normal(0.3)}),
    "reinit": lambda net, key: pt.reinit(pt.init(net, K, X), key, {".*weight": "normal"}),
    "packed": lambda net, key: pt.pack(pt.init(net, key, X)),
    "in a dict": lambda net, key: {"net": pt.init(net, key, X), "step": jnp.int32(0)},
    "partial": lambda net, key: pt.select(pt.init(net, key, X), ".*weight"),
    "expanded": lambda net, key: pt.expand(pt.init(net, K, X), {".*weight": LoRA(2)}, key),
}
ALIKE: dict[str, Any] = {
    "layers": nn.Sequential(*[nn.Sequential(nn.Dense(8), nn.BatchNorm()) for _ in range(7)]),
    "Repeat": nn.Repeat(nn.Sequential(nn.Dense(8), nn.BatchNorm()), 7),
}
RUNS: dict[str, Any] = {
    "jit": lambda f: jax.jit(f)(K),
    "checkpoint": lambda f: jax.jit(jax.checkpoint(f))(K),
    "vmap": lambda f: jax.tree.map(lambda a: a[0], jax.vmap(f)(K[None])),
    "scan": lambda f: jax.tree.map(
        lambda a: a[0], jax.lax.scan(lambda _, key: (None, f(key)), None, K[None])[1]
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("net", ALIKE)
@pytest.mark.parametrize("verb", VERBS)
def test_loops_go_with_transforms(verb: str, net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(key: Any) -> Any:
        return VERBS[verb](ALIKE[net], key)

    wanted = run(K)
    monkeypatch.setattr(loops, "_PORTION", 0)
    monkeypatch.setattr(loops, "_LOOPS", 3)
    for name, transform in RUNS.items():
        found = transform(run)
        if verb == "expanded":  # LoRA scales what it draws, which XLA rounds otherwise under jit
            jax.tree.map(close, found, wanted)
        else:
            assert same_bits(found, wanted), name


@pytest.mark.slow
@pytest.mark.parametrize("repeat", [False, True])
def test_an_initializer_in_loops_may_close_over_what_is_traced(
    repeat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loops, "_PORTION", 0)

    def total(scale: Any) -> Any:
        def scaled(key: Any, shape: Any, dtype: Any) -> Any:
            return scale * jax.random.normal(key, shape, dtype)

        layer = nn.Dense(8, weight_initializer=scaled)
        net: Any = nn.Repeat(layer, 20) if repeat else nn.Sequential(*[layer] * 20)
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(pt.init(net, K, X)))

    one = float(total(1.0))  # the total is that of scale 1 times scale squared
    scales = jnp.asarray([0.5, 2.0])
    close(jax.jit(total)(0.5), one / 4)
    close(jax.jit(jax.grad(total))(0.5), one)
    close(jax.jit(jax.grad(jax.checkpoint(total)))(0.5), one)
    close(jax.vmap(jax.grad(total))(scales), one * 2 * scales)
    close(jax.lax.scan(lambda _, scale: (None, total(scale)), None, scales)[1], one * scales**2)


def test_a_jitted_init_takes_little_memory_beside_the_leaves() -> None:
    net = nn.Sequential(*[nn.Dense(512, use_bias=False) for _ in range(32)])  # 32 MiB
    x = jax.ShapeDtypeStruct((1, 512), "float32")
    memory = jax.jit(lambda key: pt.init(net, key, x)).lower(K).compile().memory_analysis()
    assert memory.output_size_in_bytes >= 32 * 2**20
    assert memory.temp_size_in_bytes < 0.2 * memory.output_size_in_bytes


def test_a_stack_takes_no_memory_beside_it() -> None:
    net = nn.Repeat(nn.Repeat(nn.Dense(512), 8), 8)  # 64 MiB
    x = jax.ShapeDtypeStruct((1, 512), "float32")
    memory = jax.jit(lambda key: pt.init(net, key, x)).lower(K).compile().memory_analysis()
    assert memory.output_size_in_bytes >= 64 * 2**20
    assert memory.temp_size_in_bytes < 0.2 * memory.output_size_in_bytes


@pytest.mark.parametrize(
    "bias", ["ones", init.Normal(1.0), init.Mixed(["0_0.*", ".*"], ["ones", "normal"])]
)
def test_a_stack_that_is_computed_in_a_loop_has_the_same_bits(bias: Any) -> None:
    net = nn.Repeat(nn.Repeat(nn.Dense(3, bias_initializer=bias), 2), 4)

    def run(key: Any) -> Any:
        return pt.init(net, key, jax.ShapeDtypeStruct((1, 3), "float32"))

    mapped = jax.jit(jax.vmap(run))(K[None])
    assert same_bits(jax.tree.map(lambda a: a[0], mapped), run(K))
    assert same_bits(jax.jit(run)(K), run(K))
