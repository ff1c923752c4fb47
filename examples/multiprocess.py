"""Two processes train one model; one is lost, and both resume from a checkpoint.

Each process has two CPU devices, and both run the same program. A collective waits for every process,
so when one is lost the other hangs: the launcher kills it and restarts both, and they load the last
checkpoint. A step depends only on what the checkpoint holds, so the final loss is that of an
undisturbed run.

Run it with ``python -m examples.multiprocess``; it needs optax and Orbax. It uses only the loopback
interface and ends within minutes: no process outlives ``--timeout``.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

import paramtree as pt
from examples import char_lm, sharded_lm

PROCESSES, DEVICES = 2, 2  # devices per process
ROOT = Path(__file__).resolve().parents[1]


class Run(NamedTuple):
    """The state of a training run: what a checkpoint holds."""

    params: Any
    state: Any
    step: int


# One process


def work(args: argparse.Namespace) -> None:
    """Trains as one of the processes, from the last checkpoint if there is one."""
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{args.port}", PROCESSES, args.process)
    settings = char_lm.Settings(width=32, layers=1, heads=4)
    where = sharded_lm.sharded(settings, sharded_lm.TABLES["both"], args.lr, jax.devices())
    data, step = char_lm.load_data(), sharded_lm.make_step(where, args.lr)
    loss: Any = float("nan")
    with pt.Checkpoints(args.folder, keep=2) as checkpoints:
        run = Run(*sharded_lm.begin(where, args.lr, args.seed), 0)
        if checkpoints.latest is not None:
            run = checkpoints.load(like=run)
            print(f"process {args.process} goes on from step {run.step}", flush=True)
        for i in range(run.step, args.steps):
            tokens = char_lm.batch_at(data.train, i, args.batch_size, args.context, args.seed)
            params, state, loss = step(run.params, run.state, sharded_lm.put_batch(where, tokens))
            run = Run(params, state, i + 1)
            if run.step % args.every == 0:
                checkpoints.save(run.step, run)
            if args.process == args.lose and run.step == args.lose_at:
                print(f"process {args.process} is lost after step {run.step}", flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
    if args.process == 0:
        print(f"loss {float(loss)!r}", flush=True)
    jax.distributed.shutdown()


# The launcher


def start(args: argparse.Namespace, folder: Path, lose: int) -> list[subprocess.Popen[str]]:
    """Starts the processes; process ``lose`` kills itself midway."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Workers do not inherit this process's device settings.
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    options = [f"--{name}={getattr(args, name)}" for name in ("steps", "every", "seed")]
    options += [f"--folder={folder}", f"--port={port}", f"--lose={lose}", f"--lose-at={args.lose_at}"]
    command = [sys.executable, "-m", "examples.multiprocess", *options]
    return [
        subprocess.Popen(
            [*command, f"--process={i}"],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(PROCESSES)
    ]


def wait(processes: Sequence[subprocess.Popen[str]], until: float) -> tuple[bool, str]:
    """Waits until all processes end or one fails; returns whether all succeeded, and the output.

    If one fails or time runs out, kills the others, which would wait forever.
    """
    while any(p.poll() is None for p in processes):
        failed = any(p.poll() not in (None, 0) for p in processes)
        if failed or time.monotonic() > until:
            for process in processes:
                process.kill()
            break
        time.sleep(0.05)
    output = "".join(process.communicate()[0] for process in processes)
    return all(process.returncode == 0 for process in processes), output


def train(args: argparse.Namespace, folder: Path, lose: int) -> float:
    """Returns the final loss of a run; restarts all processes once if one is lost.

    Raises:
      RuntimeError: a process failed for another reason, or the run took too long.
    """
    until = time.monotonic() + args.timeout
    succeeded, output = wait(start(args, folder, lose), until)
    lines = [line for line in output.splitlines() if line.startswith(("process", "loss"))]
    print("\n".join(lines), flush=True)
    if not succeeded and "is lost" in output:
        return train(args, folder, lose=-1)
    if not succeeded:
        raise RuntimeError(f"the processes failed, or took longer than {args.timeout} s:\n{output}")
    return next(float(line.removeprefix("loss ")) for line in lines if line.startswith("loss"))


def main(argv: Sequence[str] | None = None) -> tuple[float, float]:
    """Trains twice, undisturbed and with a lost process; returns both final losses."""
    parser = argparse.ArgumentParser(description="Loses a process, and resumes from a checkpoint.")
    sharded_lm.add_options(parser, steps=12)
    parser.set_defaults(every=4, batch_size=8, context=32)
    parser.add_argument("--lose-at", type=int, default=10, help="step after which a process is lost")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for each start")
    for name in ("folder", "port", "process", "lose"):  # set by the launcher
        parser.add_argument(f"--{name}", type=str if name == "folder" else int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.process is not None:
        work(args)
        return (0.0, 0.0)
    if not args.every <= args.lose_at < args.steps:
        parser.error("--lose-at must be at least --every, the first checkpoint, and less than --steps")
    with tempfile.TemporaryDirectory() as folder:
        print("undisturbed")
        undisturbed = train(args, Path(folder, "undisturbed"), lose=-1)
        print("with a lost process")
        disturbed = train(args, Path(folder, "disturbed"), lose=PROCESSES - 1)
    print(f"the losses are {'equal' if undisturbed == disturbed else 'different'}")
    return undisturbed, disturbed


if __name__ == "__main__":
    main()
