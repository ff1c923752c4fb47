"""The benchmark suite: its statistics, and that its processes take turns. No times are judged."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from benchmarks.suite import report
from benchmarks.suite.case import Bound, Case, load
from benchmarks.suite.rounds import environment, one_round, run


def values(**contenders: list[float]) -> dict[str, Any]:
    return {name: {"m": taken} for name, taken in contenders.items()}


def case(**changes: Any) -> Case:
    made = Case("c", "A case", (1, 2), {"paramtree": dict, "a": dict, "b": dict})
    return dataclasses.replace(made, **changes)


# Three rounds of three turns, some with outliers.
ROUNDS = [
    {"1": values(paramtree=[2.0, 20.0, 2.0], a=[10.0, 1.0, 1.0], b=[4.0, 4.0, 4.0]), "2": values(paramtree=[6.0, 6.0, 6.0])},
    {"1": values(paramtree=[3.0, 3.0, 3.0], a=[1.0, 1.0, 1.0], b=[1.5, 1.5, 1.5]), "2": values(paramtree=[6.0, 6.0, 6.0])},
    {"1": values(paramtree=[4.0, 4.0, 4.0], a=[4.0, 4.0, 4.0], b=[2.0, 2.0, 2.0]), "2": values(paramtree=[6.0, 6.0, 6.0])},
]  # fmt: skip


def test_a_ratio_is_of_the_least_times() -> None:
    assert report.ratio(case(), ROUNDS, "m", 1, "paramtree", "a") == report.Spread(2.0, 1.0, 3.0)


def test_of_what_is_no_time_the_median_counts() -> None:
    memory = case(unit="x")
    assert report.value(memory, ROUNDS, 1, "paramtree", "m") == report.Spread(3.0, 2.0, 4.0)
    assert report.ratio(memory, ROUNDS, "m", 1, "paramtree", "b") == report.Spread(1.5, 0.5, 2.0)


def test_the_best_of_several_is_that_of_the_round() -> None:
    assert report.ratio(case(), ROUNDS, "m", 1, "paramtree", ("a", "b")) == report.Spread(2.0, 2.0, 3.0)


def test_growth_is_over_another_size_of_the_same_round() -> None:
    assert report.ratio(case(), ROUNDS, "m", 2, "paramtree", "paramtree", base=1) == report.Spread(
        3.0, 1.5, 3.0
    )


def test_what_was_not_measured_has_no_ratio_and_meets_nothing() -> None:
    assert report.ratio(case(), ROUNDS, "m", 2, "paramtree", "a") is None
    assert report.value(case(), ROUNDS, 1, "paramtree", "other") is None
    [found] = report.verdicts(case(bounds=(Bound("m", "a", 9.0, when=lambda size: size == 2),)), ROUNDS)
    assert not found.met and found.answer == "not measured"


@pytest.mark.parametrize("nothing", ["a", "paramtree"])
def test_nothing_over_zero_is_no_ratio(nothing: str) -> None:
    # One of a round's memory, or all of it, can be zero: there was room in what was freed before.
    memory = case(unit="x", bounds=(Bound("m", "a", 2.0),))
    some = {"paramtree": [2.0], "a": [1.0]}
    rounds = [{"1": values(**{**some, nothing: [0.0]})}]
    [found] = report.verdicts(memory, rounds)
    assert found.met is (nothing == "paramtree")
    assert found.answer == ("0.00 (0.00 to 0.00)" if found.met else "not measured")
    result = {"rounds": rounds, "absent": {}, "errors": {}}
    text = report.document({"c": memory}, [{"machine": {}, "cases": {"c": result}}], set())
    row = "| 1 | a | 0 x | 0 x to 0 x | 0.00 |" if nothing == "a" else "| 1 | a | 1 x | 1 x to 1 x |  |"
    assert row in text

    mixed = [*rounds, {"1": values(**some)}, {"1": values(**some)}]
    assert report.ratio(memory, mixed, "m", 1, "paramtree", "a") == (
        report.Spread(2.0, 2.0, 2.0) if nothing == "a" else report.Spread(2.0, 0.0, 2.0)
    )


@pytest.mark.parametrize(
    ("bound", "met", "asked"),
    [
        (Bound("m", "a", 2.0), True, "at most 2 of a"),
        (Bound("m", "a", 1.9, why="the floor"), False, "at most 1.9 of a"),
        (Bound("m", ("a", "b"), 2.0), True, "at most 2 of best of a, b"),
        (Bound("m", None, 0.5), False, "at most 500 ms"),
        (Bound("m", None, 3.0), True, "at most 3 s"),
    ],
)
def test_bounds(bound: Bound, met: bool, asked: str) -> None:
    bound = dataclasses.replace(bound, when=lambda size: size == 1)
    [found] = report.verdicts(case(bounds=(bound,)), ROUNDS)
    assert found.met is met and found.asked == asked
    assert report.met(found).startswith("met" if met else "**not met**") and bound.why in report.met(
        found
    )


def test_the_document_has_every_contender_and_what_is_absent() -> None:
    result = {"rounds": ROUNDS, "absent": {"b": "not installed"}, "errors": {"a, 2": "it fell over"}}
    machine = {"processor": "a | one"}
    cases = {"c": case(bounds=(Bound("m", "a", 2.0),), note="What it is.")}
    text = report.document(cases, [{"machine": machine, "cases": {"c": result}}], set())
    assert "| 1 | paramtree | 2 s | 2 s to 4 s |  |" in text
    assert "| 1 | a | 1 s | 1 s to 4 s | 0.50 |" in text
    assert "Left out: b (not installed)." in text and "Failed: a, 2 (it fell over)." in text
    assert "What it is." in text and "- processor: a | one" in text
    assert "2.00 (1.00 to 3.00) | met |" in text


@pytest.mark.parametrize(
    ("number", "unit", "text"),
    [(1.5, "s", "1.5 s"), (0.0123, "s", "12.3 ms"), (4e-7, "s", "0.4 µs"), (3 * 2**20, "bytes", "3 MiB"),
     (400 * 2**20, "bytes", "400 MiB"), (2048, "bytes", "2 KiB"), (7, "files", "7 files")],
)  # fmt: skip
def test_units(number: float, unit: str, text: str) -> None:
    assert report.shown(number, unit) == text


def test_every_bound_names_contenders_and_sizes_that_there_are() -> None:
    for name, one in load().items():
        assert one.name == name and "paramtree" in one.contenders
        for bound in one.bounds:
            reference = bound.reference or ()
            names = {bound.ours, *((reference,) if isinstance(reference, str) else reference)}
            assert names <= set(one.contenders), f"{name}: {names}"
            assert any(bound.when(size) for size in one.sizes), f"{name}: {bound}"
            assert bound.base is None or bound.base in one.sizes


def test_processes_take_turns(tmp_path: Path) -> None:
    one = dataclasses.replace(load()["names"], turns=2)
    names = list(one.contenders)
    found, out, about = one_round(one, 400, names, 1, environment(one, tmp_path))
    assert not out and about["jax"]
    assert list(found) == names[1:] + names[:1]  # the order rotates by one in the second round
    for metrics in found.values():
        assert set(metrics) >= {"collect, first", "mask, again"}
        assert all(len(taken) == 2 and min(taken) > 0 for taken in metrics.values())


def test_a_contender_that_fails_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    # Workers load the case by name, and the real case does not have this contender.
    one = dataclasses.replace(
        load()["imports"], contenders={"paramtree": dict, "nobody": dict}, rounds=1
    )
    shown: list[str] = []
    result = run(one, False, tmp_path, shown.append)
    assert list(result["rounds"][0]["import"]) == ["paramtree"]
    assert list(result["errors"]) == ["nobody, import"]
    assert any("KeyError: 'nobody'" in line for line in shown)
