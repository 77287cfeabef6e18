"""Vectors that a model reads in place of a context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Slots:
    """What a context was compressed into: a few vectors a row, of the width of the model's token embeddings.

    Slots are plain tensors. They can be stored, sent to another process that has the same model, put side by
    side (`Slots.join`), and read as often as one likes.

    Args:
        vectors: `(rows, slots, width)`.
        mask: `(rows, slots)` bool, False where a row has fewer slots than others; all True by default.

    Raises:
        ValueError: shapes that do not fit together.

    Example:
        >>> first, second = Slots(torch.zeros(2, 4, 8)), Slots(torch.ones(2, 3, 8))
        >>> Slots.join([first, second])
        Slots(rows=2, slots=7, width=8)
    """

    vectors: Tensor
    mask: Tensor = None  # type: ignore[assignment]  # filled in below

    def __post_init__(self) -> None:
        if self.vectors.ndim != 3:
            raise ValueError(f"vectors of Slots are (rows, slots, width), got the shape {tuple(self.vectors.shape)}")
        if self.mask is None:
            object.__setattr__(self, "mask", torch.ones(self.vectors.shape[:2], dtype=torch.bool))
        if self.mask.shape != self.vectors.shape[:2]:
            raise ValueError(
                f"the mask of Slots has the shape {tuple(self.mask.shape)}, expected {tuple(self.vectors.shape[:2])}, "
                "one entry a slot"
            )
        object.__setattr__(self, "mask", self.mask.to(self.vectors.device, torch.bool))

    def __repr__(self) -> str:
        rows, slots, width = self.vectors.shape
        return f"Slots(rows={rows}, slots={slots}, width={width})"

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, rows: Any) -> Slots:
        """Return some of the rows: `slots[:2]`, `slots[[0, 0, 1]]`."""
        if isinstance(rows, int):
            rows = [rows]
        return Slots(self.vectors[rows], self.mask[rows])

    def detach(self) -> Slots:
        """Return the same slots without the graph that made them."""
        return Slots(self.vectors.detach(), self.mask)

    def to(self, *args: Any) -> Slots:
        """Return the slots on another device or in another dtype, as `Tensor.to`."""
        return Slots(self.vectors.to(*args), self.mask)

    @staticmethod
    def join(parts: Sequence[Slots]) -> Slots:
        """Put the slots of several contexts side by side, in the order in which they are to be read.

        Raises:
            ValueError: no parts, or parts of different rows or widths.
        """
        shapes = {(len(part), part.vectors.shape[-1]) for part in parts}
        if len(shapes) != 1:
            raise ValueError(f"Slots.join needs parts of the same rows and width, got {sorted(shapes)}")
        vectors, masks = [part.vectors for part in parts], [part.mask for part in parts]
        return Slots(torch.cat(vectors, dim=1), torch.cat(masks, dim=1))

    def save(self, file: str | Path, **about: str) -> None:
        """Write the slots into a safetensors file.

        Args:
            file: where to.
            **about: what else shall be known of them (the model's name, the source of the text).
        """
        tensors = {"vectors": self.vectors.detach().cpu().contiguous(), "mask": self.mask.cpu().contiguous()}
        save_file(tensors, file, metadata={"format": "pt", **about})

    @classmethod
    def load(cls, file: str | Path, device: str | torch.device = "cpu") -> Slots:
        """Read what `save` wrote.

        Raises:
            ValueError: the file holds no slots.
        """
        with safe_open(file, "pt", device=str(device)) as saved:
            if missing := {"vectors", "mask"} - set(saved.keys()):
                raise ValueError(f"{file} holds no slots: it lacks {', '.join(sorted(missing))}")
            return cls(saved.get_tensor("vectors"), saved.get_tensor("mask"))
