"""One fit loop for every model: accelerate, EMA, checkpoints, exact resume.

A training step is a function ``step_loss(model, generator) -> (total, terms)`` that draws its own
batch and noise with ``generator``. The generator's state is part of the checkpoint, so a resumed
run sees the same batches as one that was never interrupted.
"""

import json
import math
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from lib.checkpoints import CheckpointError, write_atomically

# One pass over all parameters; on a CPU and for small models 4 times as fast as the default.
FUSED_ADAM = partial(torch.optim.Adam, fused=True)

StepLoss = Callable[[nn.Module, torch.Generator], tuple[Tensor, dict[str, Tensor]]]


class TrainingError(RuntimeError):
    """Say in one sentence why training stopped and what to do."""


class Interrupted(KeyboardInterrupt):
    """Say where the checkpoint of an interrupted run is and how to go on."""


@dataclass
class Fit:
    """What a call of :func:`fit` leaves: weights to use, steps made, seconds, terms over time."""

    model: nn.Module
    steps: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


def pick_device(name: str | None = None) -> torch.device:
    """Return the asked device, or CUDA where there is one and the CPU elsewhere.

    Raises: TrainingError if CUDA is asked for and absent.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise TrainingError(
            "CUDA was asked for, but this machine has no usable GPU; use the cpu profile instead."
        )
    return torch.device(name or ("cuda" if available else "cpu"))


def has_fast_bf16(device: torch.device) -> bool:
    """Say whether bf16 autocast pays on the device: on GPUs that have it, on CPUs with AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported()


def cosine(progress: float, warmup: float = 0.04) -> float:
    """Rise from 0 to 1 over the share ``warmup`` of the steps, then fall to 0 along a cosine."""
    return min(1.0, (progress + 1e-4) / warmup) * 0.5 * (1.0 + math.cos(math.pi * progress))


def fit(
    model: nn.Module,
    step_loss: StepLoss,
    *,
    steps: int,
    lr: float,
    generator: torch.Generator,
    device: torch.device | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] = FUSED_ADAM,
    schedule: Callable[[float], float] | None = None,
    ema_decay: float | None = None,
    grad_clip: float | None = None,
    bf16: bool = False,
    checkpoint: Path | None = None,
    checkpoint_every_s: float = 300.0,
    resume: bool = False,
    log_every: int = 100,
    progress: bool = True,
) -> Fit:
    """Minimise ``step_loss`` for ``steps`` steps and return the weights to use.

    ``generator`` must live on ``device``. ``schedule`` maps the share of steps done, in [0, 1), to
    a factor on ``lr``, such as :func:`cosine`. With ``ema_decay`` the returned model holds the
    exponential moving average, else the raw weights. ``bf16`` trains under autocast
    where the device is fast at it; likelihoods that sum many terms are better left in float32.
    With ``checkpoint`` (a file) the state is
    saved every ``checkpoint_every_s`` seconds, at the end, and on Ctrl-C; with ``resume`` a run
    goes on from there, bit for bit on a CPU. Lines of ``history`` hold step and terms.

    Raises: TrainingError if the loss stops being finite (the last checkpoint is kept);
    Interrupted after Ctrl-C; CheckpointError if the checkpoint belongs to other settings.
    """
    device = device or pick_device("cpu")
    precision = "bf16" if bf16 and has_fast_bf16(device) else "no"
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision)
    model.to(device, memory_format=torch.channels_last).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    adam = optimizer(parameters, lr=lr)
    average = None
    if ema_decay is not None:
        average = AveragedModel(
            model, multi_avg_fn=get_ema_multi_avg_fn(ema_decay), use_buffers=True
        )
    state = _State(model, adam, average, generator, Fit(model))
    if resume and checkpoint is not None and checkpoint.is_file():
        state.load(checkpoint, device)
    step_module, prepared = accelerator.prepare(_Step(model, step_loss), adam)

    start = time.perf_counter() - state.fit.seconds
    saved_at = time.perf_counter()
    with _CtrlC() as ctrl_c:
        bar = tqdm(total=steps, initial=state.fit.steps, disable=not progress, mininterval=1.0)
        while state.fit.steps < steps:
            total, terms = step_module(generator)
            step = state.fit.steps
            log_now = step % log_every == 0 or step == steps - 1
            if (log_now or device.type == "cpu") and not math.isfinite(total.item()):
                kept = (
                    f"the checkpoint {checkpoint} is from before"
                    if checkpoint and checkpoint.is_file()
                    else "no checkpoint was written yet"
                )
                raise TrainingError(
                    f"The loss became {total.item()} at step {step}; {kept}; "
                    "lower the learning rate or clip the gradients."
                )
            if schedule is not None:
                for group in adam.param_groups:
                    group["lr"] = lr * schedule(step / steps)
            prepared.zero_grad(set_to_none=True)
            accelerator.backward(total)
            if grad_clip is not None:
                accelerator.clip_grad_norm_(parameters, grad_clip)
            prepared.step()
            if average is not None:
                average.update_parameters(model)
            if log_now:
                line = {"total": total.item(), **{k: float(v) for k, v in terms.items()}}
                state.fit.history.append({"step": step, **line})
                bar.set_postfix(loss=f"{line['total']:.4g}")
            state.fit.steps += 1
            bar.update()
            now = time.perf_counter()
            state.fit.seconds = now - start
            if checkpoint is not None and now - saved_at > checkpoint_every_s:
                state.save(checkpoint)
                saved_at = now
            if ctrl_c.pressed:
                break
        bar.close()
    if checkpoint is not None and state.fit.steps > 0:
        state.save(checkpoint)
    if ctrl_c.pressed:
        where = f"go on with --resume from {checkpoint}" if checkpoint else "nothing was saved"
        raise Interrupted(f"Stopped after step {state.fit.steps} of {steps}; {where}.")
    state.fit.model = (average.module if average is not None else model).eval()
    return state.fit


def trained_seconds(checkpoint: Path) -> float:
    """Return the seconds of training in a checkpoint of :func:`fit`; 0 for any other file."""
    with safe_open(checkpoint, framework="pt") as file:
        metadata = file.metadata() or {}
    return json.loads(metadata["progress"])["seconds"] if "progress" in metadata else 0.0


class _Step(nn.Module):
    """Make the step a ``forward``, which is what accelerate wraps for autocast and sharding."""

    def __init__(self, model: nn.Module, step_loss: StepLoss):
        super().__init__()
        self.model, self.step_loss = model, step_loss

    def forward(self, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        return self.step_loss(self.model, generator)


class _State:
    """Everything a resumed run needs, in one safetensors file."""

    def __init__(self, model, optimizer, average, generator, fit: Fit):
        self.model, self.optimizer, self.average = model, optimizer, average
        self.generator, self.fit = generator, fit

    def tensors(self) -> dict[str, Tensor]:
        found = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        if self.average is not None:
            found |= {f"ema.{k}": v for k, v in self.average.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in moments.items()}
        found["generator"] = self.generator.get_state()
        return {k: v.detach().cpu().clone().contiguous() for k, v in found.items()}

    def save(self, path: Path) -> None:
        if not all(torch.isfinite(p).all() for p in self.model.parameters()):
            raise TrainingError(
                f"The weights are no longer finite after step {self.fit.steps}; nothing was "
                f"written, so {path} (if it exists) is the last good checkpoint."
            )
        progress = {
            "steps": self.fit.steps,
            "seconds": self.fit.seconds,
            "history": self.fit.history,
        }
        write_atomically(path, save(self.tensors(), {"progress": json.dumps(progress)}))

    def load(self, path: Path, device: torch.device) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                progress = json.loads(file.metadata()["progress"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}
            groups: dict[str, dict] = {"model": {}, "ema": {}, "optimizer": {}}
            for key, value in tensors.items():
                if key != "generator":
                    group, _, rest = key.partition(".")
                    groups[group][rest] = value
            self.model.load_state_dict(groups["model"])
            if self.average is not None:
                self.average.load_state_dict(groups["ema"])
            moments: dict[int, dict[str, Tensor]] = {}
            for key, value in groups["optimizer"].items():
                index, name = key.split(".")
                moments.setdefault(int(index), {})[name] = value
            packed = self.optimizer.state_dict()
            self.optimizer.load_state_dict({**packed, "state": moments})
            self.generator.set_state(tensors["generator"])
        except Exception as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"Cannot resume from {path}: {reason}; delete the file to start anew."
            ) from error
        self.fit.steps, self.fit.seconds = progress["steps"], progress["seconds"]
        self.fit.history = progress["history"]


class _CtrlC:
    """Turn the first Ctrl-C into a flag, so that a step is finished and saved; the second kills."""

    def __init__(self):
        self.pressed = False
        self.in_main_thread = threading.current_thread() is threading.main_thread()

    def __enter__(self):
        if self.in_main_thread:
            self.previous = signal.signal(signal.SIGINT, self._press)
        return self

    def _press(self, signum, frame):
        self.pressed = True
        signal.signal(signal.SIGINT, self.previous)

    def __exit__(self, *exception):
        if self.in_main_thread and not self.pressed:
            signal.signal(signal.SIGINT, self.previous)
