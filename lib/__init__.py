"""The shared library of the book: models, methods, metrics, data and the runs that join them."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Float sums depend on the number of threads. One thread keeps the printed numbers of a chapter
# the same on every machine; lib.run raises it for long runs.
os.environ.setdefault("OMP_NUM_THREADS", "1")
