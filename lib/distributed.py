"""Several processes that make one run: who they are, and what they compute together.

``accelerate launch -m lib.run ...`` starts them, on one machine or several that share a file
system. In a single process every function here returns what it got and costs nothing.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT_S = 600.0

# A group on CPUs beside that of the devices, so that flags are exchanged without waiting for a
# GPU, and a partner that ends is noticed at once.
_control: dist.ProcessGroup | None = None


class ProcessError(RuntimeError):
    """Say in one sentence what is wrong with the processes of a run and what to do."""


def start(device: torch.device, timeout_s: float = TIMEOUT_S) -> torch.device:
    """Join the processes that were launched together and return the device of this one.

    One process returns ``device``, and so does a second call. A process that waits longer than
    ``timeout_s`` for another gives up with a ProcessError.

    Raises: ProcessError if there are more processes than GPUs.
    """
    global _control
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        from accelerate import PartialState

        local, n_gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if device.type == "cuda" and local >= n_gpus:
            raise ProcessError(
                f"This machine has {n_gpus} GPUs and at least {local + 1} processes; start one a "
                "GPU, with accelerate launch --num_processes."
            )
        timeout = timedelta(seconds=timeout_s)
        PartialState(cpu=device.type == "cpu", timeout=timeout)
        _control = dist.new_group(backend="gloo", timeout=timeout)
    if n_processes() > 1 and device.type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return device


def stop() -> None:
    """Leave the other processes; the last call of a run that ended well."""
    if dist.is_initialized():
        dist.destroy_process_group()


def n_processes() -> int:
    """Return the number of processes of this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Say whether this is the process that writes files and prints."""
    return rank() == 0


def wait() -> None:
    """Wait until all processes are here, and see what the main one has written."""
    total([0.0])


def total(values: Sequence[float]) -> list[float]:
    """Add numbers up over the processes, in float64 on the CPU."""
    if n_processes() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    with noticing_lost_processes():
        dist.all_reduce(sums, group=_control)
    return sums.tolist()


def copy_from_main(tensors: Iterable[Tensor]) -> None:
    """Replace tensors, where they are, by those of the main process."""
    if n_processes() == 1:
        return
    for tensor in tensors:
        bits = tensor.detach().clone().flatten().view(torch.uint8)
        with noticing_lost_processes():
            dist.broadcast(bits, 0, group=_group_of(bits))
        with torch.no_grad():
            tensor.copy_(bits.view(tensor.dtype).view(tensor.shape))


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replace tensors of one type, where they are, by their sums over the processes."""
    if n_processes() == 1 or not tensors:
        return
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    with noticing_lost_processes():
        dist.all_reduce(flat, group=_group_of(flat))
    parts = flat.split([tensor.numel() for tensor in tensors])
    with torch.no_grad():
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))


def average(tensors: Sequence[Tensor]) -> None:
    """Replace tensors of one type, where they are, by their means over the processes."""
    if n_processes() > 1:
        add_up(tensors)
        with torch.no_grad():
            for tensor in tensors:
                tensor.div_(n_processes())


def by_share(per_row: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Compute a function of rows, each process on its share, and return it for all rows.

    The result is the same in every process, bit for bit, so that they take the same decisions.

    Shapes: ``x`` (n, ...), the same in every process; ``per_row`` maps (m, ...) to (m,).
    """
    if n_processes() == 1:
        return per_row(x)
    found = x.new_zeros(len(x))
    own = torch.arange(len(x), device=x.device).tensor_split(n_processes())[rank()]
    if len(own):
        found[own] = per_row(x[own])
    add_up([found])
    return found


def fingerprint(tensors: Iterable[Tensor]) -> int:
    """Return a number that is the same for equal tensors, and otherwise hardly ever."""
    found = 0
    for tensor in tensors:
        whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        bits = tensor.detach().contiguous().view(whole[tensor.element_size()])
        found = hash((found, int(bits.sum(dtype=torch.int64))))
    return found


def agree(number: int) -> bool:
    """Say whether all processes gave the same number."""
    if n_processes() == 1:
        return True
    lowest = torch.tensor([number, -number])
    with noticing_lost_processes():
        dist.all_reduce(lowest, dist.ReduceOp.MIN, group=_control)
    return int(lowest[0]) == -int(lowest[1])


def _group_of(tensor: Tensor) -> dist.ProcessGroup | None:
    return _control if tensor.device.type == "cpu" else None


@contextmanager
def noticing_lost_processes() -> Iterator[None]:
    """Turn the error of a collective, whose partner ended or did not come, into a sentence.

    Raises: ProcessError.
    """
    try:
        yield
    except ProcessError:
        raise
    except RuntimeError as error:
        broken = isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)
        if n_processes() == 1 or not broken:
            raise
        reason = " ".join(str(error).split())
        raise ProcessError(
            f"Process {rank()} lost another process of this run, which was killed, failed, or kept "
            f"all waiting too long ({reason:.120}); see what it said, and go on with --resume."
        ) from error
