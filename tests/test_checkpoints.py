"""Shipped weights: what is saved comes back, and damage is noticed before use."""

import pytest
import torch
import yaml

from lib import ROOT
from lib.checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from lib.models.realnvp import RealNVP

ARGUMENTS = {"dim": 2, "n_layers": 2, "hidden": 4}


def ship(folder, **arguments):
    torch.manual_seed(0)
    flow = RealNVP(**{**ARGUMENTS, **arguments})
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_checkpoint("flow", flow, {**ARGUMENTS, **arguments}, "flow/cpu", "abc", folder)
    return flow


def test_weights_come_back_rounded_to_fp16(tmp_path):
    flow = ship(tmp_path)
    loaded = load_checkpoint("flow", tmp_path)
    assert not loaded.training
    for a, b in zip(flow.parameters(), loaded.parameters(), strict=True):
        assert b.dtype == torch.float32
        assert torch.equal(a.half().float(), b)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["flow.safetensors", "manifest.yaml"]


def test_an_unknown_name_lists_the_known(tmp_path):
    ship(tmp_path)
    with pytest.raises(CheckpointError, match=r"no checkpoint named 'flaw'; shipped are: flow"):
        load_checkpoint("flaw", tmp_path)


def test_one_flipped_byte_is_noticed(tmp_path):
    ship(tmp_path)
    path = tmp_path / "flow.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged or of another version"):
        load_checkpoint("flow", tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"is missing; get it again with"):
        load_checkpoint("flow", tmp_path)


def test_weights_of_another_architecture_are_refused(tmp_path):
    ship(tmp_path)
    manifest = yaml.safe_load((tmp_path / "manifest.yaml").read_text())
    manifest["flow"]["arguments"]["hidden"] = 8
    (tmp_path / "manifest.yaml").write_text(yaml.safe_dump(manifest))
    with pytest.raises(CheckpointError, match="do not fit RealNVP"):
        load_checkpoint("flow", tmp_path)


def test_too_large_a_file_is_refused_and_not_written(tmp_path):
    with pytest.raises(CheckpointError, match="more than the 16777216 that may be shipped"):
        ship(tmp_path, hidden=2100, n_layers=2)
    assert not list(tmp_path.iterdir())


def test_every_shipped_checkpoint_loads_and_none_is_unlisted():
    folder = ROOT / "checkpoints"
    manifest_file = folder / "manifest.yaml"
    manifest = yaml.safe_load(manifest_file.read_text()) if manifest_file.is_file() else {}
    files = {path.name for path in folder.glob("*.safetensors")}
    assert files == {entry["file"] for entry in manifest.values()}
    for name in manifest:
        load_checkpoint(name)
