"""What the benchmarks set side by side must do the same, or the ratio says nothing."""

import importlib
import json
from itertools import islice

import page_status
import pytest
import torch
from page_text import PageError

from lib import ROOT
from lib.config import load_config
from lib.experiments._amnesia_ddpm import Memory
from lib.experiments._erasers import load_models
from lib.experiments.amnesia_ddpm import task_of
from lib.models.conv_vae import ConvVAE
from lib.models.ddpm import ConditionalDDPM
from lib.models.gan import StyleGenerator


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


def test_times_are_medians_and_ratios_stand_against_the_first(bench, monkeypatch, capsys):
    shared = bench("_compare")
    now, took = [0.0], {"slow": [9, 4, 2, 6], "fast": [9, 1, 3, 2]}
    monkeypatch.setattr(shared.time, "process_time", lambda: now[0])
    monkeypatch.setattr(shared, "LINES", [])

    def way(name):
        seconds = iter(took[name])
        return lambda: now.__setitem__(0, now[0] + next(seconds))

    found = shared.compare("a step", {name: way(name) for name in took}, rounds=3)
    assert found == {"slow": 4000.0, "fast": 2000.0}  # the first round of four warms up
    assert [(line.way, line.ratio) for line in shared.LINES] == [("slow", 1.0), ("fast", 2.0)]
    assert "2.00x" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("unlearning_vae_mnist", lambda: ConvVAE((1, 28, 28), (8, 8, 8), 4)),
        ("unlearning_gan_mnist", lambda: StyleGenerator((1, 28, 28), (8, 8, 8), 4, 1)),
    ],
)
def test_both_ways_of_unlearning_take_the_same_steps(name, base, bench):
    torch.manual_seed(0)
    steps, _ = bench("unlearning_step").ways(name, base())
    slow, fast = (list(islice(step, 4)) for step in steps.values())
    assert slow == pytest.approx(fast, rel=1e-3)
    assert slow[0] != pytest.approx(slow[3], rel=1e-3)


def test_both_ways_of_forgetting_a_digit_have_the_same_gradients(bench):
    torch.manual_seed(0)
    model = ConditionalDDPM((1, 28, 28), 10, (8, 8), patch=2).train()
    memory = Memory(torch.randint(0, 256, (8, 1, 28, 28), dtype=torch.uint8), torch.arange(8))
    task = task_of(load_config("amnesia_ddpm_mnist", "cpu").config)
    gradients = []
    for loss in bench("ddpm").forgetting(model, task, memory).values():
        model.zero_grad()
        loss(torch.Generator().manual_seed(1)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3 * float(gradients[0].abs().max()))


@pytest.fixture
def small():
    """Return a config of MiniSD, and a tiny untrained pipeline."""
    torch.manual_seed(0)
    config = load_config("amnesia_sd_person", "smoke").config
    return config, load_models(config, torch.device("cpu"))[0]


def test_both_ways_of_drawing_give_the_same_picture(small, bench):
    config, pipe = small
    theirs, ours = (
        draw() for draw in bench("mini_sd").both_drawings(pipe, config.drawing).values()
    )
    torch.testing.assert_close(theirs, ours / 255, rtol=0, atol=1 / 255)


def test_a_forgetting_step_sees_as_many_latents_as_a_training_step(small, bench, monkeypatch):
    config, pipe = small
    steps, seen = bench("mini_sd").both_steps(pipe, config.sa), []
    kind = type(pipe.unet)
    forward = kind.forward

    def counting(net, x, *rest, **options):
        seen.append(len(x))
        return forward(net, x, *rest, **options)

    monkeypatch.setattr(kind, "forward", counting)
    for step in steps.values():
        step()
    assert seen == [2 * config.sa.batch] * 2


def test_benchmarks_show_the_last_table_or_say_how_to_make_it(tmp_path):
    with pytest.raises(PageError, match="make it with `make bench`"):
        page_status.benchmarks(tmp_path)
    lines = [
        {"what": "a step", "way": "theirs", "value": 2.0, "unit": "ms", "ratio": 1.0},
        {"what": "a step", "way": "ours", "value": 1.0, "unit": "ms", "ratio": 2.0},
        {"what": "pictures", "way": "ours", "value": 9.0, "unit": "images/s", "ratio": None},
    ]
    about = {"machine": "M", "versions": {"torch": "1"}, "commit": "abc", "date": "2000-01-01"}
    path = tmp_path / "book/tables/benchmarks.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(about | {"lines": lines}))
    page = page_status.benchmarks(tmp_path)
    assert "2000-01-01 at commit `abc` on M, with torch 1" in page
    assert page.count("a step") == 1 and "2.00×" in page and "images/s" in page
