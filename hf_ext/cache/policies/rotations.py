"""How a model turns its queries from position to position, as one tensor that a policy can carry and save."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hf_ext.attention.rotary import Rotary

#: Distances at which angles are measured, each more exact than the one before.
DISTANCES = (1, 32, 1024)


@torch.no_grad()
def rotations_of(model: Any) -> Tensor:
    """Ask a model how each of its layers turns queries by their positions.

    Args:
        model: a decoder-only model with rotary positions.

    Returns:
        float64 `(layers, 2, width)`: for each number of a head the number that turns with it (itself if none does),
        and by what angle a position turns it; where heads of layers differ in width, filled up with what does not turn.

    Raises:
        ValueError: the model has no rotary positions that can be moved.

    Example:
        >>> from hf_ext.testing import tiny_models
        >>> found = rotations_of(tiny_models.shared("llama"))
        >>> found.shape, found[0, 0].int().tolist()
        (torch.Size([2, 2, 8]), [4, 5, 6, 7, 0, 1, 2, 3])
    """
    rotary = Rotary.of(model)
    widths = _widths(model)
    found = torch.zeros(len(widths), 2, max(widths), dtype=torch.float64)
    found[:, 0] = torch.arange(max(widths))
    device = model.get_input_embeddings().weight.device
    for layer, width in enumerate(widths):
        unit = torch.eye(width, device=device)
        partner = angle = torch.zeros(0)
        for distance in DISTANCES:
            # Row j is unit vector j after the turn: the transpose of the matrix of the rotation.
            matrix = rotary.rotate(layer, unit, torch.tensor(distance, device=device)).double().cpu().T
            across = matrix - matrix.diagonal().diag()
            most = across.abs().max(dim=1)
            if distance == 1:
                partner = most.indices.where(most.values > 0, torch.arange(width))
                known = torch.zeros(width, dtype=torch.float64)
            sine = matrix.gather(1, partner[:, None])[:, 0].masked_fill(partner == torch.arange(width), 0)
            measured = torch.atan2(sine, matrix.diagonal())
            known = distance * known  # what is known says how many times it went round
            angle = known + torch.remainder(measured - known + math.pi, 2 * math.pi) - math.pi
            known = angle / distance
        found[layer, 0, :width], found[layer, 1, :width] = partner.double(), known
    return found


def turn(rotation: Tensor, states: Tensor, by: Tensor) -> Tensor:
    """Turn states by positions.

    Args:
        rotation: `(2, width)` of a layer, see `rotations_of`.
        states: `(..., width)`.
        by: positions, broadcasts to all dimensions of the states but the last; negative turns back.

    Example:
        >>> quarter = torch.tensor([[1.0, 0.0], [-math.pi / 2, math.pi / 2]], dtype=torch.float64)
        >>> turn(quarter, torch.tensor([1.0, 0.0]), torch.tensor(1)).round(decimals=4).abs()
        tensor([0., 1.])
    """
    partner, angles = rotation[0].long(), rotation[1] * by[..., None]
    return states * angles.cos().to(states.dtype) + states[..., partner] * angles.sin().to(states.dtype)


def mean_turn(rotation: Tensor, first: int, count: int) -> Tensor:
    """Return the mean of the matrices that turn by `first` and the next `count - 1` positions, `(width, width)`.

    Args:
        rotation: `(2, width)` of a layer, see `rotations_of`.
        first: number of positions.
        count: of turns.

    Example:
        >>> half = torch.tensor([[1.0, 0.0], [-math.pi, math.pi]], dtype=torch.float64)
        >>> mean_turn(half, 0, 2).abs().max() < 1e-9  # as much as it turns away it turns back
        tensor(True)
    """
    steps = torch.arange(first, first + count, device=rotation.device, dtype=torch.float64)
    angles = rotation[1] * steps[:, None]
    partner = rotation[0].long()
    own = torch.arange(len(partner), device=rotation.device)
    matrix = angles.cos().mean(0).diag()
    matrix[own, partner] += angles.sin().mean(0).masked_fill(partner == own, 0)
    return matrix


def _widths(model: Any) -> list[int]:
    """Return the width of the heads of every layer."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.get_input_embeddings().weight.device)
    layers = model(ids, use_cache=True).past_key_values.layers
    return [layer.keys.shape[-1] for layer in layers]
