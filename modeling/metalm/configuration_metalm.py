"""Configuration of MetaLM (arXiv:2206.06336). Imports transformers only: this file is part of the Hub repository."""

import copy
from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig

#: The shapes that stand in where none is given: a model that a laptop trains.
_SMALL = {"vocab_size": 4096, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2,
          "num_attention_heads": 4}  # fmt: skip
_DECODER = {"model_type": "llama", **_SMALL, "max_position_embeddings": 2048}
_ENCODER = {"model_type": "bert", **_SMALL, "max_position_embeddings": 512}


class MetaLMConfig(PreTrainedConfig):
    """Shape of a MetaLM: any causal language model, and encoders whose outputs take the place of its embeddings.

    Args:
        text_config: configuration of the causal language model, or its dictionary; a small Llama by default.
        encoder_config: configuration of the bidirectional encoder of text spans. Without any encoder a small BERT.
        vision_config: configuration of the encoder of images (`ViTConfig`, ...); none by default.
        connector_layers: linear layers of the connector between an encoder and the language model. 1 is a linear
            projection; more are a feed-forward network with GELU between them.

    Raises:
        ValueError: naming the option, its value and what it must be.

    Example:
        >>> from transformers import BertConfig, GPT2Config
        >>> config = MetaLMConfig(text_config=GPT2Config(n_embd=64), encoder_config=BertConfig(vocab_size=50257))
        >>> config.hidden_size, config.encoder_config.hidden_size
        (64, 768)
    """

    model_type = "metalm"
    sub_configs: ClassVar[dict[str, Any]] = {
        "text_config": PreTrainedConfig,
        "encoder_config": PreTrainedConfig,
        "vision_config": PreTrainedConfig,
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    text_config: PreTrainedConfig | dict[str, Any] | None = None
    encoder_config: PreTrainedConfig | dict[str, Any] | None = None
    vision_config: PreTrainedConfig | dict[str, Any] | None = None
    connector_layers: int = 1

    def __post_init__(self, **kwargs: Any) -> None:
        """Build the configurations of the parts, then check everything."""
        if self.encoder_config is None and self.vision_config is None:
            self.encoder_config = dict(_ENCODER)
        self.text_config = _built("text_config", dict(_DECODER) if self.text_config is None else self.text_config)
        self.encoder_config = _built("encoder_config", self.encoder_config)
        self.vision_config = _built("vision_config", self.vision_config)
        parts = [part for name in self.sub_configs if (part := getattr(self, name)) is not None]
        chosen = [part._attn_implementation for part in parts]
        super().__post_init__(**kwargs)  # sets the attention of all parts to its own, which is None if none is given
        if kwargs.get("attn_implementation") is None:
            for part, attention in zip(parts, chosen, strict=True):
                part._attn_implementation = attention
        self.validate()

    @property
    def vocab_size(self) -> int:
        """Tokens of the language model."""
        return self.text_config.vocab_size  # type: ignore[union-attr]

    @property
    def hidden_size(self) -> int:
        """Width of the language model."""
        return self.text_config.hidden_size  # type: ignore[union-attr]

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the language model."""
        return self.text_config.num_hidden_layers  # type: ignore[union-attr]

    @property
    def max_position_embeddings(self) -> int | None:
        """Context of the language model, if it has a limit."""
        return getattr(self.text_config, "max_position_embeddings", None)

    def validate(self) -> None:
        """Check the parts against each other.

        Raises:
            ValueError: naming the option, its value and what it must be.
        """
        text, encoder, vision = self.text_config, self.encoder_config, self.vision_config
        if text.is_encoder_decoder:  # type: ignore[union-attr]
            raise ValueError(f"text_config is of an encoder-decoder ({text.model_type}); expected a causal model")  # type: ignore[union-attr]
        for name, part in (("encoder_config", encoder), ("vision_config", vision)):
            if part is None:
                continue
            if part.is_encoder_decoder or getattr(part, "is_decoder", False):  # type: ignore[union-attr]
                raise ValueError(
                    f"{name} is of a decoder ({part.model_type}); expected an encoder whose tokens see each other in "  # type: ignore[union-attr]
                    "both directions, such as BERT or ViT, without is_decoder=True"
                )
            if not isinstance(getattr(part, "hidden_size", None), int):
                raise ValueError(
                    f"{name} ({part.model_type}) has no hidden_size, which the connector needs; expected the "  # type: ignore[union-attr]
                    "configuration of a single encoder"
                )
        if encoder is not None and encoder.vocab_size < text.vocab_size:  # type: ignore[union-attr]
            raise ValueError(
                f"encoder_config has vocab_size={encoder.vocab_size}, text_config {text.vocab_size}: both read the "  # type: ignore[union-attr]
                "same token ids, so the encoder needs at least as many; use an encoder of the same tokenizer"
            )
        layers = self.connector_layers
        if isinstance(layers, bool) or not isinstance(layers, int) or layers < 1:
            raise ValueError(f"connector_layers={layers!r} must be a whole number >= 1")
        super().validate()


def _built(name: str, value: Any) -> PreTrainedConfig | None:
    """Return the configuration that a dictionary describes, as it stands in a file."""
    if value is None or isinstance(value, PreTrainedConfig):
        return copy.deepcopy(value)  # the attention of a part is set in here
    # Imported here, since where this class is registered that module is what asks for it.
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if not isinstance(value, dict) or value.get("model_type") not in CONFIG_MAPPING:
        known = value.get("model_type") if isinstance(value, dict) else value
        raise ValueError(
            f"{name}={known!r} is no configuration: expected one of transformers, or a dictionary whose model_type "
            "transformers knows"
        )
    return CONFIG_MAPPING[value["model_type"]](**{key: item for key, item in value.items() if key != "model_type"})


MetaLMConfig.register_for_auto_class()
