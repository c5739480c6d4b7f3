"""Time Glow against normflows, side by side in one run.

``python benchmarks/glow.py``. All have the blocks, flow steps and hidden channels below, additive
couplings, and train with the same fused Adam on 32×32 images in colour. Ours computes the priors
from what a block passes on, as the paper does; normflows' are constants. Ours is laid out
channels_last, which is what ``lib.train.fit`` does; normflows is timed in both layouts.
Wanted: scoring and training at least as fast as normflows, sampling at least 1.5 times as fast.
"""

import normflows
import torch
from _compare import FlowWays, compare

from lib.models.glow import Glow, dequantise

SHAPE, BLOCKS, FLOWS, HIDDEN, BATCH = (3, 32, 32), 3, 4, 32, 8


def normflows_glow() -> normflows.MultiscaleFlow:
    channels, side = SHAPE[0], SHAPE[1]
    bases, blocks, merges = [], [], []
    for i in reversed(range(BLOCKS)):
        n_channels = channels * 2 ** (i + 2)
        steps = [normflows.flows.GlowBlock(n_channels, HIDDEN, scale=False) for _ in range(FLOWS)]
        blocks.append([*steps, normflows.flows.Squeeze()])
        last = i == BLOCKS - 1
        shape = (n_channels if last else n_channels // 2, side >> (i + 1), side >> (i + 1))
        bases.append(normflows.distributions.GlowBase(shape))
        if not last:
            merges.append(normflows.flows.Merge())
    return normflows.MultiscaleFlow(bases, blocks, merges, class_cond=False)


def normflows_ways(x: torch.Tensor, **layout) -> FlowWays:
    flow = normflows_glow().to(**layout)
    return FlowWays(flow, x, lambda x: flow.log_prob(x, None), lambda n: flow.sample(n)[0])


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = dequantise(torch.randint(0, 256, (BATCH, *SHAPE), dtype=torch.uint8), 5)
    ours = Glow(SHAPE, BLOCKS, FLOWS, HIDDEN).to(memory_format=torch.channels_last)
    ways = {
        "normflows": normflows_ways(x),
        "normflows, channels_last": normflows_ways(x, memory_format=torch.channels_last),
        "ours": FlowWays(ours, x, ours.log_prob, ours.sample),
    }
    for what in ("score", "train", "draw"):
        title = f"Glow, {what} {BATCH} images of 32×32, 1 CPU thread"
        compare(title, {name: getattr(way, what) for name, way in ways.items()})


if __name__ == "__main__":
    main()
