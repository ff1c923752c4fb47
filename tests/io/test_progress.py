"""The progress bar: on a terminal, after a second, and never elsewhere."""

import contextlib
import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import paramtree as pt
from paramtree.io import progress as module
from paramtree.io.formats import FORMATS
from paramtree.io.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")  # a dumb one cannot redraw a line
    monkeypatch.setattr(module, "_AFTER", 0.05)
    monkeypatch.setattr(module, "_EVERY", 0.02)
    return Terminal()


def slow(out: Any, shown: bool | None, seconds: float = 0.3) -> None:
    # Not in a fixture, as pytest replaces the standard error before each test.
    with contextlib.redirect_stderr(out), progress("loading [a].npz", 1000, shown) as count:
        for _ in range(10):
            time.sleep(seconds / 10)
            count(100)


def test_a_bar_appears_on_a_terminal_for_what_is_slow(terminal: Terminal) -> None:
    slow(terminal, None, 2.0)  # rich takes some time to import
    assert "loading [a].npz" in terminal.getvalue() and "1.0/1.0 kB" in terminal.getvalue()


def test_nothing_appears_for_what_is_fast_or_unwanted(terminal: Terminal) -> None:
    slow(terminal, None, 0.0)
    slow(terminal, False)
    assert terminal.getvalue() == ""


def test_nothing_appears_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(module, "_AFTER", 0.0)
    slow(out, None)
    assert out.getvalue() == ""
    slow(None, None, 0.0)  # a process without a standard error


def test_an_error_ends_the_bar(terminal: Terminal) -> None:
    def interrupted() -> None:
        with contextlib.redirect_stderr(terminal), progress("saving", 10, True):
            time.sleep(0.1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    before = terminal.getvalue()
    time.sleep(0.1)
    assert terminal.getvalue() == before


@pytest.mark.parametrize("ending", [form.endings[0] for form in FORMATS if form.writes])
@pytest.mark.parametrize("shown", [True, None, False])
def test_files_are_the_same_with_and_without_a_bar(
    tmp_path: Path, ending: str, shown: Any, terminal: Terminal
) -> None:
    tree = {"a": np.arange(1000.0), "b": {"c": np.ones(3)}}
    pt.save(tmp_path / f"m{ending}", tree, progress=shown)
    loaded = pt.load(tmp_path / f"m{ending}", like=tree, progress=shown)
    assert np.array_equal(loaded["a"], tree["a"])
    if ending == ".safetensors":
        pt.save(tmp_path / "s.safetensors", tree, progress=shown, max_shard_size=100)
        assert np.array_equal(pt.load(tmp_path / "s.safetensors", progress=shown).a, tree["a"])


def test_a_file_that_is_being_written_is_counted(tmp_path: Path) -> None:
    from paramtree.io.atomic import replacing
    from paramtree.io.progress import written

    path = tmp_path / "m.npz"
    with replacing(str(path)) as new:
        Path(new).write_bytes(bytes(123))
        assert written(str(path)) == 123
    assert written(str(path)) == 0
