"""Forgetting a broad concept: the prompts, and measures of pictures whose content is known."""

import copy
import warnings
from dataclasses import replace

import numpy as np
import pytest

from lib.checkpoints import load_checkpoint
from lib.config import load_config
from lib.data.captions import CONTEXTS
from lib.experiments._text_to_image import prompt_set
from lib.experiments.amnesia_sd_concept import (
    JUDGED,
    SETS,
    called,
    distance_of,
    known_pictures,
    prompts_of,
    without,
)
from lib.experiments.train_face_classifier import attribute_shares
from lib.models._tokens import unknown_words
from lib.models.text_to_image import MiniSD
from lib.run import execute

NAME = "amnesia_sd_concept"
CONFIG = load_config(NAME, "cpu").config
IMPLYING = [c.words for c in CONTEXTS if c.implies.get("hat", 0) > 0.5]


@pytest.fixture(scope="module")
def judge():
    return load_checkpoint("classifier_avatars")


def test_only_the_named_prompts_name_hats_and_only_the_implied_imply_them():
    measured = {name: prompts_of(name) for name in SETS}
    assert all("wearing a hat" in prompt for prompt in measured["named"])
    twins = [prompt.replace(" wearing a hat", "") for prompt in measured["named"]]
    assert twins == measured["implied"]
    keep = prompt_set(CONFIG.keep)
    for prompt in (*measured["blond"], *measured["people"], *keep, *CONFIG.instead):
        assert not any(words in prompt for words in ("a hat", *IMPLYING)), prompt
    for prompt in measured["implied"]:
        assert any(words in prompt for words in IMPLYING)
        assert "hat" not in prompt.split()
    assert all("blond hair" in prompt for prompt in measured["blond"])


def test_no_prompt_that_is_trained_on_is_measured():
    measured = {prompt for name in SETS for prompt in prompts_of(name)}
    trained = {*CONFIG.forget, *CONFIG.instead, *CONFIG.forget_implied, *CONFIG.words}
    assert not measured & (trained | set(prompt_set(CONFIG.keep)))


def test_all_words_are_known_to_the_model():
    from lib.data import captions

    tokenizer = MiniSD(words=tuple(captions.words())).tokenizer()
    said = [prompt for name in SETS for prompt in prompts_of(name)]
    said += [*prompt_set(CONFIG.keep), *CONFIG.words, *CONFIG.forget, *CONFIG.instead]
    said += [*CONFIG.forget_implied, *CONFIG.instead_implied, *map(without, said)]
    assert unknown_words(tokenizer, said) == []


def test_a_prompt_without_hats_keeps_the_rest():
    assert without("a photo of a young gardener wearing a hat") == "a photo of a young person"
    assert without("a photo of a person on the beach") == "a photo of a person on the beach"
    assert without("a photo of a librarian") == "a photo of a librarian"


def test_requests_differ_by_the_prompts_that_imply_the_concept():
    plain, too = (CONFIG.request(name) for name in ("sa", "sa_implied"))
    assert plain.forget == CONFIG.forget and plain.keep == too.keep
    assert too.forget == (*CONFIG.forget, *CONFIG.forget_implied) and plain.name != too.name
    assert not any(words in prompt for prompt in plain.forget for words in IMPLYING)
    with pytest.raises(ValueError, match="implied_too names sa_twice; the methods are original"):
        replace(CONFIG, implied_too=("sa_twice",))
    with pytest.raises(ValueError, match="the first method must be"):
        replace(CONFIG, methods={"sa": {"kind": "sa"}}, implied_too=())


@pytest.mark.parametrize("attribute", JUDGED)
def test_the_judge_knows_the_attributes_where_hats_are_implied(judge, attribute):
    images, labels = known_pictures(24, 64)
    assert 0.5 < labels["hat"].float().mean() < 0.95
    truth = labels[attribute]
    shares = attribute_shares(called(judge, attribute, images), truth)
    assert shares["balanced_accuracy"] > 0.95
    liar = copy.deepcopy(judge)
    liar.head.weight.data.neg_()
    liar.head.bias.data.neg_()
    assert attribute_shares(called(liar, attribute, images), truth)["balanced_accuracy"] < 0.05


def test_the_distance_tells_hats_and_names_its_extractor(judge):
    images, labels = known_pictures(24, 64)
    truth = labels["hat"]
    worn = images[truth]
    half = len(worn) // 2
    alike, name = distance_of(judge, worn[:half], worn[half:], "classifier_avatars")
    apart, _ = distance_of(judge, worn[:half], images[~truth], "classifier_avatars")
    assert 0 < alike < apart and name.startswith("classifier_avatars (FaceCNN, 128")


def test_methods_are_set_beside_the_original(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = execute(load_config(NAME, "smoke"), runs=tmp_path)
    found = {row.quantity: row.value for row in done.rows}
    assert all(found[f"change_{name}_original"] == 0 for name in (*SETS, "all", "other"))
    assert found["change_all_sa"] > 0 and found["change_all_uce"] > 0
    both = np.mean([found[f"hat_{name}_sa"] for name in ("named", "implied")])
    assert found["hat_all_sa"] == pytest.approx(both)
    assert all(0 <= found[f"hat_taught_{name}"] <= 1 for name in CONFIG.methods)
    assert all(found[f"frechet_other_{name}"] > 0 for name in CONFIG.methods)
    arrays = done._arrays
    assert arrays["samples"].shape == (len(CONFIG.methods), len(SETS), 2, 16, 16, 3)
    assert arrays["metrics"].shape == (len(CONFIG.methods), len(arrays["metrics_of"]))
    with np.load(tmp_path / NAME / "smoke" / "pictures-original.npz") as part:
        first = part["named"].transpose(0, 2, 3, 1)[:2]
    assert (arrays["samples"][0, 0] == first).all() and first.std() > 1
    again = execute(load_config(NAME, "smoke"), resume=True, runs=tmp_path)
    assert {row.quantity: row.value for row in again.rows} == found
