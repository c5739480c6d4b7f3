"""Run all benchmarks and write their one table: ``python benchmarks/_all.py`` (``make bench``).

Each runs in a process of its own, because one of them changes how memory is kept. The table goes to
``book/tables/benchmarks.json`` with machine, versions and commit; the status page shows it.
"""

import importlib
import importlib.metadata
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from datetime import date
from pathlib import Path

import _compare

from lib import ROOT
from lib.checkpoints import write_atomically
from lib.machine import cores, processor
from lib.run import current_commit

PACKAGES = ("torch", "diffusers", "transformers", "torchmetrics", "normflows", "zuko")
TABLE = ROOT / "book/tables/benchmarks.json"


def lines_of(name: str) -> list[dict]:
    """Run one benchmark and return its lines."""
    importlib.import_module(name).main()
    return [asdict(line) for line in _compare.LINES]


def main() -> None:
    names = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        lines = [line for found in pool.map(lines_of, names) for line in found]
    table = {
        "machine": f"{processor()}, {cores()} cores",
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "commit": current_commit(),
        "date": date.today().isoformat(),
        "lines": lines,
    }
    write_atomically(TABLE, (json.dumps(table, indent=1, ensure_ascii=False) + "\n").encode())
    print(f"{len(lines)} lines on {table['machine']}: {TABLE}")


if __name__ == "__main__":
    main()
