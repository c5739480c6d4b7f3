"""Time the RealNVP of the toy chapter against normflows and zuko, side by side in one run.

``python benchmarks/realnvp.py``. All three have 8 affine couplings with two hidden layers of 64
and train with the same fused Adam. Each round times every library once; the table shows medians,
in CPU milliseconds of one thread, which other work on the machine does not distort.
"""

import normflows
import torch
import zuko
from _compare import compare

from lib.models.realnvp import RealNVP
from lib.train import FUSED_ADAM

LAYERS, HIDDEN, BATCH = 8, 64, 256


def normflows_flow():
    layers = []
    for _ in range(LAYERS):
        net = normflows.nets.MLP([1, HIDDEN, HIDDEN, 2], init_zeros=True)
        layers += [normflows.flows.AffineCouplingBlock(net), normflows.flows.Permute(2, "swap")]
    return normflows.NormalizingFlow(normflows.distributions.DiagGaussian(2), layers)


class Ways:
    """One library's flow with what we time of it."""

    def __init__(self, flow, log_prob, sample):
        self.flow, self.log_prob, self.sample = flow, log_prob, sample
        self.adam = FUSED_ADAM(flow.parameters(), lr=1e-3)
        self.x = 0.5 * torch.randn(BATCH, 2, generator=torch.Generator().manual_seed(0))

    def score(self):
        with torch.no_grad():
            self.log_prob(self.x)

    def train(self):
        self.adam.zero_grad(set_to_none=True)
        (-self.log_prob(self.x).mean()).backward()
        self.adam.step()

    def draw(self):
        with torch.no_grad():
            self.sample(BATCH)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ours, theirs = RealNVP(2, LAYERS, HIDDEN), normflows_flow()
    lazy = zuko.flows.RealNVP(2, transforms=LAYERS, hidden_features=(HIDDEN, HIDDEN))
    ways = {
        "normflows": Ways(theirs, theirs.log_prob, lambda n: theirs.sample(n)[0]),
        "zuko": Ways(lazy, lambda x: lazy().log_prob(x), lambda n: lazy().sample((n,))),
        "ours": Ways(ours, ours.log_prob, ours.sample),
    }
    for what in ("score", "train", "draw"):
        title = f"RealNVP, {what} {BATCH} points, 1 CPU thread"
        compare(title, {name: getattr(way, what) for name, way in ways.items()})


if __name__ == "__main__":
    main()
