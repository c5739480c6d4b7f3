"""Time the drawing of avatars: pictures a second of one CPU thread, by size.

``python benchmarks/avatars.py [--seconds 5]``. CPU seconds are counted, so that other work on the
machine only disturbs through the caches; beside them stands the time of a plain product over
256 kB of numbers, which tells how much it does.
"""

import argparse
import time

import torch
from _compare import record

from lib.data import avatars


def cpu_seconds(function) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="CPU time a size")
    parser.add_argument("--chunk-pixels", type=int, default=avatars.CHUNK_PIXELS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    identity, picture = avatars.members("train")
    numbers = torch.rand(2**16) + 0.5
    for size in (32, 64, 128):
        n = 4 * max(1, options.chunk_pixels // size**2)
        some = identity[:n], picture[:n], size, None, n // 4
        avatars.render(*some)  # warm up
        times, products = [], []
        while sum(times) < options.seconds:
            times.append(cpu_seconds(lambda some=some: avatars.render(*some)))
            products.append(cpu_seconds(lambda: [numbers * numbers for _ in range(20)]) / 20)
        mean, best = n * len(times) / sum(times), n / min(times)
        what = f"avatars of {size}×{size}, 1 CPU thread, a product {1e6 * min(products):.0f} µs"
        record(what, f"ours, best {best:.0f}", mean, "images/s")


if __name__ == "__main__":
    main()
