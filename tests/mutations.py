"""Puts twenty small faults into a copy of the library, one at a time, and says which test finds each.

As a command: ``python tests/mutations.py``, or ``make mutations``. ``--list`` only lists the faults, and
``--only N`` puts in those numbers. A fault that no test finds makes the exit status 1, as does a test
that fails without the fault.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("paramtree", "tests", "examples", "conftest.py", "pyproject.toml")
LIMIT = 900  # seconds for one fault


class Mutation(NamedTuple):
    """A fault: ``old`` stands once in the file, and ``new`` in its place is wrong."""

    fault: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]  # files that should find it, or single tests of files that take long


MUTATIONS = (
    # core
    Mutation(
        "a part of a tree takes the kinds of the first leaves",
        "paramtree/core/structure.py",
        "slot_kinds = tuple(full.kinds[slot] for slot in kept)",
        "slot_kinds = full.kinds[: len(kept)]",
        ("tests/verbs/test_parts.py",),
    ),
    Mutation(
        "a sub-tree's stacks are where they were in the whole tree",
        "paramtree/core/structure.py",
        "tuple(moved(full.stacks[i], -1) for i in below)",
        "tuple(full.stacks[i] for i in below)",
        ("tests/core/test_stacks.py::test_stacks_survive_files_and_verbs",),
    ),
    Mutation(
        "a tree in a container has its stacks where they were outside of it",
        "paramtree/core/pytrees.py",
        "axes = stack or (moved(own, size) if full.stacks else ())",
        "axes = stack or (own if full.stacks else ())",
        ("tests/core/test_stacks.py::test_stacks_survive_files_and_verbs",),
    ),
    Mutation(
        "the last but one of the rules that match wins, not the first",
        "paramtree/core/rules.py",
        "for i in reversed(range(last)):",
        "for i in range(last):",
        ("tests/core/test_names.py",),
    ),
    Mutation(
        "a pickled structure loses its stacks",
        "paramtree/core/structure.py",
        "return Structure.intern, (self.paths, self.slots, self.kinds, self.stacks)",
        "return Structure.intern, (self.paths, self.slots, self.kinds)",
        ("tests/core/test_stacks.py::test_stacks_survive_files_and_verbs",),
    ),
    # model
    Mutation(
        "stacks in stacks are in the wrong order",
        "paramtree/model/record.py",
        "Recording(self._record, (*self._stack, (len(place_of(scope)), count)))",
        "Recording(self._record, ((len(place_of(scope)), count), *self._stack))",
        ("tests/nn/test_repeat.py::test_a_repeat_in_a_repeat",),
    ),
    Mutation(
        "every draw of a layer has the same key",
        "paramtree/model/training.py",
        "(*path, str(call.draws[path]))",
        '(*path, "1")',
        ("tests/model/test_scopes.py::test_every_draw_differs_or_raises[twice-eager]",),
    ),
    Mutation(
        "all copies of a layer draw the same numbers",
        "paramtree/model/training.py",
        "jax.random.split(scope.key(), n)",
        "jnp.stack([scope.key()] * n)",
        ("tests/nn/test_repeat.py::test_each_copy_draws_its_own_numbers",),
    ),
    Mutation(
        "levels are in the order in which they are first read",
        "paramtree/model/record.py",
        "            self.levels[path[:depth]] = next(self.clock)\n",
        "",
        ("tests/model/test_model.py::test_the_order_is_that_of_the_declarations_and_not_of_reading",),
    ),
    Mutation(
        "state is not written in the dtype in which it is stored",
        "paramtree/model/training.py",
        "value, have = value.astype(want[1]), (have[0], want[1])",
        "have = (have[0], want[1])",
        ("tests/model/test_scopes.py::test_state_is_written_in_its_own_dtype",),
    ),
    # transforms
    Mutation(
        "gradients do not pass straight through rounding",
        "paramtree/parametrizations/stored.py",
        "return parts + jax.lax.stop_gradient(integers * scale - parts)",
        "return parts + (integers * scale - parts)",
        (
            "tests/parametrizations/test_reparametrize.py::test_the_gradient_of_rounding_passes_straight_through",
        ),
    ),
    Mutation(
        "LoRA's scale is not applied",
        "paramtree/parametrizations/stored.py",
        '(scale * (parts["b"] @ parts["a"]))',
        '(parts["b"] @ parts["a"])',
        (
            "tests/parametrizations/test_reparametrize.py::test_lora_scales_the_change_by_alpha_over_the_rank",
        ),
    ),
    Mutation(
        "of several inputs of a layer, capture keeps the first",
        "paramtree/inspect/capture.py",
        "args[0] if len(args) == 1 else args)",
        "args[0])",
        ("tests/inspect/test_capture.py::test_all_inputs_of_a_layer_are_kept",),
    ),
    Mutation(
        "arguments with an entry for each copy come after those that copies share",
        "paramtree/nn/copies.py",
        "[value for _, value in sorted({**shared, **own}.items())]",
        "[*shared.values(), *own.values()]",
        ("tests/nn/test_vmap.py::test_repeat_with_an_input_for_each_copy",),
    ),
    Mutation(
        "state is differentiated",
        "paramtree/verbs/grad.py",
        'select_slots(source, wrt, PARAM, "grad")',
        'select_slots(source, wrt, None, "grad")',
        ("tests/verbs/test_parts.py::test_state_and_whole_numbers_are_not_trained",),
    ),
    # io
    Mutation(
        "the checksum of a file is not compared",
        "paramtree/io/checksums.py",
        "if _checksum(path, at) == expected[at // _PIECE]:",
        "if _checksum(path, at) >= 0:",
        ("tests/io/test_orbax_folders.py::test_a_large_file_is_checked_while_it_is_read",),
    ),
    Mutation(
        "every copy of a stack in a file is the first",
        "paramtree/io/restack.py",
        "bounds[axis] = slice(i, i + 1)",
        "bounds[axis] = slice(0, 1)",
        (
            "tests/core/test_stacks.py::test_a_file_of_any_form_loads_into_any_form[stacked-outer-nested]",
        ),
    ),
    Mutation(
        "a saved PRNG key is one of another implementation",
        "paramtree/io/wire.py",
        'f"{_KEY}{jax.random.key_impl(leaf)}"',
        'f"{_KEY}unsafe_rbg"',
        ("tests/io/test_files.py::test_keys_come_back",),
    ),
    Mutation(
        "a checkpoint whose metric is NaN is the best",
        "paramtree/io/checkpoints.py",
        "return (-math.inf if math.isnan(value) else value, step)",
        "return (math.inf if math.isnan(value) else value, step)",
        ("tests/io/test_checkpoints.py::test_the_last_and_the_best_stay",),
    ),
    Mutation(
        "two arrays for one tied leaf are not compared",
        "paramtree/io/load.py",
        "self.problems.equal(name, first, value, alias, self.value(alias))",
        "self.value(alias)",
        ("tests/io/test_files.py::test_tied_names_with_different_values_say_how_far_apart_they_are",),
    ),
)


def first_failure(folder: Path, tests: Sequence[str]) -> tuple[int, str, str]:
    """Runs tests in a copy up to the first that fails: the status, that test, and what was printed."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    # A file that is changed twice within a second looks to Python like what it has compiled.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT
        )
    except subprocess.TimeoutExpired:
        return -1, "", f"no end within {LIMIT} seconds"
    found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    return done.returncode, found[1] if found else "", done.stdout + done.stderr


def mutated(folder: Path, mutation: Mutation) -> tuple[int, str, str]:
    """Runs the tests of a fault in a copy that has it, and takes it out again."""
    file = folder / mutation.file
    before = file.read_text(encoding="utf-8")
    if before.count(mutation.old) != 1:
        sys.exit(f"{mutation.file} should hold once: {mutation.old}")
    file.write_text(before.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        return first_failure(folder, mutation.tests)
    finally:
        file.write_text(before, encoding="utf-8")


def copied(folder: Path) -> None:
    """Copies what the tests need."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)


def main(argv: Sequence[str] | None = None) -> int:
    """Puts in the faults, prints a line for each, and returns how many no test has found."""
    parser = argparse.ArgumentParser(description="Puts small faults in and says which test finds them.")
    parser.add_argument("--list", action="store_true", help="list the faults and put none in")
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="the numbers of faults")
    args = parser.parse_args(argv)
    numbers = args.only or range(1, len(MUTATIONS) + 1)
    if wrong := [n for n in numbers if not 1 <= n <= len(MUTATIONS)]:
        parser.error(f"--only {wrong[0]}: the faults have the numbers 1 to {len(MUTATIONS)}")
    if args.list:
        for n in numbers:
            print(f"{n:2} {MUTATIONS[n - 1].file}: {MUTATIONS[n - 1].fault}")
        return 0
    survived, finders = 0, dict[str, None]()
    with tempfile.TemporaryDirectory() as name:
        copied(folder := Path(name))
        for n in numbers:
            begin = time.monotonic()
            status, test, output = mutated(folder, MUTATIONS[n - 1])
            if status not in (0, 1, 2) or (status and not test):
                sys.exit(f"the tests of fault {n} did not run:\n{output}")
            survived += not status
            finders[test] = None
            result = (
                f"found by {test}" if status else f"NOT FOUND by {', '.join(MUTATIONS[n - 1].tests)}"
            )
            took = time.monotonic() - begin
            print(f"{n:2} {MUTATIONS[n - 1].fault}: {result} ({took:.0f} s)", flush=True)
        finders.pop("", None)
        if finders:
            status, test, output = first_failure(folder, [*finders])
            if status:
                sys.exit(f"without a fault {test or output} fails too")
    print(f"{len(numbers) - survived} of {len(numbers)} faults are found")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
