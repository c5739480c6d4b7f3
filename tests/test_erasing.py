"""ESD, SLD and UCE against closed forms, a slow loop, diffusers' own SLD and least squares."""

import copy

import pytest
import torch
from torch import nn

from lib.methods import erasing
from lib.methods.erasing import (
    ESDSettings,
    SafeGuidance,
    cross_attention_projections,
    esd,
    esd_target,
    safety_scale,
    sld_guidance,
    uce,
    uce_edit,
    unet_epsilon,
)
from lib.methods.layers import layer_parameters

DIM, CONDITIONS = 3, 4
ALPHA_BAR = torch.linspace(0.95, 0.1, 10)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


class Gaussians(nn.Module):
    """The exact noise of unit Gaussians whose mean is W c + shift, for one-hot conditions c."""

    def __init__(self):
        super().__init__()
        self.attn2 = nn.Linear(CONDITIONS, DIM, bias=False)
        self.shift = nn.Parameter(torch.zeros(DIM))
        self.attn2.weight.data = random(DIM, CONDITIONS).float()

    def mean(self, condition):
        return self.attn2(condition) + self.shift

    def epsilon(self, x_t, t, condition):
        alpha_bar = ALPHA_BAR[t, None]
        # x_t is N(sqrt(alpha_bar) mean, 1), whatever t: the data have variance 1.
        return (1 - alpha_bar).sqrt() * (x_t - alpha_bar.sqrt() * self.mean(condition))


def toy_epsilon(model, x_t, t, condition):
    return model.epsilon(x_t, t, condition)


def toy_latent(model, condition, generator):
    t = torch.randint(len(ALPHA_BAR), (len(condition),), generator=generator)
    return torch.randn(len(condition), DIM, generator=generator), t


EMPTY, CONCEPT, *OTHERS = torch.eye(CONDITIONS)


def erased(layers: str, eta: float = 1.0, steps: int = 250):
    base = Gaussians()
    settings = ESDSettings(layers=layers, eta=eta, lr=0.1, batch=8, max_steps=steps)
    steps_made = list(esd(base, toy_epsilon, toy_latent, CONCEPT[None], EMPTY, settings, seeded()))
    return base, steps_made[-1][0], [terms for _, terms in steps_made]


def means(model) -> torch.Tensor:
    with torch.no_grad():
        return model.mean(torch.eye(CONDITIONS))


@pytest.mark.parametrize("eta", [0.0, 1.0, 2.0])
def test_esd_mirrors_the_mean_of_a_gaussian_at_the_empty_prompts(eta):
    base, model, history = erased("xattn", eta)
    before, after = means(base), means(model)
    wanted = before[0] - eta * (before[1] - before[0])
    assert torch.allclose(after[1], wanted, atol=1e-2)
    assert torch.equal(after[[0, 2, 3]], before[[0, 2, 3]])
    assert torch.equal(model.shift, base.shift) and not torch.equal(after[1], before[1])
    assert history[0]["total"] == pytest.approx((1 + eta) ** 2 * history[0]["gap"], rel=1e-4)
    assert history[-1]["total"] < 1e-3 * history[0]["total"]
    assert [terms["step"] for terms in history] == list(range(251))


def test_esd_in_the_other_layers_moves_every_condition():
    base, model, _ = erased("noxattn")
    before, after = means(base), means(model)
    assert torch.equal(model.attn2.weight, base.attn2.weight)
    moved = 2.0 * (before[0] - before[1])
    assert torch.allclose(after - before, moved.expand_as(after), atol=1e-2)


def test_esd_leaves_its_base_alone_and_draws_each_of_several_prompts():
    base = Gaussians().requires_grad_(False)  # also a base that is frozen can be erased from
    before = means(base)
    settings = ESDSettings(lr=0.1, batch=8, max_steps=300)
    concepts = torch.stack([CONCEPT, OTHERS[0]])
    *_, (model, _) = esd(base, toy_epsilon, toy_latent, concepts, EMPTY, settings, seeded())
    assert torch.equal(means(base), before) and not any(p.requires_grad for p in base.parameters())
    wanted = 2 * before[0] - before[1:3]
    assert torch.allclose(means(model)[1:3], wanted, atol=2e-2)
    assert torch.equal(means(model)[[0, 3]], before[[0, 3]])


def test_esd_is_the_same_again_and_samples_with_the_copy():
    assert erased("full", steps=5)[2] == erased("full", steps=5)[2]
    seen = []

    def watched(model, condition, generator):
        seen.append((means(model), condition))
        return toy_latent(model, condition, generator)

    settings = ESDSettings(lr=0.05, max_steps=2)
    list(esd(Gaussians(), toy_epsilon, watched, CONCEPT[None], EMPTY, settings, seeded()))
    assert [tuple(condition.shape) for _, condition in seen] == [(1, CONDITIONS)] * 3
    assert not torch.equal(seen[0][0], seen[1][0])  # the copy, which has moved


@pytest.mark.parametrize(
    "fault",
    [
        lambda e_0, e_c, eta: e_0 + eta * (e_c - e_0),  # towards the concept
        lambda e_0, e_c, eta: e_c - eta * (e_c - e_0),  # from the concept, not from the empty one
        lambda e_0, e_c, eta: e_0 - e_c,
    ],
)
def test_planted_faults_of_the_target_are_noticed(fault, monkeypatch):
    monkeypatch.setattr(erasing, "esd_target", fault)
    with pytest.raises(AssertionError):
        test_esd_mirrors_the_mean_of_a_gaussian_at_the_empty_prompts(2.0)


def test_target_by_hand():
    assert esd_target(torch.tensor(1.0), torch.tensor(4.0), 2.0) == -5.0


@pytest.fixture(scope="module")
def unet():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=6,
        attention_head_dim=2,
        norm_num_groups=2,
    ).eval()


def test_layers_of_a_unet_split_its_parameters(unet):
    xattn, noxattn, full = (layer_parameters(unet, k) for k in ("xattn", "noxattn", "full"))
    assert xattn.keys().isdisjoint(noxattn) and xattn.keys() | noxattn.keys() == full.keys()
    assert full.keys() == dict(unet.named_parameters()).keys()
    # Four transformer blocks (down, middle, two up), each with q, k, v, out and the bias of out.
    assert len(xattn) == 4 * 5 and all(".attn2." in name for name in xattn)
    assert any(".attn1." in name for name in noxattn) and "conv_in.weight" in noxattn


@pytest.mark.parametrize("layers", ["xattn", "noxattn"])
def test_esd_on_a_unet_changes_the_chosen_layers_alone(unet, layers):
    concept, anchor = random(1, 5, 6).float(), random(5, 6, seed=1).float()

    def latent(model, condition, generator):
        t = torch.randint(1000, (len(condition),), generator=generator)
        return torch.randn(len(condition), 2, 8, 8, generator=generator), t

    settings = ESDSettings(layers=layers, lr=1e-3, batch=2, max_steps=3)
    *_, (model, terms) = esd(unet, unet_epsilon, latent, concept, anchor, settings, seeded())
    chosen = layer_parameters(unet, layers)
    same = {n for n, p in model.named_parameters() if torch.equal(p, unet.get_parameter(n))}
    assert same.isdisjoint(n for n in chosen if n.endswith("to_v.weight") or "conv" in n)
    assert dict(unet.named_parameters()).keys() - chosen.keys() <= same
    assert torch.tensor(list(terms.values())).isfinite().all()


def three_predictions(seed: int = 0, scale: float = 0.05) -> torch.Tensor:
    return scale * random(3, 2, 4, 6, seed=seed)


def test_safe_guidance_without_strength_is_plain_guidance():
    none = SafeGuidance(0, 0, 0.025, 0.5, 0.7)
    state = None
    for seed in range(4):
        e, e_p, e_s = three_predictions(seed)
        guided, state = sld_guidance(e, e_p, e_s, 7.5, none, state)
        assert torch.equal(guided, e + 7.5 * (e_p - e))
        assert (state.momentum == 0).all() and state.step == seed + 1


def test_warm_up_guides_nothing_and_fills_the_momentum():
    medium, state, moved = SafeGuidance.MEDIUM, None, []
    for seed in range(12):
        e, e_p, e_s = three_predictions(seed)
        guided, state = sld_guidance(e, e_p, e_s, 7.5, medium, state)
        moved.append(not torch.equal(guided, e + 7.5 * (e_p - e)))
        assert (state.momentum != 0).any()
    assert moved == [False] * 10 + [True] * 2


def test_momentum_against_a_slow_loop():
    safety = SafeGuidance(30, 2, 0.01, 0.3, 0.4)
    nu, state = [0.0] * 48, None
    for i in range(6):
        e, e_p, e_s = three_predictions(i).flatten(1).tolist()
        wanted = []
        for j in range(48):
            phi = 30 * (e_p[j] - e_s[j])
            mu = min(1.0, abs(phi)) if e_p[j] - e_s[j] < 0.01 else 0.0
            gamma = mu * (e_s[j] - e[j]) + 0.3 * nu[j]
            nu[j] = 0.4 * nu[j] + 0.6 * gamma
            wanted.append(e[j] + 7.5 * (e_p[j] - e[j] - (gamma if i >= 2 else 0.0)))
        guided, state = sld_guidance(*three_predictions(i).flatten(1), 7.5, safety, state)
        assert guided.tolist() == pytest.approx(wanted, abs=1e-12)
        assert state.momentum.tolist() == pytest.approx(nu, abs=1e-12)


@pytest.mark.parametrize(
    "fault",
    [
        lambda e_p, e_s, scale, threshold: safety_scale(e_s, e_p, scale, threshold),
        lambda e_p, e_s, scale, threshold: safety_scale(e_p, e_s, scale, torch.inf),
        lambda e_p, e_s, scale, threshold: (e_p - e_s < threshold) * scale * (e_p - e_s).abs(),
    ],
)
def test_planted_faults_of_safe_guidance_are_noticed(fault, monkeypatch):
    monkeypatch.setattr(erasing, "safety_scale", fault)
    with pytest.raises(AssertionError):
        test_momentum_against_a_slow_loop()


@pytest.fixture(scope="module")
def peer():
    from diffusers.pipelines.deprecated import stable_diffusion_safe

    return stable_diffusion_safe


@pytest.mark.parametrize("name", ["weak", "medium", "strong", "max"])
def test_presets_and_guidance_are_those_of_diffusers(peer, name):
    theirs = getattr(peer.SafetyConfig, name.upper())
    ours = SafeGuidance.named(name)
    assert ours == SafeGuidance(
        theirs["sld_guidance_scale"],
        theirs["sld_warmup_steps"],
        theirs["sld_threshold"],
        theirs["sld_momentum_scale"],
        theirs["sld_mom_beta"],
    )
    guide = peer.StableDiffusionPipelineSafe.perform_safety_guidance
    momentum, state = None, None
    for i in range(18):
        e, e_p, e_s = three_predictions(i)
        guided, state = sld_guidance(e, e_p, e_s, 7.5, ours, state)
        # They take the prediction for the prompt first.
        away, momentum = guide(None, True, momentum, e_p - e, (e_p, e, e_s), i, **theirs)
        assert torch.allclose(guided, e + 7.5 * away, atol=1e-12)


def test_scale_of_the_guidance_by_hand():
    e_p, e_s = torch.tensor([0.0, 0.0, 0.0, 0.0]), torch.tensor([1.0, 0.01, -0.01, -1.0])
    assert safety_scale(e_p, e_s, 20, 0.05).tolist() == pytest.approx([1.0, 0.2, 0.2, 0.0])
    assert safety_scale(e_p, e_s, 20, 0.0).tolist() == pytest.approx([1.0, 0.2, 0.0, 0.0])


W = random(5, 7)
ERASE, TO, KEEP = random(2, 7, seed=1), random(2, 7, seed=2), random(3, 7, seed=3)


def objective(weight, erase_scale=1.0, preserve_scale=1.0, lam=0.5):
    edit = ((weight @ ERASE.T - W @ TO.T) ** 2).sum()
    keep = ((weight @ KEEP.T - W @ KEEP.T) ** 2).sum()
    return erase_scale * edit + preserve_scale * keep + lam * ((weight - W) ** 2).sum()


SCALES = [{}, {"erase_scale": 3.0, "preserve_scale": 0.2, "lam": 0.01}, {"preserve_scale": 0.0}]


def is_stationary(weight, scales) -> bool:
    weight = weight.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(objective(weight, **scales), weight)
    return bool(gradient.abs().max() < 1e-9)


@pytest.mark.parametrize("scales", SCALES)
def test_closed_form_is_the_least_squares_solution(scales):
    edited = uce(W, ERASE, TO, KEEP, **scales)
    given = {"erase_scale": 1.0, "preserve_scale": 1.0, "lam": 0.5} | scales
    e, p, lam = (given[k] ** 0.5 for k in ("erase_scale", "preserve_scale", "lam"))
    rows = torch.cat([e * ERASE, p * KEEP, lam * torch.eye(7, dtype=W.dtype)])
    values = torch.cat([e * TO @ W.T, p * KEEP @ W.T, lam * W.T])
    assert torch.allclose(edited, torch.linalg.lstsq(rows, values).solution.T, atol=1e-10)
    assert is_stationary(edited, scales)


def test_planted_faults_of_the_closed_form_are_noticed():
    edited = uce(W, ERASE, TO, KEEP)
    assert is_stationary(edited, {})
    ridge_to_zero = edited - 0.5 * W @ torch.linalg.inv(
        ERASE.T @ ERASE + KEEP.T @ KEEP + 0.5 * torch.eye(7, dtype=W.dtype)
    )
    assert not is_stationary(ridge_to_zero, {})  # lam in the inverse alone
    assert not is_stationary(uce(W, TO, ERASE, KEEP), {})
    assert not is_stationary(uce(W, ERASE, TO), {})
    assert not is_stationary(uce(W, ERASE, TO, KEEP, lam=0.25), {})


def test_edited_concept_maps_to_its_target_and_orthogonal_ones_stay():
    basis, _ = torch.linalg.qr(random(7, 7, seed=4))
    erase, keep = 3 * basis[:2], basis[2:]
    edited = uce(W, erase, TO, keep[:3], lam=1e-9)
    assert torch.allclose(edited @ erase.T, W @ TO.T, atol=1e-7)
    edited = uce(W, erase, TO, keep[:3], lam=0.5)
    assert torch.allclose(edited @ keep.T, W @ keep.T, atol=1e-12)  # preserved or not
    share = 9 / 9.5  # of the way to the target, with lam against |c|^2
    assert torch.allclose((edited - W) @ erase.T, share * W @ (TO - erase).T, atol=1e-12)
    assert torch.allclose(uce(W, erase, erase), W, atol=1e-12)


def test_preserving_protects_what_is_near_the_erased():
    near = ERASE + 0.3 * random(2, 7, seed=5)

    def harm(**given):
        return ((uce(W, ERASE, TO, **given) - W) @ near.T).norm()

    assert harm(preserve=near, preserve_scale=20.0) < 0.3 * harm()


def test_uce_edits_every_key_and_value_matrix_of_a_unet_and_nothing_else(unet):
    erase, to, keep = (random(2, 6, seed=seed).float() for seed in (1, 2, 3))
    before = copy.deepcopy(unet.state_dict())
    edited = uce_edit(unet, erase, to, keep, lam=0.1)
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    changed = {n for n, value in edited.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == {f"{name}.weight" for name in cross_attention_projections(unet)}
    assert len(changed) == 4 * 2
    for name in changed:
        assert torch.equal(edited.state_dict()[name], uce(before[name], erase, to, keep, lam=0.1))
    half = uce_edit(copy.deepcopy(unet).half(), erase, to)
    assert {p.dtype for p in half.parameters()} == {torch.float16}


BAD = {
    "no such layers": (lambda: layer_parameters(Gaussians(), "selfattn"), r"'selfattn' .* choose"),
    "no cross-attention": (lambda: layer_parameters(nn.Linear(2, 2), "xattn"), r"'attn2'"),
    "settings": (lambda: ESDSettings(layers="x"), r"choose from full, xattn, noxattn"),
    "eta": (lambda: ESDSettings(eta=-1.0), r"eta is -1.0; it must be at least 0"),
    "concept": (
        lambda: next(
            esd(Gaussians(), toy_epsilon, toy_latent, CONCEPT, EMPTY, ESDSettings(), seeded())
        ),
        r"\(4,\) and the anchor \(4,\); wanted \(k, ...\)",
    ),
    "preset": (lambda: SafeGuidance.named("mild"), r"'mild'; choose weak, medium, strong or max"),
    "scale": (lambda: SafeGuidance(-1, 0, 0.0, 0.0, 0.0), r"scale -1, .* at least 0"),
    "beta": (lambda: SafeGuidance(1, 0, 0.0, 0.0, 1.0), r"beta is 1.0; it must lie in \[0, 1\)"),
    "predictions": (
        lambda: sld_guidance(W, W, W[:2], 7.5, SafeGuidance.WEAK),
        r"\(5, 7\), \(5, 7\), \(2, 7\); wanted one shape",
    ),
    "pairs": (lambda: uce(W, ERASE, TO[:1]), r"wanted \(out, dim\), \(n, dim\)"),
    "width": (lambda: uce(W, ERASE[:, :3], TO[:, :3]), r"wanted \(out, dim\), \(n, dim\)"),
    "nothing": (lambda: uce(W, ERASE[:0], TO[:0]), r"at least one embedding"),
    "lam": (lambda: uce(W, ERASE, TO, lam=0.0), r"lam above 0, since"),
    "nan": (lambda: uce(W, ERASE / 0, TO), r"not finite; check the text encoder"),
    "uce": (lambda: uce_edit(nn.Linear(2, 2), ERASE, TO), r"no cross-attention .* pipeline"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_inputs_are_refused_in_a_sentence(what):
    call, sentence = BAD[what]
    with pytest.raises(ValueError, match=sentence):
        call()
