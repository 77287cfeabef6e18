"""Layerwise unmasking: let chosen layers of a causal model look both ways (arXiv:2401.14556).

    layers 1 1 0 0      layers with a 1 see what comes after a token, too; the others stay causal
        |
    config.unmasked_layers  --saved with the model-->  config.json
        |
    every attention layer asks its config, and opens its mask or leaves it

For labels of single tokens a decoder is better off if it may look right; which layers should, depends on the task.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_ext import adapter
from hf_ext.attention.intercept import Attended, visible
from hf_ext.layers import base_model

#: Name of the config's field, and of the file beside an adapter.
FIELD, FILE = "unmasked_layers", "layerwise_unmasking.json"

_NAMES: dict[str, str] = {}


class LayerwiseUnmasking(TrainerCallback):
    """Remove the causal mask from some layers of a model, before it is fine-tuned to label tokens.

    The choice stands in the model's config, so that `save_pretrained` keeps it and copies of the model
    have it. A checkpoint is loaded with `LayerwiseUnmasking.load(AutoModelForTokenClassification, path)`;
    loaded in another way it would be causal. As a callback of the stock Trainer it attaches itself and
    writes a small file into every checkpoint, which serves adapters, whose checkpoints have no config of
    the model: `LayerwiseUnmasking.of(path).attach(model)`.

    Args:
        layers: which layers look both ways: a pattern of 0 and 1 for groups of equally many layers, the
            first ones first (`"0110"`), their numbers, or `"all"`.

    Raises:
        ValueError: a pattern of anything else, or layers that the model does not have.

    Source:
        Dukić and Šnajder, Looking Right is Sometimes Right: Investigating the Capabilities of Decoder-only
        LLMs for Sequence Labeling (Findings of ACL 2024).

    Example:
        >>> from hf_ext.testing import tiny_models
        >>> model, ids = tiny_models.build("llama"), torch.tensor([[5, 6, 7]])
        >>> before = model(ids).logits
        >>> _ = LayerwiseUnmasking("01").attach(model)
        >>> model.config.unmasked_layers
        [1]
        >>> bool((model(ids).logits[:, 0] == before[:, 0]).all())  # the first token sees the others now
        False
        >>> LayerwiseUnmasking.detach(model)
        >>> bool((model(ids).logits == before).all())
        True
    """

    def __init__(self, layers: str | Sequence[int] = "all") -> None:
        if isinstance(layers, str):
            if layers != "all" and (not layers or set(layers) - {"0", "1"}):
                raise ValueError(
                    f"layers must be 'all', a pattern of 0 and 1 such as '0110', or numbers; got {layers!r}"
                )
        elif any(isinstance(layer, bool) or not isinstance(layer, int) or layer < 0 for layer in layers):
            raise ValueError(f"numbers of layers must be ints of at least 0, got {layers!r}")
        self.layers: str | list[int] = layers if isinstance(layers, str) else sorted(set(layers))

    def chosen(self, count: int) -> list[int]:
        """Return the numbers of the layers of a model of `count` layers.

        Example:
            >>> LayerwiseUnmasking("0110").chosen(8)
            [2, 3, 4, 5]
        """
        if isinstance(self.layers, list):
            wrong = [layer for layer in self.layers if layer >= count]
            if wrong:
                raise ValueError(f"the model has {count} layers, there is none of the number {wrong[0]}")
            return self.layers
        if self.layers == "all":
            return list(range(count))
        if count % len(self.layers):
            raise ValueError(
                f"{count} layers do not make {len(self.layers)} equal groups as in {self.layers!r}; give as many "
                f"groups as divide {count}, or the numbers of the layers"
            )
        each = count // len(self.layers)
        return [layer for layer in range(count) if self.layers[layer // each] == "1"]

    def attach(self, model: Any) -> Any:
        """Let the chosen layers of a model look both ways, and return it.

        Args:
            model: a decoder-only model of transformers with any head, or a PEFT model around one.
        """
        inner = base_model(model)
        if inner.config.is_encoder_decoder:
            raise ValueError(
                f"{type(inner).__name__} is an encoder-decoder; only decoder-only models have a mask to lift"
            )
        layers = self.chosen(inner.config.get_text_config(decoder=True).num_hidden_layers)
        for config in adapter.attention_configs(inner):
            setattr(config, FIELD, layers)
            adapter.switch_attention(config, _unmasking(adapter.attention_of(config)))
        return model

    @staticmethod
    def detach(model: Any) -> None:
        """Make a model causal again."""
        originals = {name: own for own, name in _NAMES.items()}
        for config in adapter.attention_configs(base_model(model)):
            name = adapter.attention_of(config)
            adapter.switch_attention(config, originals.get(name, name))
            if hasattr(config, FIELD):
                delattr(config, FIELD)

    def save(self, folder: str | Path) -> None:
        """Write which layers they are into a folder, such as that of an adapter."""
        Path(folder, FILE).write_text(json.dumps({FIELD: self.layers}) + "\n", encoding="utf-8")

    @classmethod
    def of(cls, folder: str | Path) -> LayerwiseUnmasking:
        """Return the unmasking of a checkpoint: of a whole model, or of an adapter.

        Args:
            folder: the checkpoint.

        Raises:
            ValueError: it says nothing of unmasking.
        """
        for name in (FILE, "config.json"):
            path = Path(folder, name)
            if path.is_file():
                layers = json.loads(path.read_text(encoding="utf-8")).get(FIELD)
                if layers is not None:
                    return cls(layers)
        raise ValueError(f"{folder} has neither {FILE} nor a config.json with {FIELD}; it was not saved unmasked")

    @classmethod
    def load(cls, auto_class: Any, folder: str | Path, **kwargs: Any) -> Any:
        """Load a model that was saved unmasked.

        Args:
            auto_class: `AutoModelForTokenClassification`, or another class with `from_pretrained`.
            folder: the checkpoint.
            **kwargs: of `from_pretrained`.
        """
        return cls.of(folder).attach(auto_class.from_pretrained(folder, **kwargs))

    # As a callback of the Trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Attach, unless it is done already."""
        if model is not None:
            self.attach(model)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the choice into the checkpoint."""
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if state.is_world_process_zero and folder.is_dir():
            self.save(folder)


def both_ways(mask: Any, query: Tensor, key: Tensor) -> Any:
    """Return a causal mask with its mirror image added: what saw is seen; windows and padding stay.

    Args:
        mask: of a causal layer, in its own form.
        query: `(rows, heads, tokens, width)`.
        key: likewise, of the same tokens.

    Raises:
        ValueError: there are keys of a cache, which could not look right any more.

    Example:
        >>> q = torch.zeros(1, 1, 3, 4)
        >>> causal = torch.ones(1, 1, 3, 3).tril().bool() & torch.tensor([True, True, False])
        >>> both_ways(causal, q, q)[0, 0].int()
        tensor([[1, 1, 0],
                [1, 1, 0],
                [1, 1, 0]], dtype=torch.int32)
    """
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"an unmasked layer got {query.shape[2]} tokens after {key.shape[2] - query.shape[2]} of a cache, which "
            "have not seen them; unmasked models label whole texts (use_cache=False) and do not generate"
        )
    if mask is None:
        return None
    seen = visible(mask, query, key)
    real = seen.diagonal(dim1=-2, dim2=-1)
    opened = (seen | seen.transpose(-1, -2)) & real[..., None, :]
    if mask.dtype == torch.bool:
        return opened
    return torch.zeros_like(mask).masked_fill(~opened, torch.finfo(mask.dtype).min)


def _unmasking(own: str) -> str:
    """Return the name of the attention that asks its config, in place of the implementation called `own`."""
    if own in _NAMES.values():
        return own
    if own not in _NAMES:
        _NAMES[own] = f"hf_ext_unmasked_{len(_NAMES)}"
        adapter.register_attention_like(_NAMES[own], functools.partial(_attend, own), own)
    return _NAMES[own]


def _attend(
    own: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> Attended:
    attend = adapter.attention_function(own, module)
    config: Any = module.config
    if module.layer_idx not in (getattr(config, FIELD, None) or ()):
        return attend(module, query, key, value, attention_mask, **kwargs)
    mask = both_ways(attention_mask, query, key)
    return attend(module, query, key, value, mask, **{**kwargs, "is_causal": False})
