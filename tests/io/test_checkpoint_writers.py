"""One writer at a time, whose saves are not lost however it ends; readers see all that is finished."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import paramtree as pt
from paramtree.io import background, folders
from paramtree.io import checkpoints as module

pytest.importorskip("fcntl")  # without it nothing is locked


def test_after_close_nothing_is_saved_in_silence(tmp_path: Path) -> None:
    checkpoints = pt.Checkpoints(tmp_path, best="loss")
    checkpoints.save(1, {"a": jnp.ones(2)}, {"loss": 1.0})
    for _ in range(2):
        checkpoints.close()
    with pytest.raises(
        pt.ParamTreeError, match="cannot save: .* are closed. Make a new pt.Checkpoints"
    ):
        checkpoints.save(2, {"a": jnp.ones(2)}, {"loss": 1.0})
    with pytest.raises(
        pt.ParamTreeError, match="cannot delete: .* are closed. Make a new pt.Checkpoints"
    ):
        checkpoints.delete(1)
    checkpoints.wait()
    assert checkpoints.steps == [1] and checkpoints.best == checkpoints.latest == 1
    assert checkpoints.load({"a": jnp.zeros(2)})["a"][0] == 1
    assert sorted(os.listdir(tmp_path)) == ["1"]  # no lock, and nothing unfinished


def test_an_error_in_the_background_is_raised_once_and_the_lock_is_freed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "no space left on device")

    checkpoints = pt.Checkpoints(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, "publish", full)
        checkpoints.save(1, {"a": jnp.ones(2)})
        with pytest.raises(OSError, match="no space left"):
            checkpoints.wait()
        assert checkpoints.steps == [] and not background._TASKS
        checkpoints.save(1, {"a": jnp.ones(2)})
        with pytest.raises(OSError, match="no space left"):
            checkpoints.close()
    assert os.listdir(tmp_path) == []
    with pt.Checkpoints(tmp_path) as again:
        again.save(1, {"a": jnp.ones(2)})


def program(code: str, *args: Any, before: str = "") -> tuple[int, str]:
    """Runs a program that saves step 1 without closing; returns its exit code and what it printed."""
    code = f"""
import sys
{before}
import jax.numpy as jnp
import paramtree as pt
checkpoints = pt.Checkpoints(sys.argv[1])
checkpoints.save(1, {{"a": jnp.arange(200_000.0)}})
{textwrap.dedent(code)}
"""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, args)],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return ran.returncode, ran.stderr


ENDS = {
    "by itself": ("", 0, ""),
    "by an exception": ("raise ValueError('stop here')", 1, "stop here"),
    "by sys.exit": ("sys.exit(3)", 3, ""),
    "when nobody holds the checkpoints": ("del checkpoints", 0, ""),
    "in a function of atexit": ("import atexit; atexit.register(print, 'bye')", 0, ""),
    "in a thread": ("import threading; threading.Thread(target=checkpoints.wait).start()", 0, ""),
    "by an interrupt": (
        "import os, signal; os.kill(os.getpid(), signal.SIGINT)",
        -2,
        "KeyboardInterrupt",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("end", ENDS)
def test_a_program_that_ends_without_close_has_saved(tmp_path: Path, end: str) -> None:
    code, returned, printed = ENDS[end]
    ended, errors = program(code, tmp_path)
    assert ended == returned and printed in errors
    assert printed or "Error" not in errors, errors
    with pt.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == [1]
        np.testing.assert_array_equal(checkpoints.load()["a"], np.arange(200_000.0, dtype=np.float32))
    assert os.listdir(tmp_path) == ["1"]


@pytest.mark.slow
def test_a_save_that_fails_at_the_end_is_printed(tmp_path: Path) -> None:
    full = """
import paramtree.io.checkpoints as module
def full(*_): raise OSError(28, "no space left on device")
module.publish = full
"""
    ended, errors = program("", tmp_path, before=full)
    assert ended == 0 and "OSError: [Errno 28] no space left on device" in errors


# One writer, and many readers


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    run = {"a": jnp.ones(2)}
    first, second = pt.Checkpoints(tmp_path), pt.Checkpoints(tmp_path)
    first.save(1, run)
    held = rf"{tmp_path} was not written: this process \({os.getpid()}\), .* use another folder"
    with pytest.raises(pt.ParamTreeError, match=held):
        second.save(2, run)
    with pytest.raises(pt.ParamTreeError, match=held):
        second.delete(1)
    first.wait()
    assert second.load(run)["a"][0] == 1  # reading needs no lock
    first.save(2, run)
    first.close()
    second.save(3, run)
    assert second.steps == [1, 2, 3]
    del second  # frees the lock, too
    with pt.Checkpoints(tmp_path) as third:
        third.save(4, run)
    assert sorted(os.listdir(tmp_path)) == ["2", "3", "4"]


def test_a_reader_sees_what_a_writer_does(tmp_path: Path) -> None:
    reader = pt.Checkpoints(tmp_path, best="loss")
    assert reader.steps == [] and reader.best is None
    with pt.Checkpoints(tmp_path, keep=1, best="loss") as writer:
        for step, loss in [(1, 3.0), (2, 1.0), (3, 2.0), (4, 0.5)]:
            writer.save(step, {"step": step}, {"loss": loss}, wait=True)
            assert reader.latest == writer.latest == step
            assert reader.steps == writer.steps and reader.best == writer.best
            assert reader.load({"step": 0})["step"] == step
        writer.delete(4)
        assert reader.steps == [] and reader.best is None


def test_what_is_being_loaded_is_not_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from paramtree.io.opening import open_source

    monkeypatch.setattr(folders, "_PATIENCE", 0.2)
    with pt.Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, {"a": jnp.ones(2)}, wait=True)
        with open_source(str(tmp_path)) as source:
            checkpoints.save(2, {"a": jnp.zeros(2)}, wait=True)
            assert checkpoints.steps == [1, 2]
            source.prepare({"a": None})
            assert source.get("a")[0] == 1
        checkpoints.save(3, {"a": jnp.zeros(2)}, wait=True)
        assert checkpoints.steps == [3]
        with open_source(str(tmp_path)):
            checkpoints.delete(3)  # which is asked for, so it waits, but not for ever
        assert checkpoints.steps == []


def test_the_latest_is_loaded_while_old_ones_are_deleted(tmp_path: Path) -> None:
    stop, errors = threading.Event(), []

    def write() -> None:
        try:
            with pt.Checkpoints(tmp_path, keep=1) as writer:
                for step in range(1, 10**6):
                    if stop.is_set():
                        return
                    writer.save(step, {"a": np.full(1000, step)}, wait=True)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        reader, last = pt.Checkpoints(tmp_path), 0
        while reader.latest is None and thread.is_alive():
            pass
        for _ in range(20):
            found = set(np.asarray(reader.load()["a"]))
            assert len(found) == 1 and min(found) >= last
            last = min(found)
    finally:
        stop.set()
        thread.join()
    assert errors == []


@pytest.mark.slow
def test_another_process_is_named_and_a_killed_one_frees_the_folder(tmp_path: Path) -> None:
    code = """
checkpoints.wait()
import os, time
if not os.fork():  # as a data loader does, which must not keep the lock
    print("child", os.getpid(), flush=True)
    time.sleep(60)
    os._exit(0)
time.sleep(60)
"""
    started = f"import sys, jax.numpy as jnp, paramtree as pt\ncheckpoints = pt.Checkpoints({str(tmp_path)!r})\n"
    started += "checkpoints.save(1, {'a': jnp.ones(2)})\n" + code
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", started],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout
        child = int(process.stdout.readline().split()[1])
        try:
            with pt.Checkpoints(tmp_path) as checkpoints:
                with pytest.raises(pt.ParamTreeError, match=f"process {process.pid} is writing to it"):
                    checkpoints.save(2, {"a": jnp.zeros(2)})
                assert checkpoints.steps == [1]
                process.kill()
                process.wait()
                checkpoints.save(2, {"a": jnp.zeros(2)})
                assert checkpoints.steps == [1, 2]
        finally:
            process.kill()
            os.kill(child, signal.SIGKILL)


@pytest.mark.slow
def test_two_processes_that_save_to_one_path_leave_one_whole_checkpoint(tmp_path: Path) -> None:
    code = """
import sys
import numpy as np
import paramtree as pt
number = int(sys.argv[2])
for _ in range(8):
    pt.save(sys.argv[1], {"a": np.full(10_000, number), f"only{number}": np.ones(1)})
"""
    file = tmp_path / "a.orbax"
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code, str(file), str(number)],
            cwd=Path(__file__).parents[2],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        for number in range(2)
    ]
    assert [process.wait(120) for process in processes] == [0, 0]
    found = pt.load(file)
    number = int(found["a"][0])
    assert set(found) == {"a", f"only{number}"} and set(np.asarray(found["a"])) == {number}
    assert os.listdir(file) == ["15"]
