"""Which layers of a text-to-image model a method trains: Selective Amnesia and ESD choose so."""

from torch import nn

LAYERS = ("full", "xattn", "noxattn")


def layer_parameters(model: nn.Module, layers: str) -> dict[str, nn.Parameter]:
    """Choose the parameters that are trained, by name.

    ``xattn`` are those of the cross-attention, ``noxattn`` all others, and ``full`` is both. ESD's
    released code leaves the time embedding and the output layer out of ``noxattn`` as well.

    Raises: ValueError if the name is unknown or the model has no such parameters.
    """
    if layers not in LAYERS:
        raise ValueError(f"The layers {layers!r} are unknown; choose from {', '.join(LAYERS)}.")
    chosen = {
        name: parameter
        for name, parameter in model.named_parameters()
        if layers == "full" or ("attn2" in name.split(".")) == (layers == "xattn")
    }
    if not chosen:
        raise ValueError(
            f"The model {type(model).__name__} has no parameters in the layers {layers!r}; wanted "
            "a network with cross-attention ('attn2' in diffusers), so choose other layers."
        )
    return chosen


def train_only(model: nn.Module, layers: str) -> None:
    """Let gradients reach the parameters of :func:`layer_parameters` alone."""
    model.requires_grad_(False)
    for parameter in layer_parameters(model, layers).values():
        parameter.requires_grad_(True)
