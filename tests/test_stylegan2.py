"""StyleGAN2 against slow loops over the tensors of a checkpoint as the port names them."""

import math
from argparse import Namespace
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.signal import convolve2d, correlate2d

from lib.checkpoints import CheckpointError
from lib.config import ConfigError, load_config, resolve
from lib.experiments import _unlearning as unlearning
from lib.models.gan import StyleGenerator
from lib.models.stylegan2 import StyleGAN2, load_stylegan2, port_names, to_port

CHANNELS, DIM, N_MAPPING = (6, 5, 4), 7, 3
KERNEL = np.outer((1, 3, 3, 1), (1, 3, 3, 1)) / 16


def port_shapes(channels=CHANNELS, dim=DIM, n_mapping=N_MAPPING):
    """List names and shapes of the state of the port's Generator, as its source builds it."""
    shapes = {"input.input": (1, channels[0], 4, 4)}
    for i in range(1, n_mapping + 1):
        shapes |= {f"style.{i}.weight": (dim, dim), f"style.{i}.bias": (dim,)}

    def modulated(name, n_in, n_out, kernel):
        return {
            f"{name}.weight": (1, n_out, n_in, kernel, kernel),
            f"{name}.modulation.weight": (n_in, dim),
            f"{name}.modulation.bias": (n_in,),
        }

    def styled(name, n_in, n_out):
        more = {f"{name}.noise.weight": (1,), f"{name}.activate.bias": (n_out,)}
        return modulated(f"{name}.conv", n_in, n_out, 3) | more

    def to_rgb(name, n_in):
        return modulated(f"{name}.conv", n_in, 3, 1) | {f"{name}.bias": (1, 3, 1, 1)}

    shapes |= styled("conv1", channels[0], channels[0]) | to_rgb("to_rgb1", channels[0])
    shapes["noises.noise_0"] = (1, 1, 4, 4)
    for i, (n_in, n_out) in enumerate(pairwise(channels)):
        shapes |= styled(f"convs.{2 * i}", n_in, n_out) | to_rgb(f"to_rgbs.{i}", n_out)
        shapes |= styled(f"convs.{2 * i + 1}", n_out, n_out)
        shapes |= {
            f"convs.{2 * i}.conv.blur.kernel": (4, 4),
            f"to_rgbs.{i}.upsample.kernel": (4, 4),
        }
        side = 8 * 2**i
        shapes |= {f"noises.noise_{2 * i + j}": (1, 1, side, side) for j in (1, 2)}
    return shapes


def port_state():
    """Draw a state in which no tensor has its initial value."""
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(s, generator=generator) for name, s in port_shapes().items()}
    for name in state:
        if name.endswith("kernel"):
            state[name] = torch.tensor(KERNEL, dtype=torch.float32)
        elif name.startswith("style.") and name.endswith("weight"):
            state[name] *= 100  # stored for a hundredth of the rate
    return state


def written(path, state, **others):
    torch.save({"g_ema": state, **others}, path)
    return path


@pytest.fixture
def loaded(tmp_path):
    return load_stylegan2(written(tmp_path / "tiny.pt", port_state()))


class Slow:
    """Compute a picture from the port's tensors, one number after the other."""

    def __init__(self, state):
        self.state = {name: value.double().numpy() for name, value in state.items()}

    @staticmethod
    def leaky(x):
        return math.sqrt(2) * np.where(x > 0, x, 0.2 * x)

    def styles(self, z):
        w = z / np.sqrt((z**2).mean() + 1e-8)
        for i in range(1, N_MAPPING + 1):
            weight, bias = self.state[f"style.{i}.weight"], self.state[f"style.{i}.bias"]
            w = self.leaky(0.01 * (weight @ w / math.sqrt(DIM) + bias))
        return w

    def modulated(self, name, x, w, up=False, demodulate=True):
        weight = self.state[f"{name}.weight"][0]
        style = self.state[f"{name}.modulation.weight"] @ w / math.sqrt(DIM)
        style = style + self.state[f"{name}.modulation.bias"]
        weight = weight * style[None, :, None, None] / math.sqrt(weight[0].size)
        if demodulate:
            weight = weight / np.sqrt((weight**2).sum((1, 2, 3), keepdims=True) + 1e-8)
        apply = self.stamped if up else lambda x, kernel: correlate2d(x, kernel, mode="same")
        return np.stack(
            [sum(apply(m, k) for m, k in zip(x, kernels, strict=True)) for kernels in weight]
        )

    @staticmethod
    def stamped(x, kernel):
        """Put the kernel down, times each pixel, two pixels apart; then blur."""
        found = np.zeros((2 * len(x) + 1,) * 2)
        for (row, column), value in np.ndenumerate(x):
            found[2 * row : 2 * row + 3, 2 * column : 2 * column + 3] += value * kernel
        return convolve2d(np.pad(found, 1), KERNEL, mode="valid")

    def layer(self, name, number, x, w, up=False):
        y = self.modulated(f"{name}.conv", x, w, up)
        y = y + self.state[f"{name}.noise.weight"] * self.state[f"noises.noise_{number}"][0]
        return self.leaky(y + self.state[f"{name}.activate.bias"][:, None, None])

    def added(self, name, x, w):
        return self.modulated(f"{name}.conv", x, w, False, False) + self.state[f"{name}.bias"][0]

    def larger(self, image):
        apart = np.zeros((3, 2 * image.shape[1] + 3, 2 * image.shape[1] + 3))
        apart[:, 2:-1:2, 2:-1:2] = image
        return np.stack([convolve2d(part, KERNEL, mode="valid") for part in apart])

    def picture(self, w):
        x = self.layer("conv1", 0, self.state["input.input"][0], w)
        image = self.added("to_rgb1", x, w)
        for i in range(len(CHANNELS) - 1):
            x = self.layer(f"convs.{2 * i}", 2 * i + 1, x, w, up=True)
            x = self.layer(f"convs.{2 * i + 1}", 2 * i + 2, x, w)
            image = self.larger(image) + self.added(f"to_rgbs.{i}", x, w)
        return image


def test_pictures_are_those_of_slow_loops(loaded):
    z = torch.randn(2, DIM, generator=torch.Generator().manual_seed(1))
    slow, state = Slow(port_state()), loaded.state_dict()
    styles = np.stack([slow.styles(one) for one in z.double().numpy()])
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.mapping(z).double(), torch.tensor(styles), rtol=1e-4, atol=1e-5
        )
        wanted = torch.tensor(np.stack([slow.picture(w) for w in styles]))
        assert wanted.shape == (2, 3, 16, 16) and wanted.std() > 0.5
        torch.testing.assert_close(loaded(z).double(), wanted, rtol=1e-4, atol=1e-4)
        # The readable model, with the same weights, draws something else.
        plain = StyleGenerator((3, 16, 16), CHANNELS, DIM, N_MAPPING)
        plain.load_state_dict({name: state[name] for name in plain.state_dict()})
        assert float((plain(z) - wanted).abs().mean()) > 0.1


def test_random_noise_and_styles_a_resolution(loaded):
    w = loaded.mapping(loaded.draw_latents(2, torch.Generator().manual_seed(1)))
    torch.testing.assert_close(loaded.synthesis(w[:, None].expand(-1, 3, -1)), loaded.synthesis(w))
    drawn = [
        loaded.synthesis(w, "random", torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.allclose(drawn[0], drawn[2])
    for wrong in (w[:, :3], w[:, None]):
        with pytest.raises(ValueError, match=r"wants \(batch, 7\) or \(batch, 3, 7\)"):
            loaded.synthesis(wrong)
    with pytest.raises(ValueError, match="The noise is 'no'"):
        loaded.synthesis(w, "no")


def test_a_state_of_the_port_comes_back(loaded):
    state, again = port_state(), to_port(loaded)
    assert {name: tuple(value.shape) for name, value in again.items()} == port_shapes()
    for name, value in state.items():
        torch.testing.assert_close(again[name], value)
    ours = [our for our, _, _ in port_names(N_MAPPING, len(CHANNELS))]
    assert sorted(ours) == sorted(loaded.state_dict())


def test_the_published_size():
    channels = (512, 512, 512, 512, 512, 256, 128, 64, 32)
    with torch.device("meta"):
        model = StyleGAN2((3, 1024, 1024), channels, 512, 8)
        state = to_port(model)
    assert {name: tuple(value.shape) for name, value in state.items()} == (
        port_shapes(channels, 512, 8)
    )
    assert state["convs.15.conv.weight"].shape == (1, 32, 32, 3, 3)
    assert state["noises.noise_16"].shape == (1, 1, 1024, 1024)
    assert sum(p.numel() for p in model.parameters()) == 30_370_060  # as NVIDIA's code counts


def test_files_of_all_kinds_of_the_port_are_read(tmp_path, loaded):
    z = loaded.draw_latents(1)
    state = port_state()
    training = {"g": state, "d": {}, "args": Namespace(size=16, path="x"), "ada_aug_p": 0.0}
    path = written(tmp_path / "training.pt", state, **training)
    assert torch.equal(load_stylegan2(path)(z), loaded(z))
    old = tmp_path / "old.pt"
    content = {"g_ema": state, "latent_avg": torch.zeros(DIM)}
    torch.save(content, old, _use_new_zipfile_serialization=False)
    assert torch.equal(load_stylegan2(old)(z), loaded(z))


def test_what_is_no_checkpoint_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"no StyleGAN2 in .*rosinality.*550000\.pt.*BOOK_DATA"
    ):
        load_stylegan2(tmp_path / "nothing.pt")
    runs_code = written(tmp_path / "code.pt", port_state(), bad=print)
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(runs_code.read_bytes()[:-100])
    (tmp_path / "text.pt").write_text("<html>quota exceeded</html>")
    for path in (runs_code, damaged, tmp_path / "text.pt"):
        with pytest.raises(CheckpointError, match="tensors and plain containers alone"):
            load_stylegan2(path)
    torch.save({"g": port_state()}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="holds no 'g_ema'"):
        load_stylegan2(tmp_path / "other.pt")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"conv1.noise.weight": None}, r"conv1\.noise\.weight and so on, 1 in all"),
        ({"convs.9.conv.weight": torch.zeros(1)}, r"convs\.9\.conv\.weight and so on"),
        ({"conv1.activate.bias": None}, "conv1.activate.bias' is missing"),
        ({"to_rgb1.bias": torch.zeros(3)}, r"shape \(3,\), wanted \(1, 3, 1, 1\)"),
        ({"style.1.bias": "no"}, "style.1.bias is no tensor"),
        ({"input.input": torch.zeros(1, 6, 8, 8)}, r"\(1, 6, 8, 8\), wanted \(1, 6, 4, 4\)"),
        ({"convs.0.conv.blur.kernel": torch.ones(4, 4) / 4}, "another blur"),
    ],
)
def test_a_generator_that_does_not_fit_is_refused(tmp_path, changes, sentence):
    state = {k: v for k, v in (port_state() | changes).items() if v is not None}
    with pytest.raises(CheckpointError, match=f"does not fit: .*({sentence})"):
        load_stylegan2(written(tmp_path / "tiny.pt", state))


def test_a_file_of_the_reader_is_unlearned(tmp_path, monkeypatch):
    monkeypatch.setenv("BOOK_DATA", str(tmp_path))
    written(tmp_path / "mine.pt", port_state())
    about = {"data": "avatars", "size": 16, "held_out": "test", "judge": "random"}
    config = unlearning.SubjectConfig(**about, base="mine.pt", space="w", features=("smile",))
    subject = unlearning.load_subject(config, torch.device("cpu"))
    assert subject.is_gan and subject.model.image_shape == (3, 16, 16)
    z = subject.draw(9, torch.Generator().manual_seed(0))
    whole = subject.pictures(subject.model, z)
    monkeypatch.setattr(unlearning, "CHUNK_PIXELS", 2 * 16**2)
    torch.testing.assert_close(subject.pictures(subject.model, z), whole)
    feature = unlearning.Feature(torch.ones(DIM) / DIM**0.5, torch.tensor(0.0))
    settings = unlearning.UnlearningSettings(max_steps=1, batch=4)
    after, _ = unlearning.unlearned_model(subject, [feature], settings, seed=0)
    for name, value in subject.model.named_parameters():
        assert torch.equal(after.get_parameter(name), value) == name.startswith("mapping")
    layered = replace(subject, space="layers")
    w = layered.draw_samples(9, torch.Generator().manual_seed(0))
    torch.testing.assert_close(layered.pictures(subject.model, w), whole)


@pytest.mark.parametrize("name", ["gan_ffhq", "gan_avatars_ablation", "gan_avatars_attack"])
def test_pictures_like_photographs_are_not_kept(name):
    shipped = load_config("unlearning_gan_ffhq", "paper").config
    assert shipped.base.endswith(".pt") and shipped.n_shown == 0
    resolved = load_config(f"unlearning_{name}", "cpu").resolved | {"base": "550000.pt"}
    assert resolve("x", "paper", resolved | {"n_shown": 0}).config.n_shown == 0
    with pytest.raises(ConfigError, match="n_shown is 4, wanted 0"):
        resolve("x", "paper", resolved | {"n_shown": 4})
