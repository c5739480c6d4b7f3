"""Run one config: ``python -m lib.run configs/NAME.yaml --profile cpu [--resume]``.

The one entry point for anything longer than two CPU minutes. Work in progress lives in
``.runs/<name>/<profile>/``; a finished run writes ``results/<name>/<profile>/`` in one go.

On several GPUs, of one machine or more that share a file system:
``accelerate launch -m lib.run configs/NAME.yaml --profile paper``. Each process then draws batches
of the config's size, so that the effective batch is that times the processes, and computes the
rest like the others; the main one alone writes and prints.
"""

import argparse
import functools
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lib import ROOT, distributed
from lib.checkpoints import CheckpointError, load_checkpoint, save_checkpoint, write_atomically
from lib.config import PROFILES, ConfigError, Loaded, current_profile, load_config
from lib.data import DataError
from lib.distributed import ProcessError
from lib.memory import keep_freed_memory
from lib.results import ResultsError, Row, write_results
from lib.train import Interrupted, TrainingError, has_fast_bf16, pick_device, trained_seconds


def seed_everything(seed: int) -> torch.Generator:
    """Seed Python, numpy and torch, and return a CPU generator with the same seed."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


class Run:
    """What an experiment sees of the outside: its device, its folder, and where rows go."""

    def __init__(self, loaded: Loaded, resume: bool = False, runs: Path = ROOT / ".runs"):
        self.name, self.profile = loaded.name, loaded.profile
        self.resolved = {"name": loaded.name, "profile": loaded.profile, **loaded.resolved}
        self.resume = resume
        self.device = distributed.start(device_of(self.profile))
        self.work_dir = runs / self.name / self.profile
        self.work_dir.mkdir(parents=True, exist_ok=True)
        if distributed.is_main():
            for half_written in self.work_dir.glob(".*.tmp"):  # by a process that was killed
                half_written.unlink()
        # Set by an experiment that passes it to fit, so that rows name the precision.
        self.bf16 = False
        self.rows: list[Row] = []
        self._arrays: dict[str, np.ndarray] = {}
        self._figures: dict[str, Any] = {}
        self._clock = self.work_dir / "seconds.json"
        self._start = time.perf_counter() - (self._seconds_before() if resume else 0.0)
        canonical = json.dumps(self.resolved, sort_keys=True, default=str).encode()
        self.config_sha = hashlib.sha256(canonical).hexdigest()[:12]

    def _seconds_before(self) -> float:
        """Return the seconds spent before a resume; a run that was killed wrote no clock."""
        clock = json.loads(self._clock.read_text()) if self._clock.is_file() else 0.0
        return max(
            clock, sum(trained_seconds(path) for path in self.work_dir.glob("*.safetensors"))
        )

    @property
    def seconds(self) -> float:
        """Return the seconds spent on this run, those before a resume included."""
        return time.perf_counter() - self._start

    def generator(self, seed: int) -> torch.Generator:
        """Return a generator on the run's device."""
        return torch.Generator(self.device).manual_seed(seed)

    def checkpoint(self, part: str) -> Path:
        """Return the resumable training file of one part of the run, such as ``seed3``."""
        return self.work_dir / f"{part}.safetensors"

    def part(
        self, name: str, compute: Callable[[], Mapping[str, float | np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """Compute one part of a long run and keep it, so that a resumed run only reads it again.

        Numbers come back as arrays without dimensions.
        """
        path = self.work_dir / f"{name}.npz"
        if not (self.resume and path.is_file()):
            content = io.BytesIO()
            np.savez(content, allow_pickle=False, **compute())
            write_atomically(path, content.getvalue())
            distributed.wait()
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)

    def row(
        self,
        quantity: str,
        values: float | Sequence[float],
        *,
        n_samples: int,
        unit: str,
        data: str,
        seeds: Sequence[int],
        feature_extractor: str | None = None,
        preprocessing: str | None = None,
    ) -> None:
        """Record one quantity: ``values`` is one number a seed, kept as mean and sd (n - 1)."""
        numbers = np.atleast_1d(np.asarray(values, dtype=float))
        if len(numbers) != len(seeds):
            raise ResultsError(
                f"The row {quantity!r} has {len(numbers)} values for {len(seeds)} seeds; "
                "give one value a seed."
            )
        self.rows.append(
            Row(
                quantity=quantity,
                value=float(numbers.mean()),
                sd=float(numbers.std(ddof=1)) if len(numbers) > 1 else None,
                seeds=list(seeds),
                n_samples=n_samples,
                unit=unit,
                data=data,
                feature_extractor=feature_extractor,
                preprocessing=preprocessing,
                device=describe_device(self.device, self.bf16),
                wall_s=round(self.seconds, 1),
                commit=current_commit(),
                config_sha=self.config_sha,
            )
        )

    def arrays(self, **arrays: np.ndarray) -> None:
        """Keep small arrays for the sliders of a chapter."""
        self._arrays |= arrays

    def figure(self, name: str, figure: Any) -> None:
        """Keep a matplotlib figure; at most three a run."""
        self._figures[name] = figure

    def ship(self, name: str, model: nn.Module, arguments: dict[str, Any]) -> nn.Module:
        """Ship a model's weights as fp16 and return the model as a reader will load it.

        Measure on what this returns: the shipped weights are rounded. The smoke profile writes
        into the work folder instead of ``checkpoints/``. The profiles ``gpu`` and ``paper`` add
        their name to the model's: the chapters load the one that two cores can run.
        """
        folder = self.work_dir if self.profile == "smoke" else ROOT / "checkpoints"
        if self.profile in ("gpu", "paper"):
            name = f"{name}_{self.profile}"
        save_checkpoint(
            name, model, arguments, f"{self.name}/{self.profile}", current_commit(), folder
        )
        distributed.wait()
        return load_checkpoint(name, folder).to(self.device)

    def pause_clock(self) -> None:
        """Write the seconds so far, so that a resumed run counts on."""
        write_atomically(self._clock, json.dumps(self.seconds).encode())

    def write(self) -> Path:
        """Write the results; those of the smoke profile go into the work folder."""
        results = self.work_dir / "results" if self.profile == "smoke" else ROOT / "results"
        folder = results / self.name / self.profile
        if distributed.is_main():
            write_results(folder, self.resolved, self.rows, self._arrays, self._figures)
        return folder


def execute(loaded: Loaded, resume: bool = False, runs: Path = ROOT / ".runs") -> Run:
    """Run a loaded config to its end, write its results and return the run."""
    run = Run(loaded, resume, runs)
    seed_everything(0)
    try:
        loaded.experiment.run(loaded.config, run)
    finally:
        run.pause_clock()
    run.write()
    return run


def device_of(profile: str) -> torch.device:
    """Return the device that a profile asks for; the smoke profile takes what there is.

    Raises: TrainingError if it is a GPU and there is none.
    """
    return pick_device({"cpu": "cpu", "gpu": "cuda", "paper": "cuda"}.get(profile))


def describe_device(device: torch.device, bf16: bool = False) -> str:
    """Name the devices of all processes and the precision, as in ``2 CPU cores, float32``."""
    precision = "bf16" if bf16 and has_fast_bf16(device) else "float32"
    n_processes = distributed.n_processes()
    if device.type == "cuda":
        times = f"{n_processes} × " if n_processes > 1 else ""
        return f"{times}{torch.cuda.get_device_name(device)}, {precision}"
    cores = n_processes * torch.get_num_threads()
    return f"{cores} CPU core{'s' if cores > 1 else ''}, {precision}"


@functools.cache
def current_commit() -> str:
    """Return the short commit of the checkout, marked where there are uncommitted changes."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).strip()

    try:
        commit, changed = git("rev-parse", "--short=10", "HEAD"), git("status", "-s", "lib")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+changes" if changed else "")


def _end_with_a_sentence(signum, frame) -> None:
    """Answer the launcher, which ends all processes of this machine when one of them fails.

    A process that noticed the loss itself is on its way to a sentence, and goes on.
    """
    signal.signal(signum, signal.SIG_IGN)
    if sys.exc_info()[0] is not None:
        return
    raise ProcessError(
        f"Process {distributed.rank()} was told to end, as the launcher does when another process "
        "failed or was killed; see what that one said, and go on with --resume."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line; print one sentence instead of a traceback for known errors."""
    status = _main(arguments)
    if distributed.n_processes() > 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # nothing is left to say
        if status == 0:
            distributed.stop()
    return status


def _main(arguments: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lib.run", description=__doc__)
    parser.add_argument("config", help="a name such as toy_taming, or its file in configs/")
    parser.add_argument("--profile", choices=PROFILES, help="default: BOOK_PROFILE, else cpu")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    n_local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes on this machine
    parser.add_argument(
        "--threads",
        type=int,
        default=max(1, (os.cpu_count() or 1) // n_local),
        help="CPU threads of a process",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=distributed.TIMEOUT_S,
        help="seconds after which a process gives up waiting for another",
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    try:
        loaded = load_config(Path(options.config).stem, options.profile or current_profile())
        distributed.start(device_of(loaded.profile), options.timeout)
        if distributed.n_processes() > 1:
            signal.signal(signal.SIGTERM, _end_with_a_sentence)
        run = execute(loaded, options.resume)
    except (
        CheckpointError,
        ConfigError,
        DataError,
        ProcessError,
        ResultsError,
        TrainingError,
    ) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except Interrupted as stop:
        if distributed.is_main():
            print(stop, file=sys.stderr)
        return 130
    for row in run.rows if distributed.is_main() else ():
        spread = "" if row.sd is None else f" ± {row.sd:.3g}"
        print(f"{row.quantity:40s} {row.value:.6g}{spread} {row.unit}")
    if distributed.is_main():
        print(f"{loaded.name} ({run.profile}) took {run.seconds:.0f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
