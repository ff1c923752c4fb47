"""The parent process: starts the workers of a round, gives them turns, and collects their values."""

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.suite.case import Case, Size

ROOT = Path(__file__).parents[2]
Line = dict[str, Any]


class Worker:
    """A process of ``benchmarks.suite.worker``."""

    def __init__(self, case: Case, size: Size, *args: str, env: dict[str, str]) -> None:
        command = [sys.executable, "-m", "benchmarks.suite.worker", case.name, str(size), *args]
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            cwd=ROOT,
            env=env,
        )
        self._text = b""
        self._limit = case.limit

    def line(self) -> Line:
        """Returns the next line of JSON that it prints, and skips other output."""
        until = time.monotonic() + self._limit
        out = self._process.stdout
        assert out is not None
        while True:
            while b"\n" in self._text:
                text, self._text = self._text.split(b"\n", 1)
                if text.startswith(b"{"):
                    return json.loads(text)
            if not select.select([out], [], [], max(0.0, until - time.monotonic()))[0]:
                return {"error": f"no output within {self._limit:.0f} s"}
            more = os.read(out.fileno(), 1 << 16)
            if not more:
                self._stderr.seek(0)
                last = self._stderr.read().decode(errors="replace").strip()[-2000:]
                return {"error": f"exited with status {self._process.wait()}", "traceback": last}
            self._text += more

    def turn(self) -> Line:
        """Takes a turn and returns the line that the worker prints."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # `line` reports the exit status
        return self.line()

    def end(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()
        self._stderr.close()


def environment(case: Case, caches: Path) -> dict[str, str]:
    """Returns the environment variables of a case's processes."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if case.cached:
        env["JAX_COMPILATION_CACHE_DIR"] = str(caches)
        env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        env["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    else:
        env.pop("JAX_COMPILATION_CACHE_DIR", None)
    return env


def rotated(names: list[str], by: int) -> list[str]:
    """Returns the names, rotated left."""
    by %= max(1, len(names))
    return names[by:] + names[:by]


Values = dict[str, dict[str, list[float]]]


def one_round(
    case: Case, size: Size, names: list[str], number: int, env: dict[str, str]
) -> tuple[Values, dict[str, Line], Line]:
    """Runs every contender in a new process.

    Returns:
      The value of each turn by contender and metric; the error or reason of each contender without
      values; and the jax version and device.
    """
    values: Values = {}
    out: dict[str, Line] = {}
    about: Line = {}
    order = rotated(names, number)
    groups = [[name] for name in order] if case.alone else [order]
    for group in groups:
        workers: dict[str, Worker] = {}
        try:
            # At most one worker per core sets up at a time.
            width = os.cpu_count() or 1
            for start in range(0, len(group), width):
                begun = {
                    name: Worker(case, size, name, "--live", env=env)
                    for name in group[start : start + width]
                }
                workers.update(begun)
                for name, worker in begun.items():
                    line = worker.line()
                    if "ready" in line:
                        about = {key: line[key] for key in ("jax", "device") if key in line} or about
                    else:
                        out[name] = line
            for turn in range(1 if case.alone else case.turns):
                for name in rotated([name for name in group if name not in out], turn):
                    line = workers[name].turn()
                    if "values" not in line:
                        out[name] = line
                        continue
                    for metric, value in line["values"].items():
                        values.setdefault(name, {}).setdefault(metric, []).append(value)
        finally:
            for worker in workers.values():
                worker.end()
    return {name: taken for name, taken in values.items() if name not in out}, out, about


def all_at_once(case: Case, size: Size, env: dict[str, str]) -> tuple[Values, dict[str, Line], Line]:
    """Calls every metric of a case once, in one process; returns the same as ``one_round``."""
    values: Values = {}
    out: dict[str, Line] = {}
    about: Line = {}
    worker = Worker(case, size, *case.contenders, "--smoke", env=env)
    try:
        for name in case.contenders:
            line = worker.line()
            if "values" in line:
                values[name] = {metric: [value] for metric, value in line["values"].items()}
                about = {key: line[key] for key in ("jax", "device") if key in line}
            else:
                out[name] = line
    finally:
        worker.end()
    return values, out, about


def run(case: Case, smoke: bool, caches: Path, show: Callable[[str], None]) -> Line:
    """Runs a case.

    Returns:
      The entry for ``results.json``. ``rounds`` has a dict for each round: the values of its turns by
      size, contender and metric.
    """
    sizes = case.smoke or case.sizes[:1] if smoke else case.sizes
    names = {str(size): list(case.contenders) for size in sizes}
    rounds: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    errors: dict[str, str] = {}
    about: Line = {}
    began = time.monotonic()
    env = environment(case, caches)
    for number in range(1 if smoke else case.rounds):
        if number >= 2 and time.monotonic() - began > case.seconds:
            break
        rounds.append({})
        for size in sizes:
            if smoke:
                values, out, told = all_at_once(case, size, env)
            else:
                values, out, told = one_round(case, size, names[str(size)], number, env)
            rounds[-1][str(size)] = values
            about = told or about
            for name, line in out.items():
                names[str(size)].remove(name)
                if "absent" in line:
                    absent[name] = line["absent"]
                else:
                    errors[f"{name}, {size}"] = line["error"]
                    show(f"{case.name}, {name}, {size}: {line['error']}\n{line.get('traceback', '')}")
        show(f"{case.name}, round {number + 1}: {time.monotonic() - began:.0f} s")
    taken = time.monotonic() - began
    return {"about": about, "rounds": rounds, "absent": absent, "errors": errors, "seconds": taken}
