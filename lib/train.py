"""One fit loop for every model: accelerate, EMA, checkpoints, exact resume, several processes.

A training step is a function ``step_loss(model, generator) -> (total, terms)`` that draws its own
batch and noise with ``generator``. The generator's state is part of the checkpoint, so a resumed
run sees the same batches as one that was never interrupted.
A step may average several such batches, also over several processes: see :mod:`lib.streams`.
"""

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from lib import distributed
from lib.checkpoints import CheckpointError, write_atomically
from lib.distributed import ProcessError
from lib.streams import Batches, Streams

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
    """Return the asked kind of device, or CUDA where there is one and the CPU elsewhere.

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
    streams: int | None = None,
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

    A step minimises the mean of ``step_loss`` over ``streams`` batches. By default they are as
    many as the processes, so that the effective batch grows with them; a checkpoint keeps its
    number. All processes call this function with equal arguments, begin with the weights of the
    main one, see the checkpoint on a shared file system, and return the same; the main one writes.

    Raises: TrainingError if the loss stops being finite (the last checkpoint is kept), a process
    is lost, or there are fewer streams than processes; Interrupted after Ctrl-C; CheckpointError
    if the checkpoint belongs to other settings.
    """
    device = distributed.start(device or pick_device("cpu"))
    precision = "bf16" if bf16 and has_fast_bf16(device) else "no"
    # A parameter may be without gradient in a step; PyTorch warns once where none is.
    sharding = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(
        cpu=device.type == "cpu", mixed_precision=precision, kwargs_handlers=[sharding]
    )
    model.to(device, memory_format=torch.channels_last).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    adam = optimizer(parameters, lr=lr)
    distributed.copy_from_main(model.state_dict().values())
    average = None
    if ema_decay is not None:
        average = AveragedModel(
            model, multi_avg_fn=get_ema_multi_avg_fn(ema_decay), use_buffers=True
        )
    state = _State(model, adam, average, Streams(generator), Fit(model))
    resumed = resume and checkpoint is not None and checkpoint.is_file()
    if resumed:
        state.load(checkpoint, device)
    state.open_streams(streams, resumed)

    begun, pressed = state.fit.steps, False
    hidden = not progress or not distributed.is_main()
    start = time.perf_counter() - state.fit.seconds
    saved_at = time.perf_counter()
    with _CtrlC() as ctrl_c, _sentence_for_lost_processes(state, checkpoint):
        state.compare()
        step_module, prepared = accelerator.prepare(_Step(model, step_loss), adam)
        batches = Batches(accelerator, step_module, model, state.streams)
        bar = tqdm(total=steps, initial=begun, disable=hidden, mininterval=1.0)
        while state.fit.steps < steps and not pressed:
            step = state.fit.steps
            log_now = step % log_every == 0 or step == steps - 1
            prepared.zero_grad(set_to_none=True)
            batches.backward(step)
            # Reading the loss waits for the device, so that on a GPU it is not done every step.
            loss = batches.loss() if log_now or device.type == "cpu" else 0.0
            save_now = (
                checkpoint is not None and time.perf_counter() - saved_at > checkpoint_every_s
            )
            asked = [loss, ctrl_c.pressed, save_now and distributed.is_main()]
            loss, pressed, save_now = distributed.total(asked)
            if not math.isfinite(loss):
                kept = (
                    f"the checkpoint {checkpoint} is from before"
                    if checkpoint and checkpoint.is_file()
                    else "no checkpoint was written yet"
                )
                raise TrainingError(
                    f"The loss became {loss} at step {step}; {kept}; "
                    "lower the learning rate or clip the gradients."
                )
            if schedule is not None:
                for group in adam.param_groups:
                    group["lr"] = lr * schedule(step / steps)
            if grad_clip is not None:
                accelerator.clip_grad_norm_(parameters, grad_clip)
            prepared.step()
            if average is not None:
                average.update_parameters(model)
            if log_now:
                state.fit.history.append({"step": step, "total": loss, **batches.terms()})
                bar.set_postfix(loss=f"{loss:.4g}")
            state.fit.steps += 1
            bar.update()
            if step == begun:
                state.compare()
            state.fit.seconds = time.perf_counter() - start
            if save_now:
                state.save(checkpoint)
                saved_at = time.perf_counter()
        bar.close()
        (pressed,) = distributed.total([ctrl_c.pressed])
        if checkpoint is not None and state.fit.steps > 0:
            state.save(checkpoint)
        state.streams.gather()  # the caller may go on with the first one
    if pressed:
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


@contextmanager
def _sentence_for_lost_processes(state: "_State", checkpoint: Path | None) -> Iterator[None]:
    try:
        with distributed.noticing_lost_processes():
            yield
    except ProcessError as error:
        saved = checkpoint is not None and checkpoint.is_file()
        kept = f"{checkpoint} is the last checkpoint" if saved else "no checkpoint was written yet"
        raise TrainingError(f"Stopped after step {state.fit.steps}; {kept}. {error}") from error


class _State:
    """Everything a resumed run needs, in one safetensors file."""

    def __init__(self, model, optimizer, average, streams: Streams, fit: Fit):
        self.model, self.optimizer, self.average = model, optimizer, average
        self.streams, self.fit = streams, fit

    def open_streams(self, streams: int | None, resumed: bool) -> None:
        """Open as many streams as are asked for or as there are processes; a checkpoint has some.

        Raises: CheckpointError or TrainingError if the numbers do not go together.
        """
        n_processes = distributed.n_processes()
        if not resumed:
            self.streams.open(streams or n_processes)
        n_streams = len(self.streams)
        if streams not in (None, n_streams):
            raise CheckpointError(
                f"The checkpoint has {n_streams} streams and {streams} are asked for; resume "
                "without saying how many, or delete the file to start anew."
            )
        if n_streams < n_processes:
            raise TrainingError(
                f"A step draws from {n_streams} stream{'s' if n_streams > 1 else ''}, too few for "
                f"{n_processes} processes; start at most one process a stream, or begin anew "
                "without --resume."
            )

    def compare(self) -> None:
        """Check that all processes have made the same steps to the same weights and averages.

        Raises: TrainingError if not.
        """
        tensors = [*self.model.state_dict().values()]
        if self.average is not None:
            tensors += self.average.state_dict().values()
        if distributed.n_processes() > 1 and not distributed.agree(
            hash((self.fit.steps, distributed.fingerprint(tensors)))
        ):
            raise TrainingError(
                f"The processes differ in their steps or weights (here after step {self.fit.steps})"
                "; initialise the model before fit, from the seed alone, and keep .runs on a file "
                "system that all machines share."
            )

    def tensors(self) -> dict[str, Tensor]:
        found = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        if self.average is not None:
            found |= {f"ema.{k}": v for k, v in self.average.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in moments.items()}
        for stream, value in enumerate(self.streams.states()):
            found[f"generator.{stream}" if stream else "generator"] = value
        return {k: v.detach().cpu().clone().contiguous() for k, v in found.items()}

    def save(self, path: Path) -> None:
        self.streams.gather()
        if not all(torch.isfinite(p).all() for p in self.model.parameters()):
            raise TrainingError(
                f"The weights are no longer finite after step {self.fit.steps}; nothing was "
                f"written, so {path} (if it exists) is the last good checkpoint."
            )
        if distributed.is_main():
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
            groups: dict[str, dict] = {"model": {}, "ema": {}, "optimizer": {}, "generator": {}}
            for key, value in tensors.items():
                group, _, rest = key.partition(".")
                groups[group][rest] = value
            self.model.load_state_dict(groups["model"])
            if self.average is not None:
                self.average.load_state_dict(groups["ema"])
            moments: dict[int, dict[str, Tensor]] = {}
            for key, value in groups["optimizer"].items():
                index, name = key.split(".")
                moments.setdefault(int(index), {})[name] = value
            # The fused kernels walk over memory: moments must lie as their channels_last weights.
            weights = [w for group in self.optimizer.param_groups for w in group["params"]]
            for index, named in moments.items():
                for name, value in named.items():
                    if value.shape == weights[index].shape:
                        like = torch.empty_like(weights[index], dtype=value.dtype)
                        named[name] = like.copy_(value)
            packed = self.optimizer.state_dict()
            self.optimizer.load_state_dict({**packed, "state": moments})
            states = groups["generator"]
            self.streams.set_states([states[str(n) if n else ""] for n in range(len(states))])
        except Exception as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"Cannot resume from {path}: {reason}; delete the file to start anew."
            ) from error
        self.fit.steps, self.fit.seconds = progress["steps"], progress["seconds"]
        self.fit.history = progress["history"]


class _CtrlC:
    """Turn the first Ctrl-C into a flag, so that a step is finished and saved; the second kills.

    With several processes no later one kills, since the launcher passes on the one that they all
    got from the terminal.
    """

    def __init__(self):
        self.pressed = False
        self.in_main_thread = threading.current_thread() is threading.main_thread()

    def __enter__(self):
        if self.in_main_thread:
            self.previous = signal.signal(signal.SIGINT, self._press)
        return self

    def _press(self, signum, frame):
        self.pressed = True
        if distributed.n_processes() == 1:
            signal.signal(signal.SIGINT, self.previous)

    def __exit__(self, *exception):
        if self.in_main_thread and not self.pressed:
            signal.signal(signal.SIGINT, self.previous)
