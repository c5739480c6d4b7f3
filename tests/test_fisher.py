import pytest
import torch
from torch import nn

from lib.methods.fisher import diagonal_fisher, split_parameters
from lib.models.cvae import ConditionalVAE


def loop_fisher(model, loss, batch):
    """The definition, one sample at a time."""
    sums = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for i in range(len(batch[0])):
        model.zero_grad()
        loss(model, *(part[i : i + 1] for part in batch)).sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                sums[name] += parameter.grad**2
    return {name: total / len(batch[0]) for name, total in sums.items()}


class Everything(nn.Module):
    """An embedding, convolutions, every norm, and linear layers, with an in-place activation."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 16)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.batch_norm = nn.BatchNorm2d(4)
        self.group_norm = nn.GroupNorm(2, 4)
        self.layer_norm = nn.LayerNorm(64)
        self.linear = nn.Linear(64, 7)
        self.relu = nn.ReLU(inplace=True)
        self.last = nn.Linear(7, 3, bias=False)

    def forward(self, x, c):
        h = self.conv(x + self.embed(c).reshape(-1, 1, 4, 4))
        h = self.group_norm(torch.tanh(self.batch_norm(h)))
        return self.last(self.relu(self.linear(self.layer_norm(h.flatten(1)))))


def squared_output(model, *batch):
    return model(*batch).square().sum(1)


def everything():
    torch.manual_seed(0)
    model = Everything().double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    model.batch_norm.running_mean.normal_()
    batch = torch.rand(13, 1, 4, 4, dtype=torch.float64), torch.arange(13) % 5
    return model.eval(), batch


def assert_same(found, expected, rtol=1e-5):
    assert found.keys() == expected.keys()
    for name in expected:
        assert expected[name].abs().max() > 0
        torch.testing.assert_close(
            found[name], expected[name], rtol=rtol, atol=rtol * float(expected[name].max()) * 1e-3
        )


@pytest.mark.parametrize("linear_identity", [True, False])
def test_matches_the_loop_for_every_type_of_layer(linear_identity):
    model, batch = everything()
    expected = loop_fisher(model, squared_output, batch)
    parts = [tuple(part[:8] for part in batch), tuple(part[8:] for part in batch)]
    found = diagonal_fisher(model, squared_output, parts, chunk=3, linear_identity=linear_identity)
    assert_same(found, expected, rtol=1e-9)


@pytest.mark.parametrize("linear_identity", [True, False])
def test_matches_the_loop_for_the_vae_in_float32(linear_identity):
    torch.manual_seed(0)
    model = ConditionalVAE((1, 8, 8), 10, hidden=(32, 16), latent_dim=4)
    x, c, noise = torch.rand(50, 1, 8, 8), torch.randint(10, (50,)), torch.randn(50, 4)
    loss = ConditionalVAE.elbo_from_noise
    found = diagonal_fisher(model, loss, [(x, c, noise)], linear_identity=linear_identity)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert_same(found, loop_fisher(model, loss, (x, c, noise)))


def test_the_path_is_chosen_by_type():
    model, _ = everything()
    linear, others = split_parameters(model)
    assert list(linear) == ["linear", "last"]
    assert {name.partition(".")[0] for name in others} == {
        "embed",
        "conv",
        "batch_norm",
        "group_norm",
        "layer_norm",
    }
    model.last.weight.requires_grad_(False)
    assert list(split_parameters(model)[0]) == ["linear"]


def test_frozen_parameters_are_left_out():
    model, batch = everything()
    model.conv.requires_grad_(False)
    expected = loop_fisher(model, squared_output, batch)
    found = diagonal_fisher(model, squared_output, [batch])
    assert not any(name.startswith("conv") for name in found)
    assert_same(found, {name: expected[name] for name in found}, rtol=1e-9)


class Tied(nn.Module):
    def __init__(self, tie):
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.out = nn.Linear(3, 4, bias=False)
        if tie:
            self.out.weight = self.embed.weight

    def forward(self, c):
        return self.out(self.embed(c))


def test_a_tied_weight_takes_the_slow_path():
    torch.manual_seed(0)
    model, c = Tied(tie=True).double(), torch.tensor([0, 1, 3, 2, 2])
    assert split_parameters(model) == ({}, ["embed.weight"])
    found = diagonal_fisher(model, squared_output, [(c,)])
    assert_same(found, loop_fisher(model, squared_output, (c,)), rtol=1e-9)


def test_misuse_of_the_identity_is_noticed():
    torch.manual_seed(0)
    layer = nn.Linear(3, 3)
    x = torch.rand(6, 3)
    twice = lambda model, x: model(model(x)).square().sum(1)  # noqa: E731
    with pytest.raises(ValueError, match="applied a second time"):
        diagonal_fisher(layer, twice, [(x,)])
    tokens = lambda model, x: model(x).square().sum((1, 2))  # noqa: E731
    with pytest.raises(ValueError, match=r"applied on \(6, 2, 3\)"):
        diagonal_fisher(layer, tokens, [(torch.rand(6, 2, 3),)])
    outside = lambda model, x: (model(x) @ model.weight).square().sum(1)  # noqa: E731
    with pytest.raises(ValueError, match="used outside that layer"):
        diagonal_fisher(layer, outside, [(x,)])
    for loss in (twice, outside):
        found = diagonal_fisher(layer, loss, [(x,)], linear_identity=False)
        assert_same(found, loop_fisher(layer, loss, (x,)))


def test_bad_input_is_named():
    model, batch = everything()
    with pytest.raises(ValueError, match="got no samples"):
        diagonal_fisher(model, squared_output, [])
    with pytest.raises(ValueError, match="do not average over the batch"):
        diagonal_fisher(model, lambda m, *b: squared_output(m, *b).mean(), [batch])
    with pytest.raises(ValueError, match="not finite"):
        diagonal_fisher(model, squared_output, [(batch[0] * float("nan"), batch[1])])
    with pytest.raises(ValueError, match=r"'batch_norm' is in training mode.*model.eval\(\)"):
        diagonal_fisher(model.train(), squared_output, [batch])
