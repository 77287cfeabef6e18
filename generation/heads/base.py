"""What drafting heads have in common: a small model that saves by itself and belongs to one target.

A head holds neither embeddings nor an LM head. It borrows the target's through a `TargetEnds`
that the caller makes once and passes in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel

from hf_ext import adapter
from hf_ext.layers import TargetEnds, base_model

#: What `training_terms` returns: sums and counts by name; `loss` is what the optimizer sees.
Terms = dict[str, tuple[Tensor, Tensor | int]]


class DraftHeadConfig(PreTrainedConfig):
    """Sizes of a head and the fingerprint of the target it was made for.

    Args:
        hidden_size: width of the target's states.
        embedding_size: width of the target's token embeddings.
        target: `model_type`, `hidden_size`, `num_hidden_layers` and `vocab_size` of the target.
        **kwargs: see `PreTrainedConfig`.
    """

    model_type = "draft-head"

    def __init__(
        self,
        hidden_size: int = 32,
        embedding_size: int | None = None,
        target: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.hidden_size = hidden_size
        self.embedding_size = hidden_size if embedding_size is None else embedding_size
        self.target = dict(target or {})
        super().__init__(**kwargs)


def fingerprint(target: nn.Module) -> dict[str, Any]:
    """Return what a head must find again in its target.

    Example:
        >>> from hf_ext.testing.tiny_models import build
        >>> fingerprint(build("llama"))
        {'model_type': 'llama', 'hidden_size': 32, 'num_hidden_layers': 2, 'vocab_size': 96}
    """
    config = base_model(target).config.get_text_config(decoder=True)
    return {name: getattr(config, name) for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")}


class DraftHead(PreTrainedModel):
    """Base of the heads: `for_target`, `save_pretrained`, `from_pretrained`, `check_target`."""

    config_class: ClassVar[type[DraftHeadConfig]] = DraftHeadConfig
    base_model_prefix = "head"
    main_input_name = "states"
    _supports_sdpa = True
    #: whether training needs the KV cache of the target's pass over the batch
    needs_cache: ClassVar[bool] = False

    @classmethod
    def for_target(cls, target: nn.Module, **options: Any) -> Any:
        """Make an untrained head for a target.

        Args:
            target: a causal LM.
            **options: fields of the head's config.

        Returns:
            A head in float32 on the target's device.
        """
        known = fingerprint(target)
        embedding = base_model(target).get_input_embeddings().weight.shape[-1]  # type: ignore[operator]
        defaults = cls.defaults(known, base_model(target).config.get_text_config(decoder=True))
        values = {**defaults, **options, "embedding_size": embedding, "target": known}
        head = cls(cls.config_class(hidden_size=known["hidden_size"], **values))
        return head.to(adapter.device_of(base_model(target)))

    @classmethod
    def defaults(cls, known: Mapping[str, Any], config: Any) -> dict[str, Any]:
        """Return the options that follow from the target's sizes."""
        return {}

    def check_target(self, target: nn.Module) -> None:
        """Raise unless the head was made for a target of this shape.

        Raises:
            ValueError: the sizes differ.
        """
        known, wanted = fingerprint(target), self.config.target
        differing = [f"{name} is {known[name]}, was {wanted[name]}" for name in wanted if wanted[name] != known[name]]
        if differing:
            raise ValueError(
                f"this {type(self).__name__} was made for another target: {'; '.join(differing)}. Load that target, "
                f"or train a head for this one with {type(self).__name__}.for_target(target) and TrainDraftHead."
            )

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear) and not adapter.is_loaded(module):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    # -- training ----------------------------------------------------------------------------------

    @property
    def trained_on(self) -> tuple[int, ...]:
        """The target's states that training needs (see `hf_ext.layers`)."""
        raise NotImplementedError

    def training_terms(
        self,
        ends: TargetEnds,
        batch: Mapping[str, Any],
        targets: Tensor,
        states: Mapping[int, Tensor],
        outputs: Any,
        uniform: Callable[..., Tensor],
    ) -> Terms:
        """Return the head's loss on a batch that the frozen target has just read.

        Args:
            ends: embeddings and LM head of the target.
            batch: what the target read.
            targets: (batch, length), the token that follows each position, or -100 where the
                position does not train.
            states: the states named by `trained_on`.
            outputs: the target's outputs: logits and, if `needs_cache`, `past_key_values`.
            uniform: random numbers in [0, 1) for each position; see `hf_ext.trainer_callbacks.noise`.

        Returns:
            Sums and counts to log. The sum of `loss` is about as large as one term for each target,
            for the Trainer divides it by their number; it does not depend on how rows are batched.
        """
        raise NotImplementedError


def distillation(logits: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Compare drafts with the target's own distributions.

    Args:
        logits: (n, vocabulary) of the head.
        teacher: (n, vocabulary) of the target.

    Returns:
        The summed cross-entropy of the head against the target, and the number of rows whose
        likeliest token is the target's.

    Example:
        >>> loss, hits = distillation(torch.zeros(2, 4), torch.zeros(2, 4))
        >>> round(float(loss), 4), int(hits)  # two uniform distributions over four tokens: 2 ln 4
        (2.7726, 2)
    """
    logits = logits.float()
    loss = functional.cross_entropy(logits, teacher.float().softmax(-1), reduction="sum")
    return loss, (logits.argmax(-1) == teacher.argmax(-1)).sum()


def visible(batch: Mapping[str, Any]) -> Tensor:
    """Return which positions see which in a training batch: causal, no padding, documents apart.

    Args:
        batch: `input_ids` and, where given, a 2-D `attention_mask` and `position_ids` that restart
            with every packed document.

    Returns:
        (batch, length, length) bool. Every position sees itself, padding too.

    Example:
        >>> visible({"input_ids": torch.ones(1, 3), "attention_mask": torch.tensor([[0, 1, 1]])}).int()
        tensor([[[1, 0, 0],
                 [0, 1, 0],
                 [0, 1, 1]]], dtype=torch.int32)
    """
    tokens, mask, given = batch["input_ids"], batch.get("attention_mask"), batch.get("position_ids")
    length = tokens.shape[1]
    sees = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril().expand(len(tokens), -1, -1)
    if mask is not None:
        if mask.dim() != 2:
            raise ValueError(f"drafting heads train with a 2-D attention_mask, got {mask.dim()} dimensions")
        sees = sees & mask.bool()[:, None]
    if given is not None:
        given = given.expand(tokens.shape)
        document = functional.pad(given[:, 1:] != given[:, :-1] + 1, (1, 0)).cumsum(-1)
        sees = sees & (document[:, :, None] == document[:, None])
    return sees | torch.eye(length, dtype=torch.bool, device=tokens.device)
