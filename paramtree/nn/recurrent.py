"""Recurrent layers over whole sequences, with the names and the layout of Gluon's fused layers.

The parameters are on the layer's own level: ``l0_i2h_weight``, ``l0_h2h_weight``, ``l0_i2h_bias`` and
``l0_h2h_bias`` for the first layer from left to right, ``r0_...`` for it from right to left, ``l1_...``
for the second layer. Their rows are the gates, one after another, as in PyTorch and cuDNN.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from paramtree.core.tree import check_scope
from paramtree.initializers import Initializer, Uniform, get
from paramtree.nn.basic import Dropout, _activation, _size
from paramtree.nn.layer import Layer

__all__ = ["GRU", "LSTM", "RNN"]

State = tuple[jax.Array, ...]  # h, and c in an LSTM
Step = Callable[[Any, Any, State], State]


def _lstm(i2h: Any, h2h: Any, state: State) -> State:
    i, f, g, o = jnp.split(i2h + h2h, 4, -1)
    c = jax.nn.sigmoid(f) * state[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def _gru(i2h: Any, h2h: Any, state: State) -> State:
    i2h_r, i2h_z, i2h_n = jnp.split(i2h, 3, -1)
    h2h_r, h2h_z, h2h_n = jnp.split(h2h, 3, -1)
    r, z = jax.nn.sigmoid(i2h_r + h2h_r), jax.nn.sigmoid(i2h_z + h2h_z)
    n = jnp.tanh(i2h_n + r * h2h_n)
    return ((1 - z) * n + z * state[0],)


@functools.lru_cache
def _simple(activation: Callable[..., Any]) -> Step:
    return lambda i2h, h2h, state: (activation(i2h + h2h),)


# Jitted, as each call of a scan by itself would compile anew. Like the functions of a step, it knows no
# layer, so all of one kind and size share what is compiled.
@functools.partial(jax.jit, static_argnames=("step", "reverse"))
def _run(
    step: Step, weights: Sequence[Any], x: Any, state: State, valid: Any, reverse: bool
) -> tuple[Any, State]:
    """Returns the outputs of one layer in one direction, time-major, and its last state."""
    i2h_weight, h2h_weight, i2h_bias, h2h_bias = weights
    i2h = x @ i2h_weight.T + i2h_bias[None, None]  # one product for all steps
    transposed, bias = h2h_weight.T, h2h_bias[None]

    def one(old: State, now: Any) -> tuple[State, Any]:
        i2h, valid = now
        new = step(i2h, old[0] @ transposed + bias, old)
        if valid is None:
            return new, new[0]
        # Past its end a sequence keeps its state: from left to right the last valid one, and from
        # right to left the first of all, so that it begins at its own end.
        kept = tuple(jnp.where(valid, a, b) for a, b in zip(new, old, strict=True))
        return kept, jnp.where(valid, new[0], jnp.zeros_like(new[0]))

    end, y = lax.scan(one, state, (i2h, valid), reverse=reverse)
    return y, end


@dataclass(frozen=True, repr=False)
class _Recurrent(Layer):
    """All but one step. The settings are fields of the subclasses, as Gluon orders them differently."""

    _gates: ClassVar[int] = 1  # how many vectors of hidden_size a step takes from each product
    _states: ClassVar[tuple[str, ...]] = ("h",)

    def __post_init__(self: Any) -> None:
        name = type(self).__name__
        _size(name, "hidden_size", self.hidden_size)
        _size(name, "input_size", self.input_size)
        _size(name, "num_layers", self.num_layers)
        if not self.num_layers:
            raise ValueError(f"{name}: num_layers is 1 or more, but found 0.")
        if self.layout not in ("TNC", "NTC"):
            raise ValueError(f"{name}: layout is 'TNC' or 'NTC', but found {self.layout!r}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"{name}: dropout is a share in [0, 1), but found {self.dropout!r}.")
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        for field in ("i2h_weight", "h2h_weight", "i2h_bias", "h2h_bias"):
            initializer = getattr(self, f"{field}_initializer")
            object.__setattr__(self, f"{field}_initializer", get(initializer or Uniform()))

    @property
    def _step(self) -> Step:
        """The function that computes a state: of what the input gives, what h gives, the old state."""
        raise NotImplementedError

    def begin_state(self: Any, batch_size: int, dtype: Any = None) -> list[jax.Array]:
        """Returns a state of zeros: a list of h, and of c in an LSTM, as in Gluon.

        Args:
          batch_size: how many sequences there are.
          dtype: the layer's if None.
        """
        shape = self._rows(), batch_size, self.hidden_size
        return [jnp.zeros(shape, dtype or self.dtype) for _ in self._states]

    def __call__(self: Any, p: Any, x: Any, state: Any = None, *, lengths: Any = None) -> Any:
        check_scope(p)
        self._check(x)
        if self.layout == "NTC":
            x = x.swapaxes(0, 1)
        time, batch, size = x.shape
        sides = "lr" if self.bidirectional else "l"
        sizes = [size] + [len(sides) * self.hidden_size] * (self.num_layers - 1)
        weights = [
            [self._weights(p, f"{side}{i}_", size) for side in sides] for i, size in enumerate(sizes)
        ]
        dtype = jnp.result_type(x, weights[0][0][0])
        begin = self.begin_state(batch, dtype) if state is None else self._parts(state, batch, dtype)
        valid = None if lengths is None else self._valid(lengths, time, batch)
        if valid is not None:
            x = jnp.where(valid, x, jnp.zeros_like(x))  # else a NaN there would reach the gradient
        ends: list[State] = []
        for i, directions in enumerate(weights):
            if i and self.dropout:
                x = Dropout(self.dropout)(p, x)
            outputs = []
            for side, arrays in zip(sides, directions, strict=True):
                first = tuple(part[len(ends)] for part in begin)
                y, end = _run(self._step, arrays, x, first, valid, reverse=side == "r")
                outputs.append(y)
                ends.append(end)
            x = jnp.concatenate(outputs, 2) if self.bidirectional else y
        y = x.swapaxes(0, 1) if self.layout == "NTC" else x
        if state is None:
            return y
        new = [jnp.stack(part) for part in zip(*ends, strict=True)]
        return y, jax.tree.unflatten(jax.tree.structure(state), new)

    def _rows(self: Any) -> int:
        return self.num_layers * (2 if self.bidirectional else 1)

    def _weights(self: Any, p: Any, prefix: str, size: int) -> list[Any]:
        rows = self._gates * self.hidden_size
        return [
            p.param(f"{prefix}{name}", shape, getattr(self, f"{name}_initializer"), self.dtype)
            for name, shape in (
                ("i2h_weight", (rows, size)),
                ("h2h_weight", (rows, self.hidden_size)),
                ("i2h_bias", (rows,)),
                ("h2h_bias", (rows,)),
            )
        ]

    def _check(self: Any, x: Any) -> None:
        if x.ndim != 3:
            axes = {"T": "time", "N": "batch", "C": "channels"}
            raise ValueError(
                f"{self!r} takes an input ({', '.join(axes[a] for a in self.layout)}), but found the "
                f"shape {x.shape}."
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(
                f"{self!r} takes floating-point numbers, but found {x.dtype}: cast the input, or put "
                "an Embedding before if they are ids."
            )
        if self.input_size and x.shape[2] != self.input_size:
            raise ValueError(f"{self!r} expects inputs of size {self.input_size}, but found {x.shape}.")

    def _parts(self: Any, state: Any, batch: int, dtype: Any) -> list[Any]:
        """Returns the arrays of a state, each (layers * directions, batch, hidden_size)."""
        single = not isinstance(state, list | tuple)
        parts = [state] if single else state
        shape = self._rows(), batch, self.hidden_size
        found = [tuple(jnp.shape(part)) for part in parts]
        if found != [shape] * len(self._states) or (single and len(self._states) > 1):
            form = f"[{', '.join(self._states)}]" if len(self._states) > 1 else "an array h"
            have = f"one array {found[0]}" if single else f"{len(found)}: {found}"
            raise ValueError(
                f"{self!r} takes as its state {form}, of shape {shape} (layers times directions, "
                f"batch, hidden_size), but found {have}. begin_state({batch}) makes one of zeros."
            )
        parts = [jnp.asarray(part) for part in parts]
        for name, part in zip(self._states, parts, strict=True):
            if part.dtype != dtype:
                raise TypeError(
                    f"{self!r} computes in {dtype}, but the state {name} is {part.dtype}: cast it, or "
                    f"begin with begin_state({batch}, '{dtype}')."
                )
        return parts

    def _valid(self: Any, lengths: Any, time: int, batch: int) -> Any:
        """Returns which steps (time, batch, 1) are within their sequence."""
        lengths = jnp.asarray(lengths)
        if lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
            raise ValueError(
                f"{self!r} takes as lengths one whole number for each of the {batch} sequences, but "
                f"found {lengths.dtype}{lengths.shape}."
            )
        steps = jnp.arange(time, dtype=jnp.int32)
        return (steps[:, None] < lengths.astype(jnp.int32)[None])[:, :, None]

    def __repr__(self: Any) -> str:
        settings = [f"{self.input_size or None} -> {self.hidden_size}", self.layout]
        if self.num_layers != 1:
            settings.append(f"num_layers={self.num_layers}")
        if self.dropout:
            settings.append(f"dropout={self.dropout}")
        if self.bidirectional:
            settings.append("bidirectional")
        return f"{type(self).__name__}({', '.join(settings)})"


@dataclass(frozen=True, repr=False)
class RNN(_Recurrent):
    """A simple recurrent layer, or several: ``h' = activation(i2h(x) + h2h(h))``.

    ``i2h(x) = i2h_weight @ x + i2h_bias``, and likewise for h; i2h_weight is (hidden_size, in),
    h2h_weight (hidden_size, hidden_size), the biases (hidden_size,). Elman, "Finding structure in
    time", 1990.

    Called as ``layer(p, x)`` it begins with zeros and returns the output, (time, batch, directions *
    hidden_size) in the layout "TNC". Called as ``layer(p, x, state)`` it returns the output and the
    new state; the state is h, (layers * directions, batch, hidden_size), as an array or in a list, and
    the new one comes in the same form. ``lengths``, (batch,) whole numbers, says how many steps of
    each sequence are valid: the output is 0 beyond, the new state is that after the last of them, and
    the direction from right to left begins there. Dropout is between the layers, under
    ``pt.training``.

    Args:
      hidden_size: the size of h.
      num_layers: how many layers there are, each on the output of the one before.
      activation: a name or a function.
      layout: "TNC" for (time, batch, channels), "NTC" for (batch, time, channels), which is transposed.
      dropout: the share that is dropped between layers, in [0, 1).
      bidirectional: whether there is a second direction, whose output is appended to the first's.
      i2h_weight_initializer: U[-0.07, 0.07] if None.
      h2h_weight_initializer: U[-0.07, 0.07] if None.
      i2h_bias_initializer: zeros by default.
      h2h_bias_initializer: zeros by default.
      input_size: the size of the input if it is to be checked; 0 to infer it.
      dtype: the parameters' dtype.

    Raises:
      ValueError: a setting that is not one; an input, state or lengths of another shape.
      TypeError: an input that is not of floating point, or a state of another dtype; on calling in
        training with dropout and no key: ScopeError.

    Example:
      >>> net = RNN(8, activation="tanh", bidirectional=True)
      >>> x = jnp.ones((5, 3, 4))
      >>> params = net.init(jax.random.key(0), x)
      >>> y, h = net(params, x, jnp.zeros((2, 3, 8)), lengths=jnp.array([5, 2, 4]))
      >>> y.shape, h.shape
      ((5, 3, 16), (2, 3, 8))
    """

    hidden_size: int
    num_layers: int = 1
    activation: Any = "relu"
    layout: str = "TNC"
    dropout: float = 0
    bidirectional: bool = False
    i2h_weight_initializer: Initializer | str | None = None
    h2h_weight_initializer: Initializer | str | None = None
    i2h_bias_initializer: Initializer | str = "zeros"
    h2h_bias_initializer: Initializer | str = "zeros"
    input_size: int = 0
    dtype: Any = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        _activation(self.activation)

    @property
    def _step(self) -> Step:
        """The function that computes a state: of what the input gives, what h gives, the old state."""
        return _simple(_activation(self.activation))


@dataclass(frozen=True, repr=False)
class LSTM(_Recurrent):
    """A long short-term memory, or several layers of it.

    Its gates are the quarters of ``i2h(x) + h2h(h)``, each through a sigmoid, but g through tanh: i, f,
    g, o in the order of the parameters' rows. Then ``c' = f c + i g`` and ``h' = o tanh(c')``.
    Hochreiter and Schmidhuber, "Long short-term memory", 1997; the forget gate f is of Gers et al.,
    "Learning to forget", 2000. With ``initializers.LSTMBias`` for a bias it begins open.

    Called as ``RNN``, but that the state is ``[h, c]``, a list or a tuple of two arrays of one shape;
    i2h_weight is (4 * hidden_size, in), h2h_weight (4 * hidden_size, hidden_size), the biases
    (4 * hidden_size,).

    Args:
      hidden_size: the size of h and c.
      num_layers: how many layers there are, each on the output of the one before.
      layout: "TNC" for (time, batch, channels), "NTC" for (batch, time, channels), which is transposed.
      dropout: the share that is dropped between layers, in [0, 1).
      bidirectional: whether there is a second direction, whose output is appended to the first's.
      input_size: the size of the input if it is to be checked; 0 to infer it.
      i2h_weight_initializer: U[-0.07, 0.07] if None.
      h2h_weight_initializer: U[-0.07, 0.07] if None.
      i2h_bias_initializer: zeros by default.
      h2h_bias_initializer: zeros by default.
      dtype: the parameters' dtype.

    Raises:
      ValueError: a setting that is not one; an input, state or lengths of another shape.
      TypeError: an input that is not of floating point, or a state of another dtype; on calling in
        training with dropout and no key: ScopeError.

    Example:
      >>> net = LSTM(8, num_layers=2)
      >>> x = jnp.ones((5, 3, 4))
      >>> params = net.init(jax.random.key(0), x)
      >>> y, (h, c) = net(params, x, net.begin_state(3))
      >>> y.shape, h.shape, c.shape, net
      ((5, 3, 8), (2, 3, 8), (2, 3, 8), LSTM(None -> 8, TNC, num_layers=2))
    """

    _gates: ClassVar[int] = 4
    _states: ClassVar[tuple[str, ...]] = ("h", "c")

    hidden_size: int
    num_layers: int = 1
    layout: str = "TNC"
    dropout: float = 0
    bidirectional: bool = False
    input_size: int = 0
    i2h_weight_initializer: Initializer | str | None = None
    h2h_weight_initializer: Initializer | str | None = None
    i2h_bias_initializer: Initializer | str = "zeros"
    h2h_bias_initializer: Initializer | str = "zeros"
    dtype: Any = "float32"

    @property
    def _step(self) -> Step:
        """The function that computes a state: of what the input gives, what h gives, the old state."""
        return _lstm


@dataclass(frozen=True, repr=False)
class GRU(_Recurrent):
    """A gated recurrent unit, or several layers of it.

    Its gates r and z are ``sigmoid(i2h(x) + h2h(h))``, and n is ``tanh(i2h(x) + r h2h(h))``, each with
    its third of the parameters' rows, in the order r, z, n. Then ``h' = (1 - z) n + z h``. Cho et al.,
    "Learning phrase representations using RNN encoder-decoder for statistical machine translation",
    2014, but that the reset gate r comes after the product with h, as in cuDNN, MXNet and PyTorch.

    Called as ``RNN``; i2h_weight is (3 * hidden_size, in), h2h_weight (3 * hidden_size, hidden_size),
    the biases (3 * hidden_size,).

    Args:
      hidden_size: the size of h.
      num_layers: how many layers there are, each on the output of the one before.
      layout: "TNC" for (time, batch, channels), "NTC" for (batch, time, channels), which is transposed.
      dropout: the share that is dropped between layers, in [0, 1).
      bidirectional: whether there is a second direction, whose output is appended to the first's.
      input_size: the size of the input if it is to be checked; 0 to infer it.
      i2h_weight_initializer: U[-0.07, 0.07] if None.
      h2h_weight_initializer: U[-0.07, 0.07] if None.
      i2h_bias_initializer: zeros by default.
      h2h_bias_initializer: zeros by default.
      dtype: the parameters' dtype.

    Raises:
      ValueError: a setting that is not one; an input, state or lengths of another shape.
      TypeError: an input that is not of floating point, or a state of another dtype; on calling in
        training with dropout and no key: ScopeError.

    Example:
      >>> net = GRU(8, layout="NTC")
      >>> x = jnp.ones((3, 5, 4))
      >>> net(net.init(jax.random.key(0), x), x).shape
      (3, 5, 8)
    """

    _gates: ClassVar[int] = 3

    hidden_size: int
    num_layers: int = 1
    layout: str = "TNC"
    dropout: float = 0
    bidirectional: bool = False
    input_size: int = 0
    i2h_weight_initializer: Initializer | str | None = None
    h2h_weight_initializer: Initializer | str | None = None
    i2h_bias_initializer: Initializer | str = "zeros"
    h2h_bias_initializer: Initializer | str = "zeros"
    dtype: Any = "float32"

    @property
    def _step(self) -> Step:
        """The function that computes a state: of what the input gives, what h gives, the old state."""
        return _gru
