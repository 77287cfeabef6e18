"""Learned embeddings that stand for no token, and where PEFT checkpoints keep them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


class LearnedEmbeddings(nn.Module):
    """Groups of embeddings, each a parameter `(count, width)`, drawn like the model's own token embeddings.

    Args:
        model: a causal LM.
        **counts: how many of each group.

    Raises:
        ValueError: a count that is not a positive int.

    Example:
        >>> from hf_ext.testing import tiny_models
        >>> LearnedEmbeddings(tiny_models.build("llama"), memory=4).memory.shape
        torch.Size([4, 32])
    """

    def __init__(self, model: Any, **counts: int) -> None:
        super().__init__()
        weight = model.get_input_embeddings().weight.detach().float()
        for name, count in counts.items():
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"the number of {name} vectors must be a positive int, got {count!r}")
            noise = torch.randn(count, weight.shape[-1], device=weight.device)
            # In float32 also where the model is not: small steps would be lost to rounding.
            self.register_parameter(name, nn.Parameter(weight.mean(0) + weight.std(0) * noise))

    def count(self, name: str) -> int:
        """Return the number of embeddings of a group."""
        return len(getattr(self, name))

    def rows(self, name: str, rows: int) -> Tensor:
        """Return a group repeated for each row, `(rows, count, width)`."""
        return getattr(self, name).expand(rows, -1, -1)

    def save(self, file: Path) -> None:
        """Write the embeddings into a safetensors file."""
        save_file({name: value.detach().cpu().contiguous() for name, value in self.named_parameters()}, file)

    @torch.no_grad()
    def load(self, file: str | Path) -> None:
        """Read what `save` wrote.

        Raises:
            ValueError: another number of vectors, or another width.
        """
        with safe_open(file, "pt") as saved:
            for name, parameter in self.named_parameters():
                value = saved.get_tensor(name)
                if value.shape != parameter.shape:
                    raise ValueError(
                        f"{file} holds {name} vectors of the shape {tuple(value.shape)}, this model has "
                        f"{tuple(parameter.shape)}"
                    )
                parameter.copy_(value)


def saved_shape(file: str | Path, name: str) -> list[int]:
    """Return the shape of a group in a file that `LearnedEmbeddings.save` wrote."""
    with safe_open(file, "pt") as saved:
        return list(saved.get_slice(name).get_shape())
