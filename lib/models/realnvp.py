"""RealNVP: affine coupling layers over a standard normal latent (Dinh et al., 2017)."""

import math

import torch
from torch import Tensor, nn


class AffineCoupling(nn.Module):
    """Scale and shift the last coordinates by a function of the first ``n_kept``, then swap them.

    The swap makes the next layer move what this one kept.
    """

    def __init__(self, n_kept: int, n_moved: int, hidden: int):
        super().__init__()
        self.n_kept, self.n_moved = n_kept, n_moved
        self.net = nn.Sequential(
            nn.Linear(n_kept, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 2 * n_moved),
        )
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def scale_and_shift(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-scale and shift, each (batch, n_moved); tanh keeps the log-scale within ±2."""
        raw_scale, shift = self.net(kept).chunk(2, dim=1)
        return 2.0 * torch.tanh(raw_scale), shift

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``x`` one layer towards the latent; return it with ``log|det J|`` (batch,)."""
        kept, moved = x.split((self.n_kept, self.n_moved), dim=1)
        log_scale, shift = self.scale_and_shift(kept)
        return torch.cat((moved * log_scale.exp() + shift, kept), dim=1), log_scale.sum(1)

    def decode(self, z: Tensor) -> Tensor:
        """Undo :meth:`encode`."""
        moved, kept = z.split((self.n_moved, self.n_kept), dim=1)
        log_scale, shift = self.scale_and_shift(kept)
        return torch.cat((kept, (moved - shift) * (-log_scale).exp()), dim=1)


class RealNVP(nn.Module):
    """A normalizing flow on vectors: ``n_layers`` couplings that take turns in what they move.

    At initialisation it only swaps coordinates, so its density is the standard normal.
    """

    def __init__(self, dim: int, n_layers: int = 10, hidden: int = 64):
        super().__init__()
        if dim < 2:
            raise ValueError(
                f"A coupling needs at least 2 coordinates, got dim={dim}; "
                "use a one-dimensional density model instead."
            )
        self.dim = dim
        halves = (dim // 2, dim - dim // 2)
        self.layers = nn.ModuleList(
            AffineCoupling(halves[i % 2], halves[1 - i % 2], hidden) for i in range(n_layers)
        )

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map data to latents.

        Shapes: ``x`` (batch, dim); returns ``z`` (batch, dim) and ``log|det dz/dx|`` (batch,) in
        nats.
        Raises: ValueError if ``x`` has another shape.
        """
        self._check(x)
        log_det = x.new_zeros(len(x))
        for layer in self.layers:
            x, layer_log_det = layer.encode(x)
            log_det = log_det + layer_log_det
        return x, log_det

    def decode(self, z: Tensor) -> Tensor:
        """Map latents (batch, dim) to data; the inverse of :meth:`encode`."""
        self._check(z)
        for layer in reversed(self.layers):
            z = layer.decode(z)
        return z

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the exact log-density of each row of ``x``, in nats.

        Implements TNF Eq. (2).

        Shapes: ``x`` (batch, dim); returns (batch,).
        """
        z, log_det = self.encode(x)
        return standard_normal_log_prob(z) + log_det

    def sample(
        self, n: int, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw ``(n, dim)`` samples; ``temperature`` scales the latents' standard deviation."""
        weight = self.layers[0].net[0].weight
        z = torch.randn(n, self.dim, generator=generator, device=weight.device)
        return self.decode(temperature * z)

    def _check(self, x: Tensor) -> None:
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(
                f"RealNVP got a tensor of shape {tuple(x.shape)} and wants (batch, {self.dim}); "
                "flatten each sample to one row."
            )


def standard_normal_log_prob(z: Tensor) -> Tensor:
    """Return the log-density of each row of ``z`` under N(0, I), in nats.

    Implements TNF Eq. (4).

    Shapes: ``z`` (batch, dim); returns (batch,).
    """
    return -0.5 * (z.square() + math.log(2.0 * math.pi)).sum(1)
