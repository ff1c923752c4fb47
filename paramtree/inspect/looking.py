"""A run that looks: it passes everything on to another run, and tells a watcher what a model does.

Summaries, captures and interventions are watchers. There is no mode to switch on: on any other scope
a call of a layer costs one check of the scope's type, while tracing, and leaves nothing in the program.
"""

import dataclasses
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from paramtree.core.structure import Path
from paramtree.core.tree import ParamTree, place_of
from paramtree.model.run import INFERENCE, Run
from paramtree.model.scope import Scope, run_of, scope_of
from paramtree.model.traces import current_trace, flattened_for

__all__ = ["Looking", "Watcher", "looked_at", "without"]


class Watcher:
    """What is told of one call of a model; each method does nothing, or only what was to be done."""

    def called(
        self, run: "Looking", place: Path, layer: Any, call: Callable[[], Any], args: Any
    ) -> Any:
        """Makes a call of a layer at a place, and returns what it returns, or something else."""
        return call()

    def declared(self, path: Path) -> None:
        """Is told that a model asks for a leaf."""

    def parametrized(self, path: Path, parametrization: Any) -> None:
        """Is told that a parameter is read through a parametrisation."""

    def sown(self, run: "Looking", place: Path, name: str, value: Any) -> Any:
        """Is shown a value that is sown; returns it, or what replaces it."""
        return value

    def keep(self, run: "Looking", path: Path, value: Any) -> None:
        """Keeps what iterations have left behind, stacked."""


class Looking(Run):
    """A run that passes everything on to another, and tells a watcher of it.

    Attributes:
      inner: the run that the model would have.
      watcher: what is told.
      index: in iterations, the number of each, and of how many.
      made: how many calls were made before a function that jax compiles got the scope.
      counts: how often layers were called, by place.
      found: what the watcher keeps of this run, by path; iterations leave it behind, stacked.
      trace: the trace in which the run was made.
    """

    __slots__ = ("__weakref__", "_inside", "_open", "_outer", "_self", "_size", "counts", "found",
                 "index", "inner", "made", "trace", "watcher")  # fmt: skip

    def __init__(self, inner: Any, watcher: Watcher, outer: "Looking | None" = None) -> None:
        self.inner, self.watcher = inner, watcher
        self._outer, self._self = outer, weakref.ref(self)
        # The counts of the last iteration that was traced, and the paths that it kept, in order.
        self._inside: tuple[Mapping[Path, int], tuple[Path, ...]] = {}, ()
        self.counts: dict[Path, int] = dict(outer.counts) if outer else {}
        self.index: tuple[tuple[Any, int], ...] = outer.index if outer else ()
        self.made: list[int] = outer.made if outer else [0]
        self._size = 0  # of the iterations that are traced now
        self._open: list[tuple[Any, Path]] = outer._open if outer else []  # calls not yet returned
        self.trace = current_trace()
        self.found: dict[Path, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    @property
    def training(self) -> bool:  # type: ignore[override]  # the base has it as a constant
        return bool(self.inner.training)

    @property
    def recording(self) -> bool:  # type: ignore[override]  # the same
        return bool(self.inner.recording)

    def call(self, layer: Any, scope: Scope, method: Any, args: Any, kwargs: Any) -> Any:
        # Outside of this, the run of a transform further out sees what this one returns.
        def looked(layer: Any, scope: Scope, *args: Any, **kwargs: Any) -> Any:
            def call() -> Any:
                return method(layer, scope, *args, **kwargs)

            return self.watched(layer, place_of(scope), call, (*args, *kwargs.values()))

        return self.inner.call(layer, scope, looked, args, kwargs)

    def watched(self, layer: Any, place: Path, call: Callable[[], Any], args: Any) -> Any:
        """Makes a call, and tells the watcher of it."""
        if self._open and self._open[-1][0] is layer and self._open[-1][1] == place:
            return call()  # its own method again, through super()
        self._open.append((layer, place))
        self.made[0] += 1
        try:
            return self.watcher.called(self, place, layer, call, args)
        finally:
            self._open.pop()

    def is_within(self, place: Path) -> bool:
        """Returns whether a call at the same place has made this one."""
        return any(place == other for _, other in self._open[:-1])

    def declare(self, scope: Any, kind: str, name: str, *how: Any, **kwargs: Any) -> Any:
        leaf = self.inner.declare(scope, kind, name, *how, **kwargs)
        self.watcher.declared((*place_of(scope), name))
        return leaf

    def parametrized(self, path: Path, parametrization: Any) -> None:
        self.watcher.parametrized(path, parametrization)
        self.inner.parametrized(path, parametrization)

    def sow(self, scope: Any, name: str, value: Any) -> Any:
        value = self.watcher.sown(self, place_of(scope), name, value)
        return self.inner.sow(scope, name, value)

    # What the base class would answer itself

    def child(self, scope: Scope, key: Any) -> Any:
        value = self.inner.child(scope, key)
        return looked_at(value, self) if run_of(value) is self.inner is not INFERENCE else value

    attribute = child

    def names(self, scope: Scope) -> ParamTree:
        names: ParamTree = self.inner.names(scope)
        return names

    def update(self, path: Path, value: Any, like: Any) -> Any:
        return self.inner.update(path, value, like)

    def key(self, path: Path) -> jax.Array:
        key: jax.Array = self.inner.key(path)
        return key

    def sources(self, paths: Sequence[Path | None]) -> Any:
        return self.inner.sources(paths)

    def reading(self, cells: Any, chosen: Sequence[int]) -> None:
        self.inner.reading(cells, chosen)

    def tie(self, scope: Any, pairs: Mapping[str, str]) -> None:
        self.inner.tie(scope, pairs)

    def split(self, scope: Any, n: int) -> Any:
        self._size = n
        return self.inner.split(scope, n), jnp.arange(n)

    def repeated(self, scope: Any, count: int) -> Any:
        scope = self.inner.repeated(without(scope), count)  # while the model is initialised
        run = Looking(run_of(scope), self.watcher, self)
        run.index = (*self.index, (0, count))
        return looked_at(scope, run)

    def inside(self, tree: ParamTree, part: Any, fixed: bool = False) -> Any:
        inner, index = (None, None) if part is None else part
        scope = self.inner.inside(tree, inner, fixed)
        run = Looking(run_of(scope), self.watcher, self)
        if index is not None:
            run.index = (*self.index, (index, self._size))
        return looked_at(scope, run)

    def results(self, scope: Any, all_state: bool = False) -> dict[int, Any]:
        results: dict[int, Any] = self.inner.results(without(scope), all_state)
        return results

    def absorb(self, scope: Any, results: Mapping[int, Any]) -> None:
        self.inner.absorb(scope, results)

    def outputs(self, scope: Any) -> Any:
        if self._outer:  # jax may trace a body twice, so counts are taken in collect
            self._outer._inside = self.counts, tuple(scope._run.found)
        return scope._run.inner.outputs(without(scope)), scope._run.found

    def collect(self, outputs: Any) -> None:
        inner, found = outputs
        self.inner.collect(inner)
        counts, order = self._inside
        self.counts.update(counts)
        for path in order:  # jax has sorted the dict
            self.watcher.keep(self, path, found[path])

    def around(self, run: Any) -> Any:
        run = Looking(self.inner.around(run), self.watcher, self)
        run.found, run.counts = self.found, self.counts
        return run

    def sealed(self) -> Any:
        inner = self.inner.sealed()
        return self if inner is self.inner else Looking(inner, self.watcher, self)

    def pending(self) -> Any:
        return self.inner.pending()

    def token(self) -> tuple[Any, tuple[Any, ...]]:
        token, arrays = self.inner.token()
        purpose = flattened_for()
        # jax would reuse the trace of a compiled function, in which another call was watched.
        made = self.made[0] if purpose == "jit" else 0
        return _Token(token, self._self, purpose != "tree.map", made), arrays


def looked_at(scope: Any, run: Looking) -> Any:
    """Returns a scope, or a tree, as the scope of a run that looks."""
    return Scope(scope._tree, scope._cells, run) if type(scope) is Scope else scope_of(scope, run)


def without(scope: Scope) -> Any:
    """Returns the scope of the inner run."""
    return Scope(scope._tree, scope._cells, scope._run.inner)


@dataclasses.dataclass(frozen=True)
class _Token:
    """What jax keeps of a run; the reference is weak, as jax keeps static data alive."""

    token: Any
    run: "weakref.ref[Looking]"
    keeps_place: bool
    made: int

    def again(self, *arrays: Any) -> Any:
        inner, run = self.token.again(*arrays), self.run()
        if inner is None or run is None:
            return inner
        again = Looking(inner, run.watcher, run)
        again.found, again.counts, again.trace = run.found, run.counts, run.trace
        again._self = self.run  # a scope that a scan carries comes out as it went in
        return again
