"""Avatars: the same whatever the batch, exact labels, likeness, frequencies, and bad input."""

import numpy as np
import pytest
import torch

from lib.data import DataError, avatars, load
from lib.data._shapes import Sheet

SIZE = 48
FACE_ROWS, FACE_COLUMNS = slice(SIZE // 4, -SIZE // 6), slice(SIZE // 4, -SIZE // 4)


def whole(n: int, value: int = 0) -> torch.Tensor:
    return torch.full((n,), value)


@pytest.fixture(scope="module")
def drawn():
    identity, picture = torch.arange(32) * 7, torch.arange(32) % 5
    return identity, picture, *avatars.render(identity, picture, SIZE)


@pytest.mark.parametrize("chunk", [5, 1000])
def test_a_picture_is_the_same_in_every_chunk(drawn, chunk):
    identity, picture, images, labels = drawn
    again, others = avatars.render(identity, picture, SIZE, chunk=chunk)
    assert torch.equal(again, images)
    assert all(torch.equal(others[name], labels[name]) for name in labels)


def test_a_picture_is_the_same_in_every_order_and_integer_type(drawn):
    identity, picture, images, labels = drawn
    order = torch.randperm(len(identity), generator=torch.Generator().manual_seed(0))[:11]
    some, some_labels = avatars.render(identity[order].int(), picture[order].short(), SIZE)
    assert torch.equal(some, images[order])
    assert all(torch.equal(some_labels[name], labels[name][order]) for name in labels)
    assert {values.dtype for values in some_labels.values()} == {torch.int64}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_picture_is_the_same_on_a_gpu_to_one_level(drawn):
    identity, picture, images, labels = drawn
    there, there_labels = avatars.render(identity.cuda(), picture.cuda(), SIZE)
    difference = (there.cpu().int() - images.int()).abs()
    assert difference.max() <= 1 and difference.bool().float().mean() < 0.01
    assert all(torch.equal(there_labels[name].cpu(), labels[name]) for name in labels)


def test_bounds_of_the_layers_cut_nothing_off(monkeypatch):
    """Windows save time: with every layer over the whole canvas the pictures are the same."""
    identity, picture = torch.arange(60), torch.arange(60) % 7
    flags = {name: torch.arange(60) // k % 2 for k, name in enumerate(("hat", "glasses"), start=1)}
    some, _ = avatars.render(identity, picture, SIZE, flags)
    monkeypatch.setattr(Sheet, "_inside", lambda self, low, high, first, count: slice(0, count))
    full, _ = avatars.render(identity, picture, SIZE, flags)
    assert torch.equal(some, full)


# Where a change must be seen: rows and columns of the canvas, both from -1 to 1.
REGIONS = {
    "glasses": (-0.35, 0.35, 0.75),
    "smiling": (-0.25, 0.85, 0.75),
    "hat": (-1.00, 0.15, 1.00),
    "bangs": (-0.70, 0.25, 0.75),
    "beard": (-0.20, 1.00, 0.80),
    "blond_hair": (-1.00, 1.00, 0.90),
    "black_hair": (-1.00, 1.00, 0.90),
    "grey_hair": (-1.00, 1.00, 0.90),
    "young": (-0.60, 0.90, 0.75),
}


@pytest.mark.parametrize("name", avatars.ATTRIBUTES)
def test_an_attribute_changes_its_region_and_its_label_alone(name):
    n = 40
    identity, picture = torch.arange(n) + 300, torch.arange(n) % 3
    plain = dict.fromkeys(avatars.HAIR_COLOURS, whole(n)) if name.endswith("hair") else {}
    with_, labels = avatars.render(identity, picture, SIZE, plain | {name: whole(n, 1)})
    without, others = avatars.render(identity, picture, SIZE, plain | {name: whole(n)})
    changed = (with_.int() - without.int()).abs().amax(-1)
    centres = (torch.arange(SIZE) + 0.5) / SIZE * 2 - 1
    top, bottom, half = REGIONS[name]
    inside = ((centres > top) & (centres < bottom))[:, None] & (centres.abs() < half)
    assert changed[:, ~inside].sum() == 0
    assert (changed > 12).sum((1, 2)).min() >= 12  # to be seen, also on a small picture
    assert labels[name].eq(1).all() and others[name].eq(0).all()
    for other in set(labels) - {name}:
        assert torch.equal(labels[other], others[other])


def test_given_attributes_that_are_already_so_change_nothing(drawn):
    identity, picture, images, labels = drawn
    same = {name: labels[name] for name in avatars.ATTRIBUTES}
    assert torch.equal(avatars.render(identity, picture, SIZE, same)[0], images)


def test_a_head_has_one_hair_colour():
    identity = torch.arange(3000)
    labels = avatars.labels_of(identity, 0 * identity)
    assert sum(labels[name] for name in avatars.HAIR_COLOURS).max() == 1
    _, dyed = avatars.render(identity[:50], identity[:50], 16, {"grey_hair": whole(50, 1)})
    assert dyed["grey_hair"].all() and not (dyed["blond_hair"] | dyed["black_hair"]).any()


def test_frequencies_are_those_of_the_docstring():
    identity, picture = avatars.members("train")
    labels = avatars.labels_of(identity, picture)
    documented = {
        "young": 0.60,
        "bangs": 0.18,
        "beard": 0.15,
        "grey_hair": 0.15,
        "blond_hair": 0.19,
        "black_hair": 0.30,
        "smiling": 0.45,
        "glasses": 0.15,
        "hat": 0.12,
    }
    assert set(documented) == set(avatars.ATTRIBUTES)
    for name, share in documented.items():
        independent = 2000 if name not in ("smiling", "glasses", "hat") else 60_000
        within = 3.5 * (share * (1 - share) / independent) ** 0.5 + 0.005
        assert float(labels[name].float().mean()) == pytest.approx(share, abs=within), name
    old = labels["young"] == 0
    assert float(labels["grey_hair"][old].float().mean()) == pytest.approx(0.32, abs=0.06)
    assert float(labels["grey_hair"][~old].float().mean()) == pytest.approx(0.04, abs=0.03)


def test_attributes_of_an_identity_stay_and_those_of_a_picture_vary():
    identity, picture = avatars.members("unseen")
    labels = avatars.labels_of(identity, picture)
    for name in avatars.ATTRIBUTES:
        per_identity = labels[name].view(30, 500)
        varies = (per_identity != per_identity[0]).any(0).float().mean()
        assert varies > 0.9 if name in ("smiling", "glasses", "hat") else varies == 0, name


def test_splits_share_what_they_should():
    kept = {
        name: set(zip(*map(torch.Tensor.tolist, avatars.members(name)), strict=True))
        for name in avatars.SPLITS
    }
    assert [len(kept[name]) for name in ("train", "test", "unseen")] == [60_000, 30_000, 15_000]
    assert not kept["train"] & kept["test"]
    people = {name: {identity for identity, _ in pairs} for name, pairs in kept.items()}
    assert people["train"] == people["test"] and not people["train"] & people["unseen"]


def test_pictures_of_one_identity_are_more_alike_than_of_two():
    """Compare faces by coarse pixels: in 16 of 20 pictures the nearest other one is the same."""
    people, pictures = 24, 6
    identity = torch.arange(people).repeat_interleave(pictures)
    picture = torch.arange(pictures).repeat(people)
    images, _ = avatars.render(identity, picture, SIZE, {"hat": 0 * identity})
    faces = images[:, FACE_ROWS, FACE_COLUMNS].permute(0, 3, 1, 2).float()
    coarse = torch.nn.functional.adaptive_avg_pool2d(faces, 8).flatten(1)
    distance = torch.cdist(coarse, coarse)
    same = identity[:, None] == identity
    itself = torch.eye(len(identity), dtype=torch.bool)
    assert distance[same & ~itself].mean() < 0.6 * distance[~same].mean()
    nearest = distance.masked_fill(itself, float("inf")).argmin(1)
    assert (identity[nearest] == identity).float().mean() > 0.8


def test_small_pictures_are_large_ones_made_small():
    identity, picture = torch.arange(24), torch.arange(24)
    small, _ = avatars.render(identity, picture, 64)
    large, _ = avatars.render(identity, picture, 128)
    made = large.float().view(24, 64, 2, 64, 2, 3).mean((2, 4))
    difference = (made - small).abs()
    assert difference.mean() < 1.5 and difference.quantile(0.99) < 16
    # without coverage, by taking every second pixel, it would be more than twice as far
    assert (large[:, ::2, ::2].float() - small).abs().mean() > 2 * difference.mean()


def test_images_are_neither_blank_nor_clipped(drawn):
    _, _, images, _ = drawn
    pixels = images.float()
    assert pixels.std((1, 2)).min() > 8
    assert (images == 255).float().mean() < 0.01 and (images == 0).float().mean() < 0.01
    assert pixels.amax((1, 2, 3)).min() > 120 and pixels.amin((1, 2, 3)).max() < 90


def test_skin_spans_light_and_dark():
    identity = torch.arange(300)
    plain = {name: 0 * identity for name in ("glasses", "hat", "beard")}
    images, _ = avatars.render(identity, identity, 32, plain)
    cheeks = images[:, 17:20, 11:21].float().mean((1, 2, 3)) / 255
    assert cheeks.quantile(0.05) < 0.28 and cheeks.quantile(0.95) > 0.62


@pytest.mark.parametrize("size", [16, 17, 33, 128])
def test_every_size_is_drawn(size):
    images, _ = avatars.render(torch.arange(3), torch.arange(3), size)
    assert images.shape == (3, size, size, 3) and images.dtype == torch.uint8


def test_no_pictures_are_drawn_of_nobody():
    images, labels = avatars.render(whole(0), whole(0), 16)
    assert images.shape == (0, 16, 16, 3) and labels["young"].shape == (0,)


ONE = torch.zeros(1, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ONE, ONE, 15), r"^Avatars have 16 to 128 pixels a side, not 15\.$"),
        ((ONE, ONE, 129), r"16 to 128 pixels a side, not 129"),
        ((ONE, ONE, 32.0), r"16 to 128 pixels a side, not 32\.0"),
        (
            (ONE.float(), ONE, 32),
            r"identity must be whole numbers of the shape \(1,\), not torch.f",
        ),
        ((ONE, whole(2), 32), r"picture must be whole numbers of the shape \(1,\).*\(2,\)\.$"),
        ((ONE - 1, ONE, 32), r"identity must be from 0 to 4294967295, not -1 to -1"),
        ((ONE, ONE, 32, {"moustache": ONE}), r"no attribute moustache; they have glasses"),
        ((ONE, ONE, 32, {"hat": ONE + 2}), r"hat must be from 0 to 1, not 2 to 2"),
        ((ONE, ONE, 32, {"grey_hair": ONE + 1, "blond_hair": ONE + 1}), r"one hair colour"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        avatars.render(*arguments)


def test_load_draws_a_split_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(avatars.SPLITS, "test", avatars.Split(range(9), range(30, 33)))
    loaded = load("avatars", "test", 16)
    assert isinstance(loaded.images, np.memmap) and loaded.images.shape == (27, 16, 16, 3)
    assert loaded.source == "avatars, rendered at 16×16"
    assert set(loaded.labels) == {*avatars.ATTRIBUTES, "identity"}
    images, labels = avatars.render(*avatars.members("test"), 16)
    np.testing.assert_array_equal(loaded.images, images.numpy())
    for name, values in loaded.labels.items():
        np.testing.assert_array_equal(values, labels[name].numpy())
    monkeypatch.setattr(avatars, "render", lambda *arguments: pytest.fail("drawn again"))
    np.testing.assert_array_equal(load("avatars", "test", 16).images, images.numpy())
    assert load("avatars", "test", 16).labels["identity"].dtype == np.int64


def test_a_limit_draws_the_first_images_without_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    loaded = avatars.load("train", limit=5)
    assert loaded.images.shape == (5, 64, 64, 3) and not list(tmp_path.rglob("*.npy"))
    assert loaded.labels["identity"].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="read-only"):
        loaded.images[0] = 0


def test_wrong_splits_and_sizes_are_data_errors():
    with pytest.raises(DataError, match=r"avatars has no split 'valid'; it has train, test, un"):
        load("avatars", "valid")
    with pytest.raises(DataError, match="16 to 128 pixels a side, not 8"):
        load("avatars", "train", 8)
