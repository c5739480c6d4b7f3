"""The layers of Glow, each with its ``log|det J|`` (Kingma & Dhariwal, 2018).

All tensors are (batch, channels, height, width).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ActNorm(nn.Module):
    """Shift and scale each channel: ``y = exp(log_scale) * (x + shift)``."""

    def __init__(self, n_channels: int):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(n_channels))
        self.log_scale = nn.Parameter(torch.zeros(n_channels))

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Give every channel of ``x`` (batch, channels, height, width) mean 0 and variance 1."""
        self.shift.copy_(-x.mean((0, 2, 3)))
        self.log_scale.copy_(-(x.std((0, 2, 3), correction=0) + 1e-6).log())


class InvertibleConv(nn.Module):
    """Mix the channels of each pixel by ``W = P (I + L) (U + diag(d))``, at first a rotation.

    The permutation P and the signs of d stay fixed; ``log|det W|`` is the sum of ``log|d|``.
    """

    def __init__(self, n_channels: int):
        super().__init__()
        rotation, _ = torch.linalg.qr(torch.randn(n_channels, n_channels))
        permutation, lower, upper = torch.linalg.lu(rotation)
        self.register_buffer("permutation", permutation)
        self.register_buffer("sign", upper.diagonal().sign())
        self.lower = nn.Parameter(lower.tril(-1))
        self.upper = nn.Parameter(upper.triu(1))
        self.log_diagonal = nn.Parameter(upper.diagonal().abs().log())

    def matrix(self) -> Tensor:
        """Return W (channels, channels)."""
        eye = torch.eye(len(self.sign), dtype=self.sign.dtype, device=self.sign.device)
        upper = self.upper.triu(1) + torch.diag(self.sign * self.log_diagonal.exp())
        return self.permutation @ (self.lower.tril(-1) + eye) @ upper


class ZeroConv(nn.Conv2d):
    """Convolve 3×3 from zero weights, with a learned scale for each output channel."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, 3, padding=1)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        self.log_scale = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        # Scaling the few weights gives what scaling the many outputs would.
        scale = (3.0 * self.log_scale).exp()
        return F.conv2d(x, self.weight * scale[:, None, None, None], self.bias * scale, padding=1)


class FlowStep(nn.Module):
    """Normalise the channels, mix them, and move one half of them by a function of the other.

    ActNorm and the 1×1 convolution are both affine in a pixel's channels, so that one matrix and
    one offset do the work of the two.
    """

    def __init__(self, n_channels: int, hidden: int, affine: bool):
        super().__init__()
        self.affine = affine
        self.actnorm = ActNorm(n_channels)
        self.conv = InvertibleConv(n_channels)
        half = n_channels // 2
        self.net = nn.Sequential(
            nn.Conv2d(half, hidden, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, hidden, 1),
            nn.ReLU(inplace=True),
            ZeroConv(hidden, half * (2 if affine else 1)),
        )

    def shift_and_log_scale(self, kept: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the coupling's shift and log-scale (None if additive), each shaped like ``kept``.

        The scale is ``sigmoid(raw + 2)``, as in the Glow code: below 1, and 0.88 at first.
        """
        if not self.affine:
            return self.net(kept), None
        shift, raw_scale = self.net(kept).chunk(2, dim=1)
        return shift, F.logsigmoid(raw_scale + 2.0)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``x`` one step towards the latents.

        Shapes: ``x`` (batch, channels, height, width); returns the same and ``log|det J|``, a
        scalar for the additive coupling and (batch,) for the affine one.
        """
        weight = self.conv.matrix() * self.actnorm.log_scale.exp()
        x = mix_channels(x, weight, weight @ self.actnorm.shift)
        n_pixels = x.shape[2] * x.shape[3]
        log_det = n_pixels * (self.actnorm.log_scale.sum() + self.conv.log_diagonal.sum())
        kept, moved = x.chunk(2, dim=1)
        shift, log_scale = self.shift_and_log_scale(kept)
        moved = moved + shift
        if log_scale is not None:
            moved = moved * log_scale.exp()
            log_det = log_det + log_scale.sum((1, 2, 3))
        return torch.cat((kept, moved), dim=1), log_det

    def decode(self, z: Tensor, inverse: Tensor) -> Tensor:
        """Undo :meth:`encode`, given the inverse of its matrix from :meth:`inverse_matrix`."""
        kept, moved = z.chunk(2, dim=1)
        shift, log_scale = self.shift_and_log_scale(kept)
        if log_scale is not None:
            moved = moved * (-log_scale).exp()
        return mix_channels(torch.cat((kept, moved - shift), dim=1), inverse, -self.actnorm.shift)

    def mixing_weights(self) -> list[Tensor]:
        """List all that :meth:`inverse_matrix` depends on."""
        return [*self.conv.parameters(), *self.conv.buffers(), self.actnorm.log_scale]

    def inverse_matrix(self) -> Tensor:
        """Return the inverse (channels, channels) of ActNorm's scale and the mixing together.

        It is computed in float64, because its errors would reach every pixel.
        """
        inverse = torch.linalg.inv(self.conv.matrix().double())
        scale = self.actnorm.log_scale.double().exp()
        return (inverse / scale[:, None]).to(self.conv.lower.dtype)


def mix_channels(x: Tensor, weight: Tensor, offset: Tensor) -> Tensor:
    """Apply one matrix and offset to the channels of every pixel.

    A matrix product on the channels_last layout: on CPUs faster than ``conv2d``, and on GPUs not
    rounded to TF32, which would cost the inverse its accuracy.
    """
    return F.linear(x.permute(0, 2, 3, 1), weight, offset).permute(0, 3, 1, 2)


class Prior(nn.Module):
    """Learn mean and standard deviation of a block's latents, given the channels it passes on.

    The last block passes none on; there they are one number a channel.
    """

    def __init__(self, n_latent: int, n_passed: int):
        super().__init__()
        if n_passed:
            self.net = ZeroConv(n_passed, 2 * n_latent)
        else:
            self.constant = nn.Parameter(torch.zeros(2 * n_latent))

    def mean_and_log_std(self, passed: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return both in a shape that broadcasts to the latents'."""
        both = self.constant[None, :, None, None] if passed is None else self.net(passed)
        return both.chunk(2, dim=1)

    def encode(self, latent: Tensor, passed: Tensor | None) -> tuple[Tensor, Tensor]:
        """Standardise the latents; return them with ``log|det J|`` (batch,)."""
        mean, log_std = self.mean_and_log_std(passed)
        log_det = -log_std.expand_as(latent).sum((1, 2, 3))
        return (latent - mean) * (-log_std).exp(), log_det

    def decode(self, z: Tensor, passed: Tensor | None) -> Tensor:
        """Undo :meth:`encode`."""
        mean, log_std = self.mean_and_log_std(passed)
        return mean + log_std.exp() * z
