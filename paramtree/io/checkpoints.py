"""Checkpoints of a training run, written in the background; the latest and the best are kept.

Orbax does the work: each process writes its own shards in the background, a checkpoint appears
atomically, and old ones are deleted. This module adds names, ties, kinds, keys and holes, so that
``pt.load`` reads a checkpoint like any other file.
"""

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from paramtree.core.errors import LoadError, ParamTreeError
from paramtree.io.formats import orbax
from paramtree.io.load import load
from paramtree.io.save import content_of

__all__ = ["Checkpoints"]


class Checkpoints:
    """A folder of checkpoints of a training run.

    Args:
      folder: the folder, created if missing.
      keep: how many of the latest checkpoints to keep.
      best: the name of a metric; the checkpoint with its best value is kept as well.
      mode: whether the best value is the "min" or the "max".

    Raises:
      ValueError: ``keep`` is less than 1, or ``mode`` is neither "min" nor "max".
      NotADirectoryError: ``folder`` is a file.
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
            raise ValueError(f"keep={keep}: expected a number of checkpoints, at least 1.")
        if mode not in ("min", "max"):
            raise ValueError(f"mode={mode!r}: expected 'min' or 'max'.")
        ocp = orbax.orbax()
        self.folder = os.path.abspath(os.fspath(folder))
        if os.path.exists(self.folder) and not os.path.isdir(self.folder):
            raise NotADirectoryError(f"{self.folder} is a file. Checkpoints need a folder.")
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
        """Saves a run. Returns as soon as its arrays may be changed or donated.

        If an earlier save failed in the background, its error is raised here or in ``wait``.

        Args:
          step: the number of the checkpoint, greater than all previous ones.
          run: everything needed to resume: parameters, optimizer state, keys and step, in any pytree.
          metrics: numbers to save with it, including the metric ``best``.
          wait: whether to block until the checkpoint is on disk.

        Raises:
          TypeError: the step is not a non-negative integer, or a metric is not a number.
          ParamTreeError: this step or a later one is already saved, or the metric ``best`` is missing.
          MismatchError: some leaves cannot be saved; all are listed.
        """
        if not isinstance(step, int | np.integer) or isinstance(step, bool) or step < 0:
            raise TypeError(f"expected a non-negative integer as the step, not {step!r}.")
        last = self.latest
        if last is not None and step <= last:
            raise ParamTreeError(
                f"cannot save step {step}: {self.folder} already has a checkpoint of step {last}, and "
                "steps must increase. Save a restarted run to a new folder."
            )
        values = {}
        for name, value in (metrics or {}).items():
            try:
                values[name] = float(value)
            except (TypeError, ValueError):
                raise TypeError(f"the metric `{name}` is not a number: {value!r}.") from None
        if self._best is not None and self._best not in values:
            raise ParamTreeError(
                f"the metrics of step {step} lack `{self._best}`, which selects the best checkpoint; "
                f"they have {', '.join(values) or 'nothing'}. Pass it, as in save({step}, run, "
                f"{{{self._best!r}: 0.5}})."
            )
        content = content_of(self.folder, run, ".", orbax.FORMAT)
        state, metadata = orbax.as_state(content.arrays, content.layout)
        self._manager.save(
            int(step),
            args=orbax.orbax().args.StandardSave(state),
            metrics=values or None,
            custom_metadata=metadata,
            force=True,
        )
        if wait:
            self.wait()

    def load(self, like: Any = None, *, step: int | str | None = None, **options: Any) -> Any:
        """Returns a saved run.

        Args:
          like: a run with the structure, types and shardings to load into: arrays, or shapes with
            shardings on any mesh.
          step: the step to load, "best" for the best one; by default the latest.
          **options: options of ``pt.load``, such as ``shardings`` and ``allow_missing``.

        Raises:
          LoadError: the checkpoint does not exist, or does not fit ``like``.
        """
        self.wait()
        wanted = self.latest if step is None else self.best if step == "best" else step
        if wanted is None or wanted not in self.steps:
            steps = ", ".join(map(str, self.steps)) or "none yet"
            of_step = "" if wanted is None else f" of step {wanted}"
            raise LoadError(f"{self.folder} has no checkpoint{of_step}. Steps saved: {steps}.")
        return load(os.path.join(self.folder, str(wanted)), like, **options)

    @property
    def steps(self) -> list[int]:
        """The saved steps, in increasing order."""
        return sorted(self._manager.all_steps())

    @property
    def latest(self) -> int | None:
        """The latest saved step, or None."""
        return max(self._manager.all_steps(), default=None)

    @property
    def best(self) -> int | None:
        """The step of the best checkpoint; None if there is none, or without a ``best`` metric."""
        if self._best is None:
            return None
        self.wait()
        return self._manager.best_step()

    def wait(self) -> None:
        """Blocks until all checkpoints are on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for pending saves and stops the writer threads."""
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def _metric(self, metrics: Mapping[str, float]) -> float:
        value = metrics[self._best or ""]
        worst = math.inf if self._mode == "min" else -math.inf
        return worst if math.isnan(value) else value
