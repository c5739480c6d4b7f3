"""The comparison on Glow: measures where the answer is known, rivals of an untrained one."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lib.config import load_config
from lib.experiments import _compare_glow as rivalry
from lib.experiments import _glow_audit as audit
from lib.experiments._compare_glow import Plan, Request
from lib.experiments._faces import Faces
from lib.experiments._taming import Bench
from lib.experiments.compare_glow import Court
from lib.experiments.train_glow import leave_out
from lib.methods.audit import Curve
from lib.methods.taming import TamingSettings
from lib.run import Run

CROWD = torch.tensor([0.0, 2.0])  # mean 1, deviation 1
PLAN = Plan(steps=4, lr=1e-3, batch=3, check_every=2)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Run(load_config("compare_glow_avatars", "smoke"), runs=tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def bench(run):
    bench = Bench(load_config("compare_glow_avatars", "smoke").config, run)
    generator = torch.Generator(run.device).manual_seed(5)
    with torch.no_grad():  # untrained, the flow's couplings do nothing
        for weight in bench.base.parameters():
            noise = torch.randn(weight.shape, generator=generator, device=run.device)
            weight += 0.05 * noise
    return bench


def request_of(bench, **changes):
    pictures = bench.train.some(60, bench.device)
    settings = TamingSettings(
        max_steps=2, statistics_images=8, batch_forget=2, batch_remember=3, refresh_every=2
    )
    request = Request(pictures[:5], pictures[5:], settings, PLAN, PLAN)
    return replace(request, **changes)


def mean_nll(bench, model, images):
    return float(bench.score(model, images, torch.Generator(bench.device).manual_seed(3), 2).mean())


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_auc_counts_ordered_pairs_and_half_the_ties():
    low, high = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0, 5.0])
    assert audit.auc(high, low) == 1 and audit.auc(low, high) == 0
    assert audit.auc(low, low) == 0.5
    assert audit.auc(torch.tensor([2.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])) == 1.5 / 4


def test_places_are_those_in_the_crowd_of_the_same_model():
    nll = {"crowd": 3 * CROWD + 1, "forget": torch.tensor([4.0, 10.0])}  # mean 4, deviation 3
    found = audit.places(nll, {"crowd": CROWD}, ("forget",))
    assert found["bits_crowd"] == pytest.approx(4) and found["crowd_shift"] == pytest.approx(3)
    assert found["crowd_spread"] == pytest.approx(3)
    assert found["distance_forget"] == pytest.approx(1)
    assert found["quantile_forget"] == pytest.approx((0.5 + 0.02275) / 2, abs=1e-4)


def test_membership_by_rank_by_rise_and_by_a_threshold():
    base = {"crowd": CROWD, "forget": torch.tensor([1.0, 1.0]), "reference": torch.tensor([1.0])}
    base |= {"held_out": torch.tensor([4.0, 0.0]), "strangers": torch.tensor([9.0, 0.0])}
    nll = dict(base, forget=torch.tensor([3.5, 3.5]), reference=torch.tensor([1.5]))
    found = audit.membership(nll, base, (2.0, 3.0))
    assert found["auc_reference"] == 1 and found["auc_held_out"] == 0.5
    assert found["auc_rise_strangers"] == found["auc_rise_held_out"] == 1
    flagged = [found[f"beyond_2_{name}"] for name in ("forget", "reference", "held_out")]
    assert flagged == [1, 0, 0.5]
    assert found["beyond_3_forget"] == 0 and found["beyond_3_strangers"] == 0.5


def test_the_nll_rises_by_the_latents_energy_and_the_lost_volume(bench):
    other = copy.deepcopy(bench.base)
    with torch.no_grad():
        for block in other.blocks:
            for step in block.steps:
                step.actnorm.log_scale += 0.1
    sets = dict.fromkeys(audit.INVERTED, bench.train.some(6, bench.device))
    found = audit.inverted(bench, other, sets)
    generator = torch.Generator(bench.device).manual_seed(audit.NOISE_SEED)
    x = bench.prepare(sets["forget"], generator)
    with torch.no_grad():
        risen = float((bench.base.log_prob(x) - other.log_prob(x)).mean())
    assert found["energy_rise_forget"] + found["log_det_fall_forget"] == pytest.approx(risen, 1e-3)
    assert found["log_det_fall_forget"] != pytest.approx(0, abs=1)
    assert found["redraw_error_forget"] < 1e-3 and found["redraw_same_forget"] > 0.99
    dim = other.dim
    assert found["latent_norm_forget"] == pytest.approx(1, abs=1)
    own = audit.inverted(bench, bench.base, sets)
    assert own["energy_rise_forget"] == own["log_det_fall_forget"] == 0
    energy = audit.latents(bench, bench.base, sets["forget"])[2]
    expected = (energy.mean() - dim) / (2 * dim) ** 0.5
    assert own["latent_z_forget"] == pytest.approx(float(expected), rel=1e-4)


def test_typical_latents_have_the_norm_of_a_draw_and_the_old_direction(bench, monkeypatch):
    seen = []
    decode = bench.base.decode
    monkeypatch.setattr(bench.base, "decode", lambda z: seen.append(z) or decode(z))
    images = bench.train.some(3, bench.device)
    assert audit.typical(bench, bench.base, images).dtype == torch.uint8
    scaled = torch.cat([part.flatten(1) for part in seen[0]], dim=1)
    z = torch.cat([part.flatten(1) for part in audit.latents(bench, bench.base, images)[1]], dim=1)
    assert torch.allclose(scaled.square().sum(1), torch.full((3,), float(bench.base.dim)).to(z))
    cosine = torch.nn.functional.cosine_similarity(scaled, z)
    assert torch.allclose(cosine, torch.ones_like(cosine), atol=1e-5)


def test_a_lesson_makes_its_pictures_likelier(bench):
    settings = audit.Relearning(n_taught=4, lr=2e-3, at=(0, 5), n_crowd=8, back=0.9)
    lesson = bench.train.some(4, bench.device)
    before = weights(bench.base)
    curve = audit.relearned(bench, bench.base, lesson, {"taught": lesson}, settings)
    assert curve.steps.tolist() == [0, 5] and curve.values.shape == (2, 2)
    quantile, distance = curve.values.T
    assert quantile[1] > quantile[0] and distance[1] < distance[0]
    assert torch.equal(weights(bench.base), before)


def test_a_set_is_back_at_the_first_check_near_the_base():
    steps = np.array([0, 2, 5])
    values = {
        "original_forget": [[0.5, 0.4], [0.5, 0.4], [0.5, 0.4]],
        "taming_forget": [[0.0, 0.0], [0.45, 0.1], [0.6, 0.3]],
        "unknown_before": [[0.1, 0.1]] * 3,
        "unknown_forget": [[0.0, 0.0], [0.0, 0.1], [0.2, 0.2]],
    }
    curves = {name: Curve(steps, np.array(rows)) for name, rows in values.items()}
    found = audit.returns(curves, 0.9)
    assert found["back_steps_taught_original_forget"] == 0
    assert found["back_steps_taught_taming_forget"] == 2 and found["back_taught_taming_forget"] == 1
    assert found["back_steps_others_taming_forget"] == 5 and found["back_others_taming_forget"] == 0
    assert found["back_steps_others_unknown_forget"] == 2
    assert found["relearn_end_others_taming_forget"] == 0.3


def test_fine_tuning_never_looks_at_the_forget_pictures(bench):
    request = request_of(bench)
    before = weights(bench.base)
    first = rivalry.fine_tuned(bench, request)
    other = rivalry.fine_tuned(bench, replace(request, forget=255 - request.forget))
    assert torch.equal(weights(first.model), weights(other.model))
    assert not torch.equal(weights(first.model), before)
    assert torch.equal(weights(bench.base), before)
    assert (first.steps, first.forget_pictures, first.rest_pictures) == (4, 0, 12)


def test_ascent_climbs_the_forget_pictures_and_a_weight_keeps_the_rest(bench):
    request = request_of(bench, taming=TamingSettings(delta=1e6, statistics_images=8))
    steep = replace(PLAN, rest_weight=0.0)
    made = {
        name: rivalry.ascended(bench, replace(request, gradient_ascent=plan))
        for name, plan in (("steep", steep), ("kept", replace(PLAN, rest_weight=20.0)))
    }
    start = mean_nll(bench, bench.base, request.forget)
    assert mean_nll(bench, made["steep"].model, request.forget) > start
    rest = [mean_nll(bench, made[name].model, request.remember) for name in ("kept", "steep")]
    assert rest[0] < rest[1]
    assert made["steep"].steps == 4 and made["steep"].stopped == 0


def test_ascent_stops_at_the_threshold_of_taming(bench):
    noise = torch.Generator(bench.device).manual_seed(1)
    request = request_of(bench)
    shape, options = request.forget.shape, {"generator": noise, "device": bench.device}
    unlikely = torch.randint(0, 256, shape, **options).to(torch.uint8)
    settings = TamingSettings(delta=0.5, statistics_images=40)
    made = rivalry.ascended(bench, replace(request, forget=unlikely, taming=settings))
    assert made.steps == 0 and made.stopped == 1
    assert torch.equal(weights(made.model), weights(bench.base))


def test_taming_counts_all_steps_and_the_pictures_it_looked_at(bench):
    made = rivalry.tamed(bench, request_of(bench))
    assert made.steps == 2 and made.stopped == 0
    # Two batches of 3, and statistics of 8 images at steps 0 and 2; the rule looks at all 5.
    assert made.rest_pictures == 2 * 3 + 2 * 8 and made.forget_pictures == 5
    free = request_of(bench, taming=TamingSettings(max_steps=2, batch_forget=2, epsilon=None))
    assert rivalry.tamed(bench, free).forget_pictures == 4


def test_a_row_counts_the_pictures_of_the_set_it_names():
    config = load_config("compare_glow_avatars", "cpu").config
    counted = SimpleNamespace(config=config)
    expected = {
        "quantile_forget_taming": 15,
        "auc_held_out_taming": 15,
        "crowd_shift_fine_tune": 1000,
        "beyond_2_strangers_taming": 200,
        "relearn_end_taught_taming_forget": 4,
        "back_steps_others_taming_rest": 11,
        "forget_pictures_taming": 1,
        "samples_person_taming": config.n_samples,
        "typical_person_taming": 15,
    }
    assert {name: Court.count(counted, name, False) for name in expected} == expected
    assert Court.count(counted, "samples_positive_taming", True) == config.attribute.n_samples
    assert Court.count(counted, "quantile_without_taming", True) == config.attribute.n_scored


def test_a_judge_is_asked_about_people_it_knows(bench):
    court = Court(bench)
    images = bench.train.some(4, bench.device)
    shares = [court.taken_for(images, number) for number in range(10)]
    assert sum(shares) == pytest.approx(1)
    with pytest.raises(ValueError, match="random knows the people 0 to 9, not 10; forget one"):
        court.taken_for(images, 10)


def test_settings_without_an_answer_are_refused():
    config = load_config("compare_glow_avatars", "cpu").config
    with pytest.raises(ValueError, match="n_taught must lie between 0 and n_forget = 15"):
        replace(config, relearning=replace(config.relearning, n_taught=15))
    with pytest.raises(ValueError, match="from step 0 on"):
        replace(config, relearning=replace(config.relearning, at=(1, 2)))


def test_leaving_out_people_leaves_none_of_their_pictures():
    identity = np.array([0, 1, 2, 3, 1, 4])
    images = np.arange(6, dtype=np.uint8)[:, None, None, None]
    rows = np.stack((np.zeros(6, int), np.arange(6)), axis=1)
    faces = Faces((images,), rows, "numbered", ({"identity": identity},))
    kept = leave_out(faces, {"identity": (1, 3)})
    assert kept.labels("identity").tolist() == [0, 2, 4]
    assert kept.source == "numbered, without identity 1, 3"
    assert leave_out(faces, {}) is faces
