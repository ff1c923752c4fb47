"""Runs the suite: ``python -m benchmarks.suite``. The package docstring says how it measures."""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.suite import plots, report
from benchmarks.suite.case import Case, load
from benchmarks.suite.rounds import ROOT, run

# The one plot of the README: case, metric, title.
FIRST = ("mlp", "SGD step", "A jitted SGD step: what calling it costs")


AGAIN = "measured again later"


def show(text: str) -> None:
    """Prints and flushes."""
    print(text, flush=True)


def machine(cases: dict[str, Case]) -> dict[str, Any]:
    """Describes the machine and the versions of all packages compared."""
    cpu, memory = platform.processor() or platform.machine(), 0
    if Path("/proc/cpuinfo").exists():
        names = [
            line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
        ]
        cpu = names[0].partition(":")[2].strip() if names else cpu
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    packages = ["jax", "jaxlib", "numpy"]
    packages += sorted({package for case in cases.values() for package in case.packages} - {*packages})
    versions = []
    for package in packages:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} absent")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return {
        "processor": f"{cpu}, {cores} cores",
        "memory": f"{memory / 2**30:.0f} GiB",
        "system": platform.platform(),
        "Python": platform.python_version(),
        "packages": ", ".join(versions),
        "date": datetime.date.today().isoformat(),
        "load at the start": f"{load_average:.1f}",
    }


def busy() -> tuple[int, int]:
    """Returns the busy and the stolen CPU time so far, in clock ticks."""
    if not Path("/proc/stat").exists():
        return 0, 0
    times = [int(text) for text in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return sum(times[:3]) + sum(times[5:7]), times[7]  # without idle and iowait; steal


def stolen(before: tuple[int, int]) -> str:
    """Returns the share of CPU time that the host took from this machine since ``before``."""
    worked, gone = (now - then for now, then in zip(busy(), before, strict=True))
    return f"{100 * gone / max(1, worked + gone):.0f} %"


def render(cases: dict[str, Case], folder: Path) -> None:
    """Writes the tables and plots from the results in a folder."""
    main = folder / "results.json"
    files = [main] if main.exists() else []
    files += sorted(folder.glob("results-*.json"))
    results = [json.loads(path.read_text()) for path in files]
    (folder / "plots").mkdir(exist_ok=True)
    plotted = set()
    try:
        for name, result in results[0]["cases"].items():
            if name in cases and plots.draw(cases[name], result, folder / "plots" / f"{name}.svg"):
                plotted.add(name)
            if name == FIRST[0] and name in cases:
                plots.draw(cases[name], result, folder / "plots" / "first.svg", *FIRST[1:])
    except ImportError as error:
        show(f"no plots: {error}")
    (folder / "RESULTS.md").write_text(report.document(cases, results, plotted))


def main() -> None:
    """Runs the selected cases and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", metavar="CASE", help="run only these cases; keep the other results"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="run one round of each case at its smallest size"
    )
    parser.add_argument("--list", action="store_true", help="list the cases and exit")
    parser.add_argument(
        "--render", action="store_true", help="write tables and plots from existing results"
    )
    parser.add_argument("--label", default="", help="write results-LABEL.json, for another machine")
    parser.add_argument("--out", type=Path, help="the folder to write to; benchmarks/ by default")
    args = parser.parse_args()
    cases = load()
    if args.list:
        for case in cases.values():
            show(f"{case.name:16} {case.title}: {', '.join(case.contenders)}")
        return
    if unknown := set(args.only or ()) - set(cases):
        parser.error(f"unknown cases: {', '.join(sorted(unknown))}; the cases are {', '.join(cases)}")
    if args.smoke and not args.out:
        with tempfile.TemporaryDirectory() as folder:
            measure(cases, args, Path(folder))
    else:
        measure(cases, args, args.out or ROOT / "benchmarks")


def measure(cases: dict[str, Case], args: argparse.Namespace, folder: Path) -> None:
    """Runs the selected cases and writes the results to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if args.render:
        render(cases, folder)
        return
    path = folder / (f"results-{args.label}.json" if args.label else "results.json")
    results = json.loads(path.read_text()) if path.exists() else {"cases": {}}
    full = not args.only or not path.exists()
    about = results["machine"] = machine(cases) if full else results["machine"]
    if not full:  # the description of the machine stays that of the full run
        again = {*about.get(AGAIN, "").split(", "), *args.only} - {""}
        about[AGAIN] = ", ".join(name for name in cases if name in again)
    before = busy()
    failed = []
    began = time.monotonic()
    selected = {name: case for name, case in cases.items() if not args.only or name in args.only}
    # A smoke run does not judge times, so two cases may run at once.
    pool = ThreadPoolExecutor(2 if args.smoke else 1)
    with tempfile.TemporaryDirectory() as caches, pool:
        runs = pool.map(lambda case: run(case, args.smoke, Path(caches), show), selected.values())
        for (name, case), result in zip(selected.items(), runs, strict=True):
            results["cases"][name] = result
            about.update({k: v for k, v in result["about"].items() if k == "device"})
            failed += [f"{name}: {who}" for who in result["errors"]]
            for who, why in result["absent"].items():
                show(f"  left out: {who} ({why})")
            for verdict in () if args.smoke else report.verdicts(case, result["rounds"]):
                bound = f"{verdict.bound.metric}, {verdict.bound.ours}, {verdict.size}: {verdict.asked}"
                show(f"  {'met    ' if verdict.met else 'NOT MET'} {bound}: {verdict.answer}")
            results["cases"] = {
                name: results["cases"][name] for name in cases if name in results["cases"]
            }
            if full:
                about["CPU time stolen by the host"] = stolen(before)
            path.write_text(
                json.dumps(results, separators=(",", ":"))
            )  # partial results survive a crash
    taken = time.monotonic() - began
    if full:
        about["minutes"] = f"{taken / 60:.1f}"
    path.write_text(json.dumps(results, separators=(",", ":")))
    render(cases, folder)
    show(f"{taken:.0f} s; written to {folder}")
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
