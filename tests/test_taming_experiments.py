from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lib.config import load_config
from lib.data.images import MISSING
from lib.experiments import taming_attribute, taming_no_data
from lib.experiments._faces import Faces
from lib.experiments._taming import Bench, Judge
from lib.run import Run

LABELS = np.array([0, 1, MISSING, 1, 0, 0, MISSING, 1])


def faces(**labels):
    n = len(next(iter(labels.values())))
    images = np.arange(n, dtype=np.uint8)[:, None, None, None]
    rows = np.stack((np.zeros(n, int), np.arange(n)), axis=1)
    return Faces((images,), rows, "numbered pictures", (labels,))


def bench_of(name, tmp_path, **changes):
    loaded = load_config(name, "smoke")
    return Bench(replace(loaded.config, **changes), Run(loaded, runs=tmp_path))


def test_sets_by_label_are_disjoint_and_complete():
    with_it, without = taming_attribute.split(LABELS)
    assert with_it.tolist() == [1, 3, 7] and without.tolist() == [0, 4, 5]
    for kind in ("forgotten", "control"):
        forget, remember = taming_attribute.sets(LABELS, kind)
        assert forget.tolist() == with_it.tolist() and remember.tolist() == without.tolist()
    for kind in ("increased", "debiased"):
        forget, remember = taming_attribute.sets(LABELS, kind)
        assert forget.tolist() == without.tolist() and remember.tolist() == with_it.tolist()


def test_debiasing_stops_at_the_first_check_past_one_half():
    shares, taken = iter([0.2, 0.5, 0.6, 0.4, 0.9]), []
    checks = (taming_attribute.Check(10, None, None, share) for share in shares)
    for check in taming_attribute.until_past_half(checks):
        taken.append(check.share)
    assert taken == [0.2, 0.5, 0.6]
    assert next(shares) == 0.4  # the steps after it were never made
    never = [taming_attribute.Check(10, None, None, 0.1)] * 3
    assert len(list(taming_attribute.until_past_half(never))) == 3


def test_the_last_model_is_one_that_was_judged():
    config = load_config("taming_attribute_avatars", "cpu").config
    with pytest.raises(ValueError, match="multiple of judge_every = 7"):
        replace(config, judge_every=7)


def test_a_control_has_no_forget_loss(tmp_path, monkeypatch):
    bench = bench_of("taming_attribute_avatars", tmp_path)
    judge = Judge("random", bench, ("label",))
    alphas = []
    steps = bench.steps
    monkeypatch.setattr(
        bench, "steps", lambda *sets, **changes: alphas.append(changes) or steps(*sets, **changes)
    )
    for kind in ("control", "forgotten"):
        checks = list(taming_attribute.follow(bench, judge, "label", kind))
        assert [check.step for check in checks] == [1]
    assert alphas == [{"alpha": 0.0}, {}]


def test_the_yardstick_tells_pictures_with_from_those_without(tmp_path):
    bench = bench_of("taming_attribute_avatars", tmp_path, n_crowd=200, n_scored=150)
    judge = Judge("random", bench, ("label",))
    yardstick = taming_attribute.Yardstick(bench, judge)
    labels = yardstick.faces.labels("label")

    def bits(model):
        return yardstick.bits_base + (labels[:150] == 1)

    yardstick.bits = bits
    changes = yardstick.bits_changes(bench.base, "label")
    assert changes["bits_change_with"] == pytest.approx(1, abs=1e-6)
    assert changes["bits_change_without"] == pytest.approx(0, abs=1e-6)
    distances = yardstick.distances(yardstick.real, "label")
    assert distances["frechet"] == pytest.approx(0, abs=1e-3)
    # 20 ones are fewer than the judge's 128 features.
    assert set(distances) == {"frechet", "frechet_without"}


def test_a_judge_says_which_labels_it_knows(tmp_path):
    judge = Judge("random", bench_of("taming_attribute_avatars", tmp_path), ("label",))
    with pytest.raises(ValueError, match="random does not know 'hat'; it knows label"):
        judge.share(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "hat")


def test_real_pictures_get_the_levels_of_samples(tmp_path):
    bench = bench_of("taming_attribute_avatars", tmp_path)
    levels = bench.as_sampled(torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8)).flatten()
    assert len(levels.unique()) == 2**bench.config.n_bits
    assert (levels[0], levels[-1]) == (0, 255)
    assert torch.equal(bench.as_sampled(levels.view(4, 1, 8, 8)).flatten(), levels)


def test_a_group_is_those_who_have_all_the_labels():
    some = faces(hat=np.array([1, 1, 0, MISSING, 1]), young=np.array([0, 1, 0, 0, 0]))
    chosen = taming_no_data.group(some, {"hat": 1, "young": 0})
    assert chosen.at(np.arange(len(chosen)), torch.device("cpu")).flatten().tolist() == [0, 4]
    assert len(taming_no_data.group(some, {})) == 5


def test_forget_and_remember_sets_share_no_picture():
    config = SimpleNamespace(n_forget=(1, 3), n_remember=5)
    bench = SimpleNamespace(config=config, device=torch.device("cpu"))
    sets = taming_no_data.two_sets(bench, faces(label=np.zeros(9)))
    forget, remember = (set(part.flatten().tolist()) for part in (sets.forget, sets.remember))
    assert (len(forget), len(remember)) == (3, 5) and not forget & remember
    with pytest.raises(ValueError, match="has 7 such pictures, and 3 to forget and 5 to remember"):
        taming_no_data.two_sets(bench, faces(label=np.zeros(7)))


def test_a_run_without_its_main_number_of_pictures_is_refused():
    config = load_config("taming_no_data_avatars", "cpu").config
    with pytest.raises(ValueError, match="n_main = 7 must be one of n_forget"):
        replace(config, n_main=7)
    with pytest.raises(ValueError, match="no step of shown_at beyond max_steps"):
        replace(config, shown_at=(0, 1000))


def test_quantiles_and_shifts_are_those_of_a_normal_crowd():
    crowd = np.array([0.0, 2.0])  # mean 1, deviation 1
    nll = {"nll_forget": np.array([1.0, 1.0, 99.0]), "nll_remember": crowd, "nll_train": crowd - 1}
    assert taming_no_data.quantile(nll, "remember", 2) == pytest.approx(0.5)
    assert taming_no_data.quantile(nll, "train", 2) == pytest.approx(0.1587, abs=1e-4)
    assert taming_no_data.quantile(nll, "remember", 3) == pytest.approx(1 / 3)
    assert taming_no_data.shift(nll, crowd + 2) == pytest.approx(3)


def test_a_judge_sees_larger_pictures_averaged_down_to_its_size(tmp_path):
    judge = Judge("random", bench_of("taming_attribute_avatars", tmp_path), ("label",))
    small = torch.randint(256, (20, 1, 8, 8), dtype=torch.uint8)
    large = small.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert judge.share(large, "label") == judge.share(small, "label")
    assert judge.features(small).std(0).max() > 0
    torch.testing.assert_close(judge.features(large), judge.features(small))
