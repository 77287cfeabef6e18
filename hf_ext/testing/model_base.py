"""What the parts of the model contract share: the model under test, its inputs, and comparing with a message."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel


class ContractBase:
    """Settings of the contract and helpers of its tests.

    Attributes:
        model_class: the causal language model under test.
        invalid_options: options for `config` that must be refused, each with a regular expression that the message
            of the exception matches.
        beyond_context: `"works"` when input longer than `max_position_embeddings` is computed like any other, or the
            type of the exception that it raises.
        blocked_packages: packages that must not be needed to load a saved model.
        tolerance: largest difference of float32 logits that count as equal.
    """

    model_class: type[PreTrainedModel]
    invalid_options: ClassVar[Sequence[tuple[Mapping[str, Any], str]]] = ()
    beyond_context: str | type[Exception] = "works"
    blocked_packages: tuple[str, ...] = ("hf_ext",)
    tolerance: float = 5e-5

    def config(self, **options: Any) -> PreTrainedConfig:
        """Return the configuration of a tiny model; `options` replace its values."""
        raise NotImplementedError(f"{type(self).__name__} must define config(self, **options)")

    def make_model(self, **options: Any) -> PreTrainedModel:
        """Build the model under test with weights large enough for masks and positions to show in the logits."""
        torch.manual_seed(0)
        model = self.model_class(self.config(**options)).eval()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim > 1:
                    weight.normal_(std=1 / math.sqrt(weight.shape[-1]))
                else:  # norms are initialized to 1 and biases to 0: values at which mistakes hide
                    weight.add_(torch.randn_like(weight) / 10)
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        return model

    def length(self) -> int:
        """Length of the test sequences: well beyond the sliding window, where there is one."""
        window = getattr(self.config(), "sliding_window", None)
        return max(24, 2 * window + 5 if window else 0)

    def tokens(self, batch: int = 2, length: int | None = None) -> torch.Tensor:
        """Return random token ids `[batch, length]`, always the same."""
        generator = torch.Generator().manual_seed(1)
        return torch.randint(1, self.config().vocab_size, (batch, length or self.length()), generator=generator)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> None:
    """Fail with the largest difference in the message.

    Example:
        >>> assert_close(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0]), 0.1, "two tensors")
        Traceback (most recent call last):
            ...
        AssertionError: two tensors differ by up to 0.5 (allowed: 0.1)
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"{what} differ in shape: {tuple(actual.shape)} and {tuple(expected.shape)}")
    largest = (actual.float() - expected.float()).abs().max().item()
    if not largest <= tolerance:  # also when it is NaN
        raise AssertionError(f"{what} differ by up to {largest:.3g} (allowed: {tolerance:.3g})")


def left_pad(rows: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return `input_ids`, `attention_mask` and `position_ids` of a left-padded batch, as `generate` makes them.

    Example:
        >>> left_pad([torch.tensor([5]), torch.tensor([6, 7])])["input_ids"].tolist()
        [[0, 5], [6, 7]]
    """
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    mask = torch.stack([(torch.arange(width) >= width - len(row)).long() for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
