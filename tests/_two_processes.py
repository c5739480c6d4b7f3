"""What the two processes of test_distributed.py do; the test does the same in one process.

``python _two_processes.py checks FOLDER`` goes through all checks, each process writes what it
found into ``FOLDER/found<rank>.json``, and at last the second process kills itself. With ``run``
instead it is ``python -m lib.run`` on a config that is long enough to be killed.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from lib import distributed
from lib import run as lib_run
from lib.checkpoints import write_atomically
from lib.config import load_config
from lib.methods.fisher import diagonal_fisher
from lib.methods.taming import TamingSettings, tame
from lib.models.cvae import ConditionalVAE
from lib.models.glow import dequantise
from lib.models.realnvp import RealNVP
from lib.train import Fit, Interrupted, TrainingError, fit

STEPS = 6
RUN = "glow_celeba128"


def build(seed: int = 0) -> nn.Module:
    """Build a model with what makes sharding hard: batch norm, dropout, and an unused parameter."""
    torch.manual_seed(seed)
    # Straight before batch norm a bias would have no gradient but rounding, which Adam enlarges.
    layers = nn.Linear(16, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1)
    model = nn.Sequential(nn.Flatten(), *layers)
    model.register_parameter("unused", nn.Parameter(torch.ones(3)))
    model.register_buffer("passes", torch.zeros((), dtype=torch.int64))
    return model


class Draws:
    """A step that notes what it drew: the pictures' numbers, and the noise that was added."""

    def __init__(self, then: Callable[[nn.Module, int], Tensor | None] = lambda model, call: None):
        levels = torch.Generator().manual_seed(5)
        self.images = torch.randint(256, (64, 1, 4, 4), generator=levels, dtype=torch.uint8)
        self.index, self.noise, self.then = [], [], then

    def __call__(self, model: nn.Module, generator: torch.Generator):
        index = torch.randint(len(self.images), (8,), generator=generator)
        x = dequantise(self.images[index], 5, generator)
        self.index.append(index.tolist())
        self.noise.append(((x + 0.5) * 32 % 1).flatten().tolist())
        model.passes += 1
        loss = (model(x) - x.mean((1, 2, 3))[:, None]).square().mean()
        extra = self.then(model, len(self.index))
        return loss if extra is None else loss * extra, {"error": loss.detach().sqrt()}


def train(
    path: Path | None, steps: int = STEPS, draws: Draws | None = None, seed: int = 1, **options
) -> tuple[Fit, nn.Module]:
    """Fit :func:`build`'s model."""
    model = options.pop("model", None) or build()
    generator = torch.Generator().manual_seed(seed)
    settings = {"lr": 1e-2, "ema_decay": 0.5, "grad_clip": 1.0, "log_every": 1, "progress": False}
    step_loss = draws or Draws()
    settings |= {"generator": generator, "checkpoint": path, **options}
    return fit(model, step_loss, steps=steps, **settings), model


def fisher() -> tuple[dict[str, Tensor], int]:
    """Compute the Fisher information of a small VAE; say how many samples this process took."""
    torch.manual_seed(0)
    model = ConditionalVAE((1, 4, 4), 10, hidden=(8, 8), latent_dim=2)
    x, c, noise = torch.rand(50, 1, 4, 4), torch.randint(10, (50,)), torch.randn(50, 2)
    taken = []

    def loss(model, x, c, noise):
        taken.append(len(x))
        return model.elbo_from_noise(x, c, noise)

    batches = zip(x.split(20), c.split(20), noise.split(20), strict=True)
    return diagonal_fisher(model, loss, batches), sum(taken)


def taming() -> tuple[list[dict[str, float]], int]:
    """Tame a small flow; return the terms of its steps, and how many rows went through it."""
    torch.manual_seed(0)
    flow, seen = RealNVP(2, 2, 8), []
    for parameter in flow.parameters():
        nn.init.normal_(parameter, std=0.3)
    generator = torch.Generator().manual_seed(3)
    forget, remember = torch.randn(3, 2, generator=generator), torch.randn(41, 2)
    settings = TamingSettings(max_steps=12, lr=1e-3, refresh_every=4, statistics_images=31)

    def nll(model: RealNVP, x: Tensor) -> Tensor:
        seen.append(len(x))
        return -model.log_prob(x)

    def noisy(x: Tensor, generator: torch.Generator) -> Tensor:
        return x + 0.1 * torch.rand(x.shape, generator=generator)

    steps = tame(flow, forget, remember, nll, settings, generator, prepare=noisy)
    return [terms for _, terms in steps], sum(seen)


def sentence(action: Callable[[], object]) -> str:
    """Return the message of the error that an action must raise."""
    try:
        action()
    except (TrainingError, Interrupted) as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("no error was raised")


def on_rank(rank: int, call: int, action: Callable[[], Tensor | None]):
    """Do something in one process at its ``call``-th batch."""
    return lambda model, at: action() if at == call and distributed.rank() == rank else None


def own_start(model: nn.Module, call: int) -> None:
    """Initialise the weights on the first batch, as a model should not do inside fit."""
    if call == 1:
        with torch.no_grad():
            model[1].bias.fill_(float(distributed.rank()))


def checks(folder: Path) -> dict:
    """Go through all checks that need two processes and return the findings of this one."""
    distributed.start(torch.device("cpu"), timeout_s=60)
    draws = Draws()
    whole, model = train(folder / "whole.safetensors", draws=draws)
    found = {
        "history": whole.history,
        "index": draws.index,
        "noise": draws.noise,
        "weights": distributed.fingerprint(model.state_dict().values()),
        "average": distributed.fingerprint(whole.model.state_dict().values()),
        "passes": int(model.passes),
    }
    train(folder / "half.safetensors", steps=STEPS // 2)
    resumed, _ = train(folder / "one.safetensors", seed=99, resume=True)
    found["resumed"] = resumed.history
    # The processes begin with weights of their own, which fit replaces by those of the first.
    other, model = train(None, model=build(distributed.rank()))
    found["started_apart"] = other.history
    found["started_apart_weights"] = distributed.fingerprint(model.state_dict().values())

    values, found["fisher_samples"] = fisher()
    found["fisher"] = {name: value.tolist() for name, value in values.items()}
    found["taming"], found["taming_rows"] = taming()

    found["own_start"] = sentence(lambda: train(None, draws=Draws(own_start)))
    nan = Draws(on_rank(1, 3, lambda: torch.tensor(float("nan"))))
    found["nan"] = sentence(lambda: train(folder / "nan.safetensors", draws=nan))
    found["few"] = sentence(lambda: train(folder / "single.safetensors", resume=True))
    press = Draws(on_rank(1, 2, lambda: os.kill(os.getpid(), signal.SIGINT)))
    found["ctrl_c"] = sentence(lambda: train(folder / "ctrl_c.safetensors", draws=press))

    run = lib_run.execute(load_config(RUN, "smoke"), runs=folder / "runs")
    found["rows"] = {row.quantity: row.value for row in run.rows if row.unit != "s"}
    found["device"] = run.rows[0].device
    write_atomically(folder / f"written_by_{distributed.rank()}", b"")

    return found


def killed(folder: Path) -> dict:
    """Train until the second process kills itself; return what the first one says about it."""
    die = Draws(on_rank(1, 4, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    start, path = time.perf_counter(), folder / "killed.safetensors"
    said = sentence(lambda: train(path, draws=die, checkpoint_every_s=0.0))
    return {"killed": said, "killed_after_s": time.perf_counter() - start}


def long_run(folder: Path) -> int:
    """Run a config under a launcher; the second process kills itself after the first checkpoint."""

    def load(name: str, profile: str):
        loaded = load_config(name, profile)
        return replace(loaded, config=replace(loaded.config, iterations=100_000))

    def kill_when_saved() -> None:
        while not list(folder.rglob("model.safetensors")):
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)

    if os.environ["RANK"] == "1":
        threading.Thread(target=kill_when_saved, daemon=True).start()
    lib_run.load_config = load
    lib_run.execute = partial(lib_run.execute, runs=folder)
    from lib.experiments import train_glow

    train_glow.fit = partial(train_glow.fit, checkpoint_every_s=1.0)
    return lib_run.main([RUN, "--profile", "smoke", "--threads", "1", "--timeout", "300"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, target = sys.argv[1], Path(sys.argv[2])
    if what == "run":
        sys.exit(long_run(target))
    findings = checks(target)
    file = target / f"found{distributed.rank()}.json"
    file.write_text(json.dumps(findings))
    file.write_text(json.dumps(findings | killed(target)))
