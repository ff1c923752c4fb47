"""Runs one contender in its own process: ``python -m benchmarks.suite.worker CASE SIZE CONTENDER``.

It sets up, warms up, takes a few turns and prints their minima as one line of JSON. With ``--live`` it
prints a line when it is ready, and one for each turn; it takes a turn for every line it reads. With
``--smoke`` it takes a turn of one call of each contender named.
"""

import argparse
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from benchmarks.suite.case import Absent, Case, Measured, Size, Timed, load


def size_of(case: Case, text: str) -> Size:
    """Returns the size that a text denotes; it need not be one of the case's sizes."""
    for size in (*case.sizes, *case.smoke):
        if str(size) == text:
            return size
    return int(text) if text.isdecimal() else text


def turn_of(work: Any, seconds: float) -> Callable[[], float]:
    """Warms up, and returns a function that takes one turn and returns its value."""
    if isinstance(work, int | float):
        return lambda: float(work)
    if isinstance(work, Measured):
        return lambda: float(work.call())
    timed = work if isinstance(work, Timed) else Timed(work)
    clock = time.perf_counter
    if timed.before is not None:
        before = timed.before

        def once() -> float:
            argument = before()
            start = clock()
            result = timed.call(argument)
            taken = clock() - start
            del result  # freeing it is not timed
            return taken

        estimate = max(once() for _ in range(2))
        count = max(1, min(5, int(seconds / max(estimate, 1e-9))))
        return lambda: min(once() for _ in range(count))
    call = timed.call

    def many(count: int) -> float:
        start = clock()
        for _ in range(count):
            call()
        return (clock() - start) / count

    many(1)  # compiles
    estimate = many(1)
    if estimate > seconds:  # a single call fills the turn
        return lambda: many(1)
    estimate = min(estimate, many(1), many(1))
    estimate = many(max(1, int(seconds / 3 / estimate)))
    count = max(1, int(seconds / 3 / estimate))
    return lambda: min(many(count) for _ in range(3))


Turns = dict[str, Callable[[], float]]


def attempt(case: Case, size: Size, contender: str, seconds: float) -> Turns | None:
    """Sets up a contender and returns its turns; prints the error and returns None if it fails."""
    try:
        metrics = case.contenders[contender](size)
        turns = {metric: turn_of(work, seconds) for metric, work in metrics.items()}
    except (Absent, ImportError) as error:
        say({"absent": str(error)})
        return None
    except Exception as error:
        say({"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()})
        return None
    gc.collect()
    gc.freeze()  # the collector skips objects of jax and the set-up while timing
    return turns


def about() -> dict[str, str]:
    """Returns the jax version and the device, if jax is loaded."""
    if "jax" not in sys.modules:
        return {}
    import jax

    return {"jax": jax.__version__, "device": jax.devices()[0].device_kind}


def take(turns: Turns) -> dict[str, float]:
    """Takes a turn of each metric."""
    return {metric: float(f"{turn():.5g}") for metric, turn in turns.items()}


def say(line: dict[str, Any]) -> None:
    """Prints one line of JSON."""
    print(json.dumps(line), flush=True)


def main() -> None:
    """Runs one contender."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case")
    parser.add_argument("size")
    parser.add_argument("contender", nargs="+")
    parser.add_argument("--live", action="store_true", help="take a turn for every line read")
    parser.add_argument("--smoke", action="store_true", help="time single calls only")
    args = parser.parse_args()
    case = load()[args.case]
    size = size_of(case, args.size)
    if args.smoke:
        for contender in args.contender:
            turns = attempt(case, size, contender, 0)
            if turns is not None:
                say({"values": take(turns), **about()})
        return
    turns = attempt(case, size, args.contender[0], case.slice)
    if turns is None:
        return
    if args.live:
        say({"ready": True, **about()})
        for _ in sys.stdin:
            say({"values": take(turns)})
        return
    count = 1 if case.alone else case.turns
    taken = [take(turns) for _ in range(count)]
    values = {metric: min(turn[metric] for turn in taken) for metric in turns}
    say({"values": values, "unit": case.unit, **about()})


if __name__ == "__main__":
    main()
