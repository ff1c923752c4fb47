"""Checkpoints of a run: written while it goes on, the last few and the best of them kept.

Orbax does the work: each process writes its own parts in the background, a checkpoint appears whole or
not at all, and old ones are deleted. What is added is what every file of this library has: names, ties,
kinds, keys and holes, so that ``pt.load`` reads a checkpoint like any other file.
"""

import math
import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import numpy as np

from paramtree.core.errors import LoadError, ParamTreeError
from paramtree.io.formats import orbax
from paramtree.io.load import load
from paramtree.io.save import flattened

__all__ = ["Checkpoints"]


class Checkpoints:
    """A folder with the checkpoints of a run.

    Args:
      folder: where; it is made if it is not there.
      keep: how many of the last checkpoints stay.
      best: the name of a metric; the checkpoint with the best value of it stays as well.
      mode: whether the best value is the "min" or the "max".

    Raises:
      ValueError: ``keep`` is less than 1, or ``mode`` is something else.
      NotADirectoryError: the folder is a file.
      ParamTreeError: Orbax is not installed.

    Example:
      >>> import jax, paramtree as pt, tempfile
      >>> net, x = pt.nn.Dense(2), jax.numpy.ones((1, 3))
      >>> run = {"params": pt.init(net, jax.random.key(0), x), "key": jax.random.key(1), "step": 0}
      >>> with pt.Checkpoints(tempfile.mkdtemp(), keep=2, best="loss") as checkpoints:
      ...     for step in range(1, 6):
      ...         checkpoints.save(step, {**run, "step": step}, {"loss": (step - 2) ** 2})
      ...     checkpoints.steps, checkpoints.best, checkpoints.load(run)["step"]
      ([2, 4, 5], 2, 5)
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep: int = 3,
        best: str | None = None,
        mode: str = "min",
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep is how many checkpoints stay, at least 1, not {keep}.")
        if mode not in ("min", "max"):
            raise ValueError(f"mode is 'min' or 'max', not {mode!r}.")
        ocp = orbax.orbax()
        self.folder = os.path.abspath(os.fspath(folder))
        if os.path.exists(self.folder) and not os.path.isdir(self.folder):
            raise NotADirectoryError(f"{self.folder} is a file: checkpoints are kept in a folder.")
        self._best, self._mode = best, mode
        managers = ocp.checkpoint_managers
        policies = [managers.LatestN(keep)]
        if best is not None:
            policies.append(managers.BestN(get_metric_fn=self._metric, reverse=mode == "min", n=1))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy(policies),
            best_fn=None if best is None else self._metric,
            best_mode=mode,
            enable_async_checkpointing=True,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def save(
        self, step: int, run: Any, metrics: Mapping[str, Any] | None = None, *, wait: bool = False
    ) -> None:
        """Saves everything that a run goes on from; it returns as soon as the arrays may change.

        An earlier save that failed in the background raises here, or in ``wait``.

        Args:
          step: the number of the checkpoint, larger than that of every one before.
          run: parameters, state, optimiser, keys and step, in any pytree.
          metrics: numbers to keep beside it, such as the one that says which is best.
          wait: whether to wait until it is on the disk.

        Raises:
          TypeError: the step is no whole number of 0 or more, or a metric no number.
          ParamTreeError: there is a checkpoint of that step or a later one, or the metrics lack the
            one that says which is best.
          MismatchError: leaves that cannot be saved; all are listed.
        """
        if not isinstance(step, int | np.integer) or isinstance(step, bool) or step < 0:
            raise TypeError(f"a step is a whole number, 0 or more, not {step!r}.")
        last = self.latest
        if last is not None and step <= last:
            raise ParamTreeError(
                f"{self.folder} has a checkpoint of step {last}, and the next one is of a later step, "
                f"not {step}. A run that begins again needs a folder of its own."
            )
        found = {}
        for name, value in (metrics or {}).items():
            try:
                found[name] = float(value)
            except (TypeError, ValueError):
                raise TypeError(f"the metric `{name}` is a number, not {value!r}.") from None
        if self._best is not None and self._best not in found:
            raise ParamTreeError(
                f"`{self._best}` says which checkpoint is best, and the metrics of step {step} have "
                f"{', '.join(found) or 'nothing'}: give it, as in save({step}, run, "
                f"{{{self._best!r}: 0.5}})."
            )
        arrays, layout = flattened(self.folder, run, ".", orbax.NATIVE)
        state, metadata = orbax.as_state(arrays, layout)
        self._manager.save(
            int(step),
            args=orbax.orbax().args.StandardSave(state),
            metrics=found or None,
            custom_metadata=metadata,
            force=True,
        )
        if wait:
            self.wait()

    def load(self, like: Any = None, *, step: int | str | None = None, **options: Any) -> Any:
        """Returns the run that was saved, on the devices and in the types of another one.

        Args:
          like: a run as it is to be: arrays, or shapes with shardings; any mesh will do.
          step: which one, "best" for the best; the last if not given.
          **options: what ``pt.load`` takes, such as ``shardings`` and ``allow_missing``.

        Raises:
          LoadError: there is no such checkpoint, or it does not fit.
        """
        self.wait()
        wanted = self.latest if step is None else self.best if step == "best" else step
        if wanted is None or wanted not in self.steps:
            there = ", ".join(map(str, self.steps)) or "none yet"
            what = "" if wanted is None else f" of step {wanted}"
            raise LoadError(f"{self.folder} has no checkpoint{what}: the steps there are {there}.")
        return load(os.path.join(self.folder, str(wanted)), like, **options)

    @property
    def steps(self) -> list[int]:
        """The steps of which there are checkpoints, in order."""
        return sorted(self._manager.all_steps())

    @property
    def latest(self) -> int | None:
        """The last step of which there is a checkpoint; None if there is none."""
        return max(self._manager.all_steps(), default=None)

    @property
    def best(self) -> int | None:
        """The step of the best checkpoint; None if there is none, or nothing says which is best."""
        if self._best is None:
            return None
        self.wait()
        found: int | None = self._manager.best_step()
        return found

    def wait(self) -> None:
        """Waits until all that was saved is on the disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and ends the threads that write."""
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _metric(self, metrics: Mapping[str, float]) -> float:
        value = metrics[self._best or ""]
        worst = math.inf if self._mode == "min" else -math.inf
        return worst if math.isnan(value) else value
