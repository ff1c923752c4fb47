"""Listing a checkpoint of one gigabyte: the time after imports, and the memory beyond an empty one.

The file is a header and a hole, so it takes no disk. Each number is the median over several new
processes: the time from opening the file to printing the last line, and the peak resident memory minus
that of listing an empty file.
"""

import argparse
import json
import statistics
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

LIST = """
import sys, time
from paramtree import command
from paramtree.inspect import outline
import paramtree.io, safetensors
start = time.perf_counter()
assert command.main(sys.argv[1:]) == 0
seconds = time.perf_counter() - start
with open("/proc/self/status") as lines:
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
print(seconds, peak, file=sys.stderr)
"""


def hollow(path: Path, tensors: int, size: int) -> Path:
    """Writes a safetensors file whose values are a hole."""
    length = size // (tensors * 4) if tensors else 0
    header = {
        f"model.layers.{i // 10}.block{i % 10}.weight": {
            "dtype": "F32",
            "shape": [length],
            "data_offsets": [4 * length * i, 4 * length * (i + 1)],
        }
        for i in range(tensors)
    }
    head = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        file.truncate(8 + len(head) + 4 * length * tensors)
    return path


def measure(path: Path, rounds: int) -> tuple[float, float]:
    """Returns the seconds and the peak MiB of listing a file."""
    runs = []
    for _ in range(rounds):
        args = [sys.executable, "-c", LIST, str(path)]
        run = subprocess.run(args, capture_output=True, text=True, check=True)
        seconds, peak = run.stderr.split()
        runs.append((float(seconds), int(peak) / 1024))
    times, peaks = zip(*runs, strict=True)
    return statistics.median(times), statistics.median(peaks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tensors", type=int, nargs="*", default=[300, 1000, 20_000])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        _, empty = measure(hollow(path, 0, 0), options.rounds)
        for tensors in options.tensors:
            seconds, peak = measure(hollow(path, tensors, 2**30), options.rounds)
            print(f"1 GiB in {tensors:6} tensors: {seconds * 1e3:6.0f} ms, {peak - empty:+6.1f} MiB")


if __name__ == "__main__":
    main()
