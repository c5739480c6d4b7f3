"""Images: the loader rule, decoding and its cache, and bad input."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lib.data import DataError, images, load

MNIST_NAMES = [str(digit) for digit in range(10)]


@pytest.fixture
def snapshot(tmp_path, monkeypatch):
    """Point BOOK_DATA and the cache at empty folders and give a function that writes parquet."""
    import datasets

    monkeypatch.setenv("BOOK_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def write(file: str, columns: dict, features: dict) -> Path:
        path = tmp_path / "data" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        dataset = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        dataset.to_parquet(path)
        return path

    return write


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def pictures(array: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(image) for image in array]


def mnist_features() -> dict:
    import datasets

    return {"image": datasets.Image(), "label": datasets.ClassLabel(names=MNIST_NAMES)}


def write_mnist(snapshot, n: int = 7, file: str = "mnist/train-00000-of-00001.parquet"):
    pixels = noise(n, 28, 28)
    columns = {"image": pictures(pixels), "label": [i % 10 for i in range(n)]}
    return pixels, snapshot(file, columns, mnist_features())


def test_snapshot_is_read_exactly_and_in_order(snapshot):
    first, _ = write_mnist(snapshot, 7, "mnist/train-00000-of-00002.parquet")
    second, _ = write_mnist(snapshot, 5, "mnist/train-00001-of-00002.parquet")
    write_mnist(snapshot, 3, "mnist/test-00000-of-00001.parquet")
    loaded = load("mnist")
    np.testing.assert_array_equal(loaded.images[..., 0], np.concatenate([first, second]))
    assert loaded.images.dtype == np.uint8 and loaded.images.shape == (12, 28, 28, 1)
    assert loaded.labels["label"].tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4]
    assert loaded.labels["label"].dtype == np.int64
    assert (loaded.source, loaded.name, loaded.split) == ("mnist, snapshot", "mnist", "train")
    assert load("mnist", "test").images.shape == (3, 28, 28, 1)


def test_images_are_a_read_only_memory_map(snapshot):
    write_mnist(snapshot)
    loaded = load("mnist")
    assert isinstance(loaded.images, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        loaded.images[0] = 0


def test_missing_labels_are_minus_one_and_letters_become_codes(snapshot):
    import datasets

    features = {
        "image": datasets.Image(),
        "identity": datasets.Value("int32"),
        "gender": datasets.Value("string"),
        "smile": datasets.Value("int8"),
        "file": datasets.Value("string"),
    }
    columns = {
        "image": pictures(noise(4, 8, 8, 3)),
        "identity": [5, 5, 6, 7],
        "gender": ["m", "f", None, "none"],
        "smile": [1, 0, None, 1],
        "file": ["a", "b", "c", "d"],
    }
    snapshot("lfw64/train-0.parquet", columns, features)
    labels = {key: values.tolist() for key, values in load("lfw64").labels.items()}
    assert labels == {
        "identity": [5, 5, 6, 7],
        "gender": [0, 1, -1, -1],
        "smile": [1, 0, -1, 1],
    }
    columns["gender"] = ["m", "x", None, "f"]
    snapshot("lfw64/train-0.parquet", columns, features)
    with pytest.raises(DataError, match=r"'gender' of lfw64 holds \['x'\]"):
        load("lfw64")


def celeba_like(attribute_type: str, values: list) -> tuple[dict, dict]:
    """Two 178x218 pictures with a white frame of 20 pixels, which any crop would cut off."""
    import datasets

    framed = np.full((2, 218, 178, 3), 255, np.uint8)
    framed[:, 20:-20, 20:-20] = 0
    features = {
        "image": datasets.Image(),
        "celeb_id": datasets.Value("int64"),
        "Male": datasets.Value(attribute_type),
    }
    return {"image": pictures(framed), "celeb_id": [11, 12], "Male": values}, features


@pytest.mark.parametrize(("kind", "values"), [("bool", [True, False]), ("int8", [1, -1])])
def test_celeba_attributes_are_zero_or_one(snapshot, kind, values):
    snapshot("celeba/valid-0.parquet", *celeba_like(kind, values))
    loaded = load("celeba", "valid")
    assert loaded.images.shape == (2, 218, 178, 3)
    assert loaded.labels["Male"].tolist() == [1, 0]
    assert loaded.labels["celeb_id"].tolist() == [11, 12]


def test_size_squashes_the_whole_picture_without_a_crop(snapshot):
    snapshot("celeba/train-0.parquet", *celeba_like("bool", [True, False]))
    loaded = load("celeba", "train", size=32)
    assert loaded.images.shape == (2, 32, 32, 3)
    assert loaded.source == "celeba, snapshot, resized to 32×32"
    for edge in (loaded.images[:, 0], loaded.images[:, -1], loaded.images[:, :, 0]):
        assert edge.min() > 200
    assert loaded.images[:, 16, 16].max() == 0
    # The share of white is kept: 20 of 178 and 20 of 218 on every side.
    white = 1 - (1 - 40 / 178) * (1 - 40 / 218)
    assert abs(loaded.images.mean() / 255 - white) < 0.02


def hub_features(name: str) -> dict:
    """Return the features as the hub's pages of the real sets list them (attributes shortened)."""
    from datasets import ClassLabel, Image, Value

    return {
        "mnist": mnist_features(),
        "cifar10": {"img": Image(), "label": ClassLabel(names=MNIST_NAMES)},
        "stl10": {"image": Image(), "label": ClassLabel(names=MNIST_NAMES)},
        "celeba": {"image": Image(), "celeb_id": Value("int64"), "Male": Value("bool")},
        "ffhq": {"image": Image()},
        "fairface": {
            "image": Image(),
            "age": ClassLabel(names=["0-2", "3-9", "10-19"]),
            "gender": ClassLabel(names=["Male", "Female"]),
            "service_test": Value("bool"),
        },
    }[name]


@pytest.mark.parametrize(
    ("name", "split", "expected"),
    [
        ("mnist", "test", ("ylecun/mnist", None)),
        ("cifar10", "train", ("uoft-cs/cifar10", None)),
        ("stl10", "train", ("tanganke/stl10", None)),
        ("celeba", "valid", ("flwrlabs/celeba", None)),
        ("ffhq", "train", ("merkol/ffhq-256", None)),
        ("fairface", "validation", ("HuggingFaceM4/FairFace", "0.25")),
    ],
)
def test_hub_is_asked_where_there_is_no_snapshot(snapshot, monkeypatch, name, split, expected):
    import datasets
    import huggingface_hub

    features = hub_features(name)
    n, shape = 3, (6, 6) if name == "mnist" else (6, 6, 3)
    pixels = noise(n, *shape)
    image_column, *others = features
    columns = {image_column: pictures(pixels)} | {column: [0, 1, 1] for column in others}
    asked = []

    def load_dataset(hub, config=None, *, split):
        asked.append((hub, config, split))
        return datasets.Dataset.from_dict(columns, features=datasets.Features(features))

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = load(name, split)
    assert asked == [(*expected, split)]
    np.testing.assert_array_equal(loaded.images, pixels.reshape(loaded.images.shape))
    assert {key: values.tolist() for key, values in loaded.labels.items()} == {
        column: [0, 1, 1] for column in others
    }
    assert loaded.source == f"{name}, Hugging Face hub {expected[0]}"
    assert not datasets.config.HF_HUB_OFFLINE


def test_every_data_set_with_a_hub_id_is_tried_above():
    with_hub = {name for name, origin in images.ORIGINS.items() if origin.hub}
    assert with_hub == {"mnist", "cifar10", "stl10", "celeba", "ffhq", "fairface"}


def test_hub_that_never_answers_gives_an_error_within_seconds(snapshot, monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    monkeypatch.setattr(images, "HUB_TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", endpoint)
        start = time.perf_counter()
        with pytest.raises(DataError) as caught:
            load("mnist")
    assert time.perf_counter() - start < 5
    message = str(caught.value)
    assert "put train*.parquet into $BOOK_DATA/mnist" in message and str(tmp_path) in message
    assert "go online" in message and "ylecun/mnist" in message and "ConnectionError" in message
    assert "\n" not in message
    assert not datasets.config.HF_HUB_OFFLINE


def test_data_without_a_hub_copy_names_the_folder(monkeypatch):
    monkeypatch.delenv("BOOK_DATA", raising=False)
    message = r"put train\*\.parquet into \$BOOK_DATA/lfw64 \(BOOK_DATA is not set\)"
    with pytest.raises(DataError, match=message):
        load("lfw64")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("imagenet",), r"no data set 'imagenet'; the known ones are digits, avatars, mnist, cif"),
        (("mnist", "valid"), r"mnist has no split 'valid'; it has train, test"),
        (("digits", "valid"), r"digits has no split 'valid'; it has train, test"),
        (("mnist", "train", 0), r"at least 1, not 0"),
        (("mnist", "train", 32.0), r"at least 1, not 32\.0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(DataError, match=message):
        load(*arguments)


def test_images_of_different_sizes_need_a_size(snapshot):
    import datasets

    mixed = pictures(noise(1, 8, 8, 3)) + pictures(noise(1, 9, 8, 3))
    snapshot("ffhq/train-0.parquet", {"image": mixed}, {"image": datasets.Image()})
    with pytest.raises(DataError, match=r"Image 1 of ffhq-train has the shape \(9, 8, 3\)"):
        load("ffhq")
    assert load("ffhq", size=8).images.shape == (2, 8, 8, 3)


def test_grey_pictures_in_a_colour_set_get_three_equal_channels(snapshot):
    import datasets

    grey = noise(2, 8, 8)
    snapshot("ffhq/train-0.parquet", {"image": pictures(grey)}, {"image": datasets.Image()})
    loaded = load("ffhq")
    np.testing.assert_array_equal(loaded.images, np.repeat(grey[..., None], 3, axis=3))
    assert loaded.labels == {}


def test_damaged_snapshots_say_what_is_wrong(snapshot):
    import datasets

    broken = [{"bytes": b"no picture", "path": None}]
    snapshot("ffhq/train-0.parquet", {"image": broken}, {"image": datasets.Image()})
    with pytest.raises(DataError, match="Image 0 of ffhq-train cannot be decoded"):
        load("ffhq")
    _, path = write_mnist(snapshot)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"mnist/train\*\.parquet cannot be read"):
        load("mnist")
    snapshot("cifar10/train-0.parquet", {"label": [1]}, {"label": datasets.Value("int64")})
    with pytest.raises(DataError, match="no image column 'img'; it has label"):
        load("cifar10")
    snapshot("stl10/train-0.parquet", {"image": [], "label": []}, hub_features("stl10"))
    with pytest.raises(DataError, match="stl10-train holds no images"):
        load("stl10")


def cached_file() -> Path:
    (path,) = Path(os.environ["XDG_CACHE_HOME"], "forgetting-book").glob("*.npy")
    return path


def test_second_load_does_not_decode(snapshot, monkeypatch):
    write_mnist(snapshot)
    before = load("mnist")
    monkeypatch.setattr(images, "_decode_all", None)
    np.testing.assert_array_equal(load("mnist").images, before.images)


def test_changed_snapshot_is_not_served_from_the_old_cache(snapshot):
    write_mnist(snapshot)
    load("mnist")
    changed = noise(7, 28, 28, seed=1)
    columns = {"image": pictures(changed), "label": [0] * 7}
    snapshot("mnist/train-00000-of-00001.parquet", columns, mnist_features())
    np.testing.assert_array_equal(load("mnist").images[..., 0], changed)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _other_shape(path: Path) -> None:
    np.save(path, np.zeros((6, 28, 28, 1), np.uint8))


def _other_type(path: Path) -> None:
    np.save(path, np.zeros((7, 28, 28, 1), np.float32))


def _pickled(path: Path) -> None:
    np.save(path, np.array([{"an": "object"}]), allow_pickle=True)


@pytest.mark.parametrize(
    "damage", [_truncate, _lengthen, _empty, _other_shape, _other_type, _pickled]
)
def test_damaged_cache_is_rebuilt(snapshot, damage):
    pixels, _ = write_mnist(snapshot)
    load("mnist")
    sound = cached_file().read_bytes()
    damage(cached_file())
    np.testing.assert_array_equal(load("mnist").images[..., 0], pixels)
    assert cached_file().read_bytes() == sound
    assert len(list(cached_file().parent.iterdir())) == 2  # the array and digests.json


def test_interrupted_decoding_leaves_nothing_behind(snapshot, monkeypatch):
    write_mnist(snapshot)
    decode, calls = images._decode, []

    def stop_at_the_third(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return decode(*arguments)

    monkeypatch.setattr(images, "_decode", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        load("mnist")
    folder = Path(os.environ["XDG_CACHE_HOME"], "forgetting-book")
    assert [path.name for path in folder.iterdir()] == ["digests.json"]


def test_full_disk_is_noticed_before_decoding(snapshot, monkeypatch):
    write_mnist(snapshot)
    monkeypatch.setattr(images.shutil, "disk_usage", lambda _: os.terminal_size)
    monkeypatch.setattr(os.terminal_size, "free", 10, raising=False)
    with pytest.raises(DataError, match="XDG_CACHE_HOME"):
        load("mnist")


def test_digits_give_back_their_levels_and_split_without_overlap():
    from sklearn.datasets import load_digits

    levels, label = load_digits(return_X_y=True)
    train, test = load("digits"), load("digits", "test")
    assert train.images.shape == (1437, 8, 8, 1) and test.images.shape == (360, 8, 8, 1)
    assert train.images.max() == 255 and train.source == "digits, scikit-learn"
    back = np.rint(np.concatenate([train.images, test.images]) / 255 * 16).reshape(-1, 64)
    labels = np.concatenate([train.labels["label"], test.labels["label"]])
    ours = sorted((*row, y) for row, y in zip(back.tolist(), labels.tolist(), strict=True))
    real = sorted((*row, y) for row, y in zip(levels.tolist(), label.tolist(), strict=True))
    assert ours == real
    assert np.bincount(test.labels["label"]).min() >= 25
    # The split is fixed for good: results and references depend on it.
    assert train.labels["label"][:10].tolist() == [2, 8, 2, 6, 6, 7, 1, 9, 8, 5]
    assert load("digits", size=16).images.shape == (1437, 16, 16, 1)
    with pytest.raises(ValueError, match="read-only"):
        train.images[0] = 0


def test_importing_the_data_package_is_cheap():
    code = "import sys, lib.data; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert not {"torch", "datasets", "pyarrow", "PIL", "sklearn", "pandas"} & set(loaded)
