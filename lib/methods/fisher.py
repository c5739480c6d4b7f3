"""The diagonal Fisher information: the mean over samples of squared per-sample gradients."""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import islice

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from lib import distributed

PerSampleLoss = Callable[..., Tensor]


def diagonal_fisher(
    model: nn.Module,
    per_sample_loss: PerSampleLoss,
    batches: Iterable[tuple[Tensor, ...]],
    *,
    chunk: int = 32,
    linear_identity: bool = True,
) -> dict[str, Tensor]:
    """Average the squared gradient of every sample's loss, for every trainable parameter.

    ``per_sample_loss(model, *batch) -> (batch,)`` is the negative ELBO for a variational model
    (Selective Amnesia, Sec. 2.2); the sign does not matter. It must be deterministic: noise
    belongs into the batch. Each tensor of a batch has the samples as its first dimension.

    The weight gradient of one sample in a linear layer is the outer product of its output
    gradient delta and its input a, so the sum of squares is (delta^2)^T (a^2): exact, and as
    cheap as one ordinary backward pass. All other parameters take ``chunk`` per-sample gradients
    at a time; ``linear_identity=False`` sends linear layers that way too.

    Several processes all get the same ``batches`` and the same result; each computes its share of
    them, so there should be at least as many batches as processes.

    Returns one non-negative tensor a parameter, by name, shaped like it.
    Raises: ValueError if there are no samples, if the loss is not one finite value a sample, if
    batch norm is in training mode, or if a linear layer does not see exactly one row a sample.
    """
    _check_modes(model)
    linear, others = split_parameters(model, linear_identity)
    sums = {
        name: torch.zeros_like(parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    n_samples = 0
    for batch in islice(batches, distributed.rank(), None, distributed.n_processes()):
        if linear:
            _add_linear(sums, model, linear, per_sample_loss, batch, verify=n_samples == 0)
        if others:
            _add_per_sample(sums, model, others, per_sample_loss, batch, chunk)
        n_samples += len(batch[0])
    (n_samples,) = distributed.total([n_samples])
    if n_samples == 0:
        raise ValueError("The Fisher information got no samples; give at least one batch.")
    distributed.add_up(list(sums.values()))
    return {name: total / n_samples for name, total in sums.items()}


def split_parameters(
    model: nn.Module, linear_identity: bool = True
) -> tuple[dict[str, nn.Linear], list[str]]:
    """Choose the path of every trainable parameter, by the type of its layer.

    Returns the linear layers that the identity serves, by name, and the names of all other
    parameters. A parameter shared by two modules is among the others.
    """
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    linear = {
        name: module
        for name, module in model.named_modules()
        if linear_identity
        and type(module) is nn.Linear
        and all(p.requires_grad and owners[id(p)] == 1 for p in module.parameters())
    }
    served = {
        f"{name}.{key}" if name else key
        for name, layer in linear.items()
        for key, _ in layer.named_parameters()
    }
    return linear, [n for n, p in model.named_parameters() if p.requires_grad and n not in served]


def _add_linear(sums, model, linear, per_sample_loss, batch, verify: bool) -> None:
    """Add the squared gradients of linear layers, from one backward pass of the summed loss."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str):
        def hook(_, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if name in seen or inputs[0].ndim != 2 or len(inputs[0]) != len(batch[0]):
                times = "a second time" if name in seen else f"on {tuple(inputs[0].shape)}"
                raise ValueError(
                    f"The linear layer {name!r} was applied {times}, but the identity for linear "
                    f"layers wants it once, on one row for each of the {len(batch[0])} samples; "
                    "pass linear_identity=False."
                )
            seen[name] = (inputs[0].detach(), output)
            return output.clone()  # an in-place activation must not overwrite what we watch

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in linear.items()]
    try:
        loss = per_sample_loss(model, *batch)
    finally:
        for handle in handles:
            handle.remove()
    _check_loss(loss, len(batch[0]))
    used = [name for name in linear if name in seen]
    outputs = [seen[name][1] for name in used]
    if verify:
        weights = [linear[name].weight for name in linear]
        everything = torch.autograd.grad(loss.sum(), outputs + weights, allow_unused=True)
        deltas = everything[: len(used)]
        _verify_identity(
            linear, seen, dict(zip(used, deltas, strict=True)), everything[len(used) :]
        )
    else:
        deltas = torch.autograd.grad(loss.sum(), outputs, allow_unused=True)
    for name, delta in zip(used, deltas, strict=True):
        if delta is None:
            continue
        prefix = f"{name}." if name else ""
        squared = delta.square()
        sums[prefix + "weight"].addmm_(squared.T, seen[name][0].square())
        if linear[name].bias is not None:
            sums[prefix + "bias"] += squared.sum(0)


def _verify_identity(linear, seen, deltas, weight_grads) -> None:
    """Catch a weight that is also used outside its layer: delta^T a is then not its gradient."""
    for (name, layer), expected in zip(linear.items(), weight_grads, strict=True):
        delta = deltas.get(name)
        found = torch.zeros_like(layer.weight) if delta is None else delta.T @ seen[name][0]
        expected = torch.zeros_like(found) if expected is None else expected
        tolerance = 1e-3 * float(expected.abs().max())
        if float((found - expected).abs().max()) > tolerance:
            raise ValueError(
                f"The weight of the linear layer {name!r} is used outside that layer too, which "
                "the identity for linear layers cannot see; pass linear_identity=False."
            )


def _add_per_sample(sums, model, names, per_sample_loss, batch, chunk: int) -> None:
    """Add the squared gradients of any parameters, ``chunk`` per-sample gradients at a time."""
    tensors = {k: v.detach() for k, v in (*model.named_parameters(), *model.named_buffers())}
    free = {name: tensors.pop(name) for name in names}
    step = _Step(model, per_sample_loss)

    def one_loss(parameters, *sample):
        state = {f"model.{k}": v for k, v in (tensors | parameters).items()}
        loss = functional_call(step, state, tuple(part.unsqueeze(0) for part in sample))
        return loss.squeeze(0)

    gradients = vmap(grad(one_loss), in_dims=(None, *[0] * len(batch)), randomness="error")
    for start in range(0, len(batch[0]), chunk):
        part = tuple(tensor[start : start + chunk] for tensor in batch)
        for name, gradient in gradients(free, *part).items():
            sums[name] += gradient.square().sum(0)
    if not all(torch.isfinite(sums[name]).all() for name in names):
        raise ValueError(
            "A gradient is not finite; check the samples and the weights for NaN and infinity."
        )


class _Step(nn.Module):
    """Make the loss a ``forward``, which is what ``functional_call`` wants."""

    def __init__(self, model: nn.Module, per_sample_loss: PerSampleLoss):
        super().__init__()
        self.model, self.per_sample_loss = model, per_sample_loss

    def forward(self, *batch: Tensor) -> Tensor:
        return self.per_sample_loss(self.model, *batch)


def _check_modes(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if module.training and isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"The batch norm {name!r} is in training mode, where samples depend on each "
                "other; call model.eval() first."
            )


def _check_loss(loss: Tensor, n_samples: int) -> None:
    if tuple(loss.shape) != (n_samples,):
        raise ValueError(
            f"The loss has shape {tuple(loss.shape)}; the Fisher information wants one value for "
            f"each of the {n_samples} samples: do not average over the batch."
        )
    if not math.isfinite(float(loss.detach().sum())):
        raise ValueError(
            "The loss of a sample is not finite; check the samples and the weights for NaN and "
            "infinity."
        )
