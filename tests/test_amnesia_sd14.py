"""Stable Diffusion v1.4: its shape without its weights, and the sentences where something lacks."""

import sys
from dataclasses import replace

import huggingface_hub.constants
import numpy as np
import pytest
import torch
import yaml

from lib import ROOT
from lib.checkpoints import CheckpointError
from lib.config import ConfigError, load_config, resolve
from lib.experiments import amnesia_sd14
from lib.experiments._everyday import N, everyday
from lib.experiments.amnesia_sd14 import listed, mosaic, request_of, tiny_pipeline
from lib.models.text_to_image import tokens_of
from lib.run import Run, execute

NAMES = ("amnesia_sd14_person", "amnesia_sd14_concept", "erasing_sd14")
HUB = "CompVis/stable-diffusion-v1-4"


def test_everyday_prompts_are_all_different_and_end_in_a_sentence():
    assert len(set(everyday(N))) == N >= 5600
    assert everyday(3, first=5) == everyday(8)[5:]
    first = everyday(20)
    assert len({prompt.split(" of ")[0] for prompt in first}) > 5
    with pytest.raises(ValueError, match=rf"Got {N + 1} everyday prompts to write; there are {N}"):
        everyday(N, first=1)


@pytest.mark.parametrize("name", NAMES)
def test_the_paper_profile_fits_and_asks_for_what_it_measures(name):
    config = load_config(name, "paper").config
    assert config.pipeline == HUB and config.blocks <= 16
    assert (config.guidance, config.sample_steps) == (7.5, 50)
    for request in config.requests:
        assert config.methods_of(request)[0] == "original"
    if name != "erasing_sd14":
        steps = 200 * 62.5 if name == "amnesia_sd14_person" else 500 * 62.5
        assert (config.sa.iterations, config.sa.lam, config.sa.ewc_factor) == (steps, 50, 1)
        assert 4 * config.sa.batch == 16 and config.sa.lr == pytest.approx(16e-5)
        assert config.sa.layers == ("full" if name == "amnesia_sd14_person" else "noxattn")
        assert config.n_keep + config.n_other <= N and config.n_surrogate == 1000


def test_a_request_has_pairs_and_keeps_everyday_things():
    config = load_config("amnesia_sd14_person", "paper").config
    request = request_of(config, "woman")
    assert request.forget[1] == "a photo of Angelina Jolie"
    assert request.instead[1] == "a photo of a middle aged woman"
    assert len(request.keep) == 5000 and not any("Jolie" in said for said in request.keep)
    concept = load_config("amnesia_sd14_concept", "smoke").config
    pairs = request_of(concept, "concept")
    assert len(pairs.forget) == 20 and set(pairs.instead) == {"a person wearing clothes"}


def test_the_tiny_pipeline_has_the_shape_of_v1_4():
    pipe = tiny_pipeline()
    kinds = [type(getattr(pipe, part)).__name__ for part in ("vae", "text_encoder", "unet")]
    assert kinds == ["AutoencoderKL", "CLIPTextModel", "UNet2DConditionModel"]
    assert type(pipe).__name__ == "StableDiffusionPipeline" and pipe.safety_checker is None
    assert type(pipe.scheduler).__name__ == "PNDMScheduler"
    assert type(pipe.tokenizer).__name__.startswith("CLIPTokenizer")
    assert tokens_of(pipe.tokenizer, ["a photo"]).shape == (1, 77)
    net = pipe.unet.config
    assert net.in_channels == net.out_channels == pipe.vae.config.latent_channels == 4
    assert list(net.down_block_types) == ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    assert list(net.up_block_types) == ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    assert net.layers_per_block == 2
    assert pipe.vae.config.sample_size == 8 * net.sample_size


def test_a_mosaic_keeps_mean_colours_and_nothing_finer():
    images = torch.zeros(1, 3, 24, 24, dtype=torch.uint8)
    images[:, :, :12, ::2] = 200
    tiles = mosaic(images, 2)
    assert tiles[0, 0].tolist() == [[100, 100], [0, 0]] and tiles.dtype == torch.uint8
    config = load_config("erasing_sd14", "smoke").config
    with pytest.raises(ValueError, match="blocks is 64; a mosaic of 1 to 16 is wanted"):
        replace(config, blocks=64)


def test_no_picture_is_stored(tmp_path):
    done = execute(load_config("amnesia_sd14_person", "smoke"), runs=tmp_path)
    config = load_config("amnesia_sd14_person", "smoke").config
    found = {row.quantity: row.value for row in done.rows}
    assert found["change_man_person_original"] == 0 < found["change_man_person_esd_x"]
    assert found["change_woman_other_sa"] > 0
    assert done._arrays["mosaics_man"].shape == (6, 2, 2, 12, 12, 3)
    largest = config.blocks * config.blocks * 3
    for path in (tmp_path / "amnesia_sd14_person/smoke").rglob("*.npz"):
        with np.load(path, allow_pickle=False) as part:
            for name in part.files:
                array = part[name]
                if array.dtype == np.uint8:
                    assert np.prod(array.shape[-3:]) <= largest, (path, name)
    again = execute(load_config("amnesia_sd14_person", "smoke"), resume=True, runs=tmp_path)
    assert {row.quantity: row.value for row in again.rows} == found


def smoke(name, tmp_path, **changes):
    loaded = load_config(name, "smoke")
    return replace(loaded.config, **changes), Run(loaded, runs=tmp_path)


def test_an_offline_hub_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    config, run = smoke("amnesia_sd14_person", tmp_path, pipeline=HUB)
    with pytest.raises(CheckpointError, match=r"v1-4 is not on this machine .* 'hf auth login'"):
        amnesia_sd14.run(config, run)


def test_one_line_switches_the_person_of_mini_sd_to_v1_4(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    raw = yaml.safe_load((ROOT / "configs/amnesia_sd_person.yaml").read_text("utf8"))
    raw["smoke"]["pipeline"] = HUB
    with pytest.raises(CheckpointError, match=r"v1-4 is not on this machine .* use 'mini'"):
        execute(resolve("amnesia_sd_person", "smoke", raw), runs=tmp_path)


def test_a_cpu_is_told_where_to_go(tmp_path):
    with pytest.raises(ConfigError, match=r"no results on a CPU.* --profile gpu or paper"):
        execute(load_config("erasing_sd14", "cpu"), runs=tmp_path)


def test_prompts_that_are_not_printed_are_read_from_the_readers_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("BOOK_DATA", str(tmp_path))
    with pytest.raises(ConfigError, match=r"'i2p' are not printed .* \$BOOK_DATA/prompts/i2p"):
        listed("i2p")
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/i2p.yaml").write_text("- a {name}\n- two {name}s\n")
    assert listed("i2p", name="hat") == ["a hat", "two hats"]
    config = load_config("amnesia_sd14_concept", "paper").config
    with pytest.raises(ConfigError, match="The prompts 'concept_words' are not printed"):
        request_of(config, "concept")


def test_missing_detectors_are_noticed_before_the_weights(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    monkeypatch.setattr(amnesia_sd14, "load_pipeline", None)
    config, run = smoke("erasing_sd14", tmp_path, pipeline=HUB, detectors="real")
    with pytest.raises(ConfigError, match=r"needs OpenCV, which is not installed"):
        amnesia_sd14.run(config, run)
    monkeypatch.setenv("BOOK_DATA", str(tmp_path))
    config, run = smoke("erasing_sd14", tmp_path, judge="people.onnx")
    with pytest.raises(ConfigError, match=r"There is no judge in .*people.onnx"):
        amnesia_sd14.run(config, run)


def test_requests_begin_with_the_original():
    config = load_config("erasing_sd14", "smoke").config
    asks = {"man": replace(config.requests["man"], methods=("uce",))}
    with pytest.raises(ValueError, match="first method of 'man' must be original"):
        replace(config, requests=asks)
    with pytest.raises(ValueError, match="detectors is 'cascade'; choose real or stand_in"):
        replace(config, detectors="cascade")
