"""What the benchmarks share: time several ways in turns, and set them side by side."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lib.train import FUSED_ADAM

ROUNDS = 40


@dataclass(frozen=True)
class Line:
    """One way of doing something: its value, and how many times as good as the reference it is."""

    what: str
    way: str
    value: float
    unit: str
    ratio: float | None = None


LINES: list[Line] = []  # of this process, for the one table that `make bench` makes


def record(*line) -> None:
    """Keep and print a :class:`Line`."""
    found = Line(*line)
    if not LINES or LINES[-1].what != found.what:
        print(found.what)
    LINES.append(found)
    ratio = "" if found.ratio is None else f"{found.ratio:6.2f}x"
    print(f"  {found.way:38s} {found.value:9.2f} {found.unit} {ratio}")


def compare(
    title: str, ways: Mapping[str, Callable[[], object]], rounds: int = ROUNDS
) -> dict[str, float]:
    """Record and return the median CPU milliseconds of each way; the first is the reference.

    Every round times each way once, so that a slow phase of the machine hits all of them. Before
    them an eighth as many, at least one, warm up.
    """
    times = {name: [] for name in ways}
    warm_up = max(1, rounds // 8)
    for turn in range(rounds + warm_up):
        for name, function in ways.items():
            start = time.process_time()
            function()
            if turn >= warm_up:
                times[name].append(1e3 * (time.process_time() - start))
    medians = {name: statistics.median(values) for name, values in times.items()}
    reference = next(iter(medians.values()))
    for name, value in medians.items():
        record(title, name, value, "ms", reference / value)
    return medians


class FlowWays:
    """One library's flow, and what is timed of it: to score, train on and draw a batch."""

    def __init__(
        self,
        flow: nn.Module,
        x: Tensor,
        log_prob: Callable[[Tensor], Tensor],
        sample: Callable[[int], Tensor],
    ):
        self.x, self.log_prob, self.sample = x, log_prob, sample
        log_prob(x)  # initialises what the first batch initialises
        self.adam = FUSED_ADAM(flow.parameters(), lr=1e-4)

    def score(self) -> None:
        with torch.no_grad():
            self.log_prob(self.x)

    def train(self) -> None:
        self.adam.zero_grad(set_to_none=True)
        (-self.log_prob(self.x).mean()).backward()
        self.adam.step()

    def draw(self) -> None:
        with torch.no_grad():
            self.sample(len(self.x))
