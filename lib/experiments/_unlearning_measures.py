"""What unlearning changes: the feature's share, the rest of the picture, and the fidelity."""

import math
from functools import cached_property

import torch
from torch import Tensor, nn

from lib.experiments._latents import Pictures, seen_by
from lib.experiments._unlearning import Subject
from lib.methods.feature_unlearning import Feature, edited_latent, indicator
from lib.metrics.fidelity import frechet_distance, inception_score
from lib.models.classifier import predict_logits


class Yardstick:
    """Compare other ways of drawing with the base f, on the same ``n`` latents.

    ``before`` are f's pictures of the latents ``z``, and ``real`` as many held-out ones. ``scorer``
    is a classifier, if there is to be an inception-type score.
    """

    def __init__(
        self,
        subject: Subject,
        held_out: Pictures,
        n: int,
        seed: int,
        scorer: nn.Module | None = None,
    ):
        self.subject, self.source, self.scorer = subject, held_out.source, scorer
        generator = torch.Generator(subject.device).manual_seed(seed)
        self.z = subject.draw_samples(n, generator)
        self.before = subject.pictures(subject.model, self.z)
        self.real = held_out.some(n)
        self._free: dict[str, tuple[Tensor, Tensor]] = {}

    @cached_property
    def seen_before(self) -> Tensor:
        """Return the judge's features of f's pictures."""
        return self.subject.seen(self.before)[0]

    @cached_property
    def seen_real(self) -> Tensor:
        """Return the judge's features of the real pictures."""
        return self.subject.seen(self.real)[0]

    @property
    def extractor(self) -> str:
        """Return the name of the extractor of the Fréchet distances."""
        return self.subject.seen(self.real[:1])[1]

    def free(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the features of f's and of real pictures without the feature."""
        if name not in self._free:
            self._free[name] = (
                self.seen_before[~self.subject.has(name, self.before)],
                self.seen_real[~self.subject.has(name, self.real)],
            )
        return self._free[name]

    def edited(self, feature: Feature) -> tuple[Tensor, Tensor]:
        """Return f's pictures of the latents after the edit, and which lie beyond t: (n,)."""
        z, changed = edited_latent(self.z, [feature])
        return self.subject.pictures(self.subject.model, z), changed > 0

    def groups(self, name: str, feature: Feature) -> dict[str, Tensor]:
        """Sort the latents: whose picture by f has the feature, and which of the others lie where.

        ``forget`` have it; ``bystanders`` do not, but lie beyond the threshold, so that the method
        changes them; ``rest`` do not, and lie below it. Booleans (n,) each.
        """
        has = self.subject.has(name, self.before)
        beyond = indicator(self.z, *feature) > 0
        return {"forget": has, "bystanders": ~has & beyond, "rest": ~has & ~beyond}

    def distances(self, name: str, images: Tensor) -> dict[str, float]:
        """Return the share with the feature, and Fréchet distances to the real pictures.

        ``frechet_free`` compares what has no feature, among f's, the given and the real pictures,
        at the smallest of their three numbers, since the distance grows with few pictures;
        ``frechet_free_ratio`` is it over ``frechet_free_base``. They are nan below two pictures.
        """
        has = self.subject.has(name, images)
        seen, _ = self.subject.seen(images)
        base, real = self.free(name)
        found = {
            "share_after": float(has.float().mean()),
            "frechet": frechet_distance(self.seen_real[: len(seen)], seen[: len(self.seen_real)]),
        }
        n = min(len(base), len(real), int((~has).sum()))
        ours, theirs = math.nan, math.nan
        if n >= 2:
            ours = frechet_distance(real[:n], seen[~has][:n])
            theirs = frechet_distance(real[:n], base[:n])
        found |= {"frechet_free": ours, "frechet_free_base": theirs}
        if self.scorer is not None:
            logits = predict_logits(self.scorer, seen_by(self.scorer, images))
            found["inception_score"] = inception_score(logits)
        return found | {"frechet_free_ratio": ours / theirs}

    def compare(self, name: str, feature: Feature, after: Tensor) -> dict[str, float]:
        """Measure pictures of the latents ``z``: the feature, and what else became of them.

        ``beyond`` is the share of the latents beyond the threshold, and ``beyond_forget`` that of
        those with the feature. For each of :meth:`groups`: its ``size`` as a share of the latents,
        ``share_after`` with the feature, ``pixels`` by which the pictures moved (mean absolute
        difference, range 1), ``kept``, the share of the judge's other opinions that are as before,
        and ``moved``, the mean change of the feature's score. All but ``size`` are nan for an empty
        group.
        """
        subject = self.subject
        moved = subject.scores(name, after) - subject.scores(name, self.before)
        columns = {
            "share_after": subject.has(name, after).float(),
            "pixels": (after - self.before).abs().flatten(1).mean(1),
            "kept": (subject.opinion(name, after) == subject.opinion(name, self.before))
            .float()
            .mean(1),
            "moved": moved,
        }
        groups, beyond = self.groups(name, feature), indicator(self.z, *feature)
        found = self.distances(name, after) | {"beyond": float(beyond.mean())}
        found["beyond_forget"] = float(beyond[groups["forget"]].mean())
        for group, chosen in groups.items():
            found[f"size_{group}"] = float(chosen.float().mean())
            for quantity, values in columns.items():
                found[f"{quantity}_{group}"] = float(values[chosen].nanmean())
        return found
