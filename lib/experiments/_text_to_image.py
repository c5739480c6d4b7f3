"""What the experiments with text-to-image pipelines share: prompts, their tokens, and sampling.

The pipelines are those of :mod:`lib.models.text_to_image`. Latents are float (n, channels, height,
width), scaled as the UNet sees them. Samplers are DDIM without noise, whatever the pipeline's own
is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from lib import ROOT
from lib.methods.erasing import SafeGuidance, SampleLatent, sld_guidance, unet_epsilon
from lib.models.text_to_image import PARTS, embed, tokens_of

BATCH = 32


def prompt_set(name: str, /, folder: Path = ROOT / "configs/prompts", **words: str) -> list[str]:
    """Read a list of prompts that was written for this book, and fill its gaps such as ``{name}``.

    Raises: ValueError if there is no such list or a gap has no word.
    """
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml"))) or "none"
        raise ValueError(f"There are no prompts named {name!r}; choose from {known}.")
    try:
        return [line.format(**words) for line in yaml.safe_load(path.read_text("utf8"))]
    except KeyError as error:
        raise ValueError(
            f"The prompts {name!r} have the gap {{{error.args[0]}}}; pass a word for it."
        ) from None


def check_pipeline(pipe) -> None:
    """Raise a ValueError if the pipeline lacks a part or its UNet does not predict the noise."""
    if missing := [part for part in PARTS if getattr(pipe, part, None) is None]:
        raise ValueError(
            f"The pipeline {type(pipe).__name__} has no {', '.join(missing)}; give a text-to-image "
            "pipeline such as diffusers' StableDiffusionPipeline."
        )
    kind = pipe.scheduler.config.get("prediction_type", "epsilon")
    if kind != "epsilon":
        raise ValueError(
            f"The pipeline's UNet predicts {kind!r}; the methods here want one that predicts the "
            "noise ('epsilon'), such as Stable Diffusion v1.4."
        )


def replaced_tokens(pipe, forget: Sequence[str], instead: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return what UCE maps on what: tokens of pairs of prompts, embedded, (n, dim) each.

    A pair ends alike, as in "a photo of ada birk wearing a hat" and "a photo of a person wearing a
    hat". Paired are the last words in which they differ and all that follow, the end and the
    padding included: these all know the words before them.

    Raises: ValueError if the lists differ in length.
    """
    if len(forget) != len(instead):
        raise ValueError(
            f"Got {len(forget)} prompts to erase and {len(instead)} in their places; wanted as "
            "many."
        )
    embedded = [embed(pipe, prompts) for prompts in (forget, instead)]
    tokens = [tokens_of(pipe.tokenizer, prompts) for prompts in (forget, instead)]
    pairs = []
    for old, new, *numbers in zip(*embedded, *tokens, strict=True):
        said = [_until_end(each.tolist(), pipe.tokenizer.eos_token_id) for each in numbers]
        alike = 0
        while alike < min(map(len, said)) - 2 and said[0][-1 - alike] == said[1][-1 - alike]:
            alike += 1
        starts = [len(each) - alike - 1 for each in said]
        n = len(old) - max(starts)
        pairs.append((old[starts[0] :][:n], new[starts[1] :][:n]))
    old, new = zip(*pairs, strict=True)
    return torch.cat(old), torch.cat(new)


def _until_end(tokens: list[int], end: int) -> list[int]:
    """Cut tokens off before the first one that ends them."""
    return tokens[: tokens.index(end)] if end in tokens else tokens


@dataclass(frozen=True)
class Drawing:
    """How a config draws pictures: ``guidance`` of the prompt (1 is none) and DDIM ``steps``."""

    guidance: float
    steps: int


@torch.no_grad()
def latent_path(
    pipe,
    unet: nn.Module,
    condition: Tensor,
    drawing: Drawing,
    generator: torch.Generator,
    safety: tuple[SafeGuidance, Tensor] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Denoise noise to latents; yield (t, x_t) before every step, and (-1, x_0) at the end.

    ``condition`` (n, tokens, dim) are the embeddings of one prompt a picture. ``safety`` is a
    :class:`SafeGuidance` and the embeddings (tokens, dim) of the concept to stay away from.
    """
    scheduler = ddim(pipe)
    scheduler.set_timesteps(drawing.steps, device=condition.device)
    n, size = len(condition), unet.config.sample_size
    shape = n, unet.config.in_channels, size, size
    x_t = torch.randn(shape, generator=generator, device=generator.device)
    x_t = x_t.to(condition.device, condition.dtype)
    others = [embed(pipe, [""])[0]] if drawing.guidance != 1 or safety else []
    others += [safety[1]] if safety else []
    conditions = torch.cat([condition, *(other.expand_as(condition) for other in others)])
    state = None
    for t in scheduler.timesteps:
        yield int(t), x_t
        eps = unet_epsilon(unet, x_t.repeat(1 + len(others), 1, 1, 1), t, conditions).chunk(
            1 + len(others)
        )
        if safety:
            noise, state = sld_guidance(eps[1], eps[0], eps[2], drawing.guidance, safety[0], state)
        elif others:
            noise = eps[1] + drawing.guidance * (eps[0] - eps[1])
        else:
            noise = eps[0]
        x_t = scheduler.step(noise, t, x_t).prev_sample
    yield -1, x_t


def draw_latents(
    pipe,
    condition: Tensor,
    drawing: Drawing,
    generator: torch.Generator,
    *,
    unet: nn.Module | None = None,
    safety: tuple[SafeGuidance, Tensor] | None = None,
) -> Tensor:
    """Draw a latent for each condition (n, tokens, dim), with the pipeline's UNet or another."""
    check_pipeline(pipe)
    unet = pipe.unet if unet is None else unet
    parts = []
    for part in condition.split(BATCH):
        *_, (_, x_0) = latent_path(pipe, unet, part, drawing, generator, safety)
        parts.append(x_0)
    return torch.cat(parts)


def esd_latent(pipe, drawing: Drawing) -> SampleLatent:
    """Return the sampler that ESD trains with: x_t after a random number of steps, and its t.

    The steps are those of the sampler, so that x_t fits its t.
    """

    def draw(unet: nn.Module, condition: Tensor, generator: torch.Generator):
        stop = torch.randint(drawing.steps, (), generator=generator, device=generator.device).item()
        path = latent_path(pipe, unet, condition, drawing, generator)
        for _ in range(stop + 1):
            t, x_t = next(path)
        return x_t, torch.full((len(condition),), t, device=x_t.device)

    return draw


def ddim(pipe):
    """Return a DDIM sampler with the noise schedule of the pipeline."""
    from diffusers import DDIMScheduler  # diffusers takes seconds to import

    return DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
