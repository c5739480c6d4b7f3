from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from lib.config import ConfigError, load_config, resolve
from lib.data import load
from lib.experiments import _unlearning as unlearning
from lib.experiments import unlearning_ablation, unlearning_features
from lib.experiments._latents import Pictures
from lib.experiments._unlearning_measures import Yardstick
from lib.experiments._unlearning_tuning import Adversary, Tuning, tune
from lib.methods.feature_unlearning import Feature, UnlearningSettings
from lib.methods.selection import marks_of
from lib.models.conv_vae import ConvVAE
from lib.models.gan import StyleGenerator
from lib.run import Run, execute

ONE_STEP = UnlearningSettings(max_steps=1, batch=4)
SHORT = Tuning(lr=1e-2, batch=4, max_steps=2, warmup=1)


class Halves(nn.Module):
    """Draw a picture whose upper half has the level of the first latent, the lower of the second.

    ``change`` is done to the latents first: what is planted in an unlearned model.
    """

    image_shape = (1, 12, 12)

    def __init__(self, change=lambda z: z):
        super().__init__()
        self.scale, self.change = nn.Parameter(torch.ones(())), change

    def draw_latents(self, n, generator):
        return torch.randn(n, 2, generator=generator)

    def decode(self, z):
        levels = torch.sigmoid(self.scale * self.change(z))
        return levels[:, None, :, None].repeat_interleave(6, 2).repeat(1, 1, 1, 12)


class Looker(nn.Module):
    """See whether the upper half is bright, from z = 1 on, and the lower one, from 0 on."""

    image_shape, names = (1, 12, 12), ("upper", "lower")

    def features(self, x):
        return torch.stack((x[:, 0, :6].mean((1, 2)), x[:, 0, 6:].mean((1, 2))), 1)

    def forward(self, x):
        return self.features(x).logit() - torch.tensor([1.0, 0.0])


UPPER = Feature(torch.tensor([1.0, 0.0]), torch.tensor(0.0))  # selects half of the prior


def toy(n=400):
    limits = {"upper": 0.0}
    subject = unlearning.Subject(Halves().eval(), "z", Looker().eval(), "looker", limits)
    generator = torch.Generator().manual_seed(5)
    real = subject.pictures(subject.model, subject.draw(500, generator))
    held_out = Pictures((255 * real).round().to(torch.uint8), "halves")
    return Yardstick(subject, held_out, n, seed=0)


def compared(yardstick, change):
    after = yardstick.subject.pictures(Halves(change), yardstick.z)
    return yardstick.compare("upper", UPPER, after)


def erase(z):
    return torch.stack((z[:, 0].clamp(max=0.0), z[:, 1]), 1)


def subject_of(kind, space="z", data="digits", features=("thick",), **changes):
    values = {"data": data, "size": 8, "held_out": "test", "base": kind, "judge": "random"}
    config = unlearning.SubjectConfig(**{**values, "space": space, "features": features, **changes})
    torch.manual_seed(0)  # one untrained model in twenty draws no feature, or moves nothing
    return unlearning.load_subject(config, torch.device("cpu"))


def test_a_perfect_eraser_is_measured_as_one():
    yardstick = toy()
    found = compared(yardstick, erase)
    z = yardstick.z
    assert found["size_forget"] == pytest.approx(float((z[:, 0] >= 1).float().mean()))
    assert found["size_bystanders"] == pytest.approx(
        float(((z[:, 0] >= 0) & (z[:, 0] < 1)).float().mean())
    )
    assert sum(found[f"size_{group}"] for group in ("forget", "bystanders", "rest")) == (
        pytest.approx(1)
    )
    assert found["beyond"] == pytest.approx(float((z[:, 0] >= 0).float().mean()))
    assert found["beyond_forget"] == 1
    assert found["share_after"] == found["share_after_forget"] == 0
    assert found["pixels_rest"] == found["moved_rest"] == 0
    assert found["kept_rest"] == found["kept_bystanders"] == found["kept_forget"] == 1
    # Those beyond t lose what they had of the feature: the logit of the upper half is z itself.
    forget = z[:, 0][z[:, 0] >= 1]
    assert found["moved_forget"] == pytest.approx(-float(forget.mean()), abs=1e-3)


def test_planted_damage_is_noticed():
    yardstick = toy()
    nothing = compared(yardstick, lambda z: z)
    assert nothing["share_after"] == nothing["size_forget"] > 0.1
    assert nothing["share_after_forget"] == 1 and nothing["share_after_bystanders"] == 0
    assert nothing["frechet_free_ratio"] == pytest.approx(1)

    flipped = compared(yardstick, lambda z: torch.stack((z[:, 0], -z[:, 1]), 1))
    assert flipped["kept_rest"] < 0.01 and flipped["moved_rest"] == pytest.approx(0, abs=1e-4)
    assert flipped["pixels_rest"] > 0.1

    shifted = compared(yardstick, lambda z: erase(z) + torch.tensor([0.0, 2.0]))
    assert shifted["share_after"] == 0 and shifted["kept_rest"] < 0.7
    assert shifted["frechet_free_ratio"] > 10
    assert shifted["frechet"] > 10 * nothing["frechet"]


def test_distances_compare_equal_numbers_and_are_nan_for_too_few():
    yardstick = toy()
    f = yardstick.subject.model
    everyone = yardstick.subject.pictures(f, torch.tensor([[3.0, 0.0]]).repeat(400, 1))
    found = yardstick.distances("upper", everyone)
    assert found["share_after"] == 1 and np.isnan(found["frechet_free_ratio"])
    few = torch.cat((yardstick.before[~yardstick.subject.has("upper", yardstick.before)][:50],))
    found = yardstick.distances("upper", torch.cat((few, everyone[50:])))
    base, real = yardstick.free("upper")
    assert len(base) > 50 and len(real) > 50
    assert found["frechet_free"] == found["frechet_free_base"]  # of the same fifty pictures


def test_a_feature_is_there_where_its_score_is_not_negative():
    subject = toy().subject
    z = torch.tensor([[2.0, 0.0], [0.5, 0.0]], requires_grad=True)
    images = subject.to_unit(subject.decode(subject.model, z))
    score = subject.score("upper", images)
    assert score.tolist() == pytest.approx([1.0, -0.5], abs=1e-4)
    assert subject.has("upper", images).tolist() == [True, False]
    score.sum().backward()
    assert (z.grad[:, 0] > 0.9).all() and (z.grad[:, 1] == 0).all()
    with pytest.raises(ValueError, match="no feature 'lower'; there are upper"):
        subject.score("lower", images)
    assert subject.opinion("upper", images).tolist() == [[1], [1]]


def test_the_top_tenth_of_the_training_data_has_a_ruled_feature(monkeypatch):
    monkeypatch.setattr(unlearning, "load_checkpoint", lambda name: ConvVAE((1, 8, 8), (8, 8), 2))
    subject = subject_of("some_vae", features=("thick", "left_slant"))
    images = torch.tensor(load("digits", "train").images).permute(0, 3, 1, 2)
    for name in subject.limits:
        assert float(subject.has(name, images).float().mean()) == pytest.approx(0.1, abs=0.01)
    assert not subject.has("thick", torch.zeros(1, 1, 8, 8))  # an empty picture has no width


def test_an_untrained_base_has_every_feature_in_half_of_its_samples():
    for kind, features in (("random_vae", ("thick",)), ("random_gan", ("thick", "hat"))):
        subject = subject_of(kind, features=features)
        for name in features:
            user = unlearning.marked_by_user(subject, name, 60, 0.1, seed=0)
            assert user.is_enough and 0.2 < float(user.truth.float().mean()) < 0.8
            wrong = (
                user.truth[user.marks.negatives].sum() + (~user.truth[user.marks.positives]).sum()
            )
            assert int(wrong) == 6


def test_all_spaces_of_a_gan_show_the_same_samples():
    whole = subject_of("random_gan")
    shown = []
    for space in unlearning.SPACES:
        subject = replace(whole, space=space)
        z = subject.draw_samples(5, torch.Generator().manual_seed(1))
        shown.append(subject.pictures(subject.model, z))
        assert z.shape == (5, 8 if space == "layers" else 4)
    for images in shown:
        assert torch.allclose(images, shown[0], atol=1e-5)
    mixed = replace(whole, space="layers").draw(5, torch.Generator().manual_seed(1))
    coarse, fine = mixed.chunk(2, 1)
    assert not torch.allclose(coarse, fine)


def test_unlearning_styles_changes_the_synthesis_of_a_copy_only():
    subject = subject_of("random_gan", "w")
    user = unlearning.marked_by_user(subject, "thick", 30, 0.0, seed=0)
    feature = unlearning.feature_of(user, normalise=True)
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    unlearned, history = unlearning.unlearned_model(subject, [feature], ONE_STEP, seed=0)
    after = unlearned.state_dict()
    for name, value in subject.model.state_dict().items():
        assert torch.equal(value, before[name])
        if "mapping" in name:
            assert torch.equal(after[name], value)
    assert not torch.equal(after["constant"], before["constant"])
    assert [terms["step"] for terms in history] == [0, 1]
    assert not any(p.requires_grad for p in [*unlearned.parameters(), *subject.model.parameters()])


def test_balanced_marks_move_the_threshold_up():
    z = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    marks = marks_of(z[:, 0] > 1.28)
    user = unlearning.Marked(z, z, z[:, 0] > 1.28, marks)
    mean = unlearning.feature_of(user, True)
    balanced = unlearning.feature_of(user, True, balanced=True)
    late = unlearning.feature_of(user, True, percentile=90)
    assert abs(float(mean.t)) < 0.1 < 0.5 < float(balanced.t) < float(late.t)


def test_fine_tuning_moves_what_unlearning_may_move():
    negatives = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for kind, space in (("random_vae", "z"), ("random_gan", "w")):
        subject = subject_of(kind, space)
        tuned = tune(subject, negatives, SHORT, torch.Generator().manual_seed(0))
        old, new = subject.model.state_dict(), tuned.state_dict()
        moved = {name for name, value in old.items() if not torch.equal(value, new[name])}
        assert moved and not any("mapping" in name for name in moved)
        assert not any(p.requires_grad for p in subject.model.parameters())


def test_a_new_discriminator_learns_to_tell_real_from_drawn():
    subject = subject_of("random_gan")
    generator = torch.Generator().manual_seed(0)
    white = torch.ones(8, 1, 8, 8)
    adversary = Adversary(subject, white, replace(SHORT, warmup=20), generator)
    with torch.no_grad():
        real = adversary.discriminator(2 * white[:4] - 1)
        fake = adversary.discriminator(adversary.fake(subject.model, generator))
    assert float(real.mean()) > float(fake.mean()) + 0.5


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"space": "x"}, "latent space 'x' is unknown"),
        ({"joint": ["thick", "hat"]}, "wanted none or two of the features"),
        ({"joint": ["thick"]}, "wanted none or two of the features"),
        ({"unlearning": {"alpha": -1.0}}, "alpha is -1.0"),
    ],
)
def test_configs_that_make_no_sense_are_refused(changes, sentence):
    raw = {**load_config("unlearning_vae_mnist", "smoke").resolved, **changes}
    with pytest.raises(ConfigError, match=sentence):
        resolve("unlearning_vae_mnist", "smoke", raw)


def test_subjects_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="random_vae has no styles"):
        subject_of("random_vae", "w")
    with pytest.raises(ValueError, match="no feature 'moustache'; choose from thick, left_slant"):
        subject_of("random_vae", features=("moustache",), judge="classifier_mnist")


def test_a_feature_that_the_base_never_draws_is_left_out(tmp_path, monkeypatch):
    whole = unlearning_features.load_subject

    def without_thick(config, device):
        subject = whole(config, device)
        return replace(subject, limits=subject.limits | {"thick": 1e6})

    monkeypatch.setattr(unlearning_features, "load_subject", without_thick)
    run = execute(load_config("unlearning_vae_mnist", "smoke"), runs=tmp_path)
    values = {row.quantity: row.value for row in run.rows}
    assert values["marked_thick"] == values["share_base_thick"] == 0
    assert "share_after_thick" not in values and "share_after_joint_left_slant" not in values
    assert 0 <= values["share_after_left_slant"] <= 1


def test_a_part_is_read_by_the_prefix_of_its_quantities():
    part = {"edited": 1, "edited/share": 2, "edited_more/share": 3, "forget_edited": 4}
    assert unlearning_features.behind("edited", part) == {"share": 2}


def test_variants_change_one_thing_each():
    config = load_config("unlearning_gan_mnist_ablation", "cpu").config
    found = unlearning_ablation.variants(config)
    default = unlearning_ablation.Variant()
    assert found.pop("default") == default
    assert len(found) == 4 + 2 + 1 + 1 + 3 + 2 + 15
    for name, variant in found.items():
        changed = [key for key, value in vars(variant).items() if value != getattr(default, key)]
        assert len(changed) == 1, name
        assert name.replace("_", "").isalnum()
    assert found["alpha_0_1"].settings == {"alpha": 0.1}
    assert found["no_percep"].settings == {"without": ("percep",)}
    assert found["clicks_50_error_0_05"].user == (50, 0.05)
    with pytest.raises(ValueError, match="a default alpha among"):
        replace(config, alphas=(0.5,))


def test_the_table_of_users_has_the_default_in_its_corner():
    config = load_config("unlearning_vae_mnist_ablation", "smoke").config
    names = ("share_after", "beyond", "cosine", "frechet_free_ratio", "kept_rest")
    parts = {
        "default": dict.fromkeys(names, 1.0),
        "clicks_20_error_0_1": dict.fromkeys(names, 2.0),
    }
    table = unlearning_ablation.by_user(config, parts)["users_share_after"]
    assert np.array_equal(table, [[np.nan, 2.0], [1.0, np.nan]], equal_nan=True)


def test_all_users_see_the_same_pictures(tmp_path):
    loaded = load_config("unlearning_gan_mnist_ablation", "smoke")
    bench = unlearning_ablation.Bench(loaded.config, Run(loaded, runs=tmp_path).device)
    few = bench.user(unlearning_ablation.Variant(user=(20, 0.0)))
    many = bench.user(unlearning_ablation.Variant())
    assert set(few.marks.positives.tolist()) <= set(many.marks.positives.tolist())
    assert len(few.marks.positives) + len(few.marks.negatives) == 20
    wrong = bench.user(unlearning_ablation.Variant(user=(20, 0.1))).marks
    assert len(set(wrong.positives.tolist()) ^ set(few.marks.positives.tolist())) == 2
    styles = bench.user(unlearning_ablation.Variant(space="layers"))
    assert styles.z.shape[1] == 2 * many.z.shape[1]


def test_blur_is_less_rough():
    noise = torch.rand(4, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    blurred = nn.functional.avg_pool2d(noise, 3, stride=1, padding=1)
    assert unlearning_ablation.roughness(blurred) < unlearning_ablation.roughness(noise) / 2
    flat = torch.full((1, 1, 4, 4), 0.3)
    assert unlearning_ablation.roughness(flat) == 0


def test_pictures_that_show_nothing_show_nothing():
    subject = subject_of("random_gan")
    assert isinstance(subject.model, StyleGenerator)
    trivial = unlearning.trivial_pictures(subject, 3)
    assert {kind: len(images) for kind, images in trivial.items()} == {
        "noise": 3,
        "grey": 1,
        "black": 1,
    }
    assert trivial["grey"].unique().tolist() == [0.5] and trivial["black"].sum() == 0
    assert unlearning.as_uint8(trivial["grey"]).shape == (1, 8, 8, 1)
