"""One model with an adapter that is on for one pass and off for the other one, also where layers are recomputed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from hf_ext import adapter


def adapter_layers(model: nn.Module) -> list[Any]:
    """Return the layers of a model that PEFT has put adapters on."""
    needed = ("adapter_layer_names", "active_adapters", "enable_adapters", "merged", "disable_adapters")
    return [module for module in model.modules() if all(hasattr(module, name) for name in needed)]


@contextlib.contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Run the model without its adapters; what is trainable does not change, gradients flow through.

    Layers that gradient checkpointing runs again in the backward pass run without adapters again.

    Args:
        model: a model with adapters.

    Raises:
        ValueError: the adapters are merged into the weights, so that they cannot be switched off bit for bit.
    """
    layers = adapter_layers(model)
    if any(layer.merged for layer in layers):
        raise ValueError("the adapters are merged into the model's weights; unmerge_adapter() first")
    with _off(layers), adapter.recomputing_under(model, lambda: _off(layers)):
        yield


@contextlib.contextmanager
def _off(layers: list[Any]) -> Iterator[None]:
    on = [layer for layer in layers if not layer.disable_adapters]
    _switch(on, False)
    try:
        yield
    finally:
        _switch(on, True)


def _switch(layers: list[Any], enabled: bool) -> None:
    # PEFT freezes adapters that it switches off, and those that are not active; here, training goes on.
    flags = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    for layer in layers:
        layer.enable_adapters(enabled)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
