"""Time the RealNVP of the toy chapter against normflows and zuko, side by side in one run.

``python benchmarks/realnvp.py``. All three have 8 affine couplings with two hidden layers of 64
and train with the same fused Adam. Each round times every library once; the table shows medians,
in CPU milliseconds of one thread, which other work on the machine does not distort.
"""

import normflows
import torch
import zuko
from _compare import FlowWays, compare

from lib.models.realnvp import RealNVP

LAYERS, HIDDEN, BATCH = 8, 64, 256


def normflows_flow():
    layers = []
    for _ in range(LAYERS):
        net = normflows.nets.MLP([1, HIDDEN, HIDDEN, 2], init_zeros=True)
        layers += [normflows.flows.AffineCouplingBlock(net), normflows.flows.Permute(2, "swap")]
    return normflows.NormalizingFlow(normflows.distributions.DiagGaussian(2), layers)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = 0.5 * torch.randn(BATCH, 2)
    ours, theirs = RealNVP(2, LAYERS, HIDDEN), normflows_flow()
    lazy = zuko.flows.RealNVP(2, transforms=LAYERS, hidden_features=(HIDDEN, HIDDEN))
    ways = {
        "normflows": FlowWays(theirs, x, theirs.log_prob, lambda n: theirs.sample(n)[0]),
        "zuko": FlowWays(lazy, x, lambda x: lazy().log_prob(x), lambda n: lazy().sample((n,))),
        "ours": FlowWays(ours, x, ours.log_prob, ours.sample),
    }
    for what in ("score", "train", "draw"):
        title = f"RealNVP, {what} {BATCH} points, 1 CPU thread"
        compare(title, {name: getattr(way, what) for name, way in ways.items()})


if __name__ == "__main__":
    main()
