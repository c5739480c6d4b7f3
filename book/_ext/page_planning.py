"""The planning page: images a second, memory and cost of the ``paper`` profiles, all estimated.

The operations of a training step are counted, not timed: ``python book/_ext/page_planning.py``
goes through each model once without data or weights and writes ``book/planning_counts.json``. The
page divides them by a rate: one that a run on a GPU has measured, or a share of a GPU's peak.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import yaml
from page_text import PageError, table

from lib import results
from lib.config import PROFILES, config_names
from lib.papers import format_number
from lib.results import ResultsError, read_results

COUNTS, ASSUMED = "book/planning_counts.json", "book/planning.yaml"
COUNT_AGAIN = "run `python book/_ext/page_planning.py` and commit book/planning_counts.json."
# The fields of a config that shape its model, by experiment.
SHAPING = {
    "train_glow": ("size", "n_bits", "n_blocks", "n_flows", "hidden", "coupling"),
    "train_ddpm": ("size", "channels", "layers_per_block", "attention", "groups", "patch"),
}
# Stable Diffusion's UNet, whose runs have several stages: see page_planning_sd.
LATENT = {"experiment": "amnesia_sd14", "sample_size": 64, "cross_attention_dim": 768}
COUNTED_BATCH = 2


@dataclass(frozen=True)
class Count:
    """One model's weights, and what an image of a training step takes."""

    parameters: int
    operations: float
    activation_bytes: float

    def memory(self, batch: int, averaged: bool) -> float:
        """Return bytes: weights, gradients, both of Adam's moments, the average, activations."""
        return 4 * self.parameters * (4 + averaged) + batch * self.activation_bytes


@dataclass(frozen=True)
class Training:
    """One config's training at one profile."""

    name: str
    experiment: str
    values: dict

    @property
    def model(self) -> dict:
        """Return what shapes the model, as it stands in the file of counts."""
        shaping = {key: self.values[key] for key in SHAPING[self.experiment]}
        return {"experiment": self.experiment, **shaping}

    @property
    def images(self) -> int:
        return self.values["iterations"] * self.values["batch"]

    @property
    def precision(self) -> str:
        return "bf16" if self.values.get("bf16") else "float32"


@dataclass(frozen=True)
class Measured:
    """A training that a run has timed."""

    training: Training
    label: str
    device: str
    seconds: float

    @property
    def images_per_second(self) -> float:
        return self.training.images / self.seconds


def paper_trainings() -> tuple[list[Training], list[str]]:
    """Return the trainings of the ``paper`` profiles, and the runs that are not one model's."""
    known, others = [], []
    for name in config_names():
        raw = yaml.safe_load((results.ROOT / "configs" / f"{name}.yaml").read_text("utf8"))
        if not raw.get("paper"):
            continue
        # Not by load_config, which imports the experiment and so torch, seconds of every build.
        top = {key: value for key, value in raw.items() if key not in PROFILES}
        if raw["experiment"] in SHAPING:
            known.append(Training(name, raw["experiment"], top | raw["paper"]))
        elif raw["experiment"] != LATENT["experiment"]:
            others.append(name)
    return known, others


def measured_trainings() -> list[Measured]:
    """Return the trainings whose results hold ``training_time`` and ``training_iterations``."""
    found = []
    for path in sorted(results.RESULTS.glob("[!.]*/[!.]*/metrics.json")):
        result = read_results(path.parent.parent.name, path.parent.name)
        training = Training(result.name, result.config.get("experiment"), result.config)
        if training.experiment not in SHAPING:
            continue
        try:
            steps, row = result.value("training_iterations"), result.row("training_time")
        except ResultsError:
            continue
        if steps == training.values["iterations"]:
            label = f"{result.name}/{result.profile}"
            found.append(Measured(training, label, row.device, row.value))
    return found


def read_counts(root: Path) -> list[tuple[dict, Count]]:
    """Read the models that are counted, with their counts."""
    entries = json.loads((root / COUNTS).read_text("utf8"))
    return [(entry["model"], Count(**entry["count"])) for entry in entries]


def find(counts: list[tuple[dict, Count]], training: Training) -> Count:
    """Return the count of a training's model.

    Raises: PageError if it is not counted.
    """
    return find_model(counts, training.model, training.name)


def find_model(counts: list[tuple[dict, Count]], wanted: dict, name: str = "v1.4") -> Count:
    """Return the count of a model.

    Raises: PageError if it is not counted.
    """
    for model, count in counts:
        if model == wanted:
            return count
    raise PageError(f"The model of {name} is not counted as it is now; {COUNT_AGAIN}")


def estimates(root: Path) -> str:
    """List what the training of each ``paper`` profile takes on one GPU."""
    assumed = yaml.safe_load((root / ASSUMED).read_text("utf8"))
    counts, measured = read_counts(root), measured_trainings()
    known, others = paper_trainings()
    rows = []
    for training in known:
        count = find(counts, training)
        rate, basis = operations_per_second(training, counts, measured, assumed)
        seconds = training.images * count.operations / rate
        memory = count.memory(training.values["batch"], bool(training.values.get("ema_decay")))
        hours = seconds / 3600
        rows.append(
            [
                f"`{training.name}`",
                f"{training.images / 1e6:.0f} million images, {count.parameters / 1e6:.0f} million "
                "weights",
                format_number(training.images / seconds, 2),
                f"{memory / 2**30:.0f} GiB",
                f"{format_number(hours, 2)} h",
                f"{format_number(hours * assumed['price_per_gpu_hour'], 2)} US$",
                basis,
            ]
        )
    rows += [[f"`{name}`", "not counted", "", "", "", "", ""] for name in others]
    header = ["Run", "Training", "Images/s", "Memory", "GPU hours", "Cost", "Rate from"]
    return table(header, rows, [18, 20, 10, 10, 12, 12, 18], "planning")


def operations_per_second(
    training: Training, counts: list, measured: list[Measured], assumed: dict
) -> tuple[float, str]:
    """Return the rate to expect on a GPU and where it is from: a measured step, or the peak."""
    on_gpu = [
        each
        for each in measured
        if each.training.experiment == training.experiment
        and each.training.precision == training.precision
        and "CPU" not in each.device
    ]
    # The same config first, for its model is the most alike.
    for each in sorted(on_gpu, key=lambda each: each.training.name != training.name):
        rate = each.images_per_second * find(counts, each.training).operations
        return rate, f"measured: `{each.label}` on {each.device}"
    share, peak = assumed["share_of_peak"], assumed["peak"][training.precision]
    return share * peak, f"guessed: {share:.0%} of the peak of one {assumed['gpu']}"


def measured_steps(root: Path) -> str:
    """List the steps that runs have timed, and the operations a second they reached."""
    counts, rows = read_counts(root), []
    for each in measured_trainings():
        rate = each.images_per_second * find(counts, each.training).operations
        steps = each.training.values["iterations"] / each.seconds
        rows.append(
            [
                f"`{each.label}`",
                each.device,
                format_number(steps),
                format_number(each.images_per_second),
                f"{format_number(rate / 1e9)} GFLOP/s",
            ]
        )
    header = ["Run", "Device", "Steps/s", "Images/s", "Rate"]
    return table(header, rows, [28, 26, 14, 14, 18], "planning")


def assumptions(root: Path) -> str:
    """List what the estimates assume."""
    assumed = yaml.safe_load((root / ASSUMED).read_text("utf8"))
    peak = {name: f"{value / 1e12:.0f} TFLOP/s" for name, value in assumed["peak"].items()}
    rows = [
        ["Price of one GPU", f"{assumed['price_per_gpu_hour']:.2f} US$ an hour"],
        ["GPU", assumed["gpu"]],
        ["Its peak", ", ".join(f"{value} in {name}" for name, value in peak.items())],
        ["Share of the peak, where nothing is measured", f"{assumed['share_of_peak']:.0%}"],
    ]
    return table(["Assumption", "Value"], rows, [50, 50], "planning")


def count_step(model: dict) -> Count:
    """Count one training step of a model on PyTorch's device without memory.

    Counted are the operations of matrices and convolutions, forwards and backwards, and the
    distinct tensors that the forward pass keeps for the backward pass, but for the weights.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    n, hooks = COUNTED_BATCH, torch.autograd.graph.saved_tensors_hooks
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        module, loss = _module_and_loss(model, n)
        weights = {p.untyped_storage()._cdata for p in module.parameters()}
        with hooks(keep, lambda tensor: tensor):
            total = loss()
            n_bytes = sum(s.nbytes() for key, s in kept.items() if key not in weights)
            total.backward()
    parameters = sum(p.numel() for p in module.parameters())
    return Count(parameters, counter.get_total_flops() / n, n_bytes / n)


def _module_and_loss(model: dict, n: int):
    import torch

    if model["experiment"] == LATENT["experiment"]:
        return _latent_unet_and_loss(model, n)
    shape = (3, model["size"], model["size"])
    if model["experiment"] == "train_glow":
        from lib.models.glow import Glow

        flow = Glow(shape, model["n_blocks"], model["n_flows"], model["hidden"], model["coupling"])
        return flow.eval(), lambda: flow.nll_bits_per_dim(
            torch.rand(n, *shape), model["n_bits"]
        ).mean()
    from lib.models.ddpm import ConditionalDDPM

    names = ("channels", "layers_per_block", "attention", "groups", "patch")
    ddpm = ConditionalDDPM(shape, 10, **{name: model[name] for name in names})
    index, images = torch.zeros(n, dtype=torch.int64), torch.rand(n, *shape)
    return ddpm, lambda: ddpm.loss_from_noise(images, index, index, images).mean()


def _latent_unet_and_loss(model: dict, n: int):
    from unittest.mock import patch

    import torch
    from diffusers import UNet2DConditionModel

    size, width = model["sample_size"], model["cross_attention_dim"]
    unet = UNet2DConditionModel(sample_size=size, cross_attention_dim=width)

    def attention(q, k, v, **options):
        """Attend as a GPU does, which never holds the matrix of scores."""
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        return efficient(q, k, v, None, True, 0.0, False)[0]

    def loss():
        with patch("torch.nn.functional.scaled_dot_product_attention", attention):
            latents, t = torch.rand(n, 4, size, size), torch.zeros(n, dtype=torch.int64)
            return unet(latents, t, torch.rand(n, 77, width)).sample.square().mean()

    return unet, loss


def main(root: Path = results.ROOT) -> None:
    """Count every model of a ``paper`` profile or a measured training, and write the counts."""
    from lib.checkpoints import write_atomically  # imports torch, which no build needs

    trainings = paper_trainings()[0] + [each.training for each in measured_trainings()]
    models = {json.dumps(model): model for model in [*(t.model for t in trainings), LATENT]}
    lines = [
        json.dumps({"model": model, "count": vars(count_step(model))}) for model in models.values()
    ]
    write_atomically(root / COUNTS, ("[\n" + ",\n".join(lines) + "\n]\n").encode())


if __name__ == "__main__":
    main()
