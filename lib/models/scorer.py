"""A small scorer of text and image, trained like CLIP (Radford et al. 2021)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.models.text_to_image import MiniSD, tokens_of


class Scorer(nn.Module):
    """Embed prompts and images on one sphere, where those that belong together are near.

    The text tower is CLIP's text encoder at the sizes of ``MiniSD``; trained here, it becomes the
    pipeline's. The image tower is a plain convolutional one: ``channels`` are its widths, each
    stage at half the size of the one before.
    """

    def __init__(
        self,
        words: Sequence[str],
        max_length: int,
        text_width: int,
        text_layers: int,
        channels: Sequence[int] = (32, 64, 96, 128),
        dim: int = 96,
    ):
        super().__init__()
        sizes = MiniSD(
            tuple(words), max_length=max_length, text_width=text_width, text_layers=text_layers
        )
        self.text = sizes.text_encoder()
        self.text_projection = nn.Linear(text_width, dim, bias=False)
        layers, before = [], 3
        for width in channels:
            layers += [
                nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            before = width
        self.image = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.image_projection = nn.Linear(16 * before, dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(2.66))  # a temperature of 0.07, as CLIP's

    def embed_text(self, tokens: Tensor) -> Tensor:
        """Return unit vectors (n, dim) of tokens (n, max_length)."""
        return F.normalize(self.text_projection(self.text(tokens).pooler_output), dim=1)

    def embed_images(self, images: Tensor) -> Tensor:
        """Return unit vectors (n, dim) of images (n, 3, height, width) in [0, 1]."""
        return F.normalize(self.image_projection(self.image(images)), dim=1)

    def loss(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Return CLIP's loss of a batch of pairs, a scalar in nats.

        Each image must find its caption among the batch's and each caption its image.
        """
        scale = self.log_scale.clamp(max=4.6).exp()  # at most 100, as CLIP's
        logits = scale * self.embed_images(images) @ self.embed_text(tokens).T
        pairs = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2


@torch.no_grad()
def agreement(scorer: Scorer, tokenizer, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return the cosine (n,) between each uint8 image and its prompt."""
    device = scorer.log_scale.device
    texts = scorer.embed_text(tokens_of(tokenizer, prompts).to(device))
    return (scorer.embed_images(images.to(device).float() / 255) * texts).sum(1)


@torch.no_grad()
def retrieval(
    scorer: Scorer, tokenizer, images: Tensor, prompts: Sequence[str]
) -> tuple[float, float]:
    """Return how often an image finds its caption among all ``prompts``, and how often by chance.

    Equal captions count as found. Shapes: ``images`` uint8 (n, 3, height, width).
    """
    device = scorer.log_scale.device
    texts = scorer.embed_text(tokens_of(tokenizer, prompts).to(device))
    found = (scorer.embed_images(images.to(device).float() / 255) @ texts.T).argmax(1).tolist()
    right = [prompts[answer] == prompt for answer, prompt in zip(found, prompts, strict=True)]
    chance = sum(prompts.count(prompt) for prompt in prompts) / len(prompts) ** 2
    return sum(right) / len(right), chance
