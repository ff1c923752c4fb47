"""Models that decode: as for inference, but they write state, such as the caches of attention."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Concatenate, overload

from paramtree.core.arrays import join
from paramtree.core.errors import ScopeError
from paramtree.core.structure import Path
from paramtree.core.tree import ParamTree, located, place_of
from paramtree.model.run import Run
from paramtree.model.scope import Scope, run_of
from paramtree.model.training import training
from paramtree.typing import InTraining, P, R, Stateful

__all__ = ["check_counting", "decoding", "writes"]


class Decoding(Run):
    """The run of a model that decodes: it passes writes on to a run in training, and nothing else."""

    __slots__ = ("inner", "is_sealed")

    decoding = True

    def __init__(self, inner: Any, is_sealed: bool = False) -> None:
        self.inner, self.is_sealed = inner, is_sealed

    def update(self, path: Path, value: Any, like: Any) -> Any:
        if self.is_sealed:
            raise ScopeError(
                f"`{join(path)}` cannot be written: a verb has given this scope other paths than those "
                "of the tree that the model was called with."
            )
        with _advice():
            return self.inner.update(path, value, value if like is None else like)

    def key(self, path: Path) -> Any:
        raise ScopeError(
            f"{located(path) if path else 'the model'} draws random numbers, but the model decodes, "
            "which draws none: give it the key as an input."
        )

    def call(self, layer: Any, scope: Any, method: Any, args: Any, kwargs: Any) -> Any:
        return self.inner.call(layer, scope, method, args, kwargs)

    def declare(self, scope: Any, kind: str, name: str, *how: Any, **kwargs: Any) -> Any:
        return self.inner.declare(scope, kind, name, *how, **kwargs)

    def sources(self, paths: Sequence[Path | None]) -> Any:
        return self.inner.sources(paths)

    def reading(self, cells: Any, chosen: Sequence[int]) -> None:
        self.inner.reading(cells, chosen)

    def parametrized(self, path: Path, how: Any) -> None:
        self.inner.parametrized(path, how)

    def sow(self, scope: Any, name: str, value: Any) -> Any:
        return self.inner.sow(scope, name, value)

    def split(self, scope: Any, n: int) -> Any:
        return self.inner.split(self._trained(scope), n)

    def inside(self, tree: ParamTree, part: Any, fixed: bool = False) -> Any:
        return _decoded(self.inner.inside(tree, part, fixed), self.is_sealed)

    def results(self, scope: Any, all_state: bool = False) -> dict[int, Any]:
        results: dict[int, Any] = self.inner.results(self._trained(scope), all_state)
        return results

    def absorb(self, scope: Any, results: Mapping[int, Any]) -> None:
        with _advice():
            self.inner.absorb(self._trained(scope), results)

    def outputs(self, scope: Any) -> Any:
        return self.inner.outputs(self._trained(scope))

    def collect(self, outputs: Any) -> None:
        self.inner.collect(outputs)

    def around(self, run: Any) -> Any:
        return self.inner.around(run)

    def sealed(self) -> Any:
        return Decoding(self.inner.sealed(), True)

    def token(self) -> tuple[Any, tuple[Any, ...]]:
        token, arrays = self.inner.token()
        return _Token(token, self.is_sealed), arrays

    def _trained(self, scope: Any) -> Scope:
        return Scope(scope._tree, scope._cells, self.inner)


@dataclasses.dataclass(frozen=True)
class _Token:
    """What jax keeps of a run."""

    token: Any
    is_sealed: bool

    @property
    def keeps_place(self) -> bool:
        return bool(self.token.keeps_place)

    def again(self, *arrays: Any) -> Any:
        inner = self.token.again(*arrays)
        return None if inner is None else Decoding(inner, self.is_sealed)


@contextlib.contextmanager
def _advice() -> Iterator[None]:
    """Turns what the errors of a run in training advise into what is right for one that decodes."""
    try:
        yield
    except ScopeError as error:
        raise ScopeError(str(error).replace("pt.training", "pt.decoding")) from None


def _decoded(scope: Any, is_sealed: bool = False) -> Scope:
    return Scope(scope._tree, scope._cells, Decoding(scope._run, is_sealed))


def writes(p: Any) -> bool:
    """Whether a layer may write state: the model is in training, or decodes."""
    return bool(p.training or _decodes(p))


def check_counting(layer: Any, p: Any) -> None:
    """Raises ScopeError if the model decodes: the layer would count from 0 in each piece."""
    if _decodes(p):
        place = f" of {located(place_of(p))}" if place_of(p) else ""
        raise ScopeError(
            f"{layer!r}{place} counts from 0 in every call, but the model decodes, a piece of the "
            "sequence in each call: give the layer positions=, such as n + jnp.arange(length) after n "
            "positions."
        )


def _decodes(p: Any) -> bool:
    return bool(getattr(run_of(p), "decoding", False))


@dataclasses.dataclass(frozen=True)
class _Decoded:
    """A model on the scopes of a run in training, which decodes."""

    f: Callable[..., Any]

    def __call__(self, p: Any, *inputs: Any, **kwargs: Any) -> Any:
        return self.f(p if run_of(p).recording else _decoded(p), *inputs, **kwargs)


@dataclasses.dataclass(frozen=True)
class DecodingModel:
    """A model that decodes; made by ``pt.decoding``."""

    f: Callable[..., Any]

    def __over__(self, change: Callable[[Any], Any]) -> "DecodingModel":
        return DecodingModel(change(self.f))

    def __call__(self, params: Any, *inputs: Any, **kwargs: Any) -> tuple[Any, Any]:
        if not isinstance(params, ParamTree) and not hasattr(type(params), "__open__"):
            raise TypeError(
                f"pt.decoding(model) is called with a parameter tree first, but found "
                f"{type(params).__name__}: pt.decoding(model)(params, x)."
            )
        outputs: tuple[Any, Any] = training(_Decoded(self.f))(params, *inputs, **kwargs)
        return outputs


@overload
def decoding(f: Callable[Concatenate[Any, P], R]) -> Stateful[P, R]: ...
@overload
def decoding(  # type: ignore[overload-cannot-match]  # it can: `def f(p, **kwargs)`
    f: Callable[..., R],
) -> InTraining[R]: ...
def decoding(f: Callable[..., Any]) -> Any:
    """Returns a model that decodes: ``(params, *inputs) -> (output, params)``.

    The model runs as for inference: dropout is off, and batch normalization uses its running
    statistics. But it may write state: attention with a cache stores keys and values in it, and the
    returned tree holds them. ``decoding`` of equal models is equal, so jitted steps share a cache.

    Args:
      f: a model, ``f(scope, *inputs, **kwargs)``.

    Raises:
      ScopeError: when called: a layer draws random numbers, or writes where a jax transform would lose
        that.
      TypeError: when called: ``params`` is not a parameter tree.

    Example:
      >>> import jax, jax.numpy as jnp, paramtree as pt
      >>> attend = pt.nn.MultiHeadAttention(2, causal=True, cache=8, dropout=0.5)
      >>> x = jnp.ones((1, 3, 4))
      >>> params = pt.init(attend, jax.random.key(0), x)
      >>> y, params = pt.decoding(attend)(params, x)
      >>> params.cache_index
      Array(3, dtype=int32)
    """
    return DecodingModel(f)
