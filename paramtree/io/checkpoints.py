"""Checkpoints of a training run, written in the background; the latest and the best are kept.

Orbax writes the arrays, each process its own shards, into a folder that nobody reads. When it is on
the disk, with checksums, it gets its name in one step, and old ones are deleted. The folder alone says
which checkpoints there are, so that readers see what a writer in another process does; of writers
there is one at a time. ``pt.load`` reads a checkpoint like any other file.
"""

import contextlib
import json
import math
import os
import secrets
from collections.abc import Mapping
from typing import Any, Unpack, overload

import numpy as np

from paramtree.core.errors import LoadError, ParamTreeError
from paramtree.core.tree import ParamTree
from paramtree.io.background import Task
from paramtree.io.checksums import Checksums
from paramtree.io.folders import discard, hidden, numbered, publish, remove_unfinished, tidy
from paramtree.io.formats import orbax
from paramtree.io.load import LoadOptions, load
from paramtree.io.locks import Lock
from paramtree.io.orbax_items import DEFAULT, METRICS, is_finished, is_leftover
from paramtree.io.processes import agree, is_first, meet
from paramtree.io.save import content_of
from paramtree.io.source import fail
from paramtree.typing import T

__all__ = ["Checkpoints"]

_SHOWN = 20  # steps in one message
_TRIES = 20  # to load the latest step while a writer deletes old ones


class Checkpoints:
    """A folder of checkpoints of a training run.

    One object, in one process or in all processes of a program together, writes to a folder at a time:
    it holds a lock from its first save until ``close``. Any number of others may read meanwhile. A save
    that is under way when the program ends is finished first, unless the process is killed.

    Args:
      folder: the folder, created if missing.
      keep: how many of the latest checkpoints to keep.
      best: the name of a metric; the checkpoint with its best value is kept as well.
      mode: whether the best value is the "min" or the "max".

    Raises:
      ValueError: ``keep`` is no integer of at least 1, or ``mode`` is neither "min" nor "max".
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
        if not isinstance(keep, int | np.integer) or isinstance(keep, bool) or keep < 1:
            raise ValueError(f"keep={keep!r}: expected a number of checkpoints, at least 1.")
        if mode not in ("min", "max"):
            raise ValueError(f"mode={mode!r}: expected 'min' or 'max'.")
        orbax.orbax()
        self.folder = os.path.abspath(os.fspath(folder))
        if os.path.exists(self.folder) and not os.path.isdir(self.folder):
            raise NotADirectoryError(f"{self.folder} is a file. Checkpoints need a folder.")
        os.makedirs(self.folder, exist_ok=True)
        self._keep, self._best, self._mode = keep, best, mode
        self._lock = Lock(self.folder)
        self._checkpointer: Any = None  # Orbax's, once something is saved
        self._task: Task | None = None
        self._closed = False

    def save(
        self,
        step: int,
        run: Any,
        metrics: Mapping[str, Any] | None = None,
        *,
        wait: bool = False,
        overwrite: bool = False,
    ) -> None:
        """Saves a run. Returns as soon as its arrays may be changed or donated.

        If an earlier save failed in the background, its error is raised here or in ``wait``.

        Args:
          step: the number of the checkpoint, greater than all previous ones.
          run: everything needed to resume: parameters, optimizer state, keys and step, in any pytree.
          metrics: numbers to save with it, including the metric ``best``.
          wait: whether to block until the checkpoint is on disk.
          overwrite: whether a checkpoint of this step is replaced; the old one stays until then.

        Raises:
          TypeError: the step is not a non-negative integer, or a metric is not a number.
          ParamTreeError: this step or a later one is already saved, the metric ``best`` is missing,
            another object writes to the folder, or this one is closed.
          MismatchError: some leaves cannot be saved; all are listed.
        """
        self._check_open("save")
        step = _number(step)
        values = self._checked(step, metrics or {})
        content = content_of(self.folder, run, ".", orbax.FORMAT)
        state, metadata = orbax.as_state(content.arrays, content.layout)
        self.wait()
        token = agree(lambda: self._begin(step, overwrite))
        staged = hidden(self.folder, step, "saving", token)
        ocp = orbax.orbax()
        if self._checkpointer is None:
            handlers = {
                DEFAULT: ocp.StandardCheckpointHandler(),
                METRICS: ocp.JsonCheckpointHandler(filename=METRICS),
            }
            self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(**handlers))
        items = {DEFAULT: ocp.args.StandardSave(state)}
        if values:
            items[METRICS] = ocp.args.JsonSave(values)
        try:
            self._checkpointer.save(staged, args=ocp.args.Composite(**items), custom_metadata=metadata)
        except BaseException:
            if is_first():
                remove_unfinished(staged)
            raise
        self._task = Task(lambda: self._complete(step, staged))
        if wait:
            self.wait()

    @overload
    def load(
        self, like: None = None, *, step: int | str | None = None, **options: Unpack[LoadOptions]
    ) -> ParamTree: ...
    @overload
    def load(self, like: T, *, step: int | str | None = None, **options: Unpack[LoadOptions]) -> T: ...
    def load(self, like: Any = None, *, step: int | str | None = None, **options: Any) -> Any:
        """Returns a saved run.

        Args:
          like: a run with the structure, types and shardings to load into: arrays, or shapes with
            shardings on any mesh.
          step: the step to load, "best" for the best one; by default the latest.
          **options: options of ``pt.load``, such as ``shardings`` and ``allow_missing``.

        Raises:
          LoadError: the checkpoint does not exist, is damaged, or does not fit ``like``.
          ParamTreeError: no step is the best one, as there is no such metric.
        """
        self.wait()
        if step == "best" and self._best is None:
            raise ParamTreeError(
                f"{self.folder} was opened without a metric, so no step is the best one: pass its "
                "name, as in pt.Checkpoints(folder, best='loss'), or load a step by its number."
            )
        for _ in range(_TRIES):
            found = self._found()
            wanted = max(found, default=None) if step is None else step
            if step == "best":
                wanted = self._best_of(found)
            if wanted is None or wanted not in found:
                of_step = "" if wanted is None else f" of step {wanted if step is None else step!r}"
                raise LoadError(
                    f"{self.folder} has no checkpoint{of_step}. Steps saved: {_listed(found)}."
                )
            with contextlib.suppress(FileNotFoundError):  # a writer has just deleted it
                return load(found[int(wanted)], like, **options)
        raise LoadError(f"{self.folder}: the checkpoints are deleted before they can be loaded.")

    def delete(self, step: int) -> None:
        """Deletes a checkpoint, for instance one that diverged; waits for those who load it.

        Raises:
          TypeError: the step is not a non-negative integer.
          ParamTreeError: there is no such step, another object writes to the folder, or this one is
            closed.
        """
        self._check_open("delete")
        step = _number(step)
        self.wait()
        agree(lambda: self._delete(step))

    @property
    def steps(self) -> list[int]:
        """The saved steps, in increasing order; waits for a save that is under way."""
        self.wait()
        return list(self._found())

    @property
    def latest(self) -> int | None:
        """The latest saved step, or None."""
        return max(self.steps, default=None)

    @property
    def best(self) -> int | None:
        """The step of the best checkpoint; None if there is none, or without a ``best`` metric.

        Raises:
          ParamTreeError: no step has the metric.
          LoadError: the metrics of a step are damaged.
        """
        if self._best is None:
            return None
        self.wait()
        return self._best_of(self._found())

    def wait(self) -> None:
        """Blocks until all checkpoints are on disk."""
        task, self._task = self._task, None
        if task is not None:
            try:
                task.wait()
            except KeyboardInterrupt:
                self._task = task
                raise

    def close(self) -> None:
        """Waits for pending saves, and lets others write. What is saved can still be loaded."""
        self._closed = True
        try:
            self.wait()
        finally:
            checkpointer, self._checkpointer = self._checkpointer, None
            if checkpointer is not None:
                checkpointer.close()
            self._lock.release()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    # What happens before and after Orbax writes

    def _check_open(self, verb: str) -> None:
        if self._closed:
            raise ParamTreeError(
                f"cannot {verb}: these checkpoints of {self.folder} are closed. Make a new "
                "pt.Checkpoints of the folder, or close them later."
            )

    def _checked(self, step: int, metrics: Mapping[str, Any]) -> dict[str, float]:
        values = {}
        for name, value in metrics.items():
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
        return values

    def _own(self) -> None:
        """Takes the lock, in the process that needs it."""
        if not self._lock.held and self._lock.take():
            tidy(self.folder)

    def _begin(self, step: int, overwrite: bool) -> str:
        """Returns a name for what is not finished, if the step may be saved."""
        self._own()
        found = self._found()
        last, path = max(found, default=-1), os.path.join(self.folder, str(step))
        if step <= last and not (overwrite and step in found):
            other = (
                f" overwrite=True replaces a step that exists: {_listed(found)}." if overwrite else ""
            )
            raise ParamTreeError(
                f"cannot save step {step}: {self.folder} already has a checkpoint of step {last}, and "
                f"steps must increase.{other} Save a restarted run to a new folder, delete(step) the "
                "later checkpoints, or pass overwrite=True to replace one of the same step."
            )
        if step not in found and os.path.lexists(path) and not is_leftover(path):
            raise ParamTreeError(
                f"cannot save step {step}: {path} exists and is no checkpoint. Move it, or save to "
                "another folder."
            )
        return secrets.token_hex(4)

    def _complete(self, step: int, staged: str) -> None:
        """Waits for Orbax, and makes a checkpoint of what it wrote."""
        try:
            self._checkpointer.wait_until_finished()
            if is_first():
                publish(staged, self.folder, step)
                self._prune(step)
        finally:
            if is_first():
                remove_unfinished(staged)
            meet(staged)
        if step not in self._found():
            raise ParamTreeError(
                f"step {step} was not saved to {self.folder}: process 0 failed, and has printed why."
            )

    def _prune(self, step: int) -> None:
        """Deletes what is neither among the latest nor the best; what is being loaded waits."""
        found = self._found()
        kept = {step, *list(found)[-self._keep :]}
        with contextlib.suppress(LoadError):  # with damaged metrics, none is known to be worse
            if self._best is not None and (best := self._best_of(found)) is not None:
                kept.add(best)
            for old in found.keys() - kept:
                discard(found[old])

    def _delete(self, step: int) -> str:
        self._own()
        found = self._found()
        if step not in found:
            raise ParamTreeError(
                f"cannot delete step {step}: {self.folder} has no such checkpoint. Steps saved: "
                f"{_listed(found)}."
            )
        discard(found[step], wait=True)
        return ""

    # What the folder has

    def _found(self) -> dict[int, str]:
        """Returns the folders of the finished steps, in increasing order."""
        return {step: path for step, path in numbered(self.folder).items() if is_finished(path)}

    def _best_of(self, found: Mapping[int, str]) -> int | None:
        name = self._best or ""
        metrics = {step: _metrics_of(path) for step, path in found.items()}
        values = {step: values[name] for step, values in metrics.items() if name in values}
        if metrics and not values:
            have = "; ".join(
                f"step {step} has {', '.join(sorted(values)) or 'none'}"
                for step, values in list(metrics.items())[:_SHOWN]
            )
            raise ParamTreeError(
                f"{self.folder}: no step has the metric `{name}`, which selects the best checkpoint: "
                f"{have}. Open it with best= one of these, or load a step by its number."
            )

        def order(step: int) -> tuple[float, int]:  # of equal ones the latest is the best
            value = values[step] if self._mode == "max" else -values[step]
            return (-math.inf if math.isnan(value) else value, step)

        return max(values, key=order, default=None)


def _number(step: Any) -> int:
    if not isinstance(step, int | np.integer) or isinstance(step, bool) or step < 0:
        raise TypeError(f"expected a non-negative integer as the step, not {step!r}.")
    return int(step)


def _listed(found: Mapping[int, str]) -> str:
    steps = list(map(str, found))
    more = f"{len(steps) - _SHOWN} earlier ones, " if len(steps) > _SHOWN else ""
    return more + ", ".join(steps[-_SHOWN:]) if steps else "none yet"


def _metrics_of(folder: str) -> dict[str, float]:
    """Returns the metrics of a step.

    Raises:
      LoadError: they are damaged.
    """
    where = f"{METRICS}/{METRICS}"
    Checksums(folder, folder).check(lambda name, size: name == where)
    try:
        with open(os.path.join(folder, METRICS, METRICS), encoding="utf-8") as file:
            return {str(name): float(value) for name, value in json.load(file).items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        fail(folder, where, f"is damaged: {error}. Load another checkpoint.")
