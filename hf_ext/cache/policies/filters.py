"""The filters of Q-Filters: for each key head the direction in which its queries lie, fitted from any text."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import PushToHubMixin, cached_file

from hf_ext.attention.intercept import intercept
from hf_ext.layers import in_evaluation

#: Name of the file, beside the model it is of.
FILE = "q_filters.safetensors"
#: Marks the files, and their layout.
FORMAT = "hf_ext q-filters 1"


class Filters(PushToHubMixin):
    """Directions of the queries of a model.

    `save_pretrained` and `push_to_hub` put them beside the model, `from_pretrained` reads them from there.

    Args:
        directions: `(layers, key heads, width)`; a key that points there gets attention.
        model_type: of the model they were fitted on, if it is known.
        tokens: how many tokens they were fitted on, if that is known.

    Raises:
        ValueError: directions of another shape.

    Example:
        >>> Filters(torch.ones(2, 2, 8))
        Filters(layers=2, heads=2, width=8)
    """

    def __init__(self, directions: Tensor, model_type: str = "", tokens: int = 0) -> None:
        if not isinstance(directions, Tensor) or directions.ndim != 3 or not directions.is_floating_point():
            got = tuple(directions.shape) if isinstance(directions, Tensor) else directions
            raise ValueError(
                f"filters must be a float tensor (layers, key heads, width), as QFilters.fit(model, texts) makes them; "
                f"got {got!r}"
            )
        self.directions, self.model_type, self.tokens = directions, model_type, tokens
        self._moved = {directions.device: directions}

    def __repr__(self) -> str:
        layers, heads, width = self.directions.shape
        return f"Filters(layers={layers}, heads={heads}, width={width})"

    def of_layer(self, layer: int, keys: Tensor) -> Tensor:
        """Return the directions of a layer, `(key heads, width)`, where its keys are.

        Args:
            layer: number of the layer in the model.
            keys: `(rows, key heads, n, width)`.

        Raises:
            ValueError: the filters are of a model of another shape.
        """
        layers, heads, width = self.directions.shape
        if layer >= layers or keys.shape[1] != heads or keys.shape[3] != width:
            raise ValueError(
                f"the filters are of a model of {layers} layers with {heads} key heads of width {width}; this one has "
                f"a layer {layer} with {keys.shape[1]} key heads of width {keys.shape[3]}: fit filters of its own with "
                "QFilters.fit(model, texts)"
            )
        if keys.device not in self._moved:
            self._moved[keys.device] = self.directions.to(keys.device)
        return self._moved[keys.device][layer]

    def check(self, config: Any) -> None:
        """Raise unless the filters suit a model.

        Args:
            config: of the model.

        Raises:
            ValueError: it is another type of model, or has other layers or heads.
        """
        config = config.get_text_config(decoder=True)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        found = (config.model_type, config.num_hidden_layers, heads, width)
        wanted = (self.model_type or config.model_type, *self.directions.shape)
        if found != wanted:
            names = ("model type", "layers", "key heads", "width")
            ours, theirs = (
                ", ".join(f"{name} {value}" for name, value in zip(names, shape, strict=True))
                for shape in (wanted, found)
            )
            raise ValueError(
                f"the filters are of a model with {ours}; this one has {theirs}: fit filters of its own with "
                "QFilters.fit(model, texts)"
            )

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        model: Any,
        texts: Iterable[str] | Iterable[Any],
        tokenizer: Any = None,
        max_length: int = 2048,
        progress: bool | None = None,
    ) -> Filters:
        """Compute the filters of a model from any text.

        The first right singular vector of all queries of a head, turned to where their mean lies, averaged over
        the heads that share a key (section 3 of the paper). What is held is a second moment and a mean for each head,
        however long the text.

        Args:
            model: a decoder-only model.
            texts: strings, or token ids of each text. Some ten thousand tokens do.
            tokenizer: of the model, for strings.
            max_length: tokens of a text that are used.
            progress: show a progress bar on the standard error stream; by default if that is a terminal.

        Raises:
            ValueError: no text, strings without a tokenizer, or a model without filters: an encoder-decoder, or one
                whose layers have different heads.

        Example:
            >>> from hf_ext.testing import tiny_models
            >>> Filters.fit(tiny_models.shared("llama"), [list(range(3, 40)), list(range(40, 90))]).tokens
            87
        """
        if model.config.is_encoder_decoder:
            raise ValueError(f"{type(model).__name__} is an encoder-decoder; filters are for decoder-only models")
        moments: dict[int, _Moments] = {}

        def watch(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, plain: Any, **call: Any) -> Any:
            layer = getattr(module, "layer_idx", None)
            if layer is None:
                raise ValueError(f"{type(module).__name__} does not say which layer it is of")
            moments.setdefault(layer, _Moments()).add(query, key.shape[1])
            return plain(module, query, key, value, mask, **call)

        device, tokens = model.get_input_embeddings().weight.device, 0
        with in_evaluation(model), intercept(model, watch):
            for text in _watched(texts, progress):
                if isinstance(text, str) and tokenizer is None:
                    raise ValueError("texts are strings: give the tokenizer, too, or token ids in their place")
                if isinstance(text, str):
                    text = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
                ids = torch.as_tensor(text)
                ids = ids.flatten()[:max_length]
                if len(ids):
                    model.base_model(ids[None].to(device), use_cache=False)
                    tokens += len(ids)
        if not tokens:
            raise ValueError("there is no text to fit filters on")
        found = {layer: moment.direction() for layer, moment in moments.items()}
        shapes = {tuple(direction.shape) for direction in found.values()}
        if len(shapes) != 1:
            raise ValueError(f"the layers of {type(model).__name__} have keys of different shapes: {sorted(shapes)}")
        directions = torch.zeros(max(found) + 1, *shapes.pop())
        for layer, direction in found.items():
            directions[layer] = direction
        return cls(directions, model.config.get_text_config(decoder=True).model_type, tokens)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write the filters to a folder, that of the model as a rule.

        Args:
            save_directory: the folder; it is made if it is not there.
            kwargs: what `push_to_hub` says about checkpoints of models; no matter here.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        metadata = {"format": FORMAT, "model_type": self.model_type, "tokens": str(self.tokens)}
        save_file({"directions": self.directions.contiguous().cpu()}, str(folder / FILE), metadata=metadata)

    @classmethod
    def from_pretrained(cls, place: str | Path, config: Any = None, **hub: Any) -> Filters:
        """Read filters from a folder or a repository of the Hub.

        Args:
            place: the folder or repository.
            config: of the model they are for, which is checked then.
            hub: `revision`, `token`, `cache_dir` and so on.

        Raises:
            ValueError: the file is none of filters, or they are of a model of another shape.
            OSError: there is no such file.
        """
        with safe_open(cached_file(str(place), FILE, **hub), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{FILE} in {place} holds no filters; write them with filters.save_pretrained(folder)")
            found = cls(file.get_tensor("directions"), metadata["model_type"], int(metadata["tokens"]))
        if config is not None:
            found.check(config)
        return found


class _Moments:
    """Second moment and mean of the queries of one layer's heads, summed up text by text."""

    def __init__(self) -> None:
        self.second: Any = 0
        self.first: Any = 0
        self.key_heads = 0

    def add(self, query: Tensor, key_heads: int) -> None:
        """Add `(rows, heads, q, width)` queries."""
        query = query.float().transpose(0, 1).flatten(1, 2)
        self.second = self.second + (query.transpose(1, 2) @ query).double()
        self.first = self.first + query.double().sum(1)
        self.key_heads = key_heads

    def direction(self) -> Tensor:
        """Return the mean direction of the heads of each group, `(key heads, width)`."""
        most = torch.linalg.eigh(self.second).eigenvectors[..., -1]  # the first right singular vector of all queries
        most = most * torch.where((most * self.first).sum(-1, keepdim=True) < 0, -1, 1)
        return most.unflatten(0, (self.key_heads, -1)).mean(1).float().cpu()


def _watched(texts: Iterable[Any], progress: bool | None) -> Iterable[Any]:
    if not (sys.stderr.isatty() if progress is None else progress):
        return texts
    from rich.console import Console
    from rich.progress import track

    return track(texts, description="fitting filters", console=Console(stderr=True))
