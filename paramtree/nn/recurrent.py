"""Recurrent layers over sequences, with the parameter names and layout of Gluon's fused layers.

The first layer has ``l0_i2h_weight``, ``l0_h2h_weight``, ``l0_i2h_bias`` and ``l0_h2h_bias`` for the
left-to-right direction and ``r0_...`` for right-to-left; the second layer has ``l1_...``, and so on.
Their rows are the gates in sequence, as in PyTorch and cuDNN.
"""

import functools
from collections.abc import Sequence
from typing import Any, ClassVar, overload

import jax
import jax.numpy as jnp
from jax import lax

from paramtree.initializers import Initializer
from paramtree.nn.basic import Dropout, as_activation, check_integers
from paramtree.nn.cells import Recurrent, State, Step, gru, lstm, simple
from paramtree.typing import Scope, T

__all__ = ["GRU", "LSTM", "RNN"]


def _plain(
    step: Step, reverse: bool, h2h_weight: Any, i2h: Any, bias: Any, state: State, valid: Any
) -> tuple[Any, State]:
    """Returns h after each step, (time, batch, hidden_size), and the final state.

    ``i2h`` and ``bias`` are the summands of every step, (time, batch, rows); no bias is None.
    """
    transposed = h2h_weight.T

    def body(old: State, inputs: Any) -> tuple[State, Any]:
        i2h, bias, valid = inputs
        h2h = old[0] @ transposed
        new = step(i2h, h2h if bias is None else h2h + bias, old)
        if valid is not None:
            # Invalid steps keep the state. Left to right, the final state is that of the last valid
            # step; right to left, the initial state is carried to it.
            new = tuple(jnp.where(valid, a, b) for a, b in zip(new, old, strict=True))
        return new, new[0]

    final, h = lax.scan(body, state, (i2h, bias, valid), reverse=reverse)
    return h, final


_scan = jax.custom_jvp(_plain, nondiff_argnums=(0, 1))


@_scan.defjvp
def _scan_jvp(step: Step, reverse: bool, primals: Any, tangents: Any) -> Any:
    """A change of the weights acts as one of the summands: ``h @ change.T``, which is one product.

    So is its transpose. Otherwise each step of the backward scan would add to the weights' gradient.
    """
    weight, i2h, bias, state, valid = primals
    change, i2h_change, bias_change, state_change, _ = tangents

    def of_summands(i2h: Any, bias: Any, state: State) -> Any:
        return _plain(step, reverse, weight, i2h, bias, state, valid)

    (h, final), linear = jax.linearize(of_summands, i2h, bias, state)
    first = state[0][None]
    before = jnp.concatenate([h[1:], first] if reverse else [first, h[:-1]])
    if bias is None:
        i2h_change = i2h_change + before @ change.T
    else:
        bias_change = bias_change + before @ change.T
    return (h, final), linear(i2h_change, bias_change, state_change)


# Jitted because an eager scan compiles on every call. Its static arguments hold no layer, so all layers
# of the same type and size share compiled code.
@functools.partial(jax.jit, static_argnames=("step", "reverse"))
def _run(
    step: Step, weights: Sequence[Any], x: Any, state: State, valid: Any, reverse: bool
) -> tuple[Any, State]:
    """Returns the outputs of one layer in one direction, time-major, and its final state."""
    i2h_weight, h2h_weight, i2h_bias, h2h_bias = weights
    i2h = x @ i2h_weight.T + i2h_bias[None, None]  # one product for all steps
    bias = None
    if step is gru:
        bias = jnp.broadcast_to(h2h_bias, i2h.shape)
    else:  # which adds the two
        i2h = i2h + h2h_bias[None, None]
    y, final = _scan(step, reverse, h2h_weight, i2h, bias, state, valid)
    return y if valid is None else jnp.where(valid, y, jnp.zeros_like(y)), final


class _Sequence(Recurrent):
    """Base of recurrent layers over sequences."""

    _state_axes: ClassVar[str] = "layers * directions, batch, hidden_size"

    def __post_init__(self: Any) -> None:
        super().__post_init__()
        name = type(self).__name__
        check_integers(self, 1, "num_layers")
        if self.layout not in ("TNC", "NTC"):
            raise ValueError(f"{name}: layout must be 'TNC' or 'NTC', but found {self.layout!r}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"{name}: dropout must be in [0, 1), but found {self.dropout!r}.")

    @overload
    def __call__(self, p: Scope, x: Any, state: None = None, *, lengths: Any = None) -> jax.Array: ...
    @overload
    def __call__(self, p: Scope, x: Any, state: T, *, lengths: Any = None) -> tuple[jax.Array, T]: ...
    def __call__(self: Any, p: Any, x: Any, state: Any = None, *, lengths: Any = None) -> Any:
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
        initial = self.begin_state(batch, dtype) if state is None else self._arrays(state, batch, dtype)
        valid = None if lengths is None else self._valid(lengths, time, batch)
        if valid is not None:
            x = jnp.where(valid, x, jnp.zeros_like(x))  # keeps NaNs in padding out of the gradient
        finals: list[State] = []
        for i, directions in enumerate(weights):
            if i and self.dropout:
                x = Dropout(self.dropout)(p, x)
            outputs = []
            for side, arrays in zip(sides, directions, strict=True):
                first = tuple(array[len(finals)] for array in initial)
                y, final = _run(self._step, arrays, x, first, valid, reverse=side == "r")
                outputs.append(y)
                finals.append(final)
            x = jnp.concatenate(outputs, 2) if self.bidirectional else y
        y = x.swapaxes(0, 1) if self.layout == "NTC" else x
        if state is None:
            return y
        new = [jnp.stack(rows) for rows in zip(*finals, strict=True)]
        return y, jax.tree.unflatten(jax.tree.structure(state), new)

    def _state_shape(self: Any, batch: int) -> tuple[int, ...]:
        return self.num_layers * (2 if self.bidirectional else 1), batch, self.hidden_size

    def _valid(self: Any, lengths: Any, time: int, batch: int) -> Any:
        """Returns the mask of valid steps, (time, batch, 1)."""
        lengths = jnp.asarray(lengths)
        if lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
            raise ValueError(
                f"{self!r} needs integer lengths, one for each of the {batch} sequences, but found "
                f"{lengths.dtype}{lengths.shape}."
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


class RNN(_Sequence):
    """A simple recurrent network of one or more layers: ``h' = activation(i2h(x) + h2h(h))``.

    ``i2h(x) = i2h_weight @ x + i2h_bias``, and likewise for h. i2h_weight is (hidden_size, in),
    h2h_weight (hidden_size, hidden_size), the biases (hidden_size,). Elman, "Finding structure in
    time", 1990.

    ``layer(p, x)`` starts from zeros and returns the output, (time, batch, directions * hidden_size) in
    layout "TNC". ``layer(p, x, state)`` returns the output and the new state. The state is h, (layers *
    directions, batch, hidden_size), as an array or in a list; the new state has the same form.
    ``lengths``, integers (batch,), is the number of valid steps per sequence: the output is 0 after
    them, the new state is that of the last valid step, and the right-to-left direction starts there.
    Dropout applies between layers, under ``pt.training``.

    Args:
      hidden_size: the size of h.
      num_layers: the number of layers.
      activation: a name or a function.
      layout: "TNC" for (time, batch, channels), or "NTC" for (batch, time, channels).
      dropout: the dropout rate between layers, in [0, 1).
      bidirectional: whether to add a right-to-left direction and concatenate the outputs.
      i2h_weight_initializer: U[-0.07, 0.07] if None.
      h2h_weight_initializer: U[-0.07, 0.07] if None.
      i2h_bias_initializer: zeros by default.
      h2h_bias_initializer: zeros by default.
      input_size: the expected size of the input; 0 accepts any size.
      dtype: the parameters' dtype.

    Raises:
      ValueError: a setting is invalid; when called: an input, state or lengths of another shape.
      TypeError: when called: the input is not floating-point, or the state has another dtype.
      ScopeError: when called in training with dropout and without a key.

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
        as_activation(self.activation)

    @property
    def _step(self) -> Step:
        return simple(as_activation(self.activation))


class _Gated(_Sequence):
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


class LSTM(_Gated):
    """A long short-term memory of one or more layers.

    The gates i, f, g, o are the quarters of ``i2h(x) + h2h(h)``, in the order of the parameters' rows,
    through a sigmoid, or tanh for g. Then ``c' = f c + i g`` and ``h' = o tanh(c')``. Hochreiter and
    Schmidhuber, "Long short-term memory", 1997; the forget gate f is due to Gers et al., "Learning to
    forget", 2000. ``initializers.LSTMBias`` as the initializer of a bias starts it open.

    Called like ``RNN``, with the state ``[h, c]``, a list or tuple of two arrays of equal shape.
    i2h_weight is (4 * hidden_size, in), h2h_weight (4 * hidden_size, hidden_size), the biases
    (4 * hidden_size,). All settings and errors are as for ``RNN``, which also takes ``activation``.

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

    _step = staticmethod(lstm)


class GRU(_Gated):
    """A gated recurrent unit of one or more layers.

    The gates r and z are ``sigmoid(i2h(x) + h2h(h))``, and n is ``tanh(i2h(x) + r h2h(h))``, each from
    a third of the parameters' rows, in the order r, z, n. Then ``h' = (1 - z) n + z h``. Cho et al.,
    "Learning phrase representations using RNN encoder-decoder for statistical machine translation",
    2014, except that the reset gate r applies after the product with h, as in cuDNN, MXNet and PyTorch.

    Called like ``RNN``. i2h_weight is (3 * hidden_size, in), h2h_weight (3 * hidden_size,
    hidden_size), the biases (3 * hidden_size,). All settings and errors are as for ``RNN``, which also
    takes ``activation``.

    Example:
      >>> net = GRU(8, layout="NTC")
      >>> x = jnp.ones((3, 5, 4))
      >>> net(net.init(jax.random.key(0), x), x).shape
      (3, 5, 8)
    """

    _gates: ClassVar[int] = 3

    _step = staticmethod(gru)
