"""Small shipped weights: fp16 safetensors and a manifest with their sha256."""

import hashlib
import importlib
import os
import shutil
import textwrap
from collections.abc import Callable
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


def ship_folder(
    save_into: Callable[[Path], object], folder: Path, run: str, commit: str
) -> dict[str, dict]:
    """Ship a model that is a folder of files, with a manifest of their sha256 inside.

    ``save_into`` writes the files into the folder that it is given, which takes the place of
    ``folder`` once all of them are there. Returns the manifest.

    Raises: CheckpointError if one of the files would be larger than 16 MiB.
    """
    half_written = folder.with_name(f".{folder.name}.{os.getpid()}.half")
    try:
        half_written.mkdir(parents=True)
        save_into(half_written)
        files = {}
        for path in sorted(path for path in half_written.rglob("*") if path.is_file()):
            content = path.read_bytes()
            if len(content) > MAX_BYTES:
                raise CheckpointError(
                    f"The file {path.name} of {folder.name!r} has {len(content)} bytes, more than "
                    f"the {MAX_BYTES} that may be shipped; make the model smaller or split it."
                )
            name = path.relative_to(half_written).as_posix()
            files[name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        manifest = {"files": files, "run": run, "commit": commit}
        write_atomically(half_written / "manifest.yaml", yaml.safe_dump(manifest).encode())
        shutil.rmtree(folder, ignore_errors=True)
        half_written.rename(folder)
    finally:
        shutil.rmtree(half_written, ignore_errors=True)
    return manifest


def verify_folder(folder: Path) -> None:
    """Compare the files of a shipped folder with its manifest.

    Raises: CheckpointError if the manifest or a file is absent, or a file is damaged.
    """
    again = f"get it again with 'git checkout {folder.name}' or 'make run RUN={folder.name}'"
    manifest = _manifest(folder)
    if not manifest:
        raise CheckpointError(f"The checkpoint {folder} has no manifest.yaml; {again}.")
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"The checkpoint's file {path} is missing; {again}.")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != entry["sha256"]:
            raise CheckpointError(
                f"The checkpoint's file {path} has sha256 {digest[:12]}…, the manifest wants "
                f"{entry['sha256'][:12]}…: it is damaged or of another version; {again}."
            )


def _manifest(folder: Path) -> dict[str, dict]:
    path = folder / "manifest.yaml"
    return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.is_file() else {}
