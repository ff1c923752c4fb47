"""What XLA compiles a multi-device program to: its memory use and its collectives.

jax fixes the number of CPU devices when it starts, so a program for more devices than this process has
is exported and compiled in a subprocess. The subprocess runs this file:
``python -m paramtree.inspect.compiled`` reads a program from stdin and writes JSON.
"""

import base64
import json
import math
import os
import re
import subprocess
import sys
from typing import Any

import jax
import jax.export
import numpy as np
from jax.sharding import Mesh

from paramtree.core.errors import ParamTreeError

__all__ = ["collectives", "facts", "facts_elsewhere"]

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_FLAG = "--xla_force_host_platform_device_count"
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$", re.MULTILINE)
_EXCHANGE = re.compile(rf" = (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(")
_CALLED = re.compile(
    r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.-]+)"
    r"|branch_computations=\{([^}]*)\}"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ARRAY = re.compile(r"\b([a-z]+\d*)\w*\[([\d,]*)\]")


def collectives(text: str) -> dict[str, dict[str, int]]:
    r"""Returns the collectives of a compiled program, given as HLO text.

    Returns:
      For each kind of collective in the program: the number of instructions ("ops"), the number of
      times they run, loops included ("runs"), and the bytes all runs give to one device ("bytes").

    Example:
      >>> collectives("ENTRY %main (x: f32[4]) -> f32[8] {\n  %y = f32[8]{0} all-gather(%x)\n}")
      {'all-gather': {'ops': 1, 'runs': 1, 'bytes': 32}}
    """
    bodies: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            lines = bodies[head[2]] = []
            entry = head[2] if head[1] else entry
        else:
            lines.append(line)
    totals: dict[str, dict[str, int]] = {}
    seen: set[str] = set()

    def walk(name: str, times: int) -> None:
        for line in bodies.get(name, ()):
            exchange = _EXCHANGE.search(line)
            if exchange:
                total = totals.setdefault(exchange[2], {"ops": 0, "runs": 0, "bytes": 0})
                total["ops"] += name not in seen
                total["runs"] += times
                total["bytes"] += times * _nbytes(exchange[1])
            trips = _TRIPS.search(line)
            repeats = int(trips[1]) if trips and " while(" in line else 1
            for names in _CALLED.findall(line):
                for called in re.findall(r"[\w.-]+", " ".join(names)):
                    walk(called, times * repeats)
        seen.add(name)

    walk(entry, 1)
    return {name: totals[name] for name in COLLECTIVES if name in totals}


def _nbytes(shapes: str) -> int:
    """Returns the size in bytes of an array type or a tuple type in HLO text."""
    size = 0
    for kind, dimensions in _ARRAY.findall(shapes):
        bits = re.search(r"\d+", kind)  # "pred", a boolean, has none
        itemsize = max(1, int(bits[0]) // 8) if bits else 1
        size += itemsize * math.prod(int(n) for n in dimensions.split(",") if n)
    return size


def facts(compiled: Any) -> dict[str, Any]:
    """Returns the memory use and the collectives of a compiled program.

    Returns:
      "backend"; "arguments", "outputs" and "temporaries", in bytes per device; and "collectives".
    """
    memory = compiled.memory_analysis()
    return {
        "backend": jax.default_backend(),
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "collectives": collectives(compiled.as_text()),
    }


def facts_elsewhere(exported: jax.export.Exported, axes: dict[str, int]) -> dict[str, Any]:
    """Returns ``facts`` of a program for CPU, compiled in a subprocess that has enough devices.

    Raises:
      ParamTreeError: the program cannot be compiled.
    """
    count = math.prod(axes.values())
    flags = re.sub(rf"{_FLAG}=\d+", "", os.environ.get("XLA_FLAGS", ""))
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{flags} {_FLAG}={count}".strip(),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    environment.pop("JAX_NUM_CPU_DEVICES", None)
    program = base64.b64encode(bytes(exported.serialize())).decode()
    run = subprocess.run(
        [sys.executable, "-m", "paramtree.inspect.compiled"],
        input=json.dumps({"program": program, "axes": axes}),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        error = re.split(r"^(?=[\w.]*(?:Error|Exception)\b)", run.stderr, flags=re.MULTILINE)[-1]
        raise ParamTreeError(
            f"plan: the program for {count} devices cannot be compiled: {error[:1000].strip()}"
        )
    return json.loads(run.stdout.splitlines()[-1])


def _main() -> None:
    request = json.load(sys.stdin)
    exported = jax.export.deserialize(bytearray(base64.b64decode(request["program"])))
    sizes = tuple(request["axes"].values())
    mesh = Mesh(np.array(jax.devices()[: math.prod(sizes)]).reshape(sizes), tuple(request["axes"]))
    ins: Any = exported.in_shardings_jax(mesh)
    outs: Any = exported.out_shardings_jax(mesh)
    shapes = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
        for a, sharding in zip(exported.in_avals, ins, strict=True)
    ]
    print(json.dumps(facts(jax.jit(exported.call, out_shardings=outs).lower(*shapes).compile())))


if __name__ == "__main__":
    _main()
