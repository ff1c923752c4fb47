"""Several processes with one mesh: each makes, reads and writes its own parts. On loopback only."""

import os
import re
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import paramtree as pt
from examples import multiprocess

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BEGIN = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize("127.0.0.1:" + sys.argv[1], 2, int(sys.argv[2]))
import jax.numpy as jnp
import numpy as np
import paramtree as pt
from jax.sharding import Mesh, PartitionSpec as P
me = jax.process_index()
mesh = Mesh(np.array(jax.devices()).reshape(4), ("x",))
"""
END = """
print("done", me)
jax.distributed.shutdown()
"""


def run(code: str, seconds: float = 100) -> list[str]:
    """Runs a program in two processes, and returns what each printed."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    program = BEGIN + textwrap.dedent(code) + END
    environment = {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, port, str(i)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for i, output in enumerate(outputs):
        assert f"done {i}" in output, output
    return outputs


def test_each_process_makes_and_reads_its_own_parts(tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(512 * 64, dtype=np.float32).reshape(512, 64),
        "b": np.arange(64 * 8192, dtype=np.float32).reshape(64, 8192),
        "c": np.ones(16, np.int8),
    }
    file = tmp_path / "model.safetensors"
    pt.save(file, arrays)
    outputs = run(
        f"""
        from paramtree.io import source
        read = 0
        fill = source._fill
        def counted(path, readinto, span):
            global read
            read += len(span)
            fill(path, readinto, span)
        source._fill = counted
        like = pt.peek({str(file)!r})
        placed = pt.shardings(like, mesh, {{"a": P("x"), "b": P(None, "x"), "c": None}})
        found = pt.load({str(file)!r}, shardings=placed)
        print("read", read)
        for name, shape in (("a", (512, 64)), ("b", (64, 8192)), ("c", (16,))):
            whole = np.ones(16, np.int8) if name == "c" else np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
            assert found[name].sharding == placed[name]
            for shard in found[name].addressable_shards:
                assert np.array_equal(shard.data, whole[shard.index]), name
        try:
            pt.save({str(tmp_path / "other.safetensors")!r}, found)
        except pt.ParamTreeError as error:
            print("refused", error)
        net, x = pt.nn.Dense(8), jnp.ones((2, 4))
        places = pt.shardings(pt.abstract(net, x), mesh, {{".*": P("x")}})
        params = pt.init(net, jax.random.key(0), x, shardings=places)
        print("sum", sum(float(s.data.sum()) for s in params.weight.addressable_shards))
        """
    )
    for output in outputs:
        assert f"read {512 * 64 * 4 // 2 + 64 * 8192 * 4 // 2 + 16}" in output
        assert "refused" in output and "save to a path that ends in .orbax" in output
    import jax
    import jax.numpy as jnp

    weight = np.asarray(pt.init(pt.nn.Dense(8), jax.random.key(0), jnp.ones((2, 4))).weight)
    sums = [float(re.findall(r"sum (\S+)", output)[0]) for output in outputs]
    np.testing.assert_allclose(sums, [weight[:4].sum(), weight[4:].sum()], rtol=1e-5)


def test_all_processes_write_one_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "model.orbax"
    run(
        f"""
        net, x = pt.nn.Dense(8), jnp.ones((2, 4))
        places = pt.shardings(pt.abstract(net, x), mesh, {{".*": P("x")}})
        for seed in range(3):  # each save replaces the one before, in all processes alike
            params = pt.init(net, jax.random.key(seed), x, shardings=places)
            pt.save({str(folder)!r}, params)
            found = pt.load({str(folder)!r}, like=params)
            for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(params)):
                assert one.sharding == other.sharding
                for a, b in zip(one.addressable_shards, other.addressable_shards):
                    assert np.array_equal(a.data, b.data)
        """
    )
    import jax
    import jax.numpy as jnp

    found = pt.load(folder)  # one process reads what two have written
    wanted = pt.init(pt.nn.Dense(8), jax.random.key(2), jnp.ones((2, 4)))
    np.testing.assert_array_equal(found.weight, wanted.weight)


def test_a_run_that_loses_a_process_ends_as_one_that_does_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    undisturbed, disturbed = multiprocess.main(["--timeout", "400"])
    text = capsys.readouterr().out
    assert undisturbed == disturbed and np.isfinite(undisturbed)
    assert "process 1 is lost after step 10" in text
    assert len(re.findall(r"process [01] goes on from step [48]\n", text)) == 2
    assert "the losses are equal" in text
