"""The five Gaussians of the taming paper's Figure 2."""

import torch
from torch import Tensor

# Clusters 0 to 3 are the corners, cluster 4 is the centre, the one to be forgotten.
CENTRES = torch.tensor([(-0.5, -0.5), (-0.5, 0.5), (0.5, -0.5), (0.5, 0.5), (0.0, 0.0)])


def five_gaussians(n: int, generator: torch.Generator, std: float = 0.08) -> tuple[Tensor, Tensor]:
    """Draw points from five equally likely Gaussians in the plane.

    The centres are read off the paper's Figure 2, (±0.5, ±0.5) and (0, 0), and so is ``std``,
    since the paper gives no number.

    Shapes: returns ``x`` (n, 2) float32 and ``cluster`` (n,) int64, on the generator's device.
    """
    device = generator.device
    cluster = torch.randint(len(CENTRES), (n,), generator=generator, device=device)
    noise = torch.randn(n, 2, generator=generator, device=device)
    return CENTRES.to(device)[cluster] + std * noise, cluster
