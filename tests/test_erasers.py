"""The same request to every method, on a tiny random pipeline."""

import copy
from dataclasses import replace

import pytest
import torch

from lib.config import ConfigError, load_config, resolve
from lib.experiments import _erasers
from lib.experiments._erasers import Request, Workshop, load_models
from lib.experiments._text_to_image import replaced_tokens
from lib.experiments.amnesia_sd_person import namesake_of, others_of, prompts_of, request_of
from lib.methods.layers import layer_parameters
from lib.models.text_to_image import embed
from lib.run import Run

LOADED = load_config("amnesia_sd_person", "smoke")
METHODS = {
    "original": {"kind": "original"},
    "sld_none": {"kind": "sld", "scale": 0.0, "warmup": 0},
    "sld_strong": {"kind": "sld", "scale": 1e6, "threshold": 1.0, "warmup": 0},
    "uce": {"kind": "uce", "preserve_scale": 1.0, "lam": 1e-6},
    "uce_careless": {"kind": "uce", "preserve_scale": 0.0, "lam": 1e-3},
    "uce_preserving": {"kind": "uce", "preserve_scale": 100.0, "lam": 1e-3},
    "esd_x": {"kind": "esd"},
    "sa": {"kind": "sa", "iterations": 3},
    "sa_xattn": {"kind": "sa", "layers": "xattn", "iterations": 3},
}
CONFIG = replace(LOADED.config, methods=METHODS, n_replay=4, n_surrogate=4)
REQUEST = Request(
    name="zoll",
    words=("mira zoll",),
    forget=("a photo of mira zoll", "a photo of mira zoll wearing a hat"),
    instead=("a photo of a clown", "a photo of a clown wearing a hat"),
    keep=("the sea at night", "a photo of ada birk"),
)


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    pipe, _, _ = load_models(CONFIG, torch.device("cpu"))
    for name, parameter in pipe.unet.named_parameters():
        if "attn2.to_v" in name or "attn2.to_out.0.weight" in name:
            parameter.data *= 4.0  # at random weights the prompt hardly matters
    return pipe


@pytest.fixture
def workshop(pipe, tmp_path):
    run = Run(LOADED, runs=tmp_path)
    run.device = torch.device("cpu")
    return Workshop(pipe, CONFIG, run)


def drawn(workshop, method, prompts=REQUEST.forget, request=REQUEST):
    generator = torch.Generator().manual_seed(0)
    return workshop.make(method, request).draw(prompts, 2, CONFIG.drawing, generator).float()


def test_pictures_of_a_prompt_stand_together(workshop):
    both = drawn(workshop, "original")
    assert both.shape == (4, 3, 16, 16)
    again = drawn(workshop, "original", REQUEST.forget[:1] + REQUEST.keep[:1])
    assert (both[:2] - again[:2]).abs().max() <= 1 < (both[2:] - again[2:]).abs().max()


def test_safe_guidance_without_scale_draws_the_originals_pictures(workshop):
    original, none, strong = (drawn(workshop, m) for m in ("original", "sld_none", "sld_strong"))
    assert torch.equal(original, none)
    assert (original - strong).abs().mean() > 1


def test_safe_guidance_warms_up_for_its_share_of_the_steps(workshop, monkeypatch):
    seen = []
    monkeypatch.setattr(
        _erasers, "draw_latents", lambda *_, safety, **__: seen.append(safety[0]) or 1 / 0
    )
    eraser = workshop.make("sld_strong", REQUEST)
    eraser = replace(eraser, safety=(replace(eraser.safety[0], warmup=10), eraser.safety[1]))
    with pytest.raises(ZeroDivisionError):
        eraser.draw(["a clown"], 1, replace(CONFIG.drawing, steps=15), None)
    assert seen[0].warmup == 3


def test_uce_draws_the_other_prompt_and_keeps_what_it_preserves(workshop):
    def change(method, prompts, wanted, request=REQUEST):
        after, before = (
            drawn(workshop, method, prompts, request),
            drawn(workshop, "original", wanted),
        )
        return (after - before).abs().mean()

    one, other = ("a librarian",), ("a gardener",)
    job = replace(REQUEST, forget=one, instead=other, keep=("a",))
    assert change("uce", one, other, job) < 0.2 * change("original", one, other)
    harm = change("uce_careless", REQUEST.keep, REQUEST.keep)
    assert change("uce_preserving", REQUEST.keep, REQUEST.keep) < 0.3 * harm


def test_no_method_touches_the_pipeline_and_each_trains_its_layers(workshop, pipe):
    before = copy.deepcopy(pipe.unet.state_dict())
    xattn = layer_parameters(pipe.unet, "xattn").keys()
    for method in METHODS:
        after = workshop.make(method, REQUEST).unet.state_dict()
        changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
        assert (changed == set()) == (method in ("original", "sld_none", "sld_strong"))
        assert changed <= xattn or method == "sa"
    assert all(torch.equal(value, before[n]) for n, value in pipe.unet.state_dict().items())
    assert workshop.make("sa", REQUEST).seconds > workshop.make("uce", REQUEST).seconds > 0


def test_what_methods_share_is_computed_once_also_in_a_resumed_run(workshop, monkeypatch):
    first = drawn(workshop, "sa")
    monkeypatch.setattr(_erasers, "remember", lambda *_: 1 / 0)
    monkeypatch.setattr(_erasers, "fisher_of", lambda *_: 1 / 0)
    drawn(workshop, "sa_xattn")
    other = replace(REQUEST, name="other", words=("ada tolvey",))
    assert torch.equal(drawn(workshop, "sa", request=other), first)
    resumed = Workshop(workshop.pipe, CONFIG, workshop.run)
    workshop.run.resume = True
    assert torch.equal(drawn(resumed, "sa"), first)
    with pytest.raises(ZeroDivisionError):
        resumed.make("sa", replace(REQUEST, keep=("a clown",)))


def test_the_last_different_words_and_all_after_them_are_replaced(pipe):
    old, new = replaced_tokens(pipe, REQUEST.forget[1:], REQUEST.instead[1:])
    wanted = (embed(pipe, [said])[0] for said in (REQUEST.forget[1], REQUEST.instead[1]))
    whole, other = wanted
    assert torch.equal(old, whole[5:]) and torch.equal(new, other[5:])  # "zoll", and "clown"
    both = replaced_tokens(pipe, REQUEST.forget, REQUEST.instead)
    assert both[0].shape == both[1].shape == (2 * (24 - 5), 16)


def test_only_half_of_the_other_people_are_named_in_what_is_kept():
    config = replace(LOADED.config, keep_a_person=3, keep_unnamed=20)
    request = request_of(config, "zoll")
    replayed, left_out = others_of("mira zoll")
    assert len(replayed) == len(left_out) == 9
    said = " | ".join(request.keep)
    assert all(name in said for name in replayed)
    assert not any(name in said for name in (*left_out, "mira zoll", "mira fenwyr"))
    groups = prompts_of("mira zoll", replace(config.measure, prompts=50, others=2))
    assert len(set(groups["person"][0])) == 50
    assert {len(groups[f"others_{g}"][0]) for g in ("replayed", "left_out")} == {18}
    held_out = set(groups["unnamed"][0])
    assert not any(name in prompt for name in (*replayed, *left_out) for prompt in held_out)


BAD = {
    "method": (lambda: CONFIG.method("mace"), r"no method 'mace'; the config has original"),
    "kind": (lambda: changed({"kind": "mace"}), r"kind 'mace'; choose from original, sld"),
    "setting": (lambda: changed({"kind": "uce", "lr": 1}), r"changes lr; 'uce' has erase_scale"),
    "strength": (lambda: changed({"kind": "sld", "strength": "mild"}), r"no safe guidance 'mild'"),
    "layers": (lambda: changed({"kind": "esd", "layers": "x"}), r"'x' are unknown; choose from"),
    "pairs": (lambda: replace(REQUEST, instead=("a",)), r"2 prompts to forget, 1 in their places"),
    "nobody": (lambda: namesake_of("ada lovelace"), r"Nobody is named 'ada lovelace'; choose"),
    "alone": (lambda: namesake_of("olga trimm"), r"shares the first name with 0 people"),
}


def changed(method):
    return replace(CONFIG, methods={"x": method})


@pytest.mark.parametrize("what", BAD)
def test_bad_requests_are_refused_in_a_sentence(what):
    call, sentence = BAD[what]
    with pytest.raises(ValueError, match=sentence):
        call()


def test_an_unknown_person_in_a_config_is_a_sentence():
    raw = LOADED.resolved | {"requests": {"x": {"person": "ada lovelace", "instead": "a clown"}}}
    with pytest.raises(ConfigError, match="Nobody is named 'ada lovelace'"):
        resolve("amnesia_sd_person", "smoke", raw)
