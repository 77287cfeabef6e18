"""In-context autoencoder: an adapter writes a context into slots that the untouched model reads (arXiv:2307.06945)."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModelForCausalLM
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import cached_file

from hf_ext.cache.soft.adapters import adapter_layers, switched_off
from hf_ext.cache.soft.layout import Layout, Piece
from hf_ext.cache.soft.learned import LearnedEmbeddings, saved_shape
from hf_ext.cache.soft.reading import as_mask, cached, check_model, continuing, read, same_rows, tokens, vectors
from hf_ext.cache.soft.slots import Slots

#: The file of the learned embeddings beside the adapter, and their name in the model.
FILE, NAME = "icae.safetensors", "icae"


class ICAEModel(PeftModelForCausalLM):
    """A frozen model that reads slots in place of contexts, and an adapter of it that writes them.

    The encoder is the model with its adapter on: it reads a context and `slots` learned memory tokens, and its last
    states at these are the slots. The decoder is the same model with the adapter off, bit for bit the one that was
    given: it reads slots as input embeddings, and tokens after them.

    Train it with the stock Trainer and `ICAECollator`. A batch has `context_ids` and `context_mask`, what is
    compressed; `input_ids`, `attention_mask` and `labels`, what the decoder reads and learns to say after the slots
    (-100 where nothing is asked); and `reconstruct`, True for rows that are to repeat their context. The first
    token, too, is a target. Loss and gradients do not depend on padding, nor on how a batch is split by
    accumulation. Gradients reach the adapter and the learned embeddings only.

    `save_pretrained` and every checkpoint hold a stock PEFT adapter and `icae.safetensors`.

    Args:
        model: a causal language model; it is changed in place, as by `get_peft_model`.
        peft_config: of the encoder: any method that changes layers (LoRA, DoRA, IA3, ...).
        slots: number of memory tokens, and so of slots a context; the paper compresses 512 tokens into 128.
        adapter_name: of the encoder's adapter.

    Raises:
        ValueError: no slots, a model that cannot read vectors among tokens, prompt tuning, `modules_to_save`, or
            trained biases.

    Source:
        Ge et al., In-context Autoencoder for Context Compression in a Large Language Model (ICLR 2024), section 2.

    Example:
        >>> from peft import LoraConfig
        >>> from hf_ext.testing import tiny_models
        >>> model = ICAEModel(tiny_models.build("llama"), LoraConfig(r=2, target_modules=["q_proj"]), slots=3).eval()
        >>> ids, mask = tiny_models.prompts()
        >>> slots = model.compress(ids, mask)
        >>> model.generate(slots=slots, input_ids=ids[:, -2:], max_new_tokens=4).shape
        torch.Size([3, 6])
    """

    def __init__(
        self, model: PreTrainedModel, peft_config: PeftConfig, *, slots: int = 128, adapter_name: str = "default"
    ) -> None:
        kind = type(peft_config).__name__
        if peft_config.is_prompt_learning:
            raise ValueError(f"ICAEModel switches an adapter of layers on and off, and a {kind} makes virtual tokens")
        if getattr(peft_config, "modules_to_save", None) or getattr(peft_config, "bias", "none") != "none":
            raise ValueError(f"the decoder of an ICAEModel is fixed: leave modules_to_save and bias out of {kind}")
        check_model(model, "ICAEModel")
        learned = LearnedEmbeddings(model, memory=slots, reconstruct=1)
        super().__init__(model, peft_config, adapter_name)
        if not adapter_layers(model):
            raise ValueError(f"{kind} puts no adapters on layers of {type(model).__name__}; check its target_modules")
        model.add_module(NAME, learned.requires_grad_(not peft_config.inference_mode))

    @property
    def learned(self) -> LearnedEmbeddings:
        """The memory tokens, and the token that asks for the context again."""
        return getattr(self.get_base_model(), NAME)

    @property
    def slots(self) -> int:
        """Number of slots of a context."""
        return self.learned.count("memory")

    def decoding(self) -> contextlib.AbstractContextManager[None]:
        """Let the model be the decoder for a while: `with model.decoding(): model.get_base_model()(...)`."""
        return switched_off(self.get_base_model())

    def compress(self, context_ids: Tensor, context_mask: Tensor | None = None) -> Slots:
        """Write contexts into slots; with gradients, where these are on.

        Args:
            context_ids: `(rows, columns)` int64, padded on either side.
            context_mask: of the same shape, 0 on padding.

        Returns:
            `self.slots` slots a row.

        Raises:
            ValueError: shapes that do not fit, a row without tokens, or one that the table of positions is too
                short for.
        """
        base, real = self.get_base_model(), as_mask(context_ids, context_mask, "context_ids")
        memory = self.learned.rows("memory", len(context_ids))
        layout = Layout([tokens(base, context_ids, real), Piece(memory, real.new_ones(memory.shape[:2]))])
        states = read(base, layout, what="contexts and memory tokens").states
        return Slots(states[:, -self.slots :], real.new_ones(memory.shape[:2]))

    def prefix(self, slots: Slots, cache: Any = None) -> Any:
        """Return a cache in which the decoder has read the slots.

        Going on from it fills it further; `copy.deepcopy` it for another use. `continuing` makes the inputs.

        Args:
            slots: of as many rows as there will be prompts.
            cache: an empty cache to fill; a `DynamicCache` that suits the model by default.
        """
        base = self.get_base_model()
        with torch.no_grad(), self.decoding():
            return cached(base, [vectors(base, slots)], cache)

    def continuing(
        self, slots: Slots, input_ids: Tensor, attention_mask: Tensor | None = None, cache: Any = None
    ) -> dict[str, Any]:
        """Return what stock `generate`, or a forward pass, takes to go on after slots in a cache.

        `generate(**model.continuing(slots, ids, mask))`, of this model or of one that has only the base's weights.

        Args:
            slots: what was compressed.
            input_ids: `(rows, columns)`, the prompts, padded on the left.
            attention_mask: of the same shape, 0 on padding.
            cache: what `prefix(slots)` returned; made anew by default.
        """
        return continuing(slots, input_ids, attention_mask, self.prefix(slots) if cache is None else cache)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        context_ids: Tensor | None = None,
        context_mask: Tensor | None = None,
        slots: Slots | None = None,
        reconstruct: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Compress contexts and read tokens after their slots; without contexts, the decoder as it is.

        Args:
            input_ids: `(rows, columns)` int64, what follows the slots, padded on either side.
            attention_mask: of the same shape, 0 on padding.
            labels: of the same shape, -100 where nothing is asked.
            context_ids: `(rows, columns)` int64, what is compressed.
            context_mask: of the same shape, 0 on padding.
            slots: of contexts that were compressed before, in place of `context_ids`.
            reconstruct: `(rows,)` bool, whether the row is asked to repeat its context; none by default.
            num_items_in_batch: what the summed loss is divided by, as the Trainer passes it.
            **kwargs: forward arguments of the decoder, without contexts only.

        Returns:
            Loss and logits, column by column of `input_ids`.

        Raises:
            ValueError: both contexts and slots, shapes that do not fit, or arguments that cannot be honoured.
        """
        base: Any = self.get_base_model()
        if context_ids is None and slots is None:
            if reconstruct is not None:
                raise ValueError("reconstruct asks for a context: give context_ids or slots")
            if num_items_in_batch is not None:
                kwargs["num_items_in_batch"] = num_items_in_batch
            with self.decoding():
                return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)
        given = [name for name, value in kwargs.items() if value is not None and value is not False]
        if given := [name for name in given if name not in ("return_dict", "use_cache")]:
            raise ValueError(f"with a context, ICAEModel lays rows out anew and takes no {', '.join(given)}")
        slots = self._slots(slots, context_ids, context_mask)
        real = as_mask(input_ids, attention_mask, "input_ids", empty=True)
        assert input_ids is not None
        same_rows(slots, input_ids, "input_ids")
        if labels is not None and labels.shape != input_ids.shape:
            raise ValueError(f"labels have the shape {tuple(labels.shape)}, expected {tuple(input_ids.shape)}")
        with self.decoding():
            layout = Layout([*self._asked(slots, reconstruct), tokens(base, input_ids, real)])
            logits = read(base, layout, logits=True, what="slots and tokens").logits
        assert logits is not None
        # Padding before a row's tokens stands where the last slot does, which predicts the first one.
        places = layout.places(2)
        wide = layout.take(logits, torch.cat([layout.places(1)[:, -1:], places], dim=1))
        loss = None
        if labels is not None:
            targets = torch.nn.functional.pad(labels.masked_fill(~real, -100), (1, 0), value=-100)
            vocabulary = base.config.get_text_config(decoder=True).vocab_size
            loss = base.loss_function(
                logits=wide, labels=targets, vocab_size=vocabulary, num_items_in_batch=num_items_in_batch
            )
        return CausalLMOutputWithPast(loss=loss, logits=wide[:, 1:])

    def generate(  # type: ignore[override]
        self,
        *args: Any,
        slots: Slots | None = None,
        context_ids: Tensor | None = None,
        context_mask: Tensor | None = None,
        reconstruct: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Generate after slots, or plainly; always with the decoder as it was given.

        Args:
            *args: as `generate` takes them.
            slots: what to read before `input_ids`.
            context_ids: `(rows, columns)`, what to compress and to read before `input_ids`.
            context_mask: of the same shape, 0 on padding.
            reconstruct: ask for the context again; `input_ids` are optional then.
            **kwargs: as `generate` takes them.

        Returns:
            As `generate`: rows of prompt and new tokens, without the context; only new tokens without a prompt.
        """
        if slots is None and context_ids is None:
            if reconstruct:
                raise ValueError("reconstruct asks for a context: give context_ids or slots")
            with self.decoding():
                return super().generate(*args, **kwargs)
        if args or kwargs.get("inputs_embeds") is not None or kwargs.get("past_key_values") is not None:
            raise ValueError(
                "after slots, the prompt is given as input_ids=...; to go on from a cache: "
                "generate(**model.continuing(...))"
            )
        with torch.no_grad():
            slots = self._slots(slots, context_ids, context_mask)
            ids, mask = kwargs.get("input_ids"), kwargs.pop("attention_mask", None)
            pieces = self._asked(slots, torch.full((len(slots),), reconstruct))
            if ids is not None:
                real = as_mask(ids, mask, "input_ids", empty=True)
                same_rows(slots, ids, "input_ids")
                pieces.append(tokens(self.get_base_model(), ids, real))
            with self.decoding():
                return super().generate(**kwargs, **Layout(pieces).inputs())

    def _slots(self, slots: Slots | None, ids: Tensor | None, mask: Tensor | None) -> Slots:
        if slots is not None and ids is not None:
            raise ValueError("give either context_ids or slots; Slots.join puts several contexts side by side")
        if slots is None:
            assert ids is not None
            return self.compress(ids, mask)
        return slots

    def _asked(self, slots: Slots, reconstruct: Tensor | None) -> list[Piece]:
        """Return slots, and the token that asks for the context again in the rows that want it."""
        base = self.get_base_model()
        read_first = vectors(base, slots)
        wanted = torch.zeros(len(slots), dtype=torch.bool) if reconstruct is None else reconstruct.bool()
        if wanted.shape != (len(slots),):
            raise ValueError(f"reconstruct has the shape {tuple(wanted.shape)}, expected ({len(slots)},), one a row")
        asking = self.learned.rows("reconstruct", len(slots))
        return [read_first, Piece(asking, wanted[:, None].to(read_first.mask.device))]

    def save_pretrained(
        self, save_directory: str | Path, *args: Any, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """Save the adapter, and the learned embeddings beside it; see `PeftModel.save_pretrained`."""
        super().save_pretrained(str(save_directory), *args, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            self.learned.save(Path(save_directory) / FILE)

    def load_adapter(self, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """Load the adapter together with its learned embeddings; see `PeftModel.load_adapter`."""
        trained = self.training
        result = super().load_adapter(str(model_id), adapter_name, *args, **kwargs)
        hub = {name: kwargs[name] for name in ("subfolder", "revision", "token", "cache_dir") if name in kwargs}
        self.learned.load(cached_file(str(model_id), FILE, **hub))
        self.train(trained)  # PEFT leaves the model in evaluation mode, whatever it was in
        return result

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, model: PreTrainedModel, model_id: str | Path, is_trainable: bool = False, **kwargs: Any
    ) -> ICAEModel:
        """Put a saved encoder on a model.

        Args:
            model: the model it was trained on, without adapters; changed in place.
            model_id: a folder or a Hub repository that `save_pretrained` or a checkpoint made.
            is_trainable: go on training; otherwise all is frozen and in evaluation mode.
            **kwargs: where to look on the Hub (`revision`, `token`, `cache_dir`).
        """
        config = PeftConfig.from_pretrained(str(model_id), **kwargs)
        config.inference_mode = not is_trainable
        slots = saved_shape(cached_file(str(model_id), FILE, **kwargs), "memory")[0]
        made = cls(model, config, slots=slots)
        made.load_adapter(str(model_id), "default", is_trainable=is_trainable, **kwargs)
        return made if is_trainable else made.eval()
