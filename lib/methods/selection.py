"""Who has the feature: marks on generated pictures, by a person or by a simulated user."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Marks:
    """The numbers of the pictures that were marked as having the feature, and of the others."""

    positives: Tensor
    negatives: Tensor

    def split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the latents of the marked and of the unmarked pictures.

        Shapes: ``z`` (n, ...), one latent for each picture that could be marked.
        Raises: ValueError if nothing or everything is marked, or a picture has no latent.
        """
        for numbers, kind, what in (
            (self.positives, "positive", "No picture is marked"),
            (self.negatives, "negative", "All pictures are marked"),
        ):
            if len(numbers) == 0:
                raise ValueError(
                    f"{what}, so there is no {kind} latent; a feature needs pictures with it and "
                    "pictures without it."
                )
        shown = torch.cat((self.positives, self.negatives))
        if shown.max() >= len(z):
            raise ValueError(
                f"Picture {int(shown.max())} has no latent, got {len(z)} of them; give the latents "
                "that the pictures were made from, in their order."
            )
        return z[self.positives.to(z.device)], z[self.negatives.to(z.device)]


def marks_of(marked: Tensor, shown: Tensor | None = None) -> Marks:
    """Sort pictures by their mark.

    Shapes: ``marked`` (n,) booleans; ``shown`` (n,) their numbers, by default 0 to n - 1.
    """
    numbers = torch.arange(len(marked), device=marked.device) if shown is None else shown
    return Marks(numbers[marked], numbers[~marked])


def simulated_user(
    labels: Tensor, n_pictures: int, error_rate: float, generator: torch.Generator
) -> Marks:
    """Let a simulated user look at some pictures and mark those with the feature.

    This is an oracle of the true labels, not a person. It looks at ``n_pictures`` drawn without
    replacement and gets the share ``error_rate`` of them wrong, as near as whole pictures allow,
    whatever their label. So a feature in 10% of the pictures and 10% of errors make half of the
    marks wrong (0.1 * 0.9 right ones and 0.9 * 0.1 wrong ones).

    Shapes: ``labels`` (n,) booleans, or 0 and 1; the result numbers them.
    Raises: ValueError if there are fewer pictures than asked for, ``error_rate`` is not in
    [0, 0.5], or ``labels`` holds something else.
    """
    labels = torch.as_tensor(labels)
    if labels.ndim != 1 or not ((labels == 0) | (labels == 1)).all():
        raise ValueError(
            f"The labels have shape {tuple(labels.shape)} or other values than 0 and 1; give one "
            "truth value a picture."
        )
    if not 2 <= n_pictures <= len(labels):
        raise ValueError(
            f"The user is to look at {n_pictures} of {len(labels)} pictures; wanted at least 2 and "
            "at most all."
        )
    if not 0 <= error_rate <= 0.5:
        raise ValueError(
            f"The error rate is {error_rate}; it must lie in [0, 0.5], beyond which the marks mean "
            "the opposite."
        )
    order = torch.randperm(len(labels), generator=generator, device=generator.device)
    shown = order[:n_pictures].to(labels.device)
    # They are in random order, so the first are as good as any to be wrong about.
    wrong = torch.arange(n_pictures, device=labels.device) < round(error_rate * n_pictures)
    return marks_of(labels[shown].bool() ^ wrong, shown)


def simulated_users(
    labels: Tensor,
    pictures: tuple[int, ...] = (50, 100, 200, 500),
    error_rates: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2),
    seed: int = 0,
) -> Iterator[tuple[int, float, Marks]]:
    """Yield a simulated user for every number of pictures and every error rate.

    All look at the pictures in one order and err on the first ones, so that users differ only in
    what is varied: who errs more is wrong about the same pictures, and about some more.
    """
    for n_pictures in pictures:
        for error_rate in error_rates:
            generator = torch.Generator(torch.as_tensor(labels).device).manual_seed(seed)
            yield n_pictures, error_rate, simulated_user(labels, n_pictures, error_rate, generator)
