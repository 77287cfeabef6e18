"""Configuration of SWAN-GPT (arXiv:2504.08719). Imports transformers only: this file is part of the Hub repository."""

import math
from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig

GLOBAL, LOCAL = "full_attention", "sliding_attention"


class SwanGPTConfig(PreTrainedConfig):
    """Shape of a SWAN-GPT decoder: global layers without positions between sliding-window rotary layers.

    Args:
        vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: as in Llama.
        num_key_value_heads: heads of keys and values (grouped-query attention); `num_attention_heads` by default.
        head_dim: width of one head; `hidden_size // num_attention_heads` by default.
        hidden_act: activation of the gated feed-forward part.
        max_position_embeddings: context length the model is meant for. Longer input is accepted.
        layer_types: for each layer `"full_attention"` (global, no positions) or `"sliding_attention"` (local,
            rotary). Built from `global_every` if not given.
        global_every: layers 0, `global_every`, 2 * `global_every`, ... are global, the others local. `None` makes
            every layer local. Has no effect when `layer_types` is given.
        sliding_window: how many tokens, itself included, a query of a local layer sees. At least 2.
        training_length: length the weights were trained on; `max_position_embeddings` by default. Beyond it the
            attention logits of the global layers are scaled.
        log_scale_slope: slope `a` of that scale, `1 + a * ln(n / training_length)` for a query that sees `n` tokens.
            By default `1 / ln(training_length)`, which makes the scale `ln(n) / ln(training_length)`. 0 turns it off.
        rope_parameters: rotary parameters of the local layers (`rope_type`, `rope_theta`, ...).
        attention_bias, attention_dropout, mlp_bias, rms_norm_eps, initializer_range, tie_word_embeddings, use_cache,
        pad_token_id, bos_token_id, eos_token_id: as in Llama.

    Raises:
        ValueError: naming the option, its value and what it must be.

    Example:
        >>> config = SwanGPTConfig(num_hidden_layers=6, global_every=4, sliding_window=128)
        >>> [kind.split("_")[0] for kind in config.layer_types]
        ['full', 'sliding', 'sliding', 'sliding', 'full', 'sliding']
        >>> SwanGPTConfig(training_length=100).log_scale(10_000)
        2.0
    """

    model_type = "swan_gpt"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int = 1408
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = None  # type: ignore[assignment]  # this and the like are filled in by __post_init__
    head_dim: int = None  # type: ignore[assignment]
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    layer_types: list[str] = None  # type: ignore[assignment]
    global_every: int | None = 4
    sliding_window: int = 512
    training_length: int = None  # type: ignore[assignment]
    log_scale_slope: float | None = None
    rope_parameters: dict[str, Any] = None  # type: ignore[assignment]
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in what follows from other options, then check everything."""
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "max_position_embeddings"):  # fmt: skip
            self._require_count(name, 1)
        for name in ("num_key_value_heads", "head_dim", "global_every", "training_length"):
            if getattr(self, name) is not None:
                self._require_count(name, 1)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads="
                    f"{self.num_attention_heads}, or head_dim must be given"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.layer_types is None:
            every = self.global_every
            self.layer_types = [GLOBAL if every and i % every == 0 else LOCAL for i in range(self.num_hidden_layers)]
        if self.training_length is None:
            self.training_length = self.max_position_embeddings
        super().__post_init__(**kwargs)
        self.validate()

    def log_scale(self, tokens: int) -> float:
        """Return the factor on a global layer's attention logits for a query that sees `tokens` tokens."""
        if self.log_scale_slope == 0 or tokens <= self.training_length:
            return 1.0
        slope = 1 / math.log(self.training_length) if self.log_scale_slope is None else self.log_scale_slope
        return 1.0 + slope * math.log(tokens / self.training_length)

    def validate(self) -> None:
        """Check the options against each other.

        Raises:
            ValueError: naming the option, its value and what it must be.
        """
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} must be even, because rotary positions turn pairs of dimensions; "
                "change hidden_size, num_attention_heads or head_dim"
            )
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries for num_hidden_layers={self.num_hidden_layers}; "
                "give one for each layer, or leave it out and set global_every"
            )
        if unknown := sorted(set(self.layer_types) - {GLOBAL, LOCAL}):
            raise ValueError(f"layer_types has {unknown}; an entry must be {GLOBAL!r} or {LOCAL!r}")
        if LOCAL in self.layer_types:
            # A window of 1 would leave local layers without a past, and transformers' cache keeps `window - 1` tokens.
            self._require_count("sliding_window", 2)
        if self.log_scale_slope is None and self.training_length < 2 and GLOBAL in self.layer_types:
            raise ValueError(f"training_length={self.training_length} must be at least 2, or set log_scale_slope")
        slope = self.log_scale_slope
        if slope is not None and not (isinstance(slope, int | float) and 0 <= slope < math.inf):
            raise ValueError(f"log_scale_slope={slope!r} must be a number >= 0 (0 turns the scale off)")
        if not 0.0 <= self.attention_dropout < 1.0:
            raise ValueError(f"attention_dropout={self.attention_dropout} must be at least 0 and below 1")
        for name in ("attention_bias", "mlp_bias", "tie_word_embeddings", "use_cache"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False")
        super().validate()

    def _require_count(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}={value!r} must be a whole number >= {least}")


SwanGPTConfig.register_for_auto_class()
