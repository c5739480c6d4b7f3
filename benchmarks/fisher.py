"""Time the diagonal Fisher information of the MNIST VAE three ways, side by side in one run.

``python benchmarks/fisher.py [--samples 50000]``. Loop and vmap are timed on a part of the samples
and scaled up, because they take minutes. Times are CPU seconds of one thread, which other work on
the machine does not distort. Ours is also set against the rate of plain matrix products on the same
thread, since a ratio says little about how far one could still go.
"""

import argparse
import time

import torch
from _compare import record
from torch.utils.flop_counter import FlopCounterMode

from lib.methods.fisher import diagonal_fisher
from lib.models.cvae import ConditionalVAE

LOSS = ConditionalVAE.elbo_from_noise


def loop(model, batch):
    """The definition: one backward pass a sample."""
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for sample in zip(*(part.split(1) for part in batch), strict=True):
        model.zero_grad()
        LOSS(model, *sample).sum().backward()
        for name, parameter in model.named_parameters():
            sums[name] += parameter.grad**2
    model.zero_grad()
    return {name: total / len(batch[0]) for name, total in sums.items()}


def vmap(model, batch):
    return diagonal_fisher(model, LOSS, [batch], linear_identity=False)


def identity(model, batch):
    return diagonal_fisher(model, LOSS, zip(*(part.split(500) for part in batch), strict=True))


def matrix_rate(size: int = 512) -> float:
    """Return the operations a CPU second in products of float32 matrices, the best of ten tries."""
    left, right = torch.randn(2, size, size)
    tries = (cpu_seconds(lambda: [left @ right for _ in range(50)])[0] for _ in range(10))
    return 50 * 2 * size**3 / min(tries)


def cpu_seconds(function, *arguments):
    start = time.process_time()
    value = function(*arguments)
    return time.process_time() - start, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--part", type=int, default=500, help="samples for loop and vmap")
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    model = ConditionalVAE((1, 28, 28), 10)
    classes = torch.randint(10, (options.samples,), generator=generator)
    images = torch.cat([model.sample(c, generator) for c in classes.split(1000)])
    noise = torch.randn(options.samples, model.latent_dim, generator=generator)
    everything = images, classes, noise
    part = tuple(tensor[: options.part] for tensor in everything)

    scale = options.samples / options.part
    identity(model, part)  # warm up
    rows = {}
    seconds, expected = cpu_seconds(loop, model, part)
    rows[f"loop, {options.part} samples scaled"] = seconds * scale, expected
    seconds, values = cpu_seconds(vmap, model, part)
    rows[f"vmap(grad), {options.part} samples scaled"] = seconds * scale, values
    seconds, _ = cpu_seconds(identity, model, everything)
    rows[f"ours, all {options.samples} samples"] = seconds, identity(model, part)
    with FlopCounterMode(display=False) as counter:
        identity(model, everything)
    share = counter.get_total_flops() / seconds / matrix_rate()

    slowest = next(iter(rows.values()))[0]
    n_parameters = sum(p.numel() for p in model.parameters())
    for name, (seconds, values) in rows.items():
        worst = max(float((values[k] - v).abs().max() / v.abs().max()) for k, v in expected.items())
        what = f"diagonal Fisher, {n_parameters} parameters, 1 CPU thread"
        record(what, f"{name}, {worst:.0e} off", seconds, "s", slowest / seconds)
    record(what, "ours, of the rate of matrix products", 100 * share, "%")


if __name__ == "__main__":
    main()
