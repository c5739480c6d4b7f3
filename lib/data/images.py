"""Images as uint8 arrays: a local snapshot, the Hugging Face hub, scikit-learn, or our avatars.

``load`` looks for ``$BOOK_DATA/<name>/<split>*.parquet`` first, then asks the hub, and otherwise
says in one sentence how to get the data; it never takes another data set instead. Images are
decoded once into a memory-mapped .npy in ``$XDG_CACHE_HOME/forgetting-book`` (``~/.cache`` where
that is unset), named by a digest of the data.

Labels: every column of whole numbers, truth values or class labels goes into ``labels`` under its
own name as int64; other columns are left out. A missing label is -1 (``MISSING``). ``gender`` is
0 for male and 1 for female, in lfw64 (letters there, see ``CODES``) as in fairface. The attributes
of celeba are 0 or 1, also where a copy writes -1 and 1.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa
    from PIL import Image

MISSING = -1
CODES = {"gender": {"m": 0, "f": 1}}
HUB_TIMEOUT_S = 3.0
_BATCH = 1000
_DECODER = 1  # part of the cache's file names: raise it when the decoding below changes


class DataError(ValueError):
    """Say in one sentence what is wrong with the data asked for and what to do."""


@dataclass(frozen=True)
class Origin:
    """Where a data set comes from, and how its image column is read."""

    hub: str | None
    splits: tuple[str, ...]
    image: str = "image"
    mode: str = "RGB"
    config: str | None = None


# Column names and splits were read on the hub pages of celeba, ffhq, fairface and stl10, and for
# mnist and cifar10 on snapshots of the same features; none was downloaded by the tests.
ORIGINS = {
    "mnist": Origin("ylecun/mnist", ("train", "test"), mode="L"),
    "cifar10": Origin("uoft-cs/cifar10", ("train", "test"), image="img"),
    # 96×96, without the 100,000 unlabelled images; a user's upload, the split sizes unchecked.
    "stl10": Origin("tanganke/stl10", ("train", "test")),
    # 178×218 aligned, with celeb_id and 40 attributes.
    "celeba": Origin("flwrlabs/celeba", ("train", "valid", "test")),
    # 256×256, a user's upload of all 70,000; the original is 1024×1024.
    "ffhq": Origin("merkol/ffhq-256", ("train",)),
    # Faces with a margin of 0.25; the hub also has a margin of 1.25.
    "fairface": Origin("HuggingFaceM4/FairFace", ("train", "validation"), config="0.25"),
    "lfw64": Origin(None, ("train",)),
    "att_faces64": Origin(None, ("train",), mode="L"),
}
DIGITS_SPLITS = ("train", "test")
AVATAR_SPLITS = ("train", "test", "unseen")


@dataclass(frozen=True)
class ImageSet:
    """Images with their labels, and where they came from.

    Shapes: ``images`` uint8 (n, height, width, channels), read-only; ``labels`` int64 (n,) each.
    ``source`` goes into captions.
    """

    images: np.ndarray
    labels: dict[str, np.ndarray]
    source: str
    name: str
    split: str


@dataclass(frozen=True)
class _Encoded:
    """Images before decoding: batches of ``{"bytes", "path"}``, the other columns, a digest."""

    n: int
    batches: Callable[[], Iterator[list[dict[str, Any]]]]
    columns: "pa.Table | None"
    digest: str
    source: str


def load(name: str, split: str = "train", size: int | None = None) -> ImageSet:
    """Load a data set as uint8 images and int64 labels; see the module for where it looks.

    With ``size`` the WHOLE picture is resized to size×size by PIL's antialiased bilinear filter.
    The 178×218 pictures of celeba are thereby squashed to a square without a crop, as in the
    authors' taming code.

    ``digits`` are scikit-learn's 8×8 digits with the levels v = 0..16 stored as round(v·255/16),
    so that ``np.rint(images / 255 * 16)`` gives them back; a fixed permutation makes 1437 of the
    1797 the train split.

    Raises: DataError if the name or split is unknown, the data cannot be had, an image cannot be
    decoded, or images differ in size and no ``size`` is given.
    """
    known = {"digits": DIGITS_SPLITS, "avatars": AVATAR_SPLITS}
    known |= {key: origin.splits for key, origin in ORIGINS.items()}
    if name not in known:
        raise DataError(f"There is no data set {name!r}; the known ones are {', '.join(known)}.")
    if split not in known[name]:
        raise DataError(f"{name} has no split {split!r}; it has {', '.join(known[name])}.")
    if size is not None and (type(size) is not int or size < 1):
        raise DataError(f"The size must be a whole number of pixels, at least 1, not {size!r}.")
    resized = "" if size is None else f", resized to {size}×{size}"
    if name == "digits":
        images, labels = _digits(split, size)
        return ImageSet(images, labels, f"digits, scikit-learn{resized}", name, split)
    if name == "avatars":
        from lib.data import avatars  # drawn with torch, which the other data sets do not need

        return avatars.load(split, size)
    origin = ORIGINS[name]
    encoded = _from_snapshot(name, split, origin) or _from_hub(name, split, origin)
    images = _decoded(encoded, origin.mode, size, f"{name}-{split}")
    labels = {} if encoded.columns is None else _labels(name, encoded.columns)
    return ImageSet(images, labels, encoded.source + resized, name, split)


def _digits(split: str, size: int | None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    from PIL import Image
    from sklearn.datasets import load_digits

    levels, label = load_digits(return_X_y=True)
    # numpy promises to keep this legacy stream of random numbers as it is.
    order = np.random.RandomState(0).permutation(len(levels))
    part = order[:1437] if split == "train" else order[1437:]
    images = np.rint(levels[part] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    if size is not None:
        images = np.stack([np.asarray(_resize(Image.fromarray(image), size)) for image in images])
    images = images[..., None]
    images.setflags(write=False)
    return images, {"label": label[part].astype(np.int64)}


def _from_snapshot(name: str, split: str, origin: Origin) -> _Encoded | None:
    root = os.environ.get("BOOK_DATA")
    files = sorted((Path(root) / name).glob(f"{split}*.parquet")) if root else []
    if not files:
        return None
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        opened = [pq.ParquetFile(file) for file in files]
        names = opened[0].schema_arrow.names
        others = [name for name in names if name != origin.image]
        columns = pa.concat_tables([file.read(columns=others) for file in opened])
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{files[0].parent}/{split}*.parquet cannot be read ({reason}); get the files again."
        ) from error
    if origin.image not in names:
        raise DataError(
            f"{files[0]} has no image column {origin.image!r}; it has {', '.join(names)}."
        )

    def batches() -> Iterator[list[dict[str, Any]]]:
        for file in opened:
            for batch in file.iter_batches(_BATCH, columns=[origin.image]):
                yield batch.column(origin.image).to_pylist()

    return _Encoded(
        n=sum(file.metadata.num_rows for file in opened),
        batches=batches,
        columns=columns,
        digest=_digest(files),
        source=f"{name}, snapshot",
    )


def _from_hub(name: str, split: str, origin: Origin) -> _Encoded:
    folder = f"put {split}*.parquet into $BOOK_DATA/{name}"
    set_to = os.environ.get("BOOK_DATA")
    where = f"BOOK_DATA is {set_to!r}" if set_to else "BOOK_DATA is not set"
    if origin.hub is None:
        raise DataError(
            f"{name}/{split} was not found: {folder} ({where}); in this form it is not on the "
            "Hugging Face hub, so there is no other way."
        )
    import datasets

    try:
        with _offline_unless_reachable(origin.hub):
            data = datasets.load_dataset(origin.hub, origin.config, split=split)
    except Exception as error:  # a network fails in many classes; the cause stays attached
        reason = " ".join(str(error).split())
        raise DataError(
            f"{name}/{split} was not found: {folder} ({where}), or go online once so that it comes "
            f"from the Hugging Face hub as {origin.hub} ({type(error).__name__}: {reason})."
        ) from error
    if origin.image not in data.column_names:
        raise DataError(
            f"{origin.hub} has no image column {origin.image!r}; it has "
            f"{', '.join(data.column_names)}."
        )
    raw = data.cast_column(origin.image, datasets.Image(decode=False)).with_format("arrow")
    others = [column for column in data.column_names if column != origin.image]
    return _Encoded(
        n=len(data),
        batches=lambda: (b[origin.image].to_pylist() for b in raw.iter(_BATCH)),
        columns=raw.select_columns(others)[:] if others else None,
        digest=hashlib.sha256(data._fingerprint.encode()).hexdigest(),
        source=f"{name}, Hugging Face hub {origin.hub}",
    )


@contextlib.contextmanager
def _offline_unless_reachable(hub: str) -> Iterator[None]:
    """Let ``datasets`` use only its own cache where the hub does not answer.

    Without this it retries for about 25 seconds before it gives up.
    """
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    before = datasets.config.HF_HUB_OFFLINE
    try:
        HfApi(endpoint=datasets.config.HF_ENDPOINT).dataset_info(hub, timeout=HUB_TIMEOUT_S)
    except HfHubHTTPError:
        pass  # the hub answered, and load_dataset will say what is wrong
    except Exception:  # no answer; the class depends on what the client is built on
        datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _labels(name: str, columns: "pa.Table") -> dict[str, np.ndarray]:
    import pyarrow as pa
    import pyarrow.compute as pc

    labels = {}
    for column in columns.column_names:
        values = columns[column]
        if column in CODES and not pa.types.is_integer(values.type):
            codes = CODES[column]
            unknown = set(pc.unique(values).to_pylist()) - set(codes) - {None, "none"}
            if unknown:
                raise DataError(
                    f"The column {column!r} of {name} holds {sorted(unknown)}; known are "
                    f"{', '.join(codes)} and none."
                )
            numbers = [codes.get(value, MISSING) for value in values.to_pylist()]
        elif pa.types.is_integer(values.type) or pa.types.is_boolean(values.type):
            numbers = pc.fill_null(pc.cast(values, pa.int64()), MISSING).to_numpy()
        else:
            continue
        labels[column] = np.asarray(numbers, dtype=np.int64)
        if name == "celeba" and labels[column].min(initial=0) < 0:
            labels[column] = (labels[column] > 0).astype(np.int64)
    return labels


def _cache() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "forgetting-book"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _digest(files: list[Path]) -> str:
    """Hash the files' names and contents; remember each content by path, size and time."""
    memory_file = _cache() / "digests.json"
    try:
        memory = json.loads(memory_file.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        memory = {}
    parts = []
    for file in files:
        stat, key = file.stat(), str(file.resolve())
        size_time, content = memory.get(key, (None, None))
        if size_time != [stat.st_size, stat.st_mtime_ns]:
            with open(file, "rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            memory[key] = [[stat.st_size, stat.st_mtime_ns], content]
        parts.append(f"{file.name} {content}")
    temporary = memory_file.with_name(f"{memory_file.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(memory, indent=1))
    os.replace(temporary, memory_file)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _decoded(encoded: _Encoded, mode: str, size: int | None, what: str) -> np.ndarray:
    """Open the decoded images from the cache; decode them first where that is not sound.

    Serial on purpose: it happens once, in 9 s of CPU time for MNIST's 60,000 images and 17 s for
    CIFAR-10's 50,000, and two threads gained nothing on either.
    """
    pixels = "original" if size is None else f"{size}x{size}"
    name = f"{what}-{encoded.digest[:16]}-{pixels}-v{_DECODER}.npy"
    return cached(
        name, encoded.n, size, mode, lambda path: _decode_all(encoded, mode, size, what, path)
    )


def cached(
    name: str, n: int, size: int | None, mode: str, fill: Callable[[Path], None]
) -> np.ndarray:
    """Map n images of the cache, after ``fill`` has written them where they are not sound."""
    path = _cache() / name
    images = _open(path, n, size, mode)
    if images is None:
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            fill(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        images = _open(path, n, size, mode)
        assert images is not None
    return images


def check_space(path: Path, need: int, what: str) -> None:
    """Raise DataError unless there is room for ``need`` bytes where ``path`` will be."""
    free = shutil.disk_usage(path.parent).free
    if need > free:
        raise DataError(
            f"{what} decoded takes {need / 1e9:.1f} GB but {path.parent} has "
            f"{free / 1e9:.1f} GB free; give a smaller size or set XDG_CACHE_HOME."
        )


def _open(path: Path, n: int, size: int | None, mode: str) -> np.ndarray | None:
    """Map a cached array, or return None where it is absent, cut off or of the wrong shape."""
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    sound = (
        images.dtype == np.uint8
        and images.ndim == 4
        and (images.shape[0], images.shape[3]) == (n, len(mode))
        and (size is None or images.shape[1:3] == (size, size))
        and path.stat().st_size == images.offset + images.nbytes
    )
    return images if sound else None


def _decode_all(encoded: _Encoded, mode: str, size: int | None, what: str, path: Path) -> None:
    if encoded.n == 0:
        raise DataError(f"{what} holds no images; get the data again.")
    images, done = None, 0
    for batch in encoded.batches():
        for item in batch:
            try:
                pixels = np.asarray(_decode(item, mode, size))
            except (OSError, TypeError, ValueError) as error:
                raise DataError(f"Image {done} of {what} cannot be decoded: {error}.") from error
            pixels = pixels.reshape(*pixels.shape[:2], len(mode))
            if images is None:
                check_space(path, encoded.n * pixels.size, what)
                shape = (encoded.n, *pixels.shape)
                images = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
            if pixels.shape != images.shape[1:]:
                raise DataError(
                    f"Image {done} of {what} has the shape {pixels.shape}, those before it "
                    f"{images.shape[1:]}; give a size, as in size=64, to make them equal."
                )
            images[done] = pixels
            done += 1
    images.flush()


def _decode(item: dict[str, Any], mode: str, size: int | None) -> "Image.Image":
    from PIL import Image

    content = item["bytes"] if item["bytes"] is not None else Path(item["path"]).read_bytes()
    image = Image.open(io.BytesIO(content))
    image = image if image.mode == mode else image.convert(mode)
    return image if size is None else _resize(image, size)


def _resize(image: "Image.Image", size: int) -> "Image.Image":
    from PIL import Image

    return image.resize((size, size), Image.Resampling.BILINEAR)
