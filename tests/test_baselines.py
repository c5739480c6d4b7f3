"""The plain baselines, on a model with one weight a pixel and class, where all is known."""

import inspect
from functools import partial

import pytest
import torch
from _planted import planted
from torch import nn

from lib.methods import baselines
from lib.methods.baselines import (
    fine_tune_loss,
    gradient_ascent_loss,
    only,
    random_label_loss,
    saliency_mask,
)

LABEL, N_CLASSES, N_PIXELS = 2, 3, 4


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Means(nn.Module):
    """Normal pixels, one mean a class; ``unused`` is a weight that no image depends on."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.randn(N_CLASSES, N_PIXELS, generator=seeded()))
        self.unused = nn.Parameter(torch.ones(2))

    def elbo(self, x, c):
        return -0.5 * (x - self.mean[c]).square().sum(1)


def images(n: int, classes, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return pictures around 10 times their class, and the classes."""
    c = torch.tensor(classes).repeat(n)
    return 10.0 * c[:, None] + torch.randn(len(c), N_PIXELS, generator=seeded(seed)), c


FORGET, REST = images(20, [LABEL], 1), images(20, [0, 1], 2)


def trained(loss, steps: int = 200, mask=None) -> Means:
    model = Means()
    with only(model, mask or {n: torch.ones_like(p) > 0 for n, p in model.named_parameters()}):
        adam = torch.optim.Adam(model.parameters(), lr=0.2)
        for _ in range(steps):
            adam.zero_grad()
            total, terms = loss(model.elbo)
            assert not any(term.requires_grad for term in terms.values())
            total.backward()
            adam.step()
    return model


def mean_of(model, c):
    return model.mean[c].detach()


def check_fine_tuning(code) -> None:
    model = trained(lambda elbo: code.fine_tune_loss(elbo, REST))
    assert torch.equal(mean_of(model, LABEL), mean_of(Means(), LABEL))  # nothing is shared here
    for c in (0, 1):
        assert torch.allclose(mean_of(model, c), REST[0][REST[1] == c].mean(0), atol=0.1)


def check_ascent(code) -> None:
    def forget_bound(model):
        return model.elbo(*FORGET).mean().item()

    start = Means()
    pure = trained(lambda elbo: code.gradient_ascent_loss(elbo, FORGET, None, 0.0), steps=50)
    assert forget_bound(pure) < forget_bound(start) - 10
    assert torch.equal(mean_of(pure, [0, 1]), mean_of(start, [0, 1]))
    both = trained(lambda elbo: code.gradient_ascent_loss(elbo, FORGET, REST, 1.0))
    assert forget_bound(both) < forget_bound(start) - 10
    assert torch.allclose(mean_of(both, 1), REST[0][REST[1] == 1].mean(0), atol=0.1)
    total, terms = code.gradient_ascent_loss(start.elbo, FORGET, REST, 3.0)
    assert terms["forget"] == forget_bound(start)
    assert total.item() == pytest.approx(float(terms["forget"] + 3 * terms["rest"]))


def check_random_labels(code) -> None:
    model = trained(lambda elbo: code.random_label_loss(elbo, REST[0], LABEL, REST, 1.0))
    # The condition learns what is between the others' pictures, and they stay what they are.
    assert torch.allclose(mean_of(model, LABEL), REST[0].mean(0), atol=0.1)
    assert torch.allclose(mean_of(model, 0), REST[0][REST[1] == 0].mean(0), atol=0.1)
    alone = trained(lambda elbo: code.random_label_loss(elbo, REST[0], LABEL, None, 0.0))
    assert torch.equal(mean_of(alone, 0), mean_of(Means(), 0))


def check_mask(code) -> None:
    model = Means()
    mask = code.saliency_mask(model, model.elbo, [FORGET], 4 / 14)
    # Only the row of the digit has a gradient, of 4 of the 14 weights.
    assert mask["mean"].sum(1).tolist() == [0, 0, 4] and not mask["unused"].any()
    half = code.saliency_mask(model, model.elbo, [FORGET], 2 / 14)
    gradient = (FORGET[0] - model.mean[LABEL]).sum(0).detach()
    assert half["mean"].sum() == 2
    assert set(half["mean"][LABEL].nonzero()[:, 0].tolist()) == set(
        gradient.abs().topk(2).indices.tolist()
    )
    parts = [(x, c) for x, c in zip(FORGET[0].split(7), FORGET[1].split(7), strict=True)]
    again = code.saliency_mask(model, model.elbo, parts, 2 / 14)
    assert torch.equal(again["mean"], half["mean"])


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_the_mask_has_exactly_the_share(share):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 5))

    def elbo(x, c):
        return -(model(x) - 1).square().sum(1)

    mask = saliency_mask(model, elbo, [(torch.randn(8, 6, generator=seeded()), None)], share)
    n = sum(p.numel() for p in model.parameters())
    assert sum(int(part.sum()) for part in mask.values()) == round(share * n)
    assert all(p.grad is None for p in model.parameters())


def test_weights_outside_the_mask_do_not_move():
    start = Means()
    mask = {"mean": torch.zeros(N_CLASSES, N_PIXELS) > 0, "unused": torch.zeros(2) > 0}
    mask["mean"][:, :2] = True
    loss = partial(random_label_loss, pictures=REST[0], label=LABEL, rest=REST, weight=1.0)
    model = trained(loss, mask=mask)
    assert torch.equal(model.mean[:, 2:], start.mean[:, 2:])
    assert ((model.mean[:, :2] - start.mean[:, :2]).abs() > 0.1).all()
    total, _ = loss(model.elbo)
    total.backward()  # the limit ends with its context
    assert (model.mean.grad[:, 2:] != 0).any()


CHECKS = [check_fine_tuning, check_ascent, check_random_labels, check_mask]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_baseline(check):
    check(baselines)


PLANTED = [
    (
        "kept = -elbo(*rest).mean()\n    return kept,",
        "kept = elbo(*rest).mean()\n    return kept,",
        check_fine_tuning,
    ),
    ("bound = elbo(*forget)", "bound = -elbo(*forget)", check_ascent),
    ("bound + weight * kept", "bound - weight * kept", check_ascent),
    ("wrong = -elbo(pictures, c_f)", "wrong = elbo(pictures, c_f)", check_random_labels),
    ("wrong + weight * kept", "wrong - weight * kept", check_random_labels),
    ("size.topk(", "(-size).topk(", check_mask),
    ("each.flatten().abs()", "each.flatten()", check_mask),
    (
        "total = gradient if total is None else torch._foreach_add(total, gradient)",
        "total = gradient",
        check_mask,
    ),
]


@pytest.mark.parametrize(("right", "wrong", "check"), PLANTED)
def test_planted_errors_are_noticed(right, wrong, check):
    assert inspect.getsource(baselines).count(right) == 1
    broken = planted(baselines, right, wrong)
    with pytest.raises(AssertionError):
        check(broken)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: gradient_ascent_loss(m.elbo, FORGET, None, 1.0), "1.0 with no batch of it"),
        (lambda m: random_label_loss(m.elbo, REST[0], 0, REST, -1.0), "-1.0 with a batch of it"),
        (
            lambda m: saliency_mask(m, m.elbo, [FORGET], 0.0),
            r"share is 0.0; choose one in \(0, 1\]",
        ),
        (lambda m: saliency_mask(m, m.elbo, [], 0.5), "got no images of the class"),
        (lambda m: only(m, {"mean": torch.ones(2)}).__enter__(), "1 parameters that do not match"),
    ],
)
def test_bad_input_is_named_in_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call(Means())
    assert "\n" not in str(error.value)


def test_fine_tuning_reports_its_term():
    model = Means()
    total, terms = fine_tune_loss(model.elbo, REST)
    assert list(terms) == ["rest"] and terms["rest"] == total.detach()
