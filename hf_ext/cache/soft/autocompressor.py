"""AutoCompressors: a model sums up each segment in vectors that it reads before all later ones (arXiv:2305.14788)."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_ext.cache.soft.layout import Layout, Piece
from hf_ext.cache.soft.positions import position_table, positions_optional
from hf_ext.cache.soft.reading import as_mask, cached, check_model, continuing, read, same_rows, tokens, vectors
from hf_ext.cache.soft.segments import lengths_of
from hf_ext.cache.soft.slots import Slots

#: The module of the summary tokens, and the entry of the config.
NAME, SETTINGS = "summary_tokens", "autocompressor"


@dataclass
class AutoCompressor:
    """Make an AutoCompressor of a causal LM: `AutoCompressor(summary_tokens=8).convert(model)`.

    Args:
        summary_tokens: number of tokens that sum up a segment, and so of vectors a segment leaves behind.
        stop_after: every so many segments, all summaries so far are cut off from the gradient.

    Raises:
        ValueError: a number below 1.

    Source:
        Chevalier et al., Adapting Language Models to Compress Contexts (EMNLP 2023), section 3: summaries are
        accumulated, segments have random lengths, and gradients stop after two compression steps.

    Example:
        >>> from hf_ext.testing import tiny_models
        >>> model = AutoCompressor(summary_tokens=2).convert(tiny_models.build("llama"))
        >>> ids, mask = tiny_models.prompts()
        >>> slots = model.compress(ids, mask, segments=5)
        >>> slots.mask.sum(-1).tolist()
        [6, 4, 2]
        >>> model.generate(slots=slots, input_ids=ids[:, -2:], max_new_tokens=4).shape
        torch.Size([3, 6])
    """

    summary_tokens: int = 50
    stop_after: int = 2

    def __post_init__(self) -> None:
        for name in ("summary_tokens", "stop_after"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive int, got {value!r}")

    def convert(self, model: PreTrainedModel) -> Any:
        """Give a model summary tokens, in place. Adapters, if any, come afterwards (`get_peft_model`).

        Args:
            model: a causal LM; each of the summary tokens begins as its end-of-text token.

        Returns:
            The same model, which is an `AutoCompressorModel` now.

        Raises:
            ValueError: a model with summary tokens or adapters already, or one that cannot read vectors among tokens.
        """
        if isinstance(model, AutoCompressorModel):
            raise ValueError(f"{type(model).__name__} is an AutoCompressor already")
        if not isinstance(model, PreTrainedModel):
            raise ValueError(
                f"AutoCompressor converts a transformers model, got a {type(model).__name__}; put adapters on after it"
            )
        check_model(model, "AutoCompressor")
        made: Any = model
        kind: Any = type(model)
        made.__class__ = _class_for(kind)
        setattr(made.config, SETTINGS, {"summary_tokens": self.summary_tokens, "stop_after": self.stop_after})
        made.add_summary_tokens()
        weight = made.get_input_embeddings().weight.detach()
        eos = made.config.get_text_config(decoder=True).eos_token_id
        start = weight.mean(0) if eos is None else weight[eos[0] if isinstance(eos, list) else eos]
        with torch.no_grad():
            made.summary_tokens.weight.copy_(start.expand(self.summary_tokens, -1))
        return made


class AutoCompressorModel:
    """What `AutoCompressor.convert` adds to a model's class; `from_pretrained` loads what such a model has saved.

    It is a stock transformers model otherwise: with neither `segments` nor `slots`, a call is that of the class it
    was. Train it whole with the stock Trainer and `SegmentCollator`, or with adapters as the authors did:
    `get_peft_model(model, LoraConfig(..., modules_to_save=["summary_tokens"]))`.

    Positions: with a learned table (OPT, GPT-2) summary tokens and summaries have none, so that each segment counts
    from 0; where positions are rotary, all count on.

    Example:
        >>> import torch
        >>> from hf_ext.testing import tiny_models
        >>> model = AutoCompressor(summary_tokens=2).convert(tiny_models.build("llama"))
        >>> ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
        >>> float(model(ids, labels=ids, segments=3).loss.detach()) > 0
        True
    """

    summary_tokens: nn.Embedding

    @classmethod
    def from_pretrained(cls, folder: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a saved AutoCompressor; see `PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: the folder holds a model without summary tokens.
        """
        if cls is not AutoCompressorModel:
            return super().from_pretrained(folder, *args, **kwargs)  # type: ignore[misc]
        hub = {name: kwargs[name] for name in ("revision", "token", "cache_dir", "subfolder") if name in kwargs}
        config = AutoConfig.from_pretrained(folder, **hub)
        if getattr(config, SETTINGS, None) is None:
            raise ValueError(f"{folder} holds no AutoCompressor; AutoCompressor().convert(model) makes one")
        with torch.device("meta"):
            base: Any = type(AutoModelForCausalLM.from_config(config))
        return _class_for(base).from_pretrained(folder, *args, **kwargs)

    def add_summary_tokens(self: Any) -> None:
        """Add the embeddings of the summary tokens, as many as the config says."""
        weight = self.get_input_embeddings().weight
        count = getattr(self.config, SETTINGS)["summary_tokens"]
        self.add_module(NAME, nn.Embedding(count, weight.shape[-1], device=weight.device, dtype=weight.dtype))

    def compress(
        self: Any,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        segments: int | Sequence[int] | Tensor | None = None,
        slots: Slots | None = None,
    ) -> Slots:
        """Sum up texts, segment by segment; with gradients, where these are on.

        Args:
            input_ids: `(rows, columns)` int64, padded on either side.
            attention_mask: of the same shape, 0 on padding.
            segments: where to cut, see `lengths_of`; one segment by default.
            slots: the summaries of what stood before.

        Returns:
            All summaries: those given, and `summary_tokens` vectors for each segment.

        Raises:
            ValueError: shapes that do not fit, a row without tokens, or segments beyond the table of positions.
        """
        real = as_mask(input_ids, attention_mask, "input_ids")
        return self._read_segments(input_ids, real, segments, slots, logits=False)[1]

    def prefix(self: Any, slots: Slots, cache: Any = None) -> Any:
        """Return a cache in which the model has read the slots; see `ICAEModel.prefix`."""
        with torch.no_grad():
            return cached(self, [vectors(self, slots, self._counted())], cache)

    def continuing(
        self: Any, slots: Slots, input_ids: Tensor, attention_mask: Tensor | None = None, cache: Any = None
    ) -> dict[str, Any]:
        """Return what stock `generate`, or a forward pass, takes to go on after slots in a cache.

        Args:
            slots: what was summed up.
            input_ids: `(rows, columns)`, the prompts, padded on the left.
            attention_mask: of the same shape, 0 on padding.
            cache: what `prefix(slots)` returned; made anew by default.
        """
        cache = self.prefix(slots) if cache is None else cache
        return continuing(slots, input_ids, attention_mask, cache, self._counted())

    def generate(self: Any, *args: Any, slots: Slots | None = None, **kwargs: Any) -> Any:
        """Generate after slots, or plainly.

        Args:
            *args: as `generate` takes them.
            slots: what to read before `input_ids`.
            **kwargs: as `generate` takes them.

        Returns:
            As `generate`: rows of prompt and new tokens, or new tokens only without a prompt.
        """
        if slots is None:
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        if args or kwargs.get("inputs_embeds") is not None or kwargs.get("past_key_values") is not None:
            raise ValueError(
                "after slots, the prompt is given as input_ids=...; to go on from a cache: "
                "generate(**model.continuing(...))"
            )
        pieces, ids, mask = (
            [vectors(self, slots, self._counted())],
            kwargs.get("input_ids"),
            kwargs.get("attention_mask"),
        )
        kwargs.pop("attention_mask", None)
        if ids is not None:
            real = as_mask(ids, mask, "input_ids", empty=True)
            same_rows(slots, ids, "input_ids")
            pieces.append(tokens(self, ids, real))
        with torch.no_grad(), positions_optional(self):
            return super().generate(**kwargs, **Layout(pieces).inputs())  # type: ignore[misc]

    def _counted(self: Any) -> bool:
        """Tell whether summaries have positions."""
        return position_table(self) is None

    def _loss(self: Any, given: dict[str, Any], segments: Any, slots: Slots | None) -> CausalLMOutputWithPast:
        """Read texts segment by segment, and return loss and logits, column by column."""
        ids, labels = given.pop("input_ids", None), given.pop("labels", None)
        real = as_mask(ids, given.pop("attention_mask", None), "input_ids")
        items = given.pop("num_items_in_batch", None)
        if odd := [n for n, v in given.items() if v is not None and v is not False and n not in _HARMLESS]:
            raise ValueError(f"an AutoCompressor lays segments out anew and takes no {', '.join(odd)} with segments")
        if labels is not None and labels.shape != ids.shape:
            raise ValueError(f"labels have the shape {tuple(labels.shape)}, expected {tuple(ids.shape)}")
        logits, loss = self._read_segments(ids, real, segments, slots, logits=True)[0], None
        if labels is not None:
            first = real & (real.long().cumsum(-1) == 1)  # with padding before it, a shift does not drop it
            vocabulary = self.config.get_text_config(decoder=True).vocab_size
            labels = labels.masked_fill(first | ~real, -100)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocabulary, num_items_in_batch=items)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def _read_segments(
        self: Any, ids: Tensor, real: Tensor, segments: Any, slots: Slots | None, logits: bool
    ) -> tuple[Tensor, Slots]:
        """Return logits `(rows, columns, vocabulary)` if they are asked for, or else the summaries of all segments."""
        lengths = lengths_of(max(int(real.sum(-1).max()), 1) if segments is None else segments, real)
        settings, counted, order = getattr(self.config, SETTINGS), self._counted(), real.long().cumsum(-1) - 1
        width = self.get_input_embeddings().weight.shape[-1]
        seen = Slots(self.get_input_embeddings().weight.new_zeros(len(ids), 0, width)) if slots is None else slots
        same_rows(seen, ids, "input_ids")
        found: list[Any] = []
        offset, places, start = 0, torch.zeros_like(ids), torch.zeros_like(lengths[:, :1])
        for number, length in enumerate(lengths.split(1, dim=1)):
            if number and number % settings["stop_after"] == 0:
                seen = seen.detach()
            inside = real & (order >= start) & (order < start + length)
            columns = inside.any(0).nonzero()[:, 0]
            if not len(columns):
                continue
            part = slice(int(columns[0]), int(columns[-1]) + 1)
            pieces = [vectors(self, seen, counted), tokens(self, ids[:, part], inside[:, part])]
            if last := number == lengths.shape[1] - 1 and logits:
                new = seen  # nobody reads the last summary
            else:
                summary = self.summary_tokens(torch.arange(settings["summary_tokens"], device=ids.device))
                summary = summary.expand(len(ids), -1, -1)
                pieces.append(Piece(summary, torch.ones_like(summary[..., 0], dtype=torch.bool), counted))
            layout = Layout(pieces)
            out = read(self, layout, logits=logits, what="summaries and a segment")
            if not last:
                alive = inside.any(-1, keepdim=True).expand(-1, settings["summary_tokens"])
                new = Slots(out.states[:, -settings["summary_tokens"] :], alive)
                seen = Slots.join([seen.to(new.vectors.dtype), new])
            if logits:
                found.append(out.logits)
                places[:, part] = torch.where(inside[:, part], layout.places(1) + offset, places[:, part])
                offset += layout.columns
            start = start + length
        if not logits:
            return ids, seen
        # Padding says what the last token before it does.
        last_real = torch.where(real, torch.arange(ids.shape[1], device=ids.device), 0).cummax(-1).values
        places = places.gather(1, last_real)
        return layout.take(torch.cat(found, dim=1), places), seen


#: Forward arguments that change nothing here.
_HARMLESS = ("return_dict", "use_cache")


@functools.cache
def _class_for(base: Any) -> Any:
    """Return the class of AutoCompressors of a class of models."""
    own = inspect.signature(base.forward)

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        self.add_summary_tokens()

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, segments: Any = None, slots: Slots | None = None, **kwargs: Any) -> Any:
        if segments is None and slots is None:
            return base.forward(self, *args, **kwargs)
        given = own.bind(self, *args, **kwargs).arguments
        given.pop("self")
        return self._loss({**given.pop("kwargs", {}), **given}, segments, slots)

    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in ("segments", "slots")]
    parameters = list(own.parameters.values())
    rest = [p for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]
    combined = own.replace(parameters=[p for p in parameters if p not in rest] + added + rest)
    forward.__signature__ = combined  # type: ignore[attr-defined]
    # transformers looks for what a class can do in the source of its module, which is the model's.
    space = {"__init__": __init__, "forward": forward, "__module__": base.__module__, "__doc__": base.__doc__}
    return type(f"AutoCompressor{base.__name__}", (AutoCompressorModel, base), space)
