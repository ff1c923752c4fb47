"""The same transformer in every library, for the cases that initialize, trace and compile it.

Its blocks are pre-norm: self-attention with four heads, and two dense layers with a gelu between. It is
narrow, so that tracing, compilation and dispatch dominate, not arithmetic. Weights are truncated
normals, except Equinox's, which are uniform.
"""

from collections.abc import Callable
from typing import Any

WIDTH, HEADS, WIDER, LENGTH = 64, 4, 4, 16


def inputs(width: int = WIDTH, length: int = LENGTH) -> Any:
    """Returns a batch of two sequences."""
    import jax.numpy as jnp
    import numpy as np

    return jnp.asarray(np.random.default_rng(0).normal(size=(2, length, width)), jnp.float32)


def ours(blocks: int, width: int = WIDTH, repeat: bool = False) -> Any:
    """Returns the net of this library; ``repeat`` runs the blocks as a scan."""
    import jax

    from paramtree import nn

    lecun = jax.nn.initializers.lecun_normal(in_axis=-1, out_axis=-2)

    def dense(units: int, activation: str | None = None) -> Any:
        return nn.Dense(units, activation, flatten=False, weight_initializer=lecun)

    def block() -> Any:
        attend = nn.MultiHeadAttention(HEADS, weight_initializer=lecun)
        return nn.Sequential(
            nn.Residual(norm=nn.RMSNorm(), attend=attend),
            nn.Residual(norm=nn.RMSNorm(), widen=dense(WIDER * width, "gelu"), narrow=dense(width)),
        )

    return nn.Repeat(block(), blocks) if repeat else nn.Sequential(*[block() for _ in range(blocks)])


def by_hand(blocks: int, scan: bool = False) -> Callable[[Any, Any], Any]:
    """Returns a function of a nested dict, with the names and arithmetic of ``ours``."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    def dense(p: Any, x: Any) -> Any:
        return jnp.inner(x, p["weight"]) + p["bias"][None, None]

    def norm(p: Any, x: Any) -> Any:
        square = jnp.mean(lax.square(x), -1, keepdims=True)
        return x * lax.rsqrt(square + 1e-6) * p["gamma"][None, None]

    def attend(p: Any, x: Any) -> Any:
        heads = (*x.shape[:2], HEADS, x.shape[2] // HEADS)
        query, key, value = (dense(p[name], x).reshape(heads) for name in ("query", "key", "value"))
        return dense(p["out"], jax.nn.dot_product_attention(query, key, value).reshape(x.shape))

    def block(p: Any, x: Any) -> Any:
        first, second = p["residual0"], p["residual1"]
        x = x + attend(first["attend"], norm(first["norm"], x))
        y = jax.nn.gelu(dense(second["widen"], norm(second["norm"], x)), approximate=False)
        return x + dense(second["narrow"], y)

    def model(p: Any, x: Any) -> Any:
        if scan:
            return lax.scan(lambda x, p: (block(p, x), None), x, p)[0]
        for i in range(blocks):
            x = block(p[f"sequential{i}"], x)
        return x

    return model


def linen(blocks: int, width: int = WIDTH, scan: bool = False) -> Any:
    """Returns a Flax Linen module; ``scan`` runs the blocks by its ``nn.scan``."""
    from flax import linen as nn

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = x + nn.MultiHeadDotProductAttention(HEADS)(nn.RMSNorm()(x))
            y = nn.gelu(nn.Dense(WIDER * width)(nn.RMSNorm()(x)), approximate=False)
            return x + nn.Dense(width)(y)

    class Step(nn.Module):
        @nn.compact
        def __call__(self, x: Any, _: Any) -> Any:
            return Block()(x), None

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            axes, split = {"params": 0}, {"params": True}
            return nn.scan(Step, variable_axes=axes, split_rngs=split, length=blocks)()(x, None)[0]

    return Scanned() if scan else nn.Sequential([Block() for _ in range(blocks)])


def nnx(blocks: int, width: int = WIDTH) -> Callable[[Any], Any]:
    """Returns a function that makes a Flax NNX module from a key."""
    from flax import nnx as nn

    class Block(nn.Module):
        def __init__(self, rngs: Any) -> None:
            self.norm0, self.norm1 = (nn.RMSNorm(width, rngs=rngs) for _ in range(2))
            self.attend = nn.MultiHeadAttention(HEADS, width, decode=False, rngs=rngs)
            self.widen = nn.Linear(width, WIDER * width, rngs=rngs)
            self.narrow = nn.Linear(WIDER * width, width, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            x = x + self.attend(self.norm0(x))
            return x + self.narrow(nn.gelu(self.widen(self.norm1(x)), approximate=False))

    class Net(nn.Module):
        def __init__(self, key: Any) -> None:
            rngs = nn.Rngs(key)
            self.blocks = nn.List([Block(rngs) for _ in range(blocks)])

        def __call__(self, x: Any) -> Any:
            for block in self.blocks:
                x = block(x)
            return x

    return Net


def equinox(blocks: int, width: int = WIDTH) -> Callable[[Any], Any]:
    """Returns a function that makes an Equinox module, which takes one sequence, from a key."""
    import equinox as eqx
    import jax

    class Block(eqx.Module):
        norm0: Any
        norm1: Any
        attend: Any
        widen: Any
        narrow: Any

        def __init__(self, key: Any) -> None:
            keys = jax.random.split(key, 3)
            self.norm0, self.norm1 = eqx.nn.RMSNorm(width), eqx.nn.RMSNorm(width)
            biases = {f"use_{name}_bias": True for name in ("query", "key", "value", "output")}
            self.attend = eqx.nn.MultiheadAttention(HEADS, width, **biases, key=keys[0])
            self.widen = eqx.nn.Linear(width, WIDER * width, key=keys[1])
            self.narrow = eqx.nn.Linear(WIDER * width, width, key=keys[2])

        def __call__(self, x: Any) -> Any:
            y = jax.vmap(self.norm0)(x)
            x = x + self.attend(y, y, y)
            y = jax.nn.gelu(jax.vmap(self.widen)(jax.vmap(self.norm1)(x)), approximate=False)
            return x + jax.vmap(self.narrow)(y)

    class Net(eqx.Module):
        blocks: list[Any]

        def __init__(self, key: Any) -> None:
            self.blocks = [Block(key) for key in jax.random.split(key, blocks)]

        def __call__(self, x: Any) -> Any:
            for block in self.blocks:
                x = block(x)
            return x

    return Net


def haiku(blocks: int, width: int = WIDTH) -> Any:
    """Returns a transformed Haiku function."""
    import haiku as hk
    import jax

    lecun = hk.initializers.VarianceScaling(1.0, "fan_in", "truncated_normal")

    def norm() -> Any:
        return hk.RMSNorm(-1)

    def model(x: Any) -> Any:
        for _ in range(blocks):
            y = norm()(x)
            x = x + hk.MultiHeadAttention(HEADS, width // HEADS, w_init=lecun)(y, y, y)
            y = jax.nn.gelu(hk.Linear(WIDER * width)(norm()(x)), approximate=False)
            x = x + hk.Linear(width)(y)
        return x

    return hk.without_apply_rng(hk.transform(model))
