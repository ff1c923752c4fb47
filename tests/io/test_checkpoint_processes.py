"""Several processes of one program write, replace, delete and check checkpoints together."""

import os
from pathlib import Path

import pytest

import paramtree as pt
from tests.sharding.test_multiprocess import run

pytestmark = pytest.mark.slow

pytest.importorskip("fcntl")


def test_processes_write_together_and_another_program_is_refused(tmp_path: Path) -> None:
    folder, other = tmp_path / "run", tmp_path / "other"
    with pt.Checkpoints(other) as elsewhere:
        elsewhere.save(1, {"a": 1}, wait=True)
        outputs = run(
            f"""
            spread = jax.sharding.NamedSharding(mesh, P("x"))
            def value(number):
                return {{"a": jax.make_array_from_callback((8,), spread, lambda i: np.full(8, float(number))[i])}}
            def held(found):
                return {{float(s.data[0]) for s in found["a"].addressable_shards}}
            with pt.Checkpoints({str(folder)!r}, keep=2, best="loss") as checkpoints:
                for step in (1, 2, 3):
                    checkpoints.save(step, value(step), {{"loss": step}})
                checkpoints.save(3, value(33), {{"loss": 3}}, overwrite=True)
                checkpoints.save(3, value(34), {{"loss": 3}}, overwrite=True)
                assert checkpoints.steps == [1, 2, 3] and checkpoints.best == 1
                found = checkpoints.load(value(0))
                assert held(found) == {{34.0}} and found["a"].sharding == spread
                assert held(checkpoints.load(value(0), step="best")) == {{1.0}}
                checkpoints.delete(3)
                assert checkpoints.latest == 2
                for wrong in (lambda: checkpoints.save(2, value(2), {{"loss": 0}}), lambda: checkpoints.delete(3)):
                    try:
                        wrong()
                    except pt.ParamTreeError as error:
                        print("wrong", error)
            try:
                pt.Checkpoints({str(other)!r}).save(2, value(2))
            except pt.ParamTreeError as error:
                print("refused", error)
            with pt.Checkpoints({str(folder)!r}) as checkpoints:
                checkpoints.save(3, value(3))
                print("steps", checkpoints.steps)
            """
        )
        assert elsewhere.steps == [1]
    for output in outputs:
        assert f"refused {other} was not written: process {os.getpid()} is writing to it" in output
        assert "wrong cannot save step 2: " in output and "wrong cannot delete step 3: " in output
        assert "steps [1, 2, 3]" in output
    assert sorted(os.listdir(folder)) == ["1", "2", "3"]
    assert set(pt.load(folder)["a"].tolist()) == {3.0}


def test_damage_that_one_process_finds_is_an_error_in_all(tmp_path: Path) -> None:
    outputs = run(
        f"""
        from paramtree.io import checksums
        from paramtree.io.formats import orbax
        orbax._LITTLE = checksums._SMALL = 0
        spread = jax.sharding.NamedSharding(mesh, P("x"))
        value = {{"a": jax.make_array_from_callback((800,), spread, lambda i: np.random.default_rng(0).normal(size=800)[i])}}
        file = {str(tmp_path / "a.orbax")!r}
        pt.save(file, value)
        pt.load(file, value)
        if me == 0:
            import pathlib
            data = max(pathlib.Path(file).rglob("d/*"), key=lambda file: file.stat().st_size)
            content = bytearray(data.read_bytes())
            content[len(content) // 2] ^= 1
            data.write_bytes(content)
        from jax.experimental import multihost_utils
        multihost_utils.sync_global_devices("damaged")
        try:
            pt.load(file, value)
        except pt.LoadError as error:
            print("found", error)
        """
    )
    for output in outputs:
        assert "found " in output and "is damaged: its checksum is not the one that was saved" in output


def test_one_that_cannot_write_tells_the_others(tmp_path: Path) -> None:
    outputs = run(
        f"""
        import paramtree.io.checkpoints as module
        def full(*_): raise OSError(28, "no space left on device")
        if me == 0:
            module.publish = full
        checkpoints = pt.Checkpoints({str(tmp_path)!r})
        checkpoints.save(1, {{"a": np.ones(2)}})
        try:
            checkpoints.close()
        except OSError as error:
            print("cause", error)
        except pt.ParamTreeError as error:
            print("other", error)
        """
    )
    assert "cause [Errno 28] no space left on device" in outputs[0]
    assert "other step 1 was not saved to" in outputs[1] and "process 0 failed" in outputs[1]
    assert os.listdir(tmp_path) == []
