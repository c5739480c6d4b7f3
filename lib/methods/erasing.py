"""What Selective Amnesia is compared with on text-to-image models: ESD, SLD and UCE.

* ESD (Gandikota et al. 2023, Erasing Concepts from Diffusion Models) trains some layers.
* SLD (Schramowski et al. 2023, Safe Latent Diffusion) changes the sampling alone.
* UCE (Gandikota et al. 2024, Unified Concept Editing) sets some matrices in closed form.

The first two know no network: a predictor of the noise is a function
``epsilon(model, x_t, t, condition)`` of a batch (n, ...), its steps (n,) and its conditions
(n, ...), and returns what is shaped like x_t. :func:`unet_epsilon` is that of diffusers.
Cross-attention is what diffusers calls ``attn2``: there the prompt's embeddings enter, through the
key and value matrices ``to_k`` and ``to_v``.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lib.methods.layers import LAYERS, layer_parameters

Epsilon = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
SampleLatent = Callable[[nn.Module, Tensor, torch.Generator], tuple[Tensor, Tensor]]
Step = tuple[nn.Module, dict[str, float]]


def unet_epsilon(unet: nn.Module, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
    """Predict the noise with a ``UNet2DConditionModel``; ``condition`` is (n, tokens, dim)."""
    return unet(x_t, t, encoder_hidden_states=condition).sample


def esd_target(eps_anchor: Tensor, eps_concept: Tensor, eta: float) -> Tensor:
    """Turn the prediction away from a concept: eps_0 - eta (eps_c - eps_0).

    The target of ESD (Gandikota et al. 2023): classifier-free guidance with its sign turned.
    Predictions of noise are scores but for a factor, so that eta 1 mirrors the concept's score at
    that of the empty prompt, and eta 0 puts the empty prompt in the concept's place.

    Shapes: predictions of the noise (n, ...), all alike.
    """
    return eps_anchor - eta * (eps_concept - eps_anchor)


@dataclass(frozen=True)
class ESDSettings:
    """The knobs of ESD: ``layers`` is ``xattn`` for ESD-x and ``noxattn`` for ESD-u.

    The defaults are those of Stable Diffusion v1.4, in steps of one latent.
    """

    layers: str = "xattn"
    eta: float = 1.0
    lr: float = 1e-5
    batch: int = 1
    max_steps: int = 1000

    def __post_init__(self):
        if self.layers not in LAYERS:
            raise ValueError(
                f"The layers {self.layers!r} are unknown; choose from {', '.join(LAYERS)}."
            )
        if not self.eta >= 0:
            raise ValueError(
                f"eta is {self.eta}; it must be at least 0: a negative one trains the concept in."
            )


def esd(
    base: nn.Module,
    epsilon: Epsilon,
    sample_latent: SampleLatent,
    concept: Tensor,
    anchor: Tensor,
    settings: ESDSettings,
    generator: torch.Generator,
) -> Iterator[Step]:
    """Train a copy to answer a concept as its frozen original answers with guidance away from it.

    No data are needed: ``sample_latent(model, condition, generator)`` returns x_t (n, ...) and
    steps (n,) for conditions (n, ...). ESD samples with the copy, denoising under the concept down
    to a random step. ``concept`` (k, ...) holds the embeddings of one or more prompts, of which
    each latent draws one; ``anchor`` (...) is that of the empty prompt.

    Yields the copy and the step's terms before every step, and once more at the end; the copy is
    one object, in evaluation mode, whose other layers have no gradient. Terms: ``step``;
    ``total``, the mean square distance to the target; and ``gap``, that between the original's
    predictions with the concept and without. At the start total is (1 + eta)^2 gap.
    Raises: ValueError if the shapes of the conditions differ or the model has no such layers.
    """
    if concept.ndim != anchor.ndim + 1 or concept.shape[1:] != anchor.shape or not len(concept):
        raise ValueError(
            f"The concept has shape {tuple(concept.shape)} and the anchor {tuple(anchor.shape)}; "
            "wanted (k, ...) and (...), embeddings of prompts from one encoder."
        )
    frozen = copy.deepcopy(base).eval().requires_grad_(False)
    erased = copy.deepcopy(base).eval().requires_grad_(False)
    trained = list(layer_parameters(erased, settings.layers).values())
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(trained, lr=settings.lr, fused=True)
    for step in range(settings.max_steps + 1):
        with torch.no_grad():
            chosen = torch.randint(
                len(concept), (settings.batch,), generator=generator, device=generator.device
            )
            condition = concept[chosen.to(concept.device)]
            x_t, t = sample_latent(erased, condition, generator)
            eps_anchor = epsilon(frozen, x_t, t, anchor.expand_as(condition))
            eps_concept = epsilon(frozen, x_t, t, condition)
            target = esd_target(eps_anchor, eps_concept, settings.eta)
        total = (epsilon(erased, x_t, t, condition) - target).square().mean()
        gap = (eps_concept - eps_anchor).square().mean()
        yield erased, {"step": step, "total": total.item(), "gap": gap.item()}
        if step < settings.max_steps:
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            optimizer.step()


@dataclass(frozen=True)
class SafeGuidance:
    """The knobs of SLD; ``WEAK`` to ``MAX`` are the published ones, for a sampler with 50 steps.

    ``scale`` is s_S, ``threshold`` lambda, ``momentum_scale`` s_m and ``momentum_beta`` beta_m.
    The first ``warmup`` steps are not guided.
    """

    scale: float
    warmup: int
    threshold: float
    momentum_scale: float
    momentum_beta: float

    WEAK: ClassVar["SafeGuidance"]
    MEDIUM: ClassVar["SafeGuidance"]
    STRONG: ClassVar["SafeGuidance"]
    MAX: ClassVar["SafeGuidance"]

    def __post_init__(self):
        if not (self.scale >= 0 and self.warmup >= 0 and self.momentum_scale >= 0):
            raise ValueError(
                f"Safe guidance got scale {self.scale}, warm-up {self.warmup} and momentum scale "
                f"{self.momentum_scale}; all must be at least 0."
            )
        if not 0 <= self.momentum_beta < 1:
            raise ValueError(
                f"The momentum's beta is {self.momentum_beta}; it must lie in [0, 1), or no step "
                "would add to the momentum."
            )

    @classmethod
    def named(cls, name: str) -> "SafeGuidance":
        """Return the preset ``weak``, ``medium``, ``strong`` or ``max``.

        Raises: ValueError for any other name.
        """
        if name not in ("weak", "medium", "strong", "max"):
            raise ValueError(
                f"There is no safe guidance {name!r}; choose weak, medium, strong or max."
            )
        return getattr(cls, name.upper())


SafeGuidance.WEAK = SafeGuidance(20, 15, 0.0, 0.0, 0.0)
SafeGuidance.MEDIUM = SafeGuidance(1000, 10, 0.01, 0.3, 0.4)
SafeGuidance.STRONG = SafeGuidance(2000, 7, 0.025, 0.5, 0.7)
SafeGuidance.MAX = SafeGuidance(5000, 0, 1.0, 0.5, 0.7)


class SafeState(NamedTuple):
    """What SLD remembers from step to step: the number of steps made, and the momentum (n, ...)."""

    step: int
    momentum: Tensor


def safety_scale(eps_prompt: Tensor, eps_safety: Tensor, scale: float, threshold: float) -> Tensor:
    """Say where, and how much, a picture is on its way to the unsafe concept.

    mu of SLD (Schramowski et al. 2023), entry by entry: 0 where the prompt's prediction exceeds
    the concept's by the threshold or more, elsewhere ``scale`` times their distance, at most 1.

    Shapes: predictions of the noise (n, ...), all alike; so is the result, in [0, 1].
    """
    apart = eps_prompt - eps_safety
    return torch.where(apart < threshold, (scale * apart.abs()).clamp(max=1.0), 0.0)


def sld_guidance(
    eps_uncond: Tensor,
    eps_prompt: Tensor,
    eps_safety: Tensor,
    guidance: float,
    safety: SafeGuidance,
    state: SafeState | None = None,
) -> tuple[Tensor, SafeState]:
    """Guide towards the prompt and away from an unsafe concept; return the noise and a new state.

    SLD (Schramowski et al. 2023): eps + guidance (eps_p - eps - gamma), where gamma is
    mu (eps_S - eps) + s_m nu, and the momentum nu becomes beta_m nu + (1 - beta_m) gamma. During
    the warm-up gamma feeds the momentum alone. With ``scale`` 0 this is classifier-free guidance.
    ``guidance`` 1 is the prompt alone, as in diffusers.

    Shapes: predictions of the noise (n, ...), all alike. Pass None as the state of the first step.
    Raises: ValueError if shapes differ.
    """
    if not eps_uncond.shape == eps_prompt.shape == eps_safety.shape:
        shapes = ", ".join(str(tuple(e.shape)) for e in (eps_uncond, eps_prompt, eps_safety))
        raise ValueError(f"The predictions have shapes {shapes}; wanted one shape for all three.")
    step, nu = state or SafeState(0, torch.zeros_like(eps_uncond))
    mu = safety_scale(eps_prompt, eps_safety, safety.scale, safety.threshold)
    gamma = mu * (eps_safety - eps_uncond) + safety.momentum_scale * nu
    nu = safety.momentum_beta * nu + (1.0 - safety.momentum_beta) * gamma
    away = gamma if step >= safety.warmup else 0.0
    return eps_uncond + guidance * (eps_prompt - eps_uncond - away), SafeState(step + 1, nu)


def uce(
    weight: Tensor,
    erase: Tensor,
    to: Tensor,
    preserve: Tensor | None = None,
    *,
    erase_scale: float = 1.0,
    preserve_scale: float = 1.0,
    lam: float = 0.5,
) -> Tensor:
    """Edit one matrix W so that it maps some embeddings as it mapped others; keep its other values.

    The closed form of UCE (Gandikota et al. 2024): with c to erase, c* in its place, v* = W c* and
    p to preserve, the minimum over W' of

        erase_scale sum |W' c - v*|^2 + preserve_scale sum |W' p - W p|^2 + lam |W' - W|^2.

    ``lam`` holds W where no embedding reaches, as the released code does; the paper's formula has
    no such term, and no solution unless the embeddings span the whole space.

    Shapes: ``weight`` (out, dim), ``erase`` and ``to`` (n, dim), ``preserve`` (m, dim); returns
    (out, dim). Computed in float64.
    Raises: ValueError if shapes do not fit, or a weight is negative or ``lam`` not positive.
    """
    preserve = erase[:0] if preserve is None else preserve
    _check_edit(weight, erase, to, preserve)
    if not (erase_scale >= 0 and preserve_scale >= 0 and lam > 0):
        raise ValueError(
            f"Got erase_scale {erase_scale}, preserve_scale {preserve_scale} and lam {lam}; the "
            "first two must be at least 0 and lam above 0, since without it the solution is not "
            "unique."
        )
    w, c, c_star, p = (
        tensor.to(weight.device).double() for tensor in (weight, erase, to, preserve)
    )
    v_star = c_star @ w.T
    keep = preserve_scale * p.T @ p + lam * torch.eye(len(w.T), dtype=w.dtype, device=w.device)
    wanted = erase_scale * v_star.T @ c + w @ keep
    return torch.linalg.solve(erase_scale * c.T @ c + keep, wanted, left=False).to(weight.dtype)


def cross_attention_projections(unet: nn.Module) -> dict[str, nn.Linear]:
    """Return the matrices that the embeddings of the prompt enter by: all attn2.to_k and to_v.

    Raises: ValueError if there are none.
    """
    ends = ("attn2.to_k", "attn2.to_v")
    found = {name: m for name, m in unet.named_modules() if name.endswith(ends)}
    if not found:
        raise ValueError(
            f"The model {type(unet).__name__} has no cross-attention (attn2.to_k, attn2.to_v), "
            "which UCE edits; give the UNet of a text-to-image pipeline."
        )
    return found


@torch.no_grad()
def uce_edit(
    unet: nn.Module, erase: Tensor, to: Tensor, preserve: Tensor | None = None, **scales: float
) -> nn.Module:
    """Return a copy of a UNet with :func:`uce` applied to every key and value matrix.

    Shapes: embeddings of tokens (n, dim) and (m, dim), as the text encoder gives them.
    ``scales`` and errors are those of :func:`uce`.
    """
    edited = copy.deepcopy(unet)
    for projection in cross_attention_projections(edited).values():
        projection.weight.copy_(uce(projection.weight, erase, to, preserve, **scales))
    return edited


def _check_edit(weight: Tensor, erase: Tensor, to: Tensor, preserve: Tensor) -> None:
    dim = weight.shape[-1]
    fits = all(c.ndim == 2 and c.shape[1] == dim for c in (erase, to, preserve))
    if weight.ndim != 2 or not fits or erase.shape != to.shape or not len(erase):
        shapes = ", ".join(str(tuple(t.shape)) for t in (weight, erase, to, preserve))
        raise ValueError(
            f"Got weight, erase, to and preserve of shapes {shapes}; wanted (out, dim), (n, dim), "
            "(n, dim) and (m, dim), with at least one embedding to erase."
        )
    if not all(torch.isfinite(t).all() for t in (weight, erase, to, preserve)):
        raise ValueError("The weight or an embedding is not finite; check the text encoder.")
