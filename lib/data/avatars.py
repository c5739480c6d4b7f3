"""Avatars: portraits drawn from two integers, with exact labels of identity and attributes.

An *identity* fixes face, skin, eyes, nose, lips, brows, ears, hair and its colour; a *picture* of
it varies turn, tilt, place and size, light, expression, background and clothes. Both are hashed, so
picture j of identity i is the same in every batch, and on a GPU to one level of 255.

Attributes, each 0 or 1:

* of the identity: ``young`` (60%), ``bangs`` (18%), ``beard`` (15%) and the hair's colour:
  ``grey_hair`` (15%), ``blond_hair`` (19%), ``black_hair`` (30%), or brown and red, without a label
  of their own;
* of the picture, whoever is on it: ``smiling`` (45%), ``glasses`` (15%), ``hat`` (12%).

Two correlations are wanted: 4% of the young and 32% of the others are grey, and a number without a
label, ``build``, is shared by the jaw, brows, neck and length of hair, and only its upper half has
beards. Skin is independent of everything else. At the edges of a picture hair may be cut off, but
nothing hides an attribute: a hat leaves bangs and hair at the sides in sight.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lib.data._portrait import portrait
from lib.data._traits import HAIR_COLOURS, attributes_of, draw, traits
from lib.data.images import DataError, ImageSet, cached, check_space

ATTRIBUTES = (
    "glasses",
    "smiling",
    "hat",
    "bangs",
    "beard",
    "blond_hair",
    "black_hair",
    "grey_hair",
    "young",
)
SIZES = range(16, 129)
CHUNK_PIXELS = 2**18  # larger leaves a processor's cache, smaller waits for the kernels' starts


class Split(NamedTuple):
    """Which identities and which pictures of each a split holds."""

    identities: range
    pictures: range


# 30 pictures of an identity to learn from, of which 15 may be forgotten, and 15 more held out.
SPLITS = {
    "train": Split(range(2000), range(30)),
    "test": Split(range(2000), range(30, 45)),
    "unseen": Split(range(2000, 2500), range(30)),
}


def render(
    identity: Tensor,
    picture: Tensor,
    size: int,
    attributes: Mapping[str, Tensor] | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Draw pictures of identities, and say what is on them.

    ``attributes`` sets some of ``ATTRIBUTES`` and leaves everything else as it is, for pairs that
    differ in one thing. A hair colour set to 1 replaces the one there was; 0 makes that one brown.

    Shapes: ``identity`` and ``picture`` (n,) of whole numbers from 0 to 2³² - 1; ``size`` 16 to
    128; ``attributes`` (n,) of 0 and 1 each; returns images uint8 (n, size, size, 3) and labels
    int64 (n,), the attributes and ``identity``, all on the device of ``identity``. ``chunk``
    pictures are drawn at a time, which changes nothing but memory and speed.

    Raises: ValueError if a size, shape or value is none of these, or two hair colours are set.
    """
    if type(size) is not int or size not in SIZES:
        raise ValueError(f"Avatars have 16 to 128 pixels a side, not {size!r}.")
    given = dict(attributes or {})
    if unknown := set(given) - set(ATTRIBUTES):
        raise ValueError(
            f"Avatars have no attribute {', '.join(sorted(unknown))}; they have "
            f"{', '.join(ATTRIBUTES)}."
        )
    _check("identity", identity, identity, 2**32 - 1)
    _check("picture", picture, identity, 2**32 - 1)
    for name, values in given.items():
        _check(name, values, identity, 1)
    if sum(given.get(name, 0 * identity) for name in HAIR_COLOURS).gt(1).any():
        raise ValueError("A head has one hair colour; set at most one of them to 1.")
    drawn = draw(identity.long(), picture.long())
    some = attributes_of(drawn, given)
    measures = traits(drawn, some)
    images = torch.empty(len(identity), size, size, 3, dtype=torch.uint8, device=identity.device)
    chunk = chunk or max(1, CHUNK_PIXELS // size**2)
    for start in range(0, len(identity), chunk):
        part = slice(start, start + chunk)
        pixels = portrait(measures.part(part), size)
        pixels = pixels.mul_(255).add_(0.5).clamp_(0, 255).to(torch.uint8)
        images[part] = pixels.permute(0, 2, 3, 1)
    labels = {name: some[name] for name in ATTRIBUTES}
    return images, labels | {"identity": identity.to(torch.int64, copy=True)}


def load(split: str = "train", size: int | None = None, limit: int | None = None) -> ImageSet:
    """Load a split as ``lib.data.load("avatars", split, size)`` does; ``size`` is 64 by default.

    The whole split is drawn once, into the cache of decoded images, which takes a few minutes at
    64×64. With ``limit`` only the first images are drawn, at once and without the cache.

    Raises: DataError if there is no such split or size.
    """
    size = 64 if size is None else size
    if type(size) is not int or size not in SIZES:
        raise DataError(f"avatars can be had with 16 to 128 pixels a side, not {size!r}.")
    identity, picture = (numbers[:limit] for numbers in members(split))
    labels = labels_of(identity, picture)
    if limit is not None:
        images = render(identity, picture, size)[0].numpy()
        images.setflags(write=False)
    else:
        n = len(identity)
        name = f"avatars-{split}-{_source_digest()[:16]}-{size}x{size}.npy"

        def draw_all(path: Path) -> None:
            check_space(path, n * size * size * 3, f"avatars-{split}")
            drawn = np.lib.format.open_memmap(path, "w+", np.uint8, (n, size, size, 3))
            for start in range(0, n, 1000):
                part = slice(start, start + 1000)
                drawn[part] = render(identity[part], picture[part], size)[0].numpy()
            drawn.flush()

        images = cached(name, n, size, "RGB", draw_all)
    numbers = {name: values.numpy() for name, values in labels.items()}
    return ImageSet(images, numbers, f"avatars, rendered at {size}×{size}", "avatars", split)


def members(split: str) -> tuple[Tensor, Tensor]:
    """List the identity and the picture of each image of a split, in its order.

    The first picture of every identity comes first, then the second of every identity, and so on:
    any beginning shows many people, and ``images[i :: number of identities]`` is one of them.

    Raises: DataError if there is no such split.
    """
    if split not in SPLITS:
        raise DataError(f"avatars has no split {split!r}; it has {', '.join(SPLITS)}.")
    identities, pictures = (torch.arange(r.start, r.stop) for r in SPLITS[split])
    return identities.repeat(len(pictures)), pictures.repeat_interleave(len(identities))


def labels_of(identity: Tensor, picture: Tensor) -> dict[str, Tensor]:
    """Give the labels of pictures, int64 (n,) each as in ``render``, without drawing them."""
    some = attributes_of(draw(identity.long(), picture.long(), labels_only=True), {})
    return {name: some[name] for name in ATTRIBUTES} | {"identity": identity.long()}


def _source_digest() -> str:
    """Hash the code that draws, so that the cache never holds pictures of an older one."""
    names = ("_portrait.py", "_shapes.py", "_traits.py")
    content = b"".join((Path(__file__).parent / name).read_bytes() for name in names)
    return hashlib.sha256(content).hexdigest()


def _check(name: str, values: Tensor, like: Tensor, most: int) -> None:
    if values.ndim != 1 or values.shape != like.shape or values.is_floating_point():
        raise ValueError(
            f"{name} must be whole numbers of the shape ({like.numel()},), not {values.dtype} of "
            f"the shape {tuple(values.shape)}."
        )
    if len(values) and not 0 <= int(values.min()) <= int(values.max()) <= most:
        raise ValueError(
            f"{name} must be from 0 to {most}, not {int(values.min())} to {int(values.max())}."
        )
