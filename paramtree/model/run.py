"""Why a model is called, and so what reading, declaring, writing and drawing on its scopes do."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from paramtree.core.arrays import join, shape_of
from paramtree.core.errors import MismatchError, MissingError, ScopeError
from paramtree.core.structure import Path
from paramtree.core.tree import ParamTree, located, place_of

__all__ = ["INFERENCE", "Run"]


class Run:
    """Why a model is called, and so what its scopes do; this one is the run for inference."""

    __slots__ = ()

    training = False
    recording = False  # whether the model is being initialised

    def child(self, scope: Any, key: str | int) -> Any:
        """Returns a child of a scope."""
        return scope._value(scope._tree[key])

    attribute = child

    def names(self, scope: Any) -> ParamTree:
        """Returns the level whose names the scope lists."""
        return scope._tree

    def declare(
        self, scope: Any, kind: str, name: str, shape: Any, initializer: Any, dtype: Any = jnp.float32
    ) -> Any:  # fmt: skip
        """Returns the leaf that a model asks for; ``Scope.param`` says what is raised."""
        try:
            leaf = scope[name]
        except MissingError as error:
            leaf, problem = scope, str(error)
        else:
            problem = ""
        if isinstance(leaf, ParamTree):
            full = join((*place_of(scope), name))
            raise MissingError(
                f"the model needs a leaf `{full}` of shape {tuple(shape)}: "
                f"{problem or f'`{full}` is a level, not a leaf.'} Call it with the tree that pt.init "
                "gives for this model."
            ) from None
        have = shape_of(leaf)
        if have is not None and have != tuple(shape):
            raise MismatchError(
                f"`{join((*place_of(scope), name))}` has shape {have}, but the model needs "
                f"{tuple(shape)}. Either the input does not have the size that the tree was "
                "initialised for, or the tree belongs to another model: check the input's shape, or "
                "call pt.init again. For copies of a layer in one leaf use nn.Vmap or nn.Repeat."
            )
        return leaf

    def update(self, path: Path, value: Any, like: Any) -> Any:
        """Writes state that the scope shows as ``like``, and returns what was stored."""
        raise ScopeError(
            f"`{join(path)}` cannot be written: the model was called for inference. Call it as "
            "`output, params = pt.training(model)(params, x)`."
        )

    def key(self, path: Path) -> jax.Array:
        """Draws a PRNG key for a layer."""
        raise ScopeError(
            f"{located(path)} draws random numbers, but the model was called for inference. Call it as "
            "`output, params = pt.training(model)(params, x, key=key)`."
        )

    def sources(self, paths: Sequence[Path | None]) -> tuple[list[Any] | None, Any]:
        """Returns the run's own values at some paths, if they can change, and the current trace."""
        return None, None

    def reading(self, cells: Any, chosen: Sequence[int]) -> None:
        """Checks that some values of a scope may be read."""

    def tie(self, scope: Any, pairs: Mapping[str, str]) -> None:
        """Ties paths below a scope, if the tree is still to be made."""

    def call(self, layer: Any, scope: Any, method: Any, args: Any, kwargs: Any) -> Any:
        """Calls a layer on a scope."""
        return method(layer, scope, *args, **kwargs)

    def split(self, scope: Any, n: int) -> Any:
        """Returns arrays with a leading axis of n, of which each iteration gets one entry."""
        return None

    def inside(self, tree: ParamTree, part: Any, fixed: bool = False) -> Any:
        """Returns the scope of one iteration; in one that is fixed, only state may be written."""
        return tree

    def results(self, scope: Any, all_state: bool = False) -> dict[int, Any]:
        """Returns the state that an iteration has written, by slot, or all of it."""
        return {}

    def absorb(self, scope: Any, results: Mapping[int, Any]) -> None:
        """Writes the state that iterations have written."""

    def outputs(self, scope: Any) -> Any:
        """Returns what else an iteration leaves behind, which is stacked."""

    def collect(self, outputs: Any) -> None:
        """Takes what iterations have left behind, stacked."""

    def around(self, run: Any) -> Any:
        """Returns the run of a call within this one."""
        return run

    def parametrized(self, path: Path, how: Any) -> None:
        """Takes note that a parameter is read through a parametrisation."""

    def sow(self, scope: Any, name: str, value: Any) -> Any:
        """Shows a value to who looks; returns it, or what replaces it."""
        return value

    def token(self) -> tuple[Any, tuple[Any, ...]]:
        """Returns what jax keeps of the run, whose ``again`` returns it, and arrays to take along."""
        return _Inference, ()

    def sealed(self) -> Any:
        """Returns the run for a scope whose paths are not those of the tree."""
        return self

    def pending(self) -> Any:
        """Returns the run if a verb may see a tree to which leaves are still added, else None."""
        return None


class _Inference:
    keeps_place = False

    @staticmethod
    def again(*arrays: Any) -> Run:
        return INFERENCE


INFERENCE = Run()
