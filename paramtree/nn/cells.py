"""Recurrent cells, each a single step, with the parameters of Gluon's cells.

``recurrent`` has the layers that run the same steps over whole sequences.
"""

import functools
from collections.abc import Callable
from typing import Any, ClassVar, overload

import jax
import jax.numpy as jnp

from paramtree.initializers import Initializer, Uniform, get
from paramtree.initializers.axes import of_weight
from paramtree.nn.basic import Activation, as_activation, check_integers
from paramtree.nn.layer import Layer
from paramtree.typing import Scope, T

__all__ = ["GRUCell", "LSTMCell", "RNNCell", "Recurrent", "State", "Step", "gru", "lstm", "simple"]

State = tuple[jax.Array, ...]  # h, and c in an LSTM
Step = Callable[[Any, Any, State], State]  # from i2h(x), h2h(h) and the old state to the new state
_PARAMETERS = ("i2h_weight", "h2h_weight", "i2h_bias", "h2h_bias")
_WORDS = {"T": "time", "N": "batch", "C": "channels"}


@functools.lru_cache
def simple(activation: Callable[..., Any]) -> Step:
    """Returns the step of a simple recurrent network."""
    return lambda i2h, h2h, state: (activation(i2h + h2h),)


def lstm(i2h: Any, h2h: Any, state: State) -> State:
    """The step of an LSTM."""
    i, f, g, o = jnp.split(i2h + h2h, 4, -1)
    c = jax.nn.sigmoid(f) * state[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def gru(i2h: Any, h2h: Any, state: State) -> State:
    """The step of a GRU."""
    i2h_r, i2h_z, i2h_n = jnp.split(i2h, 3, -1)
    h2h_r, h2h_z, h2h_n = jnp.split(h2h, 3, -1)
    r, z = jax.nn.sigmoid(i2h_r + h2h_r), jax.nn.sigmoid(i2h_z + h2h_z)
    n = jnp.tanh(i2h_n + r * h2h_n)
    return ((1 - z) * n + z * state[0],)


class Recurrent(Layer):
    """Base of recurrent cells and layers. Subclasses declare the fields, each in Gluon's order."""

    layout = "NC"
    _gates: ClassVar[int] = 1  # the rows of each weight, in units of hidden_size
    _states: ClassVar[tuple[str, ...]] = ("h",)
    _state_axes: ClassVar[str] = "batch, hidden_size"
    _step: ClassVar[Any]  # a Step, or a property that returns one

    def __post_init__(self: Any) -> None:
        check_integers(self, 0, "hidden_size", "input_size")
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        for name in _PARAMETERS:
            initializer = getattr(self, f"{name}_initializer") or Uniform()
            checked = of_weight(initializer) if "weight" in name else get(initializer)
            object.__setattr__(self, f"{name}_initializer", checked)

    def begin_state(self: Any, batch_size: int, dtype: Any = None) -> list[jax.Array]:
        """Returns a state of zeros: a list of h, and c for an LSTM, as in Gluon.

        Args:
          batch_size: the number of sequences.
          dtype: the layer's dtype if None.
        """
        shape = self._state_shape(batch_size)
        return [jnp.zeros(shape, dtype or self.dtype) for _ in self._states]

    def _state_shape(self: Any, batch: int) -> tuple[int, ...]:
        return batch, self.hidden_size

    def _weights(self: Any, p: Any, prefix: str, size: int) -> list[Any]:
        rows = self._gates * self.hidden_size
        shapes = (rows, size), (rows, self.hidden_size), (rows,), (rows,)
        return [
            p.param(f"{prefix}{name}", shape, getattr(self, f"{name}_initializer"), self.dtype)
            for name, shape in zip(_PARAMETERS, shapes, strict=True)
        ]

    def _check(self: Any, x: Any) -> None:
        if x.ndim != len(self.layout):
            words = ", ".join(_WORDS[letter] for letter in self.layout)
            raise ValueError(f"{self!r} needs an input ({words}), but found shape {x.shape}.")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(
                f"{self!r} needs floating-point numbers, but found {x.dtype}: cast the input, or use "
                "an nn.Embedding for ids."
            )
        if self.input_size and x.shape[-1] != self.input_size:
            raise ValueError(f"{self!r} expects inputs of size {self.input_size}, but found {x.shape}.")

    def _arrays(self: Any, state: Any, batch: int, dtype: Any) -> list[Any]:
        """Returns the arrays of a state, checked."""
        single = not isinstance(state, list | tuple)
        arrays = [state] if single else state
        shape = self._state_shape(batch)
        shapes = [tuple(jnp.shape(array)) for array in arrays]
        if shapes != [shape] * len(self._states) or (single and len(self._states) > 1):
            form = f"[{', '.join(self._states)}]" if len(self._states) > 1 else "an array h"
            text = f"one array {shapes[0]}" if single else f"{len(shapes)}: {shapes}"
            raise ValueError(
                f"{self!r} needs a state {form} of shape {shape} ({self._state_axes}), but found "
                f"{text}. begin_state({batch}) returns zeros."
            )
        arrays = [jnp.asarray(array) for array in arrays]
        for name, array in zip(self._states, arrays, strict=True):
            if array.dtype != dtype:
                raise TypeError(
                    f"{self!r} computes in {dtype}, but the state {name} is {array.dtype}: cast it, or "
                    f"start from begin_state({batch}, '{dtype}')."
                )
        return arrays


class _Cell(Recurrent):
    @overload
    def __call__(self, p: Scope, x: Any, state: None = None) -> tuple[jax.Array, Any]: ...
    @overload
    def __call__(self, p: Scope, x: Any, state: T) -> tuple[jax.Array, T]: ...
    def __call__(self: Any, p: Any, x: Any, state: Any = None) -> Any:
        self._check(x)
        batch, size = x.shape
        i2h_weight, h2h_weight, i2h_bias, h2h_bias = self._weights(p, "", size)
        dtype = jnp.result_type(x, i2h_weight)
        if state is None:
            zeros = self.begin_state(batch, dtype)
            state = tuple(zeros) if len(zeros) > 1 else zeros[0]
        old = tuple(self._arrays(state, batch, dtype))
        i2h = jnp.inner(x, i2h_weight) + i2h_bias[None]
        h2h = jnp.inner(old[0], h2h_weight) + h2h_bias[None]
        new = self._step(i2h, h2h, old)
        return new[0], jax.tree.unflatten(jax.tree.structure(state), new)

    def __repr__(self: Any) -> str:
        return f"{type(self).__name__}({self.input_size or None} -> {self.hidden_size})"


class RNNCell(_Cell):
    """A step of a simple recurrent network: ``h' = activation(i2h(x) + h2h(h))``.

    ``i2h(x) = i2h_weight @ x + i2h_bias``, and likewise for h. i2h_weight is (hidden_size, in),
    h2h_weight (hidden_size, hidden_size), the biases (hidden_size,). Elman, "Finding structure in
    time", 1990. ``pt.scan`` over it computes what ``RNN`` does.

    Args:
      hidden_size: the size of h.
      activation: a name or a function.
      i2h_weight_initializer: U[-0.07, 0.07] if None.
      h2h_weight_initializer: U[-0.07, 0.07] if None.
      i2h_bias_initializer: zeros by default.
      h2h_bias_initializer: zeros by default.
      input_size: the expected size of the input; 0 accepts any size.
      dtype: the parameters' dtype.

    Returns:
      When called with ``(p, x, state=None)``, x (batch, in): the output, (batch, hidden_size), and the
      new state. The state is h, (batch, hidden_size), as an array or in a list; the new one has the
      same form. None is zeros.

    Raises:
      ValueError: a setting is invalid; when called: an input or state of another shape.
      TypeError: when called: the input is not floating-point, or the state has another dtype.

    Example:
      >>> import paramtree as pt
      >>> cell = RNNCell(8)
      >>> xs = jnp.ones((5, 3, 4))  # time, batch, channels
      >>> params = cell.init(jax.random.key(0), xs[0])
      >>> y, h = cell(params, xs[0])
      >>> y.shape, h.shape
      ((3, 8), (3, 8))
      >>> h, ys = pt.scan(lambda p, h, x: cell(p, x, h)[::-1], params, h, xs)
      >>> ys.shape
      (5, 3, 8)
    """

    hidden_size: int
    activation: Any = "tanh"
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

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, {Activation(self.activation)})"


class _GatedCell(_Cell):
    hidden_size: int
    i2h_weight_initializer: Initializer | str | None = None
    h2h_weight_initializer: Initializer | str | None = None
    i2h_bias_initializer: Initializer | str = "zeros"
    h2h_bias_initializer: Initializer | str = "zeros"
    input_size: int = 0
    dtype: Any = "float32"


class LSTMCell(_GatedCell):
    """A step of a long short-term memory, with the gates and formulas of ``LSTM``.

    i2h_weight is (4 * hidden_size, in), h2h_weight (4 * hidden_size, hidden_size), the biases
    (4 * hidden_size,), each with the gates i, f, g, o. Hochreiter and Schmidhuber, "Long short-term
    memory", 1997; the forget gate f is due to Gers et al., "Learning to forget", 2000.

    Settings and errors are those of ``RNNCell``, which also takes ``activation``.

    Returns:
      When called with ``(p, x, state=None)``, x (batch, in): the output, (batch, hidden_size), and the
      new state. The state is ``(h, c)``, a tuple or list of two arrays (batch, hidden_size); the new
      one has the same form. None is zeros.

    Example:
      >>> cell = LSTMCell(8)
      >>> x = jnp.ones((3, 4))
      >>> params = cell.init(jax.random.key(0), x)
      >>> y, (h, c) = cell(params, x)
      >>> y, (h, c) = cell(params, x, (h, c))
      >>> y.shape, h.shape, c.shape, cell
      ((3, 8), (3, 8), (3, 8), LSTMCell(None -> 8))
    """

    _gates: ClassVar[int] = 4
    _states: ClassVar[tuple[str, ...]] = ("h", "c")
    _step = staticmethod(lstm)


class GRUCell(_GatedCell):
    """A step of a gated recurrent unit, with the gates and formulas of ``GRU``.

    i2h_weight is (3 * hidden_size, in), h2h_weight (3 * hidden_size, hidden_size), the biases
    (3 * hidden_size,), each with the gates r, z, n. Cho et al., "Learning phrase representations using
    RNN encoder-decoder for statistical machine translation", 2014, with the reset gate after the
    product with h.

    Called like ``RNNCell``, with its state. Settings and errors are its own too, except ``activation``.

    Example:
      >>> cell = GRUCell(8)
      >>> x = jnp.ones((3, 4))
      >>> y, h = cell(cell.init(jax.random.key(0), x), x, jnp.zeros((3, 8)))
      >>> y.shape, h.shape
      ((3, 8), (3, 8))
    """

    _gates: ClassVar[int] = 3
    _step = staticmethod(gru)
