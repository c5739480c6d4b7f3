"""The streams of a training step: batches with a generator each, shared out over the processes.

Of w processes, number r computes the streams r, r + w, ... So two processes with a stream each are
the same computation as one process with two streams, and either goes on where the other stopped.
"""

from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lib import distributed


class Streams:
    """The generators of all streams, of which each process draws from its own."""

    def __init__(self, first: torch.Generator):
        self.generators = [first]

    def __len__(self) -> int:
        return len(self.generators)

    @property
    def own(self) -> list[torch.Generator]:
        """Return the generators of this process."""
        return self.generators[distributed.rank() :: distributed.n_processes()]

    def open(self, n: int) -> None:
        """Add streams until there are ``n``, each seeded by a number drawn from the first."""
        first = self.generators[0]
        if n > len(self):
            options = {"generator": first, "device": first.device}
            for seed in torch.randint(2**63 - 1, (n - len(self),), **options).tolist():
                self.generators.append(torch.Generator(first.device).manual_seed(seed))

    def gather(self) -> None:
        """Bring the generators that other processes draw from up to date; all must call it."""
        if distributed.n_processes() == 1:
            return
        states = torch.stack(self.states())
        foreign = [s for s, generator in enumerate(self.generators) if generator not in self.own]
        states[foreign] = 0
        distributed.add_up([states])
        for stream in foreign:
            # PyTorch 2.13 crashes on a state that is a view into the middle of a tensor.
            self.generators[stream].set_state(states[stream].clone())

    def states(self) -> list[Tensor]:
        """Return the state of each generator, uint8 (n,) on the CPU."""
        return [generator.get_state() for generator in self.generators]

    def set_states(self, states: list[Tensor]) -> None:
        """Go on from saved states, with as many streams as they are."""
        self.open(len(states))
        for generator, state in zip(self.generators, states, strict=True):
            generator.set_state(state)


class Batches:
    """The batches of one step that this process computes, and what they give to the mean."""

    def __init__(
        self, accelerator: Accelerator, step: nn.Module, model: nn.Module, streams: Streams
    ):
        self.accelerator, self.step, self.n_streams = accelerator, step, len(streams)
        self.generators = streams.own
        self.buffers = list(model.buffers())
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        running = [buffer for m in norms for buffer in (m.running_mean, m.running_var)]
        self.averaged = [buffer for buffer in running if buffer is not None]
        self.found: list[tuple[Tensor, dict[str, Tensor]]] = []

    def backward(self, number: int) -> None:
        """Compute step ``number``; leave the gradient of the mean loss over all streams.

        Every stream begins with the same buffers, and those of batch norm become the mean of what
        the streams make of them. PyTorch's global generator, which dropout uses, is seeded anew
        for each batch if there are several.
        """
        self.found, several = [], self.n_streams > 1
        before = [buffer.clone() for buffer in self.buffers] if len(self.generators) > 1 else []
        means = [torch.zeros_like(buffer) for buffer in self.averaged] if several else []
        for index, generator in enumerate(self.generators):
            if index > 0 and before:
                torch._foreach_copy_(self.buffers, before)
            if several:
                torch.manual_seed(hash((generator.initial_seed(), number)) % 2**63)
            # The last backward pass takes the mean of the gradients over the processes.
            last = index == len(self.generators) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.step):
                total, terms = self.step(generator)
                share = distributed.n_processes() / self.n_streams
                self.accelerator.backward(total * share if several else total)
            self.found.append((total.detach(), terms))
            for mean, buffer in zip(means, self.averaged, strict=several):
                mean.add_(buffer, alpha=1 / self.n_streams)
        if several:
            distributed.add_up(means)
            for buffer, mean in zip(self.averaged, means, strict=True):
                buffer.copy_(mean)

    def loss(self) -> float:
        """Return what this process gives to the mean loss."""
        return sum(float(total) for total, _ in self.found) / self.n_streams

    def terms(self) -> dict[str, float]:
        """Return the mean terms over all streams; all processes must call it."""
        names = list(self.found[0][1])
        parts = [sum(float(terms[name]) for _, terms in self.found) for name in names]
        sums = distributed.total(parts)
        return {name: value / self.n_streams for name, value in zip(names, sums, strict=True)}
