"""Multi-head attention: grouped keys, masks, windows, rotary positions and a cache for decoding."""

from typing import Any

import jax
import jax.numpy as jnp

from paramtree.initializers import Initializer, Uniform, get
from paramtree.initializers.axes import of_weight
from paramtree.model.scope import child, run_of
from paramtree.nn.attend import attend, four_axes, window_of
from paramtree.nn.basic import Dense, check_integers
from paramtree.nn.cache import Cache, holds_memory
from paramtree.nn.decoding import check_counting, writes
from paramtree.nn.layer import Layer
from paramtree.nn.norm import RMSNorm
from paramtree.nn.rotary import check_rotary, is_number, rotate, rotated_size
from paramtree.typing import Scope

__all__ = ["MultiHeadAttention"]

_ROTARY = {"rotary_base": 10_000.0, "rotary_fraction": 1.0, "rotary_scaling": None}


class MultiHeadAttention(Layer):
    """Multi-head attention, of a sequence to itself or to another sequence.

    Vaswani et al., "Attention is all you need", 2017. Its four dense layers are ``query``, ``key``,
    ``value`` and ``out``, and with ``qk_norm`` there are ``query_norm`` and ``key_norm``. In between it
    calls ``jax.nn.dot_product_attention`` where that computes the same.

    With ``cache``, a call under ``pt.decoding`` or ``pt.training`` stores keys and values as state, so
    a sequence can be processed in pieces, such as one token at a time when sampling; dropout is off
    under ``pt.decoding``. The state is ``cache_key`` and ``cache_value``, (batch, cache, kv_heads, head
    size), and ``cache_index``, the number of cached positions. Such a call attends to the whole cache,
    so its masks and bias have ``cache`` keys, one for each place in it. A call for inference attends
    within ``x`` and ignores the cache.

    A layer that is initialised with a ``memory`` caches that instead: a call with a memory stores its
    keys, values and ``padding_mask`` in place of all before, and calls without a memory attend to what
    is stored, as further positions of one sequence, with masks and bias of ``cache`` keys. The state is
    also ``cache_mask``, (batch, cache), False where there is no key, and ``cache_index`` is the number
    of positions since the memory was given; before there is one it is -1, and the output NaN. A call
    for inference needs the memory.

    Args:
      num_heads: the number of heads.
      units: the size of the output, and of all heads together unless ``head_size`` is given; 0 for the
        input's size.
      num_kv_heads: the number of heads for keys and values, each shared by ``num_heads /
        num_kv_heads`` query heads (Ainslie et al., 2023); 0 for ``num_heads``.
      use_bias: whether the dense layers have biases.
      causal: whether a position attends only to itself and to earlier positions.
      rotary: whether to apply ``rotate`` to queries and keys.
      cache: the maximum number of cached positions, of ``x`` or of ``memory``; 0 for no cache. The
        output is NaN once the cache overflows, as compiled code cannot raise.
      dtype: the parameters' dtype.
      weight_initializer: U[-0.07, 0.07] if None.
      bias_initializer: zeros by default.
      head_size: the size of a head; 0 for ``units / num_heads``.
      scale: what the dot products are multiplied by; ``1 / sqrt(head size)`` if None.
      softcap: caps the scaled logits smoothly, ``softcap * tanh(logits / softcap)``, before bias and
        masks, as Gemma 2 does; 0 for no cap.
      window: how far a position sees: itself and ``window - 1`` positions before it, and without
        ``causal`` as many after it; 0 for all. Positions are places in the sequence.
      dropout: the probability of zeroing an attention probability in training, in [0, 1).
      qkv_bias: whether ``query``, ``key`` and ``value`` have biases; ``use_bias`` if None.
      out_bias: whether ``out`` has a bias; ``use_bias`` if None.
      qk_norm: whether to apply ``RMSNorm`` to each head's queries and keys, before ``rotate``; their
        gammas, (head size,), are shared by the heads.
      rotary_base: the base of ``rotate``.
      rotary_fraction: the part of each head, from its beginning, that is rotated.
      rotary_scaling: the scaling of ``rotate``: None, ``("linear", factor)``, ``("ntk", factor)``,
        ``("yarn", factor, original_length)`` or ``("yarn_hf", factor, original_length)``.
      cache_dtype: the dtype of the cache; that of the keys if None.
      implementation: that of ``jax.nn.dot_product_attention``: None, "xla" or "cudnn". A layer with
        "cudnn" is initialised on any machine, and called where there is cuDNN.

    Returns:
      When called with ``(p, x, memory=None, mask=None, padding_mask=None, bias=None,
      positions=None)``: (batch, length, units).

      - ``x``: (batch, length, size). Its queries attend to the keys of ``memory``, (batch, memory
        length, any size), or if None to those of ``x`` or of a cached memory.
      - ``mask``: boolean, True where attention is allowed: (query, key), (batch, query, key) or (batch,
        heads, query, key). An axis of size 1 counts for all.
      - ``padding_mask``: boolean, (batch, key), False where a key is padding.
      - ``bias``: floating, added to the logits: (query, key) or (batch, heads, query, key). An axis of
        size 1 counts for all.
      - ``positions``: integers, (length,) or (batch, length), by which ``x`` is rotated, for packed or
        left-padded sequences. By default they count from 0, or from what is cached; those of
        ``memory`` always count from 0. They do not change what is causal or in the window.

      A query that is allowed to attend to no key attends to all of them equally.

    Raises:
      ValueError: an option is invalid, or has no effect without another; when called: sizes do not
        divide, or an input has the wrong shape or dtype.
      MismatchError: when called: the cache has another dtype than the keys, without ``cache_dtype``.
      ScopeError: when called for inference: a layer that caches a memory is given none; under
        ``pt.decoding``: with ``rotary`` and a memory, but without a cache or positions.

    Example:
      >>> import jax
      >>> net = MultiHeadAttention(2, causal=True)
      >>> x = jnp.ones((1, 5, 8))
      >>> params = net.init(jax.random.key(0), x)
      >>> list(params), net(params, x).shape
      (['query', 'key', 'value', 'out'], (1, 5, 8))

      A memory that is given once, to decode position by position:

      >>> import paramtree as pt
      >>> net, memory = MultiHeadAttention(2, cache=9), jnp.ones((1, 9, 6))
      >>> params = net.init(jax.random.key(0), x, memory)
      >>> y, params = pt.decoding(net)(params, x[:, :1], memory)
      >>> y, params = pt.decoding(net)(params, x[:, 1:2])
    """

    num_heads: int
    units: int = 0
    num_kv_heads: int = 0
    use_bias: bool = True
    causal: bool = False
    rotary: bool = False
    cache: int = 0
    dtype: Any = "float32"
    weight_initializer: Initializer | str | None = None
    bias_initializer: Initializer | str = "zeros"
    head_size: int = 0
    scale: float | None = None
    softcap: float = 0.0
    window: int = 0
    dropout: float = 0.0
    qkv_bias: bool | None = None
    out_bias: bool | None = None
    qk_norm: bool = False
    rotary_base: float = 10_000.0
    rotary_fraction: float = 1.0
    rotary_scaling: tuple[Any, ...] | None = None
    cache_dtype: Any = None
    implementation: str | None = None

    def __post_init__(self) -> None:
        check_integers(self, 0, "num_heads", "units", "num_kv_heads", "cache", "head_size", "window")
        if isinstance(self.rotary_scaling, list):
            object.__setattr__(self, "rotary_scaling", tuple(self.rotary_scaling))
        if problem := self._problem():
            raise ValueError(f"MultiHeadAttention: {problem}.")
        check_rotary("MultiHeadAttention", self.rotary_base, self.rotary_fraction, self.rotary_scaling)
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        if self.cache_dtype is not None:
            object.__setattr__(self, "cache_dtype", jnp.dtype(self.cache_dtype))
            if not jnp.issubdtype(self.cache_dtype, jnp.floating):
                raise ValueError(
                    "MultiHeadAttention: cache_dtype must be a floating dtype, but found "
                    f"{self.cache_dtype}."
                )
        object.__setattr__(self, "weight_initializer", of_weight(self.weight_initializer or Uniform()))
        object.__setattr__(self, "bias_initializer", get(self.bias_initializer))
        if size := self.head_size or self.units // self.num_heads:
            self._check_head(size)

    def _problem(self) -> str:
        """Returns what is wrong with the options, or an empty string."""
        if not self.num_heads or (self.units % self.num_heads and not self.head_size):
            return (
                "num_heads must be positive and, without head_size, divide units, but found "
                f"num_heads={self.num_heads} and units={self.units}"
            )
        if self.num_kv_heads and self.num_heads % self.num_kv_heads:
            return (
                "num_kv_heads must divide num_heads, but found "
                f"num_kv_heads={self.num_kv_heads} and num_heads={self.num_heads}"
            )
        if self.scale is not None and (not is_number(self.scale) or self.scale <= 0):
            return f"scale must be a positive number or None, but found {self.scale!r}"
        if not is_number(self.softcap) or self.softcap < 0:
            return f"softcap must be a positive number, or 0 for no cap, but found {self.softcap!r}"
        if not is_number(self.dropout) or not 0 <= self.dropout < 1:
            return f"dropout must be in [0, 1), but found {self.dropout!r}"
        for name, default in _ROTARY.items():
            if not self.rotary and (value := getattr(self, name)) != default:
                return f"{name}={value!r} has no effect without rotary=True"
        if self.cache_dtype is not None and not self.cache:
            return f"cache_dtype={self.cache_dtype!r} has no effect without a cache"
        if self.implementation not in (None, "xla", "cudnn"):
            return f"implementation must be None, 'xla' or 'cudnn', but found {self.implementation!r}"
        for name in ("softcap", "dropout"):
            if self.implementation == "cudnn" and (value := getattr(self, name)):
                return f"implementation='cudnn' cannot compute {name}={value!r}: use None"
        return ""

    def _check_head(self, size: int) -> None:
        turned = rotated_size(size, self.rotary_fraction)
        if self.rotary and (turned % 2 or not turned):
            raise ValueError(
                f"MultiHeadAttention: rotary needs {self.num_heads} heads of an even size, and an even "
                f"part of it to rotate, but found size {size}, of which it would rotate {turned}."
            )

    def __call__(
        self,
        p: Scope,
        x: Any,
        memory: Any = None,
        mask: Any = None,
        padding_mask: Any = None,
        bias: Any = None,
        positions: Any = None,
    ) -> jax.Array:
        source = x if memory is None else memory
        if x.ndim != 3 or source.ndim != 3 or x.shape[0] != source.shape[0]:
            raise ValueError(
                f"{self!r} needs x and memory (batch, length, size), but found {x.shape} and "
                f"{source.shape}."
            )
        units = self.units or x.shape[-1]
        size = self.head_size or units // self.num_heads
        if not self.head_size and units % self.num_heads:
            raise ValueError(f"{self!r} cannot divide {units} units into {self.num_heads} heads.")
        self._check_head(size)
        recording, caches = run_of(p).recording, bool(self.cache) and writes(p)
        of_memory = holds_memory(self, p, memory, padding_mask)
        recalls = of_memory and memory is None
        whole = recalls or (caches and memory is None)  # whether it attends to all of the cache
        length = self.cache if recalls else source.shape[1]
        if not length or (caches and length > self.cache):
            most = f"1 to {self.cache} at a time, as its cache holds" if caches else "1 or more"
            raise ValueError(f"{self!r} attends to {most} positions, but found {length}.")
        kv_heads = self.num_kv_heads or self.num_heads
        query = self._heads(p, "query", x, self.num_heads, size)
        key = value = query[:, :0, :kv_heads]  # in place of those that are in the cache
        if not recalls:
            key = self._heads(p, "key", source, kv_heads, size)
            value = self._heads(p, "value", source, kv_heads, size)
        if self.qk_norm:
            query = RMSNorm(dtype=self.dtype)(child(p, "query_norm"), query)
            key = key if recalls else RMSNorm(dtype=self.dtype)(child(p, "key_norm"), key)
        cache = Cache(self, p, key, value, of_memory) if caches or (self.cache and recording) else None
        index = cache.index if cache and whole else 0
        query, key = self._rotated(p, query, key, index, positions, memory is None and not recalls)
        full = (x.shape[0], self.num_heads, x.shape[1], self.cache if whole else length)
        given = {"mask": mask, "padding_mask": padding_mask, "bias": bias}
        mask, bias = four_axes(self, given, full, self.cache if recording else 0)
        window, causal = window_of(self.window, self.causal), self.causal
        if cache and whole:
            how = cache.recall if recalls else cache.extend
            query, key, value, seen = how(query, key, value)
            mask = seen if mask is None else mask & seen
            window, causal = None, False
        elif cache and caches:
            key, value = cache.remember(query, key, value, padding_mask)
        drops = self.dropout and p.training
        y = attend(
            query, key, value, mask, bias, causal=causal, window=window, scale=self.scale,
            softcap=self.softcap, dropout=self.dropout, dropout_key=p.key() if drops else None,
            # Only shapes count while recording, and jax traces "cudnn" on a machine with cuDNN alone.
            implementation=None if recording else self.implementation,
        )  # fmt: skip
        return self._dense(p, "out", y.reshape(*x.shape[:2], self.num_heads * size), units)

    def _heads(self, p: Any, name: str, x: Any, heads: int, size: int) -> Any:
        return self._dense(p, name, x, heads * size).reshape(*x.shape[:2], heads, size)

    def _dense(self, p: Any, name: str, x: Any, units: int) -> Any:
        own = self.out_bias if name == "out" else self.qkv_bias
        layer = Dense(
            units,
            use_bias=self.use_bias if own is None else own,
            flatten=False,
            dtype=self.dtype,
            weight_initializer=self.weight_initializer,
            bias_initializer=self.bias_initializer,
        )
        return layer(child(p, name), x)

    def _rotated(
        self, p: Any, query: Any, key: Any, index: Any, positions: Any, own: bool
    ) -> tuple[Any, Any]:
        """Returns the queries and keys, rotated; ``own`` says that both are of one sequence."""
        shapes = query.shape[1:2], query.shape[:2], (1, query.shape[1])
        if positions is not None:
            if not self.rotary:
                raise ValueError(f"{self!r} has no use for positions: they are those of rotary=True.")
            if positions.shape not in shapes or not jnp.issubdtype(positions.dtype, jnp.integer):
                raise ValueError(
                    f"{self!r} needs positions (length,) or (batch, length) of integers, here "
                    f"{shapes[0]} or {shapes[1]}, but found {positions.dtype}{positions.shape}."
                )
        if not self.rotary:
            return query, key
        how = self.rotary_base, self.rotary_fraction, self.rotary_scaling
        if positions is None:
            if not own and not self.cache:  # a cache counts
                check_counting(self, p)
            positions = index + jnp.arange(query.shape[1], dtype=jnp.int32)
        theirs = positions if own else jnp.arange(key.shape[1], dtype=jnp.int32)
        return rotate(query, positions, *how), rotate(key, theirs, *how)

    def __repr__(self) -> str:
        def shown(*names: str) -> list[str]:
            values = {n: getattr(self, n) for n in names}
            return [n if v is True else f"{n}={v}" for n, v in values.items() if v]

        options = [
            f"{self.units or None}",
            f"heads={self.num_heads}",
            *([f"kv_heads={self.num_kv_heads}"] if self.num_kv_heads else []),
            *shown("head_size", "causal", "window", "rotary", "qk_norm", "softcap", "dropout", "cache"),
        ]
        return f"MultiHeadAttention({', '.join(options)})"
