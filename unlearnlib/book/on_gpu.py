"""All that the book can prove on a GPU, by one command: ``python -m unlearnlib.book.on_gpu --out FOLDER``.

Three parts, from the folder of the book. ``equality``: every algorithm gives on the device what it gives on the
CPU; where there are three devices or more, several processes find what one finds. ``chapters``: the notebooks run
at profile quick, where models are loaded onto the device; their tables can be compared with those of a CPU.
``scale``: seconds and bytes of the routes at the size of OPT-125M to OPT-2.7B, with random weights, beside what
chapter 20's cost model and the planner of K-FAC in groups say. Nothing is downloaded for the first and the last.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd
import torch

from unlearnlib.book import paper_scale
from unlearnlib.book.schedule import run_notebooks
from unlearnlib.cache import atomic_file
from unlearnlib.models.loading import device_name

PARTS = ("equality", "chapters", "scale")
AT_ONCE = 4
"""Processes of the equality tests, and notebooks, that run at a time: a GPU is shared by turns."""


def equality(root: Path, out: Path, device: torch.device, at_once: int) -> bool:
    """Run the tests of all algorithms on ``device``; write what each of them was off by. True if all agree."""
    report = out / "equality.xml"
    command = [sys.executable, "-m", "pytest", "tests/test_accelerator.py", "-v", "-p", "no:cacheprovider"]
    if device.type == "cuda" and torch.cuda.device_count() >= 3:
        command.append("tests/test_distributed.py")
    command += ["-n", str(at_once), f"--junitxml={report}", "-o", "junit_family=xunit1"]
    named = {"UNLEARNLIB_TEST_DEVICE": device.type, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=root, env=os.environ | named, check=False)
    table = read_report(report)
    with atomic_file(out / "equality.csv") as temporary:
        table.assign(card=device_name(device)).to_csv(temporary, index=False)
    print(table.groupby("precision", dropna=False)["error"].max().to_string())
    return ended.returncode == 0


def read_report(path: Path) -> pd.DataFrame:
    """A row a test: the parts of its name, how it ended, and the relative error that it recorded."""
    rows = []
    for case in ElementTree.parse(path).iter("testcase"):
        name = case.get("name", "").partition("[")[2].removesuffix("]")
        parts = name.rsplit("-", 2)
        method, architecture, precision = parts if len(parts) == 3 else (case.get("name"), "", "")
        errors = [float(p.get("value")) for p in case.iter("property") if p.get("name") == "error"]
        ended = next((kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None), "passed")
        row = {"method": method, "architecture": architecture, "precision": precision.removeprefix("torch.")}
        rows.append(row | {"ended": ended, "error": errors[0] if errors else float("nan")})
    return pd.DataFrame(rows)


def chapters(root: Path, only: Sequence[str], at_once: int) -> bool:
    """Run the notebooks at profile quick; their tables come to be in ``_build/quick/results``. True if all ran."""
    failures = run_notebooks(root, "quick", only, at_once)
    for name, reason in failures.items():
        print(f"{name}: {reason}")
    return not failures


def scale(out: Path, device: torch.device) -> bool:
    """Measure the paper's scale, and write ``gpu_measured.csv`` and ``inverse_fisher_gpu.csv``."""
    card = device_name(device)
    measured = paper_scale.Table(out, "gpu_measured", card)
    paper_scale.measure_speeds(measured, device)
    inverse = paper_scale.Table(out, "inverse_fisher_gpu", card)
    paper_scale.measure_inverse(inverse, device, paper_scale.LARGE)
    paper_scale.measure_routes(measured, device)
    paper_scale.measure_inverse(inverse, device, paper_scale.SMALL)
    paper_scale.measure_decompositions(measured, device)
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Prove on a GPU what can be proved of the book. The exit code is 0 only if everything worked."""
    parser = argparse.ArgumentParser(prog="python -m unlearnlib.book.on_gpu", description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the tables go")
    parser.add_argument("--only", nargs="+", default=PARTS, choices=PARTS, help="just these parts")
    parser.add_argument("--device", default="cuda", help="what is measured (default: cuda)")
    parser.add_argument("--chapters", nargs="+", default=[], metavar="NOTEBOOK", help="just these, in this order")
    parser.add_argument("--at-once", type=int, default=AT_ONCE, help=f"processes at a time (default: {AT_ONCE})")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that notebooks are stopped too
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("error: there is no CUDA device here; name another with --device", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"{device_name(device)}, PyTorch {torch.__version__}", flush=True)
    root, worked = Path.cwd(), True
    runs = {
        "equality": lambda: equality(root, options.out, device, options.at_once),
        "chapters": lambda: chapters(root, options.chapters, options.at_once),
        "scale": lambda: scale(options.out, device),
    }
    for part in options.only:
        started = time.monotonic()
        ok = runs[part]()
        worked &= ok
        print(f"{part}: {'done' if ok else 'FAILED'} in {time.monotonic() - started:.0f} s", flush=True)
    return 0 if worked else 1


if __name__ == "__main__":
    sys.exit(main())
