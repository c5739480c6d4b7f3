"""Time one forgetting step of Selective Amnesia on the MNIST VAE against a straightforward one.

``python benchmarks/amnesia_step.py``. The straightforward step is written as in the authors' code:
it takes the cross-entropy of the decoder's sigmoid, calls the ELBO twice, adds the penalty in a
loop over named parameters, and leaves Adam at its defaults. Most of its delay is the first of
these, so a second straightforward step has our ELBO, from logits, and differs in the rest alone.
Each round times every way once; the table shows medians. Times are CPU milliseconds of one thread,
which other work on the machine distorts little.
"""

from functools import partial

import torch
import torch.nn.functional as F
from _compare import compare, record

from lib.memory import keep_freed_memory
from lib.methods.amnesia import Anchor, amnesia_loss, ewc_penalty, uniform_noise
from lib.models.cvae import ConditionalVAE

BATCH, LAM = 256, 0.78
FORGET = torch.zeros(BATCH, dtype=torch.long)


def loop_penalty(model, fisher, theta_star):
    penalty = 0.0
    for name, parameter in model.named_parameters():
        penalty = penalty + (0.5 * fisher[name] * (parameter - theta_star[name]) ** 2).sum()
    return penalty


def elbo_of_sigmoid(model, x, c, generator):
    mean, log_var = model.encode(x, c)
    noise = torch.randn(mean.shape, generator=generator)
    decoded = model.decode(mean + noise * torch.exp(0.5 * log_var), c)
    fit = F.binary_cross_entropy(decoded, x, reduction="none").flatten(1).sum(1)
    return -fit - 0.5 * (mean**2 + log_var.exp() - 1 - log_var).sum(1)


def backward(model, value):
    model.zero_grad()
    value.backward()


class Step:
    """A model off its anchor, with everything a step needs."""

    def __init__(self, optimizer):
        torch.manual_seed(0)
        self.model, self.frozen = (ConditionalVAE((1, 28, 28), 10) for _ in range(2))
        self.fisher = {n: torch.rand_like(p) for n, p in self.model.named_parameters()}
        self.theta_star = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.anchor = Anchor.of(self.model, self.fisher)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(1e-3 * torch.randn_like(parameter))
        self.generator = torch.Generator().manual_seed(0)
        self.optimizer = optimizer(self.model.parameters(), lr=1e-4)
        self.noise = uniform_noise((1, 28, 28))

    def batches(self):
        keep = torch.randint(1, 10, (BATCH,), generator=self.generator)
        replay = self.frozen.sample(keep, self.generator), keep
        return (self.noise(BATCH, self.generator), FORGET), replay

    def straightforward(self, elbo=elbo_of_sigmoid):
        surrogate, replay = self.batches()
        loss = -elbo(self.model, *surrogate, self.generator).mean()
        loss = loss - elbo(self.model, *replay, self.generator).mean()
        loss = loss + LAM * loop_penalty(self.model, self.fisher, self.theta_star)
        backward(self.model, loss)
        self.optimizer.step()

    def ours(self):
        elbo = partial(self.model.elbo, generator=self.generator)
        penalty = ewc_penalty(self.model, self.anchor)
        backward(self.model, amnesia_loss(elbo, *self.batches(), penalty, LAM)[0])
        self.optimizer.step()


def main() -> None:
    torch.set_num_threads(1)
    plain, fused = Step(torch.optim.Adam), Step(partial(torch.optim.Adam, fused=True))
    steps = {
        "straightforward": plain.straightforward,
        "straightforward, our ELBO": partial(plain.straightforward, ConditionalVAE.elbo),
        "ours, fused Adam": fused.ours,
    }
    before = compare(f"one forgetting step, batch {BATCH} + {BATCH}, 1 CPU thread", steps)
    compare(
        "the penalty with its gradient",
        {
            "loop over parameters": lambda: backward(
                plain.model, loop_penalty(plain.model, plain.fisher, plain.theta_star)
            ),
            "ours, one pass": lambda: backward(fused.model, ewc_penalty(fused.model, fused.anchor)),
        },
    )
    compare("the optimiser's step", {"Adam": plain.optimizer.step, "fused": fused.optimizer.step})
    if keep_freed_memory():
        after = compare("the forgetting step again, with keep_freed_memory", steps)
        fastest, plain = after["ours, fused Adam"], before["straightforward"]
        what = "ours with keep_freed_memory against straightforward without"
        record(what, "ours", fastest, "ms", plain / fastest)


if __name__ == "__main__":
    main()
