"""MetaLM (arXiv:2206.06336): a causal language model that reads spans of its input through bidirectional encoders.

Tokens of a span see each other in an encoder. Its outputs, projected by a connector, take the place of the span's
embeddings in the input of a stock causal model, which adds its positions and reads on from left to right. The next
token after a span is predicted at the last position of the span; what lies inside is never predicted.

This file and those it imports need torch and transformers only: they are the Hub repository.
"""

import os
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModel, AutoModelForCausalLM
from transformers.utils import can_return_tuple

from .configuration_metalm import MetaLMConfig
from .parts_metalm import encoder_part, new_connector, require_both_ways, without_pooler
from .reading_metalm import SpanReading, from_column
from .semi_causal_metalm import SemiCausalCollator
from .spans_metalm import bounds_of, outside_spans

__all__ = ["MetaLMConfig", "MetaLMForCausalLM", "SemiCausalCollator", "outside_spans"]


class MetaLMForCausalLM(SpanReading, PreTrainedModel, GenerationMixin):
    """A stock causal language model with stock encoders docked to it.

    Without spans it is the language model itself, bit for bit. The modules are `language_model`, `encoder` and
    `connector` for text, `vision_encoder` and `vision_connector` for images.

    Args:
        config: a `MetaLMConfig`.
        language_model: the causal model; built from the configuration by default. So are the next two.
        encoder: reads text spans.
        vision_encoder: reads images.

    Raises:
        ValueError: a part is of another kind than its place asks for.

    Example:
        >>> from transformers import BertConfig, LlamaConfig
        >>> small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        ...          "num_attention_heads": 4}
        >>> config = MetaLMConfig(text_config=LlamaConfig(**small), encoder_config=BertConfig(**small))
        >>> model = MetaLMForCausalLM(config).eval()
        >>> prompt, spans = torch.arange(10)[None], torch.tensor([[[2, 7]]])  # columns 2 to 6 go to the encoder
        >>> model.generate(prompt, spans=spans, max_new_tokens=3, do_sample=False, eos_token_id=None).shape
        torch.Size([1, 13])
    """

    config: MetaLMConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement: ClassVar = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: MetaLMConfig,
        language_model: PreTrainedModel | None = None,
        encoder: PreTrainedModel | None = None,
        vision_encoder: PreTrainedModel | None = None,
    ) -> None:
        config.validate()
        super().__init__(config)
        self.language_model = language_model or AutoModelForCausalLM.from_config(config.text_config)
        if self.language_model._is_stateful:
            raise ValueError(
                f"{type(self.language_model).__name__} has a recurrent state in place of a cache; expected a causal "
                "Transformer, whose cache generate knows"
            )
        # The parts may have been built from copies; what is changed later (attention, vocabulary) is one object again.
        config.text_config = self.language_model.config
        width: Any = self.get_input_embeddings().embedding_dim  # of OPT and others not the hidden size
        if config.encoder_config is not None:
            self.encoder = encoder or without_pooler(AutoModel.from_config(config.encoder_config))
            config.encoder_config = self.encoder.config
            self.connector = new_connector(self.encoder.config.hidden_size, width, config.connector_layers)
        if config.vision_config is not None:
            self.vision_encoder = vision_encoder or without_pooler(AutoModel.from_config(config.vision_config))
            config.vision_config = self.vision_encoder.config
            self.vision_connector = new_connector(
                self.vision_encoder.config.hidden_size, width, config.connector_layers
            )
        for part in self.encoders():
            require_both_ways(part)
        self.vocab_size = config.vocab_size
        self.post_init()

    def encoders(self) -> list[PreTrainedModel]:
        """Return the encoders there are, that of text first."""
        return [part for name in ("encoder", "vision_encoder") if (part := getattr(self, name, None)) is not None]

    def get_input_embeddings(self) -> nn.Module:
        """Return the language model's embeddings."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's embeddings."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the language model's head."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the language model's head."""
        self.language_model.set_output_embeddings(new_embeddings)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        spans: torch.Tensor | None = None,
        image_spans: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Predict the next token at every position; arguments not named here are those of the language model.

        Args:
            input_ids: `[batch, length]`. Below images they may be anything that is in the vocabulary.
            attention_mask: `[batch, past + length]` with 0 for padding, on either side.
            labels: `[batch, length]`, shifted inside; -100 is ignored, and stands everywhere in spans.
            spans: text that the encoder reads: `[batch, entries, 2]` columns `[start, end)` with entries of -1, -1
                in rows that have fewer, or `[batch, length]` with a number for each span and 0 outside.
            image_spans: where the images stand, in the same form as bounds; entry `i` of a row is its image `i`, and
                has as many columns as the vision encoder has outputs.
            pixel_values: `[batch, entries, channels, height, width]`, or `[batch, channels, height, width]` for one
                image a row.
            **kwargs: go on to the language model.

        Returns:
            The language model's output.

        Raises:
            ValueError: spans overlap, are nested, empty, outside the text, on padding or too long for the encoder, have
                labels inside, or come with a filled cache or with `inputs_embeds`.
        """
        given: dict[str, Any] = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        if spans is not None or image_spans is not None or pixel_values is not None:
            if input_ids is None or inputs_embeds is not None:
                raise ValueError("spans are read from input_ids; pass these, and no inputs_embeds")
            if past_key_values is not None and (past := int(past_key_values.get_seq_length())):
                raise ValueError(
                    f"spans are read with the prompt, but the cache holds {past} tokens already: pass them to "
                    "generate, or pass inputs_embeds=model.embed(input_ids, spans=...) for the new tokens"
                )
            read = self.embed(
                input_ids,
                spans=spans,
                image_spans=image_spans,
                pixel_values=pixel_values,
                attention_mask=attention_mask,
                labels=labels,
            )
            if read is not None:
                given = {"inputs_embeds": read}
        given |= {"attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": past_key_values}
        given |= {"labels": labels, "use_cache": use_cache}
        if not isinstance(logits_to_keep, int) or logits_to_keep:
            given["logits_to_keep"] = logits_to_keep
        return self.language_model(**{name: value for name, value in given.items() if value is not None}, **kwargs)

    def generate(self, *args: Any, spans: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """Generate as transformers does; `spans`, `image_spans` and `pixel_values` as in `forward`.

        Spans are columns of the prompt, and are encoded once, when it is read.

        Raises:
            ValueError: as in `forward`; also for spans with a prompt that is read in pieces.
        """
        if spans is not None:
            kwargs["spans"] = bounds_of(spans)  # a row of numbers would have to grow with the text
        if spans is not None or kwargs.get("image_spans") is not None:
            config = kwargs.get("generation_config", args[1] if len(args) > 1 else None) or self.generation_config
            pieces = kwargs.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
            if pieces is not None:
                raise ValueError(
                    f"prefill_chunk_size={pieces} reads a prompt in pieces, which may cut spans; leave it out"
                )
        return super().generate(*args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        *args: Any,
        past_key_values: Any = None,
        attention_mask: Any = None,
        is_first_iteration: bool | None = False,
        spans: torch.Tensor | None = None,
        image_spans: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Prepare a call of `forward`; spans among its columns become embeddings, those before it are in the cache."""
        common = {"past_key_values": past_key_values, "attention_mask": attention_mask}
        common |= {"is_first_iteration": is_first_iteration}
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **common, **kwargs)
        read_already = not is_first_iteration and kwargs.get("use_cache", True)
        if (spans is None and image_spans is None and pixel_values is None) or read_already:
            return inputs
        ids = inputs.get("input_ids")
        if ids is None:
            raise ValueError("spans are read from input_ids; pass these, and no inputs_embeds")
        cached = input_ids.shape[1] - ids.shape[1]
        spans, image_spans = from_column(spans, cached), from_column(image_spans, cached)
        if spans is None and image_spans is None and (cached or pixel_values is None):
            return inputs
        read = self.embed(
            ids,
            spans=spans,
            image_spans=image_spans,
            pixel_values=pixel_values if image_spans is not None or not cached else None,
            attention_mask=attention_mask,
        )
        if read is not None:
            inputs["inputs_embeds"], inputs["input_ids"] = read, None
        return inputs

    def freeze_encoders(self, trainable_layers: int = 2) -> "MetaLMForCausalLM":
        """Freeze the encoders but for their last layers, as the paper does for pre-training (section 3.2).

        Args:
            trainable_layers: how many layers of each encoder go on learning; connectors always do.

        Returns:
            The model itself.

        Raises:
            ValueError: an encoder has fewer layers.
        """
        for encoder in self.encoders():
            layers = max((part for part in encoder.modules() if isinstance(part, nn.ModuleList)), key=len, default=())
            if not 0 <= trainable_layers <= len(layers):
                raise ValueError(
                    f"trainable_layers={trainable_layers} must be from 0 to {len(layers)}, the layers there are"
                )
            encoder.requires_grad_(False)
            for layer in list(layers)[len(layers) - trainable_layers :]:
                layer.requires_grad_(True)
        return self

    @classmethod
    def from_parts(
        cls,
        encoder: PreTrainedModel | str | os.PathLike | None = None,
        decoder: PreTrainedModel | str | os.PathLike | None = None,
        *,
        vision_encoder: PreTrainedModel | str | os.PathLike | None = None,
        **options: Any,
    ) -> "MetaLMForCausalLM":
        """Dock encoders to a causal language model; connectors are new and have to be trained.

        Args:
            encoder: reads text spans: an encoder with or without a head (BERT, RoBERTa, ...), a folder or a Hub name.
                Its tokenizer is the language model's.
            decoder: the causal language model, a folder or a Hub name. Required.
            vision_encoder: reads images (ViT, ...).
            **options: further options of `MetaLMConfig`, such as `connector_layers`.

        Returns:
            A model that shares the weights of its parts.

        Raises:
            ValueError: a part is missing or of another kind.

        Example:
            >>> from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel
            >>> decoder = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2))
            >>> encoder = BertModel(BertConfig(vocab_size=64, hidden_size=16, intermediate_size=32,
            ...     num_hidden_layers=1, num_attention_heads=2))
            >>> MetaLMForCausalLM.from_parts(encoder, decoder).connector
            Sequential(
              (0): Linear(in_features=16, out_features=32, bias=True)
            )
        """
        if isinstance(decoder, str | os.PathLike):
            decoder = AutoModelForCausalLM.from_pretrained(decoder, dtype="auto")
        if not isinstance(decoder, PreTrainedModel) or decoder.get_output_embeddings() is None:
            raise ValueError(
                f"decoder is {type(decoder).__name__}; expected a causal language model with its head, as "
                "AutoModelForCausalLM loads it"
            )
        parts = {
            "encoder": encoder_part(encoder, "encoder"),
            "vision_encoder": encoder_part(vision_encoder, "vision_encoder"),
        }
        if not any(parts.values()):
            raise ValueError("from_parts needs an encoder, of text (encoder) or of images (vision_encoder), or both")
        configs = {name: None if part is None else part.config for name, part in parts.items()}
        config = MetaLMConfig(
            text_config=decoder.config,
            encoder_config=configs["encoder"],
            vision_config=configs["vision_encoder"],
            **options,
        )
        model = cls(config, decoder, **parts)
        model.generation_config = decoder.generation_config
        config.dtype = decoder.dtype
        for part in (model.connector if encoder is not None else None, getattr(model, "vision_connector", None)):
            if part is not None:
                part.to(device=decoder.device, dtype=decoder.dtype)
        return model.train(decoder.training)


MetaLMForCausalLM.register_for_auto_class("AutoModelForCausalLM")
