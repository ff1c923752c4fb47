"""The attention of queries to keys, and the masks and biases that it takes."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paramtree.compat import mask_for_window
from paramtree.nn.basic import kept

__all__ = ["attend", "four_axes", "window_of"]

_NAMES = ("batch", "heads", "query", "key")
_AXES: Mapping[str, Mapping[int, tuple[int, ...]]] = {
    "mask": {2: (2, 3), 3: (0, 2, 3), 4: (0, 1, 2, 3)},
    "padding_mask": {2: (0, 3)},
    "bias": {2: (2, 3), 4: (0, 1, 2, 3)},
}


def four_axes(
    layer: Any, given: Mapping[str, Any], full: tuple[int, ...], also: int = 0
) -> tuple[Any, Any]:
    """Returns the mask and the bias of an attention, each of four axes or None.

    Args:
      layer: what errors name.
      given: the ``mask``, ``padding_mask`` and ``bias`` of the call.
      full: (batch, heads, query, key).
      also: another size that the keys may have while the model is initialised.

    Raises:
      ValueError: one has another shape or dtype than it should.
    """
    terms = {n: _checked(layer, n, t, full, also) for n, t in given.items() if t is not None}
    masks = [terms[name] for name in ("mask", "padding_mask") if name in terms]
    return masks[0] & masks[-1] if masks else None, terms.get("bias")


def _checked(layer: Any, name: str, term: Any, full: tuple[int, ...], also: int) -> Any:
    axes = _AXES[name].get(term.ndim, ())
    sizes = dict(zip(axes, term.shape, strict=bool(axes)))
    wrong = [a for a, n in sizes.items() if n not in (1, full[a], also if a == 3 and also else 1)]
    if not axes or wrong:
        forms = " or ".join(
            f"({', '.join(_NAMES[a] for a in form)}), here {tuple(full[a] for a in form)}"
            for form in _AXES[name].values()
        )
        hint = " A mask (batch, key) is given as padding_mask." if name == "mask" else ""
        if name == "bias" and term.ndim == 3:
            hint = " Add the axis that it lacks: bias[:, None] or bias[None]."
        raise ValueError(
            f"{layer!r} needs a {name} {forms}, with 1 for an axis that does not matter, but found "
            f"{term.shape}.{hint}"
        )
    boolean = term.dtype == jnp.bool_
    if name != "bias" and not boolean:
        raise ValueError(
            f"{layer!r} needs a boolean {name} (True means attend), but found {term.dtype}."
        )
    if name == "bias" and not jnp.issubdtype(term.dtype, jnp.floating):
        hint = ": a boolean one is given as mask" if boolean else ""
        raise ValueError(f"{layer!r} needs a floating bias, but found {term.dtype}{hint}.")
    if sizes[3] not in (1, full[3]):  # only shapes count while the model is initialised
        term, sizes[3] = term[..., :1], 1
    return term.reshape([sizes.get(axis, 1) for axis in range(4)])


def window_of(window: int, causal: bool) -> tuple[int, int] | None:
    """Returns how many positions before and after its own a query sees; None for all."""
    return (window - 1, 0 if causal else window - 1) if window else None


# A model has many layers of attention of the same shapes: under jit they are traced once, not each.
@partial(
    jax.jit,
    static_argnames=("causal", "window", "scale", "softcap", "dropout", "implementation"),
)
def attend(
    query: Any,
    key: Any,
    value: Any,
    mask: Any = None,
    bias: Any = None,
    *,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    dropout: float = 0.0,
    dropout_key: Any = None,
    implementation: Any = None,
) -> Any:
    """Returns what ``jax.nn.dot_product_attention`` does, also with a softcap and dropout.

    Args:
      query: (batch, query, heads, size).
      key: (batch, key, kv heads, size).
      value: as ``key``.
      mask: boolean, broadcastable to (batch, heads, query, key); as is ``bias``, floating.
      bias: added to the logits after the softcap.
      causal: whether a query sees only the keys up to its own place.
      window: how many places before and after its own it sees.
      scale: ``1 / sqrt(size)`` if None.
      softcap: 0 for none.
      dropout: the probability of zeroing a probability, if there is a ``dropout_key``.
      dropout_key: a PRNG key.
      implementation: that of ``jax.nn.dot_product_attention``.
    """
    # jax's gradient in 16 bits promotes dtypes when it is lowered, where strict promotion forbids it.
    strict = jax.config.jax_numpy_dtype_promotion == "strict"  # type: ignore[attr-defined]
    forbidden = strict and query.dtype.itemsize < 4 and implementation != "cudnn"
    # Both ways promote dtypes when they are traced.
    with jax.numpy_dtype_promotion("standard"):
        if not softcap and dropout_key is None and not forbidden:
            mask = mask_for_window(mask, window, causal)
            return jax.nn.dot_product_attention(
                query, key, value, bias, mask, scale=scale, is_causal=causal,
                local_window_size=window, implementation=implementation,
            )  # fmt: skip
        batch, length, heads, size = query.shape
        keys, kv_heads = key.shape[1:3]
        grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, size)
        wide = jnp.promote_types(query.dtype, jnp.float32)
        logits = jnp.einsum("btkgh,bskh->bkgts", grouped, key, preferred_element_type=wide)
        logits = logits.reshape(batch, heads, length, keys)
        logits = logits * (size**-0.5 if scale is None else scale)
        if softcap:
            logits = softcap * jnp.tanh(logits / softcap)
        if bias is not None:
            logits = (logits + bias).astype(wide)
        distance = np.arange(length)[:, None] - np.arange(keys)[None, :]
        seen = distance >= 0 if causal else np.ones_like(distance, bool)
        if window is not None:
            seen &= (distance <= window[0]) & (distance >= -window[1])
        if mask is not None or not seen.all():
            every = jnp.asarray(seen)[None, None]
            allowed = every if mask is None else every & mask
            least = -0.7 * float(np.finfo(wide).max)  # as jax has it; without -inf there is no NaN
            logits = jnp.where(allowed, logits, least)
        probabilities = jax.nn.softmax(logits, axis=-1)
        if dropout_key is not None:
            mask = kept(dropout_key, dropout, probabilities.shape)
            probabilities = jnp.where(mask, probabilities / (1 - dropout), 0)
        probabilities = probabilities.astype(key.dtype).reshape(
            batch, kv_heads, heads // kv_heads, length, keys
        )
        return jnp.einsum("bkgts,bskh->btkgh", probabilities, value).reshape(query.shape)
