"""Small shipped weights: fp16 safetensors and a manifest with their sha256."""

import hashlib
import importlib
import os
import textwrap
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load, save
from torch import nn

from lib import ROOT, distributed

MAX_BYTES = 16 * 2**20


class CheckpointError(RuntimeError):
    """Say in one sentence what is wrong with a checkpoint and what to do."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` to a temporary name beside ``path``, then rename it.

    Of several processes only the main one writes; see :mod:`lib.distributed`.
    """
    if not distributed.is_main():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(
    name: str,
    model: nn.Module,
    arguments: dict[str, Any],
    run: str,
    commit: str,
    folder: Path = ROOT / "checkpoints",
) -> Path:
    """Ship a model's weights as fp16 and enter them into the manifest.

    ``arguments`` are the keyword arguments that build the model's class again; ``run`` names the
    run that trained it as ``name/profile``.

    Raises: CheckpointError if the file would be larger than 16 MiB.
    """
    half = {
        key: value.detach()
        .cpu()
        .contiguous()
        .to(torch.float16 if value.is_floating_point() else None)
        for key, value in model.state_dict().items()
    }
    content = save(half)
    if len(content) > MAX_BYTES:
        raise CheckpointError(
            f"The checkpoint {name!r} has {len(content)} bytes, more than the {MAX_BYTES} that "
            "may be shipped; make the model smaller or split it."
        )
    path = folder / f"{name}.safetensors"
    write_atomically(path, content)
    manifest = _manifest(folder)
    manifest[name] = {
        "file": path.name,
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "model": f"{type(model).__module__}.{type(model).__qualname__}",
        "arguments": arguments,
        "run": run,
        "commit": commit,
    }
    text = yaml.safe_dump(manifest, sort_keys=True, allow_unicode=True)
    write_atomically(folder / "manifest.yaml", text.encode())
    return path


def load_checkpoint(name: str, folder: Path = ROOT / "checkpoints") -> nn.Module:
    """Build a shipped model in float32, in evaluation mode.

    Raises: CheckpointError if the name is unknown, the file is absent or damaged,
    or its weights do not fit the model.
    """
    manifest = _manifest(folder)
    if name not in manifest:
        known = ", ".join(sorted(manifest)) or "none yet"
        raise CheckpointError(f"There is no checkpoint named {name!r}; shipped are: {known}.")
    entry = manifest[name]
    path = folder / entry["file"]
    again = f"get it again with 'git checkout {path.name}' or 'make run RUN={name}'"
    if not path.is_file():
        raise CheckpointError(f"The checkpoint {path} is missing; {again}.")
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != entry["sha256"]:
        raise CheckpointError(
            f"The checkpoint {path} has sha256 {digest[:12]}…, the manifest wants "
            f"{entry['sha256'][:12]}…: the file is damaged or of another version; {again}."
        )
    module, _, class_name = entry["model"].rpartition(".")
    model = getattr(importlib.import_module(module), class_name)(**entry["arguments"])
    try:
        model.load_state_dict(load(content))
    except RuntimeError as error:
        reason = textwrap.shorten(str(error), 300)  # a large model's names fill a screen
        raise CheckpointError(
            f"The weights in {path} do not fit {class_name}({entry['arguments']}): {reason}"
        ) from None
    return model.float().eval()


def _manifest(folder: Path) -> dict[str, dict]:
    path = folder / "manifest.yaml"
    return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.is_file() else {}
