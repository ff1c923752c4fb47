"""Runs the suite: ``python -m benchmarks.suite``. The package's docstring says how it measures."""

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
    """Prints at once."""
    print(text, flush=True)


def machine(cases: dict[str, Case]) -> dict[str, Any]:
    """Describes where this runs, with the version of everything that is compared."""
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
        "load before it began": f"{load_average:.1f}",
    }


def busy() -> tuple[int, int]:
    """Returns how long the processors have worked, and how long others had what a host had promised."""
    if not Path("/proc/stat").exists():
        return 0, 0
    times = [int(text) for text in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return sum(times[:3]) + sum(times[5:7]), times[7]  # all but idle, waiting and stolen; stolen


def stolen(before: tuple[int, int]) -> str:
    """Returns the share of the time since then that a host took from this machine."""
    worked, gone = (now - then for now, then in zip(busy(), before, strict=True))
    return f"{100 * gone / max(1, worked + gone):.0f} % of what it asked for"


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
    """Runs the cases that are asked for, and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", metavar="CASE", help="some cases; the results of others stay"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="one round of one small size of everything"
    )
    parser.add_argument("--list", action="store_true", help="list the cases and end")
    parser.add_argument(
        "--render", action="store_true", help="write tables and plots of the results again"
    )
    parser.add_argument(
        "--label", default="", help="write results-LABEL.json: those of another machine"
    )
    parser.add_argument("--out", type=Path, help="the folder to write to; benchmarks/ if not given")
    args = parser.parse_args()
    cases = load()
    if args.list:
        for case in cases.values():
            show(f"{case.name:16} {case.title}: {', '.join(case.contenders)}")
        return
    if unknown := set(args.only or ()) - set(cases):
        parser.error(f"no case is called {', '.join(sorted(unknown))}; there are {', '.join(cases)}")
    if args.smoke and not args.out:
        with tempfile.TemporaryDirectory() as folder:
            measure(cases, args, Path(folder))
    else:
        measure(cases, args, args.out or ROOT / "benchmarks")


def measure(cases: dict[str, Case], args: argparse.Namespace, folder: Path) -> None:
    """Runs cases, and writes the results into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if args.render:
        render(cases, folder)
        return
    path = folder / (f"results-{args.label}.json" if args.label else "results.json")
    results = json.loads(path.read_text()) if path.exists() else {"cases": {}}
    whole = not args.only or not path.exists()
    about = results["machine"] = machine(cases) if whole else results["machine"]
    if not whole:  # what is said of the machine stays that of the whole run
        again = {*about.get(AGAIN, "").split(", "), *args.only} - {""}
        about[AGAIN] = ", ".join(name for name in cases if name in again)
    before = busy()
    failed = []
    began = time.monotonic()
    asked = {name: case for name, case in cases.items() if not args.only or name in args.only}
    # Times are not looked at in a smoke run, so two cases may run at once.
    pool = ThreadPoolExecutor(2 if args.smoke else 1)
    with tempfile.TemporaryDirectory() as caches, pool:
        runs = pool.map(lambda case: run(case, args.smoke, Path(caches), show), asked.values())
        for (name, case), result in zip(asked.items(), runs, strict=True):
            results["cases"][name] = result
            about.update({k: v for k, v in result["about"].items() if k == "device"})
            failed += [f"{name}: {who}" for who in result["errors"]]
            for who, why in result["absent"].items():
                show(f"  left out: {who} ({why})")
            for one in () if args.smoke else report.verdicts(case, result["rounds"]):
                what = f"{one.bound.metric}, {one.bound.ours}, {one.size}"
                show(f"  {'met    ' if one.met else 'NOT MET'} {what}: {one.asked}: {one.answer}")
            results["cases"] = {
                name: results["cases"][name] for name in cases if name in results["cases"]
            }
            if whole:
                about["time that its host gave to others"] = stolen(before)
            path.write_text(json.dumps(results, separators=(",", ":")))  # as far as it came
    taken = time.monotonic() - began
    if whole:
        about["minutes that it took"] = f"{taken / 60:.1f}"
    path.write_text(json.dumps(results, separators=(",", ":")))
    render(cases, folder)
    show(f"{taken:.0f} s; written to {folder}")
    if failed:
        sys.exit(f"these failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
