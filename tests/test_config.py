"""Configs: profiles, and one sentence for each kind of mistake."""

import pytest

from lib.config import ConfigError, config_names, current_profile, load_config, resolve

RAW = {"experiment": "taming_toy", "deltas": [1.0, 4], "smoke": {"seeds": [7]}}


def test_every_config_resolves_in_every_profile():
    assert config_names()
    for name in config_names():
        for profile in ("smoke", "cpu", "gpu", "paper"):
            assert load_config(name, profile).name == name


def test_a_profile_block_overrides_the_top_level():
    assert resolve("x", "smoke", RAW).config.seeds == (7,)
    cpu = resolve("x", "cpu", RAW)
    assert cpu.config.seeds != (7,)
    assert cpu.config.deltas == (1.0, 4.0)
    assert "smoke" not in cpu.resolved


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ({**RAW, "detla": 3}, "has the unknown key detla; experiment 'taming_toy' knows: "),
        ({**RAW, "experiment": "nope"}, "asks for experiment 'nope'; known are "),
        ({**RAW, "deltas": "four"}, "does not fit 'taming_toy'"),
    ],
)
def test_bad_configs_are_sentences(raw, sentence):
    with pytest.raises(ConfigError, match=sentence):
        resolve("x", "cpu", raw)


def test_unknown_names_and_profiles_are_sentences(monkeypatch):
    with pytest.raises(ConfigError, match="no config named 'nope'; the configs are: "):
        load_config("nope", "cpu")
    with pytest.raises(ConfigError, match="profile 'fast' is unknown"):
        load_config("toy_delta_alpha", "fast")
    monkeypatch.setenv("BOOK_PROFILE", "huge")
    with pytest.raises(ConfigError, match="profile 'huge' is unknown"):
        current_profile()
