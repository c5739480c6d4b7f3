"""The planning page's part on Stable Diffusion v1.4: its ``paper`` profiles, stage by stage."""

from dataclasses import dataclass
from pathlib import Path

import page_planning
import yaml
from page_text import table

from lib import results
from lib.config import PROFILES, config_names
from lib.papers import format_number

GUIDED, SAFELY_GUIDED = 2, 3  # forward passes of a step of sampling
N_STEPS = 1000  # of the diffusion
FISHER_CHUNK = 64  # steps that are held in memory at once, as fisher_of has it
# Copies of the weights' size that a stage holds: the pipeline's UNet, the one that is trained and
# its gradient in all of them.
COPIES = {
    "Fisher information": 5,  # and two sums
    "Selective Amnesia": 9,  # and Adam's two moments, the anchor, its Fisher, two of the penalty
    "ESD": 6,  # and the frozen original and two moments, at most
}


@dataclass(frozen=True)
class Work:
    """What a stage does: forward passes, passes of training, and pictures in memory at once."""

    forwards: float = 0.0
    trainings: float = 0.0
    batch: int = 0
    precision: str = "float32"

    def operations(self, count: page_planning.Count) -> float:
        """Return the operations; a forward pass is a third of one of training."""
        return count.operations * (self.trainings + self.forwards / 3)

    def memory(self, stage: str, count: page_planning.Count) -> float | None:
        """Return bytes in float32, or nothing for a stage that only draws."""
        if stage not in COPIES:
            return None
        return 4 * count.parameters * COPIES[stage] + self.batch * count.activation_bytes


def paper_configs() -> dict[str, dict]:
    """Return the values of the ``paper`` profiles of Stable Diffusion v1.4, by config."""
    found = {}
    for name in config_names():
        raw = yaml.safe_load((results.ROOT / "configs" / f"{name}.yaml").read_text("utf8"))
        if raw["experiment"] == page_planning.LATENT["experiment"]:
            top = {key: value for key, value in raw.items() if key not in PROFILES}
            found[name] = top | raw["paper"]
    return found


def n_prompts(name: str, root: Path, assumed: dict) -> int:
    """Return the length of a list of prompts, of those outside of the book the assumed one."""
    path = root / "configs/prompts" / f"{name}.yaml"
    if path.is_file():
        return len(yaml.safe_load(path.read_text("utf8")))
    return assumed["prompts"][name]


def stages(values: dict, root: Path, assumed: dict) -> dict[str, Work]:
    """Return the work of a config's stages; those that it does not have are left out."""
    asks, methods, sa = values["requests"], values["methods"], values["sa"]
    asked = {name: ask.get("methods") or list(methods) for name, ask in asks.items()}
    steps, found = values["sample_steps"], {}
    kinds = [methods[method]["kind"] for names in asked.values() for method in names]
    if n_sa := kinds.count("sa"):
        drawn = values["n_replay"] + len(asks) * values["n_surrogate"]
        found["Pictures to learn from"] = Work(forwards=drawn * steps * GUIDED)
        at_once = N_STEPS if sa["fisher_estimator"] == "exact" else sa["fisher_steps"]
        gradients = 2 if sa["fisher_estimator"] == "product" else 1
        found["Fisher information"] = Work(
            trainings=sa["fisher_samples"] * gradients * at_once,
            batch=min(sa.get("fisher_chunk", FISHER_CHUNK), at_once),
        )
        pictures = 2 * sa["batch"] if sa["replay"] else sa["batch"]
        found["Selective Amnesia"] = Work(
            trainings=n_sa * sa["iterations"] * pictures * assumed["sd14_gpus"],
            batch=pictures,
            precision="bf16" if values["bf16"] else "float32",
        )
    if n_esd := kinds.count("esd"):
        esd = values["esd"]
        passes = n_esd * esd["max_steps"] * esd["batch"]
        half = values["esd_drawing"]["steps"] / 2  # a random number of them, on average
        forwards = passes * (2 + half * GUIDED)
        found["ESD"] = Work(forwards=forwards, trainings=passes, batch=esd["batch"])
    forwards = 0
    for name, ask in asks.items():
        n = values["n_other"]
        n += ask["pictures"] * sum(n_prompts(p, root, assumed) for p in ask["measured"].values())
        for method in asked[name]:
            safe = methods[method]["kind"] == "sld"
            forwards += n * steps * (SAFELY_GUIDED if safe else GUIDED)
    found["Pictures to measure"] = Work(forwards=forwards)
    return found


def latent_estimates(root: Path) -> str:
    """List what each stage of Stable Diffusion's ``paper`` profiles takes."""
    assumed = yaml.safe_load((root / page_planning.ASSUMED).read_text("utf8"))
    count = page_planning.find_model(page_planning.read_counts(root), page_planning.LATENT)
    rows = []
    for name, values in paper_configs().items():
        works = stages(values, root, assumed)
        total = 0.0
        for stage, work in works.items():
            rate = assumed["share_of_peak"] * assumed["peak"][work.precision]
            hours = work.operations(count) / rate / 3600
            total += hours
            memory = work.memory(stage, count)
            held = f"{memory / 2**30:.0f} GiB" if memory else ""
            passes = f"{(work.forwards + work.trainings) / 1e6:.2g} million"
            rows.append([f"`{name}`", stage, passes, held, f"{format_number(hours, 2)} h", ""])
        cost = f"{format_number(total * assumed['price_per_gpu_hour'], 2)} US$"
        rows.append([f"`{name}`", "**all**", "", "", f"{format_number(total, 2)} h", cost])
    header = ["Run", "Stage", "Passes of the UNet", "Memory", "GPU hours", "Cost"]
    return table(header, rows, [22, 24, 18, 12, 12, 12], "planning")
