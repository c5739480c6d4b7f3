"""Sampling, baselines and Selective Amnesia on a tiny random pipeline of diffusers."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lib.data import captions
from lib.experiments._amnesia_text import (
    Memory,
    PromptedUNet,
    Task,
    fisher_of,
    forget,
    remember,
    surrogates,
)
from lib.experiments._text_to_image import (
    Drawing,
    check_pipeline,
    ddim,
    draw_latents,
    esd_latent,
    latent_path,
    prompt_set,
    replaced_tokens,
)
from lib.methods.erasing import (
    ESDSettings,
    SafeGuidance,
    esd,
    uce_edit,
    unet_epsilon,
)
from lib.methods.layers import layer_parameters
from lib.models.text_to_image import PARTS, MiniSD, embed, to_images

TOKENS, DIM, T = 16, 32, 1000
FORGET = ["a photo of ada birk", "a drawing of ada birk"]
INSTEAD = ["a photo of a clown", "a drawing of a clown"]
KEEP = ["a photo of mira zoll", "the sea at night"]
DRAWING = Drawing(guidance=7.5, steps=4)
TASK = Task(
    layers="full",
    lam=0.0,
    ewc_factor=0.5,
    replay=True,
    iterations=40,
    batch=4,
    lr=3e-3,
    fisher_estimator="product",
    fisher_steps=2,
    fisher_samples=4,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    sizes = MiniSD(
        words=tuple(captions.words()),
        size=16,
        max_length=TOKENS,
        latent_channels=2,
        vae_channels=(4, 8),
        unet_channels=(4, 8),
        unet_heads=2,
        text_width=DIM,
        text_layers=1,
        groups=2,
    )
    pipe = sizes.pipeline()
    for name, parameter in pipe.unet.named_parameters():
        if "attn2.to_v" in name or "attn2.to_out.0.weight" in name:
            parameter.data *= 4.0  # at random weights the prompt hardly matters
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.eval()
    return pipe


@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_pictures_are_those_of_the_pipeline(pipe, guidance):
    prompts = [FORGET[0], KEEP[1]]
    condition = embed(pipe, prompts)
    assert torch.equal(condition, pipe.encode_prompt(prompts, "cpu", 1, False)[0])
    given = {
        "prompt": prompts,
        "latents": torch.randn(2, 2, 8, 8, generator=seeded()),
        "guidance_scale": guidance,
        "num_inference_steps": 4,
    }
    latents = draw_latents(pipe, condition, Drawing(guidance, 4), seeded())
    wanted = pipe(**given, output_type="latent").images
    assert torch.allclose(latents, wanted, atol=1e-4) and latents.std() > 0.1
    pictures = pipe(**given, output_type="pt").images
    assert ((to_images(pipe.vae, latents) - 255 * pictures).abs() < 1).all()


def test_prompts_matter_and_generators_decide(pipe):
    a, b = (embed(pipe, [prompt]) for prompt in (FORGET[0], KEEP[0]))
    drawn = draw_latents(pipe, a, DRAWING, seeded())
    assert torch.equal(drawn, draw_latents(pipe, a, DRAWING, seeded()))
    assert (drawn - draw_latents(pipe, a, DRAWING, seeded(1))).abs().max() > 0.1
    assert (drawn - draw_latents(pipe, b, DRAWING, seeded())).abs().max() > 1e-2


def test_safe_sampling_against_a_loop_with_the_guidance_of_diffusers(pipe):
    from diffusers.pipelines.deprecated.stable_diffusion_safe import StableDiffusionPipelineSafe

    condition, empty, unsafe = (embed(pipe, [p]) for p in (FORGET[0], "", "glasses"))
    settings = {
        "sld_guidance_scale": 300,
        "sld_warmup_steps": 1,
        "sld_threshold": 0.01,
        "sld_momentum_scale": 0.3,
        "sld_mom_beta": 0.4,
    }
    scheduler, momentum = ddim(pipe), None
    scheduler.set_timesteps(4)
    x = torch.randn(1, 2, 8, 8, generator=seeded())
    for i, t in enumerate(scheduler.timesteps):
        with torch.no_grad():
            e, e_p, e_s = (pipe.unet(x, t, c).sample for c in (empty, condition, unsafe))
        away, momentum = StableDiffusionPipelineSafe.perform_safety_guidance(
            None, True, momentum, e_p - e, (e_p, e, e_s), i, **settings
        )
        x = scheduler.step(e + 7.5 * away, t, x).prev_sample

    def drawn(*knobs):
        safety = SafeGuidance(*knobs), unsafe[0]
        return draw_latents(pipe, condition, DRAWING, seeded(), safety=safety)

    plain = draw_latents(pipe, condition, DRAWING, seeded())
    assert torch.allclose(drawn(300, 1, 0.01, 0.3, 0.4), x, atol=1e-4)
    assert (plain - x).abs().max() > 1e-2
    assert torch.allclose(drawn(0, 0, 0.01, 0.3, 0.4), plain, atol=1e-5)
    assert torch.allclose(drawn(300, 4, 0.01, 0.3, 0.4), plain, atol=1e-5)


def test_esd_trains_on_latents_of_its_own_path(pipe):
    condition = embed(pipe, FORGET)
    generator = seeded(3)
    x_t, t = esd_latent(pipe, DRAWING)(pipe.unet, condition, generator)
    again = seeded(3)
    torch.randint(4, (), generator=again)
    path = dict(latent_path(pipe, pipe.unet, condition, DRAWING, again))
    assert len(path) == 5 and torch.equal(x_t, path[int(t[0])]) and len(t) == 2
    concept, anchor = embed(pipe, FORGET[:1]), embed(pipe, [""])[0]
    settings = ESDSettings(lr=1e-2, max_steps=2)
    steps = esd(
        pipe.unet, unet_epsilon, esd_latent(pipe, DRAWING), concept, anchor, settings, seeded()
    )
    *_, (erased, terms) = steps
    assert terms["step"] == 2 and terms["gap"] > 0
    latents = [draw_latents(pipe, concept, DRAWING, seeded(), unet=u) for u in (None, erased)]
    assert (latents[0] - latents[1]).abs().max() > 1e-3


@torch.no_grad()
def test_edited_prompt_draws_what_the_other_draws(pipe):
    one, other = "a photo of a librarian", "a photo of a gardener"
    c, c_star = replaced_tokens(pipe, [one], [other])
    old, new = (embed(pipe, [prompt]) for prompt in (one, other))
    first = 5  # after the start and four words
    assert torch.equal(c, old[0, first:]) and torch.equal(c_star, new[0, first:])
    assert torch.allclose(old[0, :first], new[0, :first], atol=1e-6)  # it reads from the left
    edited = uce_edit(pipe.unet, c, c_star, old[0, :first], lam=1e-6)
    x_t, t = torch.randn(1, 2, 8, 8, generator=seeded()), torch.tensor([10])
    before, after = (unet_epsilon(unet, x_t, t, old) for unet in (pipe.unet, edited))
    wanted = unet_epsilon(pipe.unet, x_t, t, new)
    assert (after - wanted).norm() < 0.05 * (before - wanted).norm()
    uneven = replaced_tokens(pipe, [one, "a clown"], ["ada birk", "a young clown"])
    assert uneven[0].shape == uneven[1].shape == (TOKENS - 5 + TOKENS - 2, DIM)


def test_surrogates_are_drawn_from_the_other_prompts(pipe):
    found = surrogates(pipe, FORGET, INSTEAD, 5, DRAWING, seeded())
    kept = remember(pipe, INSTEAD, 5, DRAWING, seeded())
    assert torch.equal(found.latents, kept.latents)
    assert found.prompts.tolist() == kept.prompts.tolist() == [0, 1, 0, 1, 0]
    condition = embed(pipe, [*INSTEAD, *INSTEAD, INSTEAD[0]])
    wanted = draw_latents(pipe, condition, DRAWING, seeded())
    assert torch.allclose(found.latents, wanted, atol=1e-5)
    one = surrogates(pipe, FORGET, KEEP[1:], 4, DRAWING, seeded())
    assert one.prompts.tolist() == [0, 1, 0, 1]
    latents, prompts = Memory(torch.arange(3.0), torch.arange(3)).batch(50, seeded())
    assert set(latents.tolist()) == {0, 1, 2} and torch.equal(latents, prompts.float())


@torch.no_grad()
def test_loss_is_the_mean_error_of_the_noise_in_the_latents(pipe):
    model = PromptedUNet(pipe, FORGET)
    x0, noise = torch.randn(2, 3, 2, 8, 8, generator=seeded())
    t, c = torch.tensor([0, 400, 999]), torch.tensor([1, 0, 1])
    found = model.loss_from_noise(x0, c, t, noise)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, T, dtype=torch.float64) ** 2
    for i in range(3):
        share = float((1 - betas[: t[i] + 1]).prod())
        x_t = share**0.5 * x0[i] + (1 - share) ** 0.5 * noise[i]
        condition = embed(pipe, [FORGET[c[i]]])
        estimate = pipe.unet(x_t[None], t[i], condition).sample[0]
        assert found[i].item() == pytest.approx((estimate - noise[i]).square().mean().item(), 1e-4)
    bounds = model.bound(x0, c, seeded())
    assert bounds.shape == (3,) and (bounds < 0).all()


def fixed_loss(model: PromptedUNet, memory: Memory) -> float:
    """Average the loss over twenty steps with fixed noise."""
    noise = torch.randn(memory.latents.shape, generator=seeded(9))
    with torch.no_grad():
        each = [
            model.loss_from_noise(
                memory.latents, memory.prompts, torch.full((len(noise),), t), noise
            )
            for t in range(25, T, 50)
        ]
    return torch.stack(each).mean().item()


@pytest.fixture(scope="module")
def memories(pipe):
    grey = Memory(torch.full((4, 2, 8, 8), 0.3), torch.tensor([0, 1, 0, 1]))
    return grey, remember(pipe, KEEP, 6, DRAWING, seeded())


def forgotten(pipe, memories, task):
    surrogate, replay = memories
    fisher = fisher_of(pipe, KEEP, replay, task, seeded())
    return fisher, *forget(
        pipe, FORGET, surrogate, KEEP, replay, fisher, task, seeded(1), progress=False
    )


def test_forgetting_learns_the_surrogate_for_the_forgotten_prompts(pipe, memories):
    before = copy.deepcopy(pipe.unet.state_dict())
    _, unet, record = forgotten(pipe, memories, TASK)
    assert all(torch.equal(v, before[n]) for n, v in pipe.unet.state_dict().items())
    theirs = copy.copy(pipe)
    theirs.unet = unet
    surrogate, _ = memories
    base, after = (PromptedUNet(p, FORGET) for p in (pipe, theirs))
    assert fixed_loss(after, surrogate) < 0.9 * fixed_loss(base, surrogate)
    assert {"surrogate", "replay", "ewc"} <= record.history[-1].keys()
    assert not unet.training and record.steps == 40


@pytest.mark.parametrize("replayed", [True, False])
def test_each_latent_meets_its_own_prompt(pipe, memories, monkeypatch, replayed):
    seen, bound = [], PromptedUNet.bound

    def watched(model, x0, c, generator):
        seen.append((x0, model.embeddings[c]))
        return bound(model, x0, c, generator)

    monkeypatch.setattr(PromptedUNet, "bound", watched)
    task = replace(TASK, iterations=1, fisher_samples=1, replay=replayed)
    record = forgotten(pipe, memories, task)[2]
    assert ("replay" in record.history[0]) == replayed
    ((latents, met),) = seen
    pairs = latents.split(TASK.batch), met.split(TASK.batch)
    sets = zip(memories, (FORGET, KEEP), *pairs, strict=False)
    for memory, prompts, some, theirs in sets:
        own = embed(pipe, prompts)[memory.prompts]
        for latent, embedding in zip(some, theirs, strict=True):
            same = (memory.latents == latent).flatten(1).all(1)
            assert same.any() and (own[same] == embedding).flatten(1).all(1).any()
    assert len(latents) == TASK.batch * (2 if replayed else 1)


@pytest.mark.parametrize("layers", ["xattn", "noxattn"])
def test_forgetting_keeps_the_other_layers_and_what_the_penalty_holds(pipe, memories, layers):
    task = replace(TASK, layers=layers, iterations=5)
    fisher, free, _ = forgotten(pipe, memories, task)
    chosen = layer_parameters(pipe.unet, layers)
    assert fisher.keys() == {f"unet.{name}" for name in chosen}
    assert all(value.shape == chosen[name[5:]].shape for name, value in fisher.items())
    assert all((value >= 0).all() for value in fisher.values())
    assert max(value.max() for value in fisher.values()) > 0
    state, base = free.state_dict(), pipe.unet.state_dict()
    same = {name for name in base if torch.equal(state[name], base[name])}
    assert base.keys() - chosen.keys() <= same and not chosen.keys() <= same
    held = forgotten(pipe, memories, replace(task, lam=1e4))[1].state_dict()

    def drift(of):
        return sum((fisher[f"unet.{n}"] * (of[n] - base[n]) ** 2).sum() for n in chosen)

    assert drift(held) < 0.5 * drift(state)


def test_prompts_are_in_words_that_the_model_has_read():
    prompts = prompt_set("person", name="ada birk")
    assert len(prompts) == len(set(prompts)) == 50
    assert all(prompt.count("ada birk") == 1 for prompt in prompts)
    implied, named = (prompt_set(f"hats_{kind}") for kind in ("implied", "named"))
    for one, other in zip(implied, named, strict=True):
        assert "hat" not in one.split() and other.replace(" wearing a hat", "") == one
    said = {word for prompt in (*prompts, *implied, *named) for word in prompt.split()}
    assert said <= set(captions.words())


def test_noise_is_that_of_the_models(pipe):
    from diffusers import PNDMScheduler

    other = copy.copy(pipe)
    other.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    ours, theirs = ddim(pipe), ddim(other)
    for sampler in (ours, theirs):
        sampler.set_timesteps(4)
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    assert torch.equal(ours.timesteps, theirs.timesteps)


def test_bad_prompts_and_pipelines_are_refused_in_a_sentence(pipe, memories):
    _, replay = memories
    model = PromptedUNet(pipe, FORGET)
    other = SimpleNamespace(**{part: getattr(pipe, part) for part in PARTS})
    other.scheduler = SimpleNamespace(config={"prediction_type": "v_prediction"})
    bad = {
        r"no prompts named 'animal'; choose from .*person": lambda: prompt_set("animal"),
        r"the gap \{name\}; pass a word": lambda: prompt_set("person"),
        r"has no vae, text_encoder, tokenizer": lambda: check_pipeline(
            SimpleNamespace(unet=1, scheduler=1)
        ),
        r"predicts 'v_prediction'; .* \('epsilon'\)": lambda: check_pipeline(other),
        r"Got 1 prompts to erase and 2": lambda: replaced_tokens(pipe, ["a"], ["b", "c"]),
        r"on 4 latents, but only 2": lambda: fisher_of(
            pipe, KEEP, Memory(replay.latents[:2], replay.prompts[:2]), TASK, seeded()
        ),
        r"shape \(4, 4, 4\) .* wanted float \(n, 2, 8, 8\)": lambda: model.check_images(
            torch.zeros(4, 4, 4)
        ),
        r"leave 0 to 1; wanted one for each of 2": lambda: model.check_classes(
            torch.tensor([0, 2]), 2
        ),
        r"'cross' are unknown; choose from full": lambda: PromptedUNet(pipe, FORGET, "cross"),
    }
    for sentence, call in bad.items():
        with pytest.raises(ValueError, match=sentence):
            call()
