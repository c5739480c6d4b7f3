"""The audit, where the answer is known: constant gradients, linear decoders, separable features."""

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from _planted import planted
from torch import nn

from lib.methods import audit
from lib.methods.audit import hidden_features, invert, linear_probe, relearn
from lib.methods.audit_rule import audited
from lib.models.diffusion import NoiseSchedule, ddim_path, last, q_sample


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Weight(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))


def upwards(model, generator):
    """Adam moves by the learning rate where the gradient is always the same."""
    assert model.training
    return -model.w, {}


def noisy(model, generator):
    return (model.w - torch.randn((), generator=generator)).square(), {}


def check_curve(code) -> None:
    model = Weight().eval().requires_grad_(False)

    def measure(taught):
        assert not taught.training and not torch.is_grad_enabled()
        return taught.w.item(), -taught.w.item()

    curve = code.relearn(model, upwards, measure, [0, 1, 5], 0.1, seeded())
    assert curve.steps.tolist() == [0, 1, 5] and curve.values.shape == (3, 2)
    assert np.allclose(curve.values, [[0, 0], [0.1, -0.1], [0.5, -0.5]], atol=1e-4)
    assert model.w.item() == 0 and not model.w.requires_grad and not model.training


def test_what_is_measured_between_does_not_change_the_curve():
    def ends(at):
        return relearn(Weight(), noisy, lambda m: m.w.item(), at, 0.1, seeded()).values[-1]

    assert ends([20]) == ends([0, 3, 7, 20]) != 0


@pytest.mark.parametrize("at", [[], [-1, 2], [3, 1], [1, 1]])
def test_steps_must_increase(at):
    with pytest.raises(ValueError, match="give at least one, from 0 on and increasing"):
        relearn(Weight(), upwards, lambda m: 0.0, at, 0.1, seeded())


# Three latents to five pixels, which cannot draw everything: the rest is known by projection.
MATRIX = torch.randn(5, 3, generator=seeded(1))
SIDE = torch.randn(5, 2, generator=seeded(2))


def projected(targets, matrix):
    solution = torch.linalg.lstsq(matrix, targets.T).solution
    return solution.T, (targets.T - matrix @ solution).T.square().mean(1).sqrt()


def check_least_squares(code) -> None:
    targets = torch.randn(4, 5, generator=seeded(3))
    z, error = projected(targets, MATRIX)
    start = torch.randn(8, 3, generator=seeded(4), requires_grad=True)
    before = start.detach().clone()
    found = code.invert(lambda z: z @ MATRIX.T, targets, start, 500, 0.05)
    assert torch.allclose(found.inputs, z, atol=1e-2)
    assert torch.allclose(found.error, error, atol=1e-4)
    assert torch.allclose(found.squared_norm, found.inputs.square().sum(1))
    assert found.condition is None and (start == before).all()


def check_condition(code) -> None:
    """With five free inputs for five pixels nothing is left; without the condition something is."""
    targets = torch.randn(4, 5, generator=seeded(3))
    z, c = torch.zeros(4, 3), torch.zeros(4, 2)

    def decode(z, c):
        return z @ MATRIX.T + c @ SIDE.T

    found = code.invert(decode, targets, z, 3000, 0.05, c)
    assert found.error.max() < 1e-2
    assert torch.allclose(decode(found.inputs, found.condition), targets, atol=2e-2)
    assert torch.allclose(found.squared_norm, found.inputs.square().sum(1))


def check_best_round_and_step(code) -> None:
    """Behind a ReLU a negative start is stuck, and giant steps only lead away from the target."""
    targets, start = torch.tensor([[1.0], [2.0]]), torch.tensor([[-1.0], [2.1], [0.5], [-1.0]])
    found = code.invert(torch.relu, targets, start, 300, 0.02)
    assert found.error.max() < 1e-3 and torch.allclose(found.inputs, targets, atol=1e-3)
    found = code.invert(torch.relu, targets, start, 20, 50.0)
    assert torch.allclose(found.error, torch.tensor([0.5, 0.1]))
    assert torch.allclose(found.inputs, torch.tensor([[0.5], [2.1]]))


def test_starts_must_fit_targets():
    targets = torch.zeros(2, 5)
    for start, condition in ((torch.zeros(3, 3), None), (torch.zeros(2, 3), torch.zeros(1, 2))):
        with pytest.raises(ValueError, match="give every target equally many starts"):
            invert(lambda z, c=None: z @ MATRIX.T, targets, start, 1, 0.1, condition)


def check_probe(code) -> None:
    labels = np.arange(400) % 4 == 0
    features = np.random.default_rng(0).normal(size=(400, 300))  # more than are needed to cheat
    nothing = code.linear_probe(features, labels)
    assert abs(nothing.accuracy - 0.5) < 0.12 and abs(nothing.shuffled - 0.5) < 0.12
    told = features[:, :5] + 8.0 * labels[:, None]
    known = code.linear_probe(torch.tensor(told), torch.tensor(labels))
    assert known.accuracy == 1.0 and abs(known.shuffled - 0.5) < 0.12


def test_a_rare_class_counts_as_much():
    labels = np.arange(1000) % 20 == 0
    features = np.random.default_rng(0).normal(size=(1000, 2)) + 1.5 * labels[:, None]
    # The best line between equal Gaussians 1.5 √2 apart is right in Φ(1.06) of the cases.
    assert linear_probe(features, labels).accuracy == pytest.approx(0.855, abs=0.06)


@pytest.mark.parametrize("labels", [np.zeros(10), np.arange(10) == 0, np.zeros(9)])
def test_a_probe_wants_two_classes(labels):
    with pytest.raises(ValueError, match="at least two classes, and two examples of each"):
        linear_probe(np.zeros((10, 2)), labels)


def check_redraw(code) -> None:
    """For a normal distribution the flow of DDIM keeps each point's distance in standard units."""
    schedule, mean, sd, t = NoiseSchedule(), 0.5, 0.2, 300
    x0, noise = torch.randn(2, 400, 1, generator=seeded()).double()
    x0 = mean + sd * x0

    def predict(x, at):
        share = schedule.share_left(at)
        offset = x - share**0.5 * mean
        return (1 - share) ** 0.5 * offset / (share * sd**2 + 1 - share)

    found = code.redraw(predict, x0, t, noise, schedule, steps=1000)
    share = schedule.share_left(t)
    x = share**0.5 * x0 + (1 - share) ** 0.5 * noise
    expected = mean + sd * (x - share**0.5 * mean) / (share * sd**2 + 1 - share) ** 0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)
    whole = code.redraw(predict, x0, 999, noise, schedule, steps=25)
    last_noise = torch.full((len(x0),), 999)
    started = q_sample(x0, last_noise, noise, schedule)
    assert torch.equal(whole, last(ddim_path(predict, started, schedule, 25)))
    with pytest.raises(ValueError, match="Got step 1000; choose one from 0 to 999"):
        code.redraw(predict, x0, 1000, noise, schedule, steps=25)


def answers(**values):
    """Return rows of a result; a pair is a value with its standard deviation."""
    pairs = {
        name: each if isinstance(each, tuple) else (each, None) for name, each in values.items()
    }
    return {name: SimpleNamespace(value=value, sd=sd) for name, (value, sd) in pairs.items()}


NAMES = ("original", "retrained", "a")


@pytest.mark.parametrize(
    ("rows", "row", "word"),
    [
        ({"x_original": 0.9, "x_retrained": 0.2, "x_a": (0.6, 0.02)}, "x_{}", "suppressed"),
        ({"x_original": 0.9, "x_retrained": 0.2, "x_a": (0.22, 0.02)}, "x_{}", "erased"),
        ({"x_original": 0.9, "x_retrained": 0.2, "x_a": (0.26, 0.02)}, "x_{}", "erased"),
        ({"x_original": 0.9, "x_retrained": 0.2, "x_a": (0.28, 0.02)}, "x_{}", "suppressed"),
        ({"x_original": 0.9, "x_retrained": 0.2, "x_a": (0.6, 0.3)}, "x_{}", "erased"),
        (
            {"x_original": 0.3, "x_retrained": 0.2, "x_a": (0.6, 0.06)},
            "x_{}",
            "undecided: no power",
        ),
        ({"x_original": 0.9, "x_retrained": 0.2, "x_a": 0.6}, "x_{}", "undecided: no power"),
        ({"x_original": 0.9, "x_a": 0.6}, "x_{}", "undecided: no control"),
        ({"x_original": 0.9, "x_a": 0.6}, "y_{}", "not asked"),
    ],
)
def test_the_rule_of_the_audit(rows, row, word):
    assert audited(answers(**rows), row, "a", NAMES) == word


@pytest.mark.parametrize(
    ("found", "others", "word"),
    [(0.1, 0.1, "suppressed"), (0.2, 0.1, "erased"), (0.2, 0.2, "undecided: wrecked")],
)
def test_low_errors_are_knowledge_unless_everything_is_drawn_badly(found, others, word):
    rows = {"error_zc_original": 0.1, "error_zc_retrained": 0.2, "error_zc_a": (found, 0.01)}
    rows |= {"error_zc_others_retrained": 0.1, "error_zc_others_a": others}
    assert audited(answers(**rows), "error_zc_{}", "a", NAMES) == word


CHECKS = (
    check_curve,
    check_least_squares,
    check_condition,
    check_best_round_and_step,
    check_probe,
    check_redraw,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_audit(check):
    check(audit)


PLANTED = [
    ("[t, *later, -1]", "[*later, -1]", check_redraw),
    ("*later, -1]", "*later, 0]", check_redraw),
    ("predict(x, now), now, after", "predict(x, after), now, after", check_redraw),
    ("copy.deepcopy(model)", "model", check_curve),
    ("if step in at:", "if step + 1 in at:", check_curve),
    ("(decode(*free) - wanted)", "(decode(*free) + wanted)", check_least_squares),
    (".sqrt(),", ",", check_least_squares),
    ("argmin(0)", "argmax(0)", check_best_round_and_step),
    ("squares.detach() < least", "squares.detach() < torch.inf", check_best_round_and_step),
    ("(start, condition) if", "(condition, start) if", check_condition),
    ("y_test, probe.predict(x_test)", "y_train, probe.predict(x_train)", check_probe),
    ("accuracy(shuffle(y_train))", "accuracy(y_train)", check_probe),
]


@pytest.mark.parametrize(("right", "wrong", "check"), PLANTED)
def test_planted_errors_are_noticed(right, wrong, check):
    assert inspect.getsource(audit).count(right) == 1
    broken = planted(audit, right, wrong)
    with pytest.raises((AssertionError, RuntimeError)):
        check(broken)


def test_hidden_features_are_those_of_the_layers():
    torch.manual_seed(0)
    first, last = nn.Conv2d(1, 3, 3, padding=1), nn.Linear(3 * 8 * 8, 2)
    model = nn.Sequential(first, nn.ReLU(), nn.Flatten(), last)
    x, shift = torch.randn(7, 1, 8, 8), torch.randn(7, 1, 1, 1)

    def call(x, shift):
        return model(x + shift)

    found = hidden_features(model, ["1", "3"], call, [x, shift], side=2, chunk=3)
    maps = torch.relu(first(x + shift))
    quarters = maps.unflatten(3, (2, 4)).unflatten(2, (2, 4)).mean((3, 5))
    assert torch.allclose(found["1"], quarters.flatten(1), atol=1e-6)
    assert torch.allclose(found["3"], last(maps.flatten(1)), atol=1e-6)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_layer_must_answer_once():
    layer = nn.Linear(2, 2)
    model = nn.Sequential(layer, nn.Linear(2, 2))
    with pytest.raises(ValueError, match="There is no layer 'z'"):
        hidden_features(model, ["z"], model, [torch.zeros(2, 2)])
    with pytest.raises(ValueError, match="answered 2 times to 1 calls"):
        hidden_features(model, ["0"], lambda x: layer(layer(x)), [torch.zeros(2, 2)])
    with pytest.raises(ValueError, match="answered 0 times to 1 calls"):
        hidden_features(model, ["1"], layer, [torch.zeros(2, 2)])
