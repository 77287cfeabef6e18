"""A transformers cache that keeps what a policy says, and nothing else.

model.generate(**inputs, past_key_values=CompressedCache(model.config, SnapKV(budget=0.25)))
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from hf_ext import adapter
from hf_ext.cache.budget import check_budget
from hf_ext.cache.entries import Entries
from hf_ext.cache.layer import CompressedLayer
from hf_ext.cache.policy import CachePolicy, Seen
from hf_ext.cache.quantisation import Quantisation
from hf_ext.cache.stores.packed import PackedStore

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class CompressedCache(Cache):
    """Keys and values of a model, of which a policy keeps some.

    What is dropped is gone from memory. `get_seq_length()` counts the tokens seen, so that positions, further turns,
    chunked prefill and plain `model(...)` calls stay right.

    Args:
        config: of the model.
        policy: what is kept, and how much of it.
        layer_budgets: a budget for each layer that is compressed, in the policy's place; as `budget` of a policy.
        skip_layers: so many first layers keep everything.
        sliding: whether layers with a sliding window are compressed, too ("compress"), or keep their window
            ("keep"); by default they keep it, unless all layers slide.
        attention_mask: `(rows, tokens)` of the first prompt; only needed for padded batches where the model's
            attention is not `"hf_ext"`, as a cache is not told about padding.
        offloading: whether layers that are not in use are moved to the CPU.
        quantise: how older entries are packed into a few bits each, or the number of bits (2, 4 or 8); by default
            they are not, unless the policy does it. With a policy that drops entries, which it may do at prefill
            only: what is packed is never dropped, and the budget counts it.

    Raises:
        ValueError: a policy or budgets that do not suit the model; when the model runs, what its attention
            implementation cannot do.

    Example:
        >>> from hf_ext.cache import Knorm
        >>> from hf_ext.testing import tiny_models
        >>> model = tiny_models.shared("llama")
        >>> cache = CompressedCache(model.config, Knorm(budget=4))
        >>> _ = model(torch.arange(1, 11)[None], past_key_values=cache)
        >>> cache.get_seq_length(), cache.held()
        (10, [4, 4])
    """

    def __init__(
        self,
        config: PretrainedConfig,
        policy: CachePolicy,
        *,
        layer_budgets: Sequence[int | float] | None = None,
        skip_layers: int = 0,
        sliding: Literal["keep", "compress"] | None = None,
        attention_mask: Tensor | None = None,
        offloading: bool = False,
        quantise: Quantisation | int | None = None,
    ) -> None:
        if not isinstance(policy, CachePolicy):
            raise ValueError(
                f"policy must be a cache policy such as SnapKV(budget=0.25), got {policy!r}; "
                "hf_ext.plugins.all(kind='cache') lists them"
            )
        self.config = config.get_text_config(decoder=True)
        self.policy = policy
        self.attention_mask = None if attention_mask is None else attention_mask.bool()
        self._unknown_padding = False
        stock = DynamicCache(config=self.config).layers
        problem = adapter.compression_problem(stock)
        if problem is not None:
            raise ValueError(f"this model's cache cannot be compressed: {problem}")
        windows = [adapter.layer_window(layer) for layer in stock]
        if sliding not in (None, "keep", "compress"):
            raise ValueError(f"sliding must be 'keep' or 'compress', got {sliding!r}")
        if sliding is None:
            sliding = "compress" if all(windows) else "keep"
        self.quantise = Quantisation(bits=quantise) if isinstance(quantise, int) else quantise
        #: Whether it was said that keys do not survive.
        self.warned = False
        if self.quantise is None:
            self.quantise = policy.quantise()
        elif policy.quantise() not in (None, self.quantise):
            raise ValueError(f"{policy!r} says how to quantise itself; leave quantise={quantise!r} out")
        if sliding == "compress" and policy.storage == "ragged" and any(windows):
            raise ValueError(
                f"{type(policy).__name__} keeps other tokens in every head, and layers with a sliding window cannot; "
                "give sliding='keep' or another policy"
            )
        self.sliding, self.skip_layers = sliding, skip_layers
        layers: list[Any] = []
        self.compressed = 0
        for number, (layer, window) in enumerate(zip(stock, windows, strict=True)):
            if number < skip_layers or adapter.is_empty_layer(layer) or (window is not None and sliding == "keep"):
                layers.append(layer)
            else:
                layers.append(CompressedLayer(self, self.compressed, window, number))
                self.compressed += 1
        if not self.compressed:
            raise ValueError(
                f"no layer is left to be compressed: there are {len(stock)}, the first {skip_layers} are skipped, and "
                f"those with a sliding window are left alone (sliding={sliding!r})"
            )
        if layer_budgets is not None:
            if len(layer_budgets) != self.compressed:
                raise ValueError(
                    f"layer_budgets has {len(layer_budgets)} budgets for {self.compressed} compressed layers"
                )
            for budget in layer_budgets:
                check_budget(budget)
        self.layer_budgets = None if layer_budgets is None else list(layer_budgets)
        #: What `by_backend` has told the first layer in this pass.
        self.asked = False
        #: The first layer that is compressed; the others have seen what it has.
        self.first = next(layer for layer in layers if isinstance(layer, CompressedLayer))
        self._check_quantise(any(layer.window is not None for layer in layers if isinstance(layer, CompressedLayer)))
        super().__init__(layers=layers, offloading=offloading)

    def _check_quantise(self, slides: bool) -> None:
        """Raise what does not go with packed entries."""
        if self.quantise is None:
            return
        policy, kind = self.policy, type(self.policy).__name__
        budgets = [self.budget_of(number) for number in range(self.compressed)]
        drops = any(isinstance(budget, int) or budget < 1 for budget in budgets)
        if policy.storage == "ragged":
            reason = f"{kind} keeps other tokens in every head, and keys are packed in groups of tokens"
        elif policy.gated:
            reason = f"{kind} may drop any token at any time, and packed ones are never dropped"
        elif slides:
            reason = "layers with a sliding window drop tokens as they go, and packed ones are never dropped"
        elif drops and policy.when != "prefill":
            reason = (
                f"{kind} drops while decoding (when={policy.when!r}), and packed entries are never dropped: give it "
                "when='prefill'"
            )
        else:
            return
        raise ValueError(f"quantised storage cannot be combined with this: {reason}")

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand the new tokens of a layer to it; see `CompressedLayer.update`.

        Raises:
            ValueError: there is no such layer.
        """
        if layer_idx >= len(self.layers):
            raise ValueError(
                f"the cache was made for a model of {len(self.layers)} layers, and this one has more: give "
                "CompressedCache the config of the model that uses it"
            )
        if not self.offloading:  # a call less at every token in every layer
            return self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    # What a user asks.

    def resident_bytes(self) -> int:
        """Return the bytes of all tensors that the cache holds: keys, values, columns, scores, scales, room."""
        storages = {}
        for tensor in self._tensors():
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    def nominal_bytes(self) -> int:
        """Return the bytes of the keys and values alone that the budget allows for what was seen."""
        total = 0
        for layer in self._compressed_layers():
            if layer.is_initialized:
                total += layer.nominal_bytes()
        return total + sum(
            tensor.numel() * tensor.itemsize for layer in self.layers if not isinstance(layer, CompressedLayer)
            for tensor in adapter.tensors_of_layer(layer)
        )  # fmt: skip

    def held(self) -> list[int]:
        """Return how many entries the heads of each compressed layer hold at most."""
        return [len(layer.store) for layer in self._compressed_layers()]

    def entries(self, layer: int) -> Entries:
        """Return what a compressed layer holds.

        Args:
            layer: number of the layer in the model.

        Raises:
            ValueError: the layer is not compressed, or holds nothing yet.
        """
        found = self.layers[layer]
        if not isinstance(found, CompressedLayer):
            raise ValueError(f"layer {layer} is not compressed")
        return found.entries()

    def columns(self, layer: int) -> Tensor:
        """Return the columns that a layer holds, `(rows, key heads, n)` int32, -1 for nothing; see `Entries`."""
        return self.entries(layer).columns

    def save(self, path: str | Path) -> None:
        """Write what is held to a safetensors file, for `load`.

        Args:
            path: of the file.

        Raises:
            ValueError: the cache is empty, or records tokens that may yet be forgotten.
        """
        from hf_ext.cache.saving import save

        save(self, path)

    @classmethod
    def load(cls, path: str | Path, config: PretrainedConfig, device: torch.device | str = "cpu") -> CompressedCache:
        """Read a file that `save` has written; `generate` goes on from it when it is given the whole text.

        Args:
            path: of the file.
            config: of the model that goes on.
            device: of that model.

        Raises:
            ValueError: the file holds something else, the model has another shape, or the policy is not installed.

        Example:
            >>> import tempfile
            >>> from hf_ext.cache import Knorm
            >>> from hf_ext.testing import tiny_models
            >>> model, ids = tiny_models.shared("llama"), torch.arange(1, 11)[None]
            >>> cache = CompressedCache(model.config, Knorm(budget=4))
            >>> _ = model(ids[:, :9], past_key_values=cache)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     cache.save(f"{folder}/prompt.safetensors")
            ...     again = CompressedCache.load(f"{folder}/prompt.safetensors", model.config)
            >>> model.generate(ids, past_key_values=again, max_new_tokens=2, do_sample=False).shape
            torch.Size([1, 12])
        """
        from hf_ext.cache.saving import load

        return load(cls, path, config, device)

    def __repr__(self) -> str:
        return f"CompressedCache({self.policy!r}, layers={self.compressed}, seen={self.get_seq_length()})"

    # What layers ask.

    def by_backend(self) -> bool:
        """Tell whether attention comes back to the cache, as `"hf_ext"` does."""
        name = adapter.attention_of(self.config)
        return name == "hf_ext" or adapter.masks_like(name, ("hf_ext",)) is not None

    def budget_of(self, layer: int) -> int | float:
        """Return the budget of a compressed layer."""
        if self.layer_budgets is not None:
            return self.layer_budgets[layer]
        return self.policy.layer_budget(layer, self.compressed)

    def seen_of(self, layer: CompressedLayer, **more: Any) -> Seen:
        """Return what a policy is told about a pass."""
        return Seen(
            layer=layer.number, layers=self.compressed, model_layer=layer.model_layer, window=layer.window, **more
        )

    def check_without_backend(self, layer: CompressedLayer) -> None:
        """Raise what cannot be done where attention does not come back to the cache."""
        problem = adapter.eviction_problem(self.config)  # known only now: the class of the model may come after us
        if problem is not None:
            raise ValueError(f"this model's cache cannot be compressed: {problem}")
        name = adapter.attention_of(self.config)
        policy, kind = self.policy, type(self.policy).__name__
        reason = None
        if policy.queries or policy.column_sums:
            reason = f"{kind} looks at queries or attention"
        elif policy.storage == "ragged":
            reason = f"{kind} keeps another number of tokens in every head"
        elif policy.gated:
            reason = f"{kind} decides for every query what it sees"
        elif policy.biased:
            reason = f"{kind} adds to the scores of what it has merged"
        elif layer.window is not None:
            reason = "layers with a sliding window are compressed"
        elif len({str(self.budget_of(number)) for number in range(self.compressed)}) > 1:
            reason = "layers have different budgets"
        elif isinstance(layer.store, PackedStore) and layer.seen > len(layer.store) and layer.store.scattered():
            reason = "rows of different lengths have dropped different numbers of tokens behind packed ones"
        if reason is not None:
            raise ValueError(
                f"{reason}, which attn_implementation={name!r} does not know of; load the model with "
                "attn_implementation='hf_ext', or call model.set_attn_implementation('hf_ext')"
            )

    def note_rows(self, keys: Tensor) -> None:
        """Note whether the rows of a first pass may be padded differently, as far as keys `(rows, ...)` tell."""
        known = self.attention_mask is not None or len(keys) == 1
        # Beams begin with copies of one row.
        self._unknown_padding = not (known or bool((keys == keys[:1]).all()))

    def check_rows(self, layer: CompressedLayer, keep: Sequence[int]) -> None:
        """Raise where tokens are to be dropped from rows that transformers' own mask would then take for others."""
        name = adapter.attention_of(self.config)
        if self._unknown_padding:
            raise ValueError(
                f"attn_implementation={name!r} does not tell the cache which tokens of a batch are padding; give "
                "CompressedCache(..., attention_mask=inputs['attention_mask']), or load the model with "
                "attn_implementation='hf_ext'"
            )
        if isinstance(self.budget_of(layer.number), float) and len(set(keep)) > 1:
            raise ValueError(
                f"rows of different lengths keep different numbers of tokens under a share as budget, which "
                f"attn_implementation={name!r} does not know of; give the budget in tokens, or load the model with "
                "attn_implementation='hf_ext'"
            )

    def given_padding(self, seen: int, count: int, rows: int) -> Tensor | None:
        """Return which of the new tokens are real, as far as `attention_mask` says; None if all are."""
        if self.attention_mask is None or seen >= self.attention_mask.shape[1]:
            return None
        mask = self.attention_mask[:, seen : seen + count]
        if rows % len(mask):
            raise ValueError(f"attention_mask has {len(mask)} rows, the model runs {rows}")
        mask = mask.repeat_interleave(rows // len(mask), dim=0)
        mask = torch.nn.functional.pad(mask, (0, count - mask.shape[1]), value=True)
        return None if bool(mask.all()) else mask

    def _compressed_layers(self) -> list[CompressedLayer]:
        return [layer for layer in self.layers if isinstance(layer, CompressedLayer)]

    def _tensors(self) -> list[Tensor]:
        found: list[Tensor] = []
        for layer in self.layers:
            found += layer.tensors() if isinstance(layer, CompressedLayer) else adapter.tensors_of_layer(layer)
        return found
