"""Keys and values of texts, kept without positions, to be attended to from elsewhere."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_ext import adapter
from hf_ext.attention.intercept import intercept
from hf_ext.attention.rotary import Rotary
from hf_ext.layers import in_evaluation


@dataclass(frozen=True)
class Memories:
    """Keys and values of all layers for the tokens of some texts.

    Args:
        keys: `(layers, key heads, tokens, width)`, as the model has them at position 0.
        values: `(layers, key heads, tokens, value width)`.
        ids: `(tokens,)` int64.
        texts: `(tokens,)` int64, the number of each token's text.
        places: `(tokens,)` int64, where each token stands in its text.
        model: marks the model they were made with.

    Example:
        >>> from hf_ext.testing import tiny_models
        >>> memories = Memories.of(tiny_models.shared("llama"), [[5, 6, 7], [8, 9]])
        >>> len(memories), memories.keys.shape, memories.places.tolist()
        (5, torch.Size([2, 2, 5, 8]), [0, 1, 2, 0, 1])
    """

    keys: Tensor
    values: Tensor
    ids: Tensor
    texts: Tensor
    places: Tensor
    model: str

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> Tensor:
        """`(tokens,)` int64, the length of each token's text."""
        return torch.bincount(self.texts)[self.texts] if len(self) else self.texts

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, texts: Sequence[Sequence[int]], window: int | None = None, stride: int = 512) -> Memories:
        """Read texts with a model and keep what its layers made of them.

        A text longer than `window` is read in overlapping pieces: each `stride` tokens, with those before
        them as context, so that every token but the first few knows what stands before it.

        Args:
            model: a decoder-only model with rotary positions.
            texts: ids of each text.
            window: tokens of a forward pass; the model's context, at most 2048, by default.
            stride: tokens kept of a pass after the first.

        Raises:
            ValueError: the model's positions are no rotations, it attends several times in a layer, an empty text,
                or a window that leaves no context.
        """
        rotary = Rotary.of(model)
        config = model.config.get_text_config(decoder=True)
        context = getattr(config, "max_position_embeddings", None) or 2048
        window = min(context, 2048) if window is None else window
        stride = min(stride, window)
        if window < 1 or stride < 1 or window > context:
            raise ValueError(f"window must be from 1 to the context of {context} tokens, and stride at least 1")
        parts: list[tuple[Tensor, Tensor]] = []
        for number, text in enumerate(texts):
            if not len(text):
                raise ValueError(f"text {number} has no tokens")
            parts += _read(model, rotary, torch.tensor(list(text)), window, stride)
        if not parts:
            raise ValueError("no texts were given")
        return cls(
            keys=torch.cat([keys for keys, _ in parts], dim=2),
            values=torch.cat([values for _, values in parts], dim=2),
            ids=torch.tensor([token for text in texts for token in text]),
            texts=torch.tensor([number for number, text in enumerate(texts) for _ in text]),
            places=torch.tensor([place for text in texts for place in range(len(text))]),
            model=mark_of(model),
        )

    def check(self, model: Any) -> None:
        """Refuse a model that did not make these memories.

        Raises:
            ValueError: its weights or its shape are others.
        """
        if mark_of(model) != self.model:
            raise ValueError(
                f"these memories were made with another model, or with other weights, than this "
                f"{type(model).__name__}; make them with Memories.of(model, texts)"
            )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file.

        Args:
            path: of the file.
        """
        tensors = {f.name: getattr(self, f.name).contiguous() for f in dataclasses.fields(self) if f.name != "model"}
        save_file(tensors, str(path), metadata={"model": self.model, "format": "hf_ext memories"})

    @classmethod
    def load(cls, path: str | Path) -> Memories:
        """Read what `save` has written.

        Args:
            path: of the file.

        Raises:
            ValueError: the file holds something else.
        """
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != "hf_ext memories":
                raise ValueError(f"{path} holds no memories; make them with Memories.of(model, texts).save(path)")
            return cls(**{name: file.get_tensor(name) for name in file.keys()}, model=metadata["model"])  # noqa: SIM118

    def spans(self, weights: Tensor, most: int) -> list[dict[str, Any]]:
        """Return the spans of the texts that have the greatest weights.

        Args:
            weights: `(tokens,)`.
            most: spans to return; neighbouring tokens make one where each has at least half the weight of its best.

        Returns:
            For each its `text`, `start` and `stop` in tokens of that text, its `ids` and its share of all `weight`.
        """
        left = weights.clone()
        found: list[dict[str, Any]] = []
        total = float(weights.sum())
        while len(found) < most and float(left.max()) > 0:
            best = int(left.argmax())
            least = left[best] / 2
            start, stop = best, best + 1
            while start > 0 and self.texts[start - 1] == self.texts[best] and left[start - 1] >= least:
                start -= 1
            while stop < len(self) and self.texts[stop] == self.texts[best] and left[stop] >= least:
                stop += 1
            found.append(
                {
                    "text": int(self.texts[best]),
                    "start": int(self.places[start]),
                    "stop": int(self.places[stop - 1]) + 1,
                    "ids": self.ids[start:stop].tolist(),
                    "weight": float(left[start:stop].sum()) / total,
                }
            )
            left[start:stop] = 0
        return found


def mark_of(model: Any) -> str:
    """Return a mark of a model: its architecture, and sums of some of its weights."""
    config = model.config.get_text_config(decoder=True)
    shape = [config.model_type, config.num_hidden_layers, config.hidden_size, config.vocab_size]
    # Tied weights are no longer one tensor where accelerate has offloaded them: equal sums count once.
    sums = dict.fromkeys(
        round(float(weight.detach().flatten()[::1009].double().sum()), 3) for weight in _weights(model)
    )
    return hashlib.sha256(json.dumps([*shape, *sums]).encode()).hexdigest()[:16]


def _weights(model: Any) -> Iterator[Tensor]:
    """Yield all parameters; those that accelerate offloads are fetched, module by module."""
    if all(weight.device.type != "meta" for weight in model.parameters()):
        yield from model.parameters()
        return
    # A statement would make exported strategies ask for accelerate, which is there only if it has offloaded the model.
    align_module_device = importlib.import_module("accelerate.utils").align_module_device
    for module in model.modules():
        with align_module_device(module):
            yield from module.parameters(recurse=False)


def _read(model: Any, rotary: Rotary, ids: Tensor, window: int, stride: int) -> list[tuple[Tensor, Tensor]]:
    """Return keys and values `(layers, heads, tokens, width)` of a text, piece by piece."""
    found, done = [], 0
    device = adapter.device_of(model)
    while done < len(ids):
        stop = min(len(ids), window if not done else done + stride)
        start = max(0, stop - window)
        layers: dict[int, tuple[Tensor, Tensor]] = {}

        def keep(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, plain: Any, **call: Any) -> Any:
            layer, at = module.layer_idx, torch.arange(key.shape[2], device=key.device)
            if layer in layers:  # noqa: B023  (called at once, here and below)
                raise ValueError(
                    f"{type(model).__name__} attends more than once in layer {layer}, with other values each time; "
                    "a memory holds one value for each key"
                )
            layers[layer] = rotary.rotate(layer, key, -at)[0], value[0]  # noqa: B023
            return plain(module, query, key, value, mask, **call)

        piece = ids[None, start:stop].to(device)
        with in_evaluation(model), intercept(model, keep):
            places = torch.arange(piece.shape[1], device=device)[None]
            model(piece, attention_mask=torch.ones_like(piece), position_ids=places, use_cache=False)
        kept = slice(done - start, None)
        pairs = [layers[layer] for layer in sorted(layers)]
        found.append(tuple(torch.stack([pair[i][:, kept].cpu() for pair in pairs]) for i in (0, 1)))
        done = stop
    return found  # type: ignore[return-value]
