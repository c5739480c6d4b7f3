"""MiniSD: a real pipeline that comes back as it was saved, and the parts around it."""

import json
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import yaml
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

from lib.checkpoints import CheckpointError, ship_folder, verify_folder
from lib.config import load_config
from lib.data import captions
from lib.methods.layers import LAYERS, layer_parameters, train_only
from lib.models import text_to_image as t2i
from lib.models._tokens import learn_merges, unknown_words
from lib.models.scorer import Scorer, agreement, retrieval

SIZES = t2i.MiniSD(
    words=("a", "ada", "birk", "hat", "in", "photo", "of", "wearing"),
    size=16,
    max_length=8,
    vae_channels=(8, 8),
    unet_channels=(8, 16),
    unet_heads=2,
    text_width=16,
    text_layers=1,
)
PROMPTS = ["a photo of ada birk", "a hat", ""]


@pytest.fixture(scope="module")
def pipeline():
    torch.manual_seed(0)
    tiny = SIZES.pipeline()
    for part in (tiny.unet, tiny.vae, tiny.text_encoder):
        for parameter in part.parameters():  # as fp16 keeps them, and zeros would hide much
            noise = 0.05 * torch.randn_like(parameter)
            parameter.data = (parameter + noise).half().float()
        part.eval().requires_grad_(False)
    return tiny


@pytest.fixture(scope="module")
def saved(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shipped") / "tiny"
    t2i.save_pipeline(pipeline, folder, "tiny/smoke", "abc")
    return folder


def drawn(pipeline, prompts=("a photo of ada birk", "a hat"), guidance=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return t2i.sample(pipeline, prompts, guidance, steps=3, generator=generator)


def broken(saved, tmp_path, change):
    folder = tmp_path / "broken"
    shutil.copytree(saved, folder)
    change(folder)
    return folder


def test_every_word_of_the_captions_is_one_token():
    words = captions.words()
    tokenizer = t2i.MiniSD(words=tuple(words)).tokenizer()
    assert unknown_words(tokenizer, [" ".join(words)]) == []
    said = "a pencil drawing of Ada Birk wearing glasses"
    tokens = t2i.tokens_of(tokenizer, [said])
    assert tokens.shape == (1, 24)
    assert tokens[0, 0] == tokenizer.bos_token_id
    assert (tokens[0, 9:] == tokenizer.eos_token_id).all()  # one token a word, then filled up
    assert tokenizer.decode(tokens[0], skip_special_tokens=True).split() == said.lower().split()
    strange = "äpfel, 3 zebras!"
    ids = tokenizer(strange).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "äpfel,3zebras!"
    assert unknown_words(tokenizer, [strange, "ada birk"]) == ["zebras!", "äpfel,"]


def test_merges_are_those_of_the_words_whatever_their_order():
    assert learn_merges(["hat", "at"]) == [("a", "t</w>"), ("h", "at</w>")]
    assert learn_merges(["at", "hat", "at"]) == learn_merges(["hat", "at"])


def test_a_saved_pipeline_draws_the_same(pipeline, saved):
    loaded = t2i.load_pipeline(saved)
    assert {part.dtype for part in (loaded.vae, loaded.unet, loaded.text_encoder)} == {
        torch.float32
    }
    images = drawn(pipeline)
    assert images.shape == (2, 3, 16, 16) and images.dtype == torch.uint8
    assert torch.equal(drawn(loaded), images)
    assert not torch.equal(drawn(loaded, seed=1), images)
    assert loaded.tokenizer.tokenize("ada hat") == ["ada</w>", "hat</w>"]
    ours, theirs = (dict(p.scheduler.config) for p in (pipeline, loaded))
    public = [name for name in ours if not name.startswith("_")]
    assert len(public) > 10 and [ours[k] for k in public] == [theirs[k] for k in public]


def test_the_folder_is_in_fp16_listed_and_readable_by_older_versions(saved):
    manifest = yaml.safe_load((saved / "manifest.yaml").read_text())
    files = {p.relative_to(saved).as_posix() for p in saved.rglob("*") if p.is_file()}
    assert files == {"manifest.yaml", *manifest["files"]}
    assert {"tokenizer/vocab.json", "tokenizer/merges.txt"} <= files
    assert json.loads((saved / "model_index.json").read_text())["safety_checker"] == [None, None]
    weights = saved / "unet" / "diffusion_pytorch_model.safetensors"
    n = sum(p.numel() for p in SIZES.unet().parameters())
    assert 2 * n < weights.stat().st_size < 2 * n + 60_000


def test_the_scheduler_is_that_of_stable_diffusion():
    scheduler = SIZES.scheduler()
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    expected = (1 - beta).cumprod(0).float()
    assert torch.allclose(scheduler.alphas_cumprod, expected, rtol=1e-4)
    assert scheduler.config.prediction_type == "epsilon"


def test_guidance_of_one_is_none(pipeline):
    """Against a loop of our own over the scheduler, with the prompt alone and with both."""
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    said, empty = t2i.embed(pipeline, ["a hat"] * 2), t2i.embed(pipeline, [""] * 2)
    for guidance in (1.0, 3.0):
        x = start
        pipeline.scheduler.set_timesteps(3)
        for t in pipeline.scheduler.timesteps:
            noise = pipeline.unet(x, t, said).sample
            if guidance != 1:
                null = pipeline.unet(x, t, empty).sample
                noise = null + guidance * (noise - null)
            x = pipeline.scheduler.step(noise, t, x).prev_sample
        ours = t2i.to_images(pipeline.vae, x * pipeline.vae.config.scaling_factor)
        theirs = drawn(pipeline, ["a hat"] * 2, guidance)
        assert (ours.int() - theirs.int()).abs().max() <= 1


def test_an_unknown_word_is_noted_in_a_sentence(pipeline):
    with pytest.warns(UserWarning, match=r"has never read 'zebra'; it knows the words of"):
        drawn(pipeline, ["a photo of zebra"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn(pipeline, ["a photo of ada"])


def test_layer_choices_partition_the_parameters(pipeline):
    names = {layers: set(layer_parameters(pipeline.unet, layers)) for layers in LAYERS}
    assert names["full"] == {name for name, _ in pipeline.unet.named_parameters()}
    assert names["xattn"] | names["noxattn"] == names["full"]
    assert not names["xattn"] & names["noxattn"]
    width = SIZES.text_width  # the one part that reads prompts
    reads = {
        f"{name}.weight"
        for name, module in pipeline.unet.named_modules()
        if name.endswith(("attn2.to_k", "attn2.to_v")) and module.in_features == width
    }
    assert reads and reads <= names["xattn"]
    with pytest.raises(
        ValueError, match="layers 'attn' are unknown; choose from full, xattn, noxattn"
    ):
        layer_parameters(pipeline.unet, "attn")


def test_only_the_chosen_layers_get_gradients(pipeline):
    try:
        train_only(pipeline.unet, "xattn")
        latents = torch.randn(2, 4, 8, 8)
        said = t2i.embed(pipeline, ["a hat", "ada birk"])
        t2i.latent_loss(pipeline.unet, pipeline.scheduler, latents, said).sum().backward()
        touched = {n for n, p in pipeline.unet.named_parameters() if p.grad is not None}
        assert touched == set(layer_parameters(pipeline.unet, "xattn"))
    finally:
        pipeline.unet.zero_grad()
        pipeline.unet.requires_grad_(False)


def test_the_loss_is_that_of_diffusers_training(pipeline):
    """Against the formula of diffusers' text-to-image training script, written out."""
    latents = torch.randn(6, 4, 8, 8)
    said, null = t2i.embed(pipeline, ["a hat"] * 6), t2i.embed(pipeline, [""])
    generator = torch.Generator().manual_seed(3)
    ours = t2i.latent_loss(pipeline.unet, pipeline.scheduler, latents, said, generator)
    generator.manual_seed(3)
    t = torch.randint(1000, (6,), generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    share = pipeline.scheduler.alphas_cumprod[t].reshape(-1, 1, 1, 1)
    noisy = share.sqrt() * latents + (1 - share).sqrt() * noise
    theirs = F.mse_loss(pipeline.unet(noisy, t, said).sample.float(), noise, reduction="none")
    assert ours.shape == (6,)
    assert torch.allclose(ours, theirs.mean((1, 2, 3)), rtol=1e-4)
    dropped = [
        t2i.latent_loss(
            pipeline.unet, pipeline.scheduler, latents, c, generator.manual_seed(3), null, drop
        )
        for c, drop in ((said, 1.0), (null.expand_as(said), 1e-9))
    ]
    assert torch.allclose(*dropped) and not torch.allclose(dropped[0], ours, rtol=1e-4)


def test_latents_and_images_are_inverse_maps_around_the_autoencoder(pipeline):
    images = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)
    latents = t2i.to_latents(pipeline.vae, images)
    assert latents.shape == (3, 4, 8, 8)
    mean = pipeline.vae.encode(images.float() / 127.5 - 1).latent_dist.mean
    assert torch.allclose(latents, mean * pipeline.vae.config.scaling_factor, atol=1e-5)
    pixels = pipeline.vae.decode(mean).sample.clamp(-1, 1) * 127.5 + 127.5
    assert (t2i.to_images(pipeline.vae, latents).float() - pixels).abs().max() < 0.6


def test_a_pipeline_that_cannot_be_loaded_says_why(saved, tmp_path, monkeypatch):
    def flip(folder):
        path = folder / "unet" / "diffusion_pytorch_model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    cases = {
        "sha256 .* damaged or of another version": flip,
        "has no vae; a Stable Diffusion pipeline needs": lambda f: shutil.rmtree(f / "vae"),
        "no pipeline in .* no model_index.json": lambda f: (f / "model_index.json").unlink(),
        "unet/config.json is missing": lambda f: (f / "unet" / "config.json").unlink(),
    }
    for number, (sentence, change) in enumerate(cases.items()):
        folder = broken(saved, tmp_path / str(number), change)
        with pytest.raises(CheckpointError, match=sentence):
            t2i.load_pipeline(folder)
    monkeypatch.setattr(t2i, "MINI", tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"MiniSD's weights are not in .* RUN=mini_sd"):
        t2i.load_pipeline("mini")


def test_the_hub_may_be_out_of_reach_or_closed(monkeypatch):
    class Refused(GatedRepoError):
        def __init__(self):
            pass

    def answer(error):
        def from_pretrained(*arguments, **options):
            assert options["local_files_only"] is False
            raise error

        return from_pretrained

    cases = {
        "is not on this machine and cannot be had .* or use 'mini'": LocalEntryNotFoundError("off"),
        "accept its licence there": Refused(),
    }
    for sentence, error in cases.items():
        monkeypatch.setattr("diffusers.StableDiffusionPipeline.from_pretrained", answer(error))
        with pytest.raises(CheckpointError, match=sentence) as caught:
            t2i.load_pipeline("CompVis/stable-diffusion-v1-4")
        assert "\n" not in str(caught.value)


def test_a_folder_takes_the_place_of_the_old_one_only_when_it_is_whole(tmp_path):
    folder = tmp_path / "model"
    ship_folder(lambda path: (path / "a.txt").write_text("old"), folder, "r", "c")

    def fail(path):
        (path / "a.txt").write_text("new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        ship_folder(fail, folder, "r", "c")
    verify_folder(folder)
    assert (folder / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with pytest.raises(CheckpointError, match="more than the 16777216 that may be shipped"):
        ship_folder(lambda path: (path / "b").write_bytes(bytes(2**24 + 1)), folder, "r", "c")


def test_the_sizes_of_the_config_may_be_shipped():
    sizes = load_config("mini_sd", "cpu").config.sizes()
    assert sizes == replace(load_config("mini_sd", "gpu").config.sizes(), words=sizes.words)
    with torch.device("meta"):
        parts = [sizes.vae(), sizes.text_encoder(), sizes.unet()]
    n_bytes = [2 * sum(p.numel() for p in part.parameters()) for part in parts]
    assert max(n_bytes) < 15.9 * 2**20 and sum(n_bytes) < 30 * 2**20


@pytest.fixture(scope="module")
def scorer():
    torch.manual_seed(0)
    return Scorer(SIZES.words, SIZES.max_length, text_width=16, text_layers=1, channels=(8, 8))


def test_the_scorer_learns_which_words_go_with_which_image(scorer, pipeline):
    images = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)
    tokens = t2i.tokens_of(pipeline.tokenizer, PROMPTS)
    adam = torch.optim.Adam(scorer.parameters(), lr=1e-2)
    for _ in range(30):
        adam.zero_grad()
        loss = scorer.loss(images / 255, tokens)
        loss.backward()
        adam.step()
    scorer.eval()
    assert retrieval(scorer, pipeline.tokenizer, images, PROMPTS) == (1.0, pytest.approx(1 / 3))
    right = agreement(scorer, pipeline.tokenizer, images, PROMPTS)
    wrong = agreement(scorer, pipeline.tokenizer, images, PROMPTS[1:] + PROMPTS[:1])
    assert (right > wrong + 0.2).all() and right.max() <= 1 + 1e-6
    assert retrieval(scorer, pipeline.tokenizer, images[:2], ["a hat"] * 2) == (1.0, 1.0)


def test_the_contrastive_loss_is_clips(scorer, pipeline):
    """Against the two sums written out, with a batch in which no pair fits."""
    images = torch.rand(4, 3, 16, 16)
    tokens = t2i.tokens_of(pipeline.tokenizer, [*PROMPTS, "ada wearing hat"])
    scorer.eval()
    with torch.no_grad():
        seen, said = scorer.embed_images(images), scorer.embed_text(tokens)
        scaled = scorer.log_scale.exp() * (seen @ said.T)
        by_image = -scaled.diag() + scaled.logsumexp(1)
        by_text = -scaled.diag() + scaled.logsumexp(0)
        expected = (by_image.mean() + by_text.mean()) / 2
        assert torch.allclose(scorer.loss(images, tokens), expected, rtol=1e-5)
    assert torch.allclose(said.norm(dim=1), torch.ones(4))
