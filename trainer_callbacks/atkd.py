"""ATKD: distillation that teaches easy and hard tokens differently (arXiv:2402.11890)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import TrainingArguments

from hf_ext.trainer_callbacks.distillation import distillation, odds_of
from hf_ext.trainer_callbacks.objective import Objective
from hf_ext.trainer_callbacks.reference import Reference
from hf_ext.trainer_callbacks.sstoken import top_share
from hf_ext.trainer_callbacks.tap import texts_of


def divided_divergence(student: Tensor, teacher: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Divide the divergence of a student from its teacher into what concerns the target and what concerns the rest.

    `KL(teacher || student) = target part + uncertainty * rest part` for every token.

    Args:
        student: (tokens, vocabulary) logits.
        teacher: likewise.
        targets: (tokens,).

    Returns:
        (tokens,) each: the target part, the divergence between the two distributions over target and not target;
        the rest part, that between the two distributions over the other tokens, each normalised; and the
        uncertainty, the teacher's probability that the token is not the target.

    Example:
        >>> logits, targets = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 4, 7])
        >>> target, rest, uncertainty = divided_divergence(logits, logits.flip(0), targets)
        >>> whole = functional.kl_div(logits.log_softmax(-1), logits.flip(0).log_softmax(-1), log_target=True,
        ...                           reduction="none").sum(-1)
        >>> bool(torch.allclose(target + uncertainty * rest, whole, atol=1e-6))
        True
    """
    place = targets[:, None]
    parts = []
    for logits in (teacher, student):
        others = logits.scatter(1, place, -torch.inf)
        odds = logits.gather(1, place)[:, 0] - others.logsumexp(-1)  # their sigmoid is the target's probability
        parts.append((odds, others.log_softmax(-1).scatter(1, place, 0.0)))
    (odds, among), (learnt, learnt_among) = parts
    chance, uncertainty = odds.sigmoid(), (-odds).sigmoid()
    target = chance * (functional.logsigmoid(odds) - functional.logsigmoid(learnt)) + uncertainty * (
        functional.logsigmoid(-odds) - functional.logsigmoid(-learnt)
    )
    weight = among.exp().scatter(1, place, 0.0)
    # A token that teacher and student both exclude has no part in either.
    difference = torch.where(weight > 0, among - learnt_among, 0.0)
    return target, (weight * difference).sum(-1), uncertainty


@dataclass(eq=False)
class ATKD(Objective):
    """Distil a teacher with the target left out of easy tokens, and both parts unweighted on hard ones.

    Token-wise distillation learns the target's probability and, weighted by the teacher's uncertainty
    `1 - p(target)`, the proportions among the other tokens. On tokens that the teacher finds easy the second part all
    but vanishes, and the first is learnt by rote. ATKD takes the `hard_share` of each text's targets about which the
    teacher is least sure as hard and the others as easy. Easy ones lose the rest part alone, hard ones both parts
    without the uncertainty as weight: `easy_weight * mean over easy + (1 - easy_weight) * mean over hard`.

    Choosing within a text rather than within a micro-batch as the released code does, and dividing by the shares
    instead of by counts, no split of the batch changes anything: easy tokens have the weight
    `easy_weight / (1 - hard_share)`, hard ones `(1 - easy_weight) / hard_share`. The teacher reads what the
    student reads, without gradients.

    The logits of both models are made from their last hidden states, some tokens at a time, where their heads allow
    that: once for the teacher's uncertainty, and again for the divergence and its gradient.

    Args:
        teacher: a model over the same vocabulary; it is moved to the student's device and not trained.
        hard_share: of each text's targets, above 0 and below 1; the paper takes 0.5.
        easy_weight: from 0 to 1; the paper takes 0.2.
        weight: of the distillation; `1 - weight` goes to the next-token loss. The paper distils only; 0 is plain
            training, bit for bit, and never asks the teacher.
        adaptive: False for plain distillation, `KL(teacher || student)` on every token, to compare with.
        clean_loss_every: see `Objective`.
        without_logits: see `Objective`. False also has the teacher's logits built.

    Raises:
        ValueError: options are out of range; in training, the teacher has another vocabulary.

    Source:
        "Revisiting Knowledge Distillation for Autoregressive Language Models" (arXiv:2402.11890).

    Example:
        >>> from hf_ext.testing.tiny_models import build
        >>> ATKD(teacher=build("llama")).describe()["options"]["easy_weight"]
        0.2
        >>> ATKD(teacher="gpt2")
        Traceback (most recent call last):
        ...
        ValueError: teacher must be a model, got str; load it with AutoModelForCausalLM.from_pretrained
    """

    slug: ClassVar[str] = "atkd"
    paper: ClassVar[str] = "Revisiting Knowledge Distillation for Autoregressive Language Models (arXiv:2402.11890)"

    teacher: Any = field(repr=False)
    hard_share: float = 0.5
    easy_weight: float = 0.2
    weight: float = 1.0
    adaptive: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.teacher, nn.Module):
            raise ValueError(
                f"teacher must be a model, got {type(self.teacher).__name__}; load it with "
                "AutoModelForCausalLM.from_pretrained"
            )
        for name in ("hard_share", "easy_weight", "weight"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ValueError(f"{name} must be a number from 0 to 1, got {value!r}")
        if self.hard_share in (0, 1):
            raise ValueError(f"hard_share must leave some tokens easy and some hard, got {self.hard_share!r}")
        self._reference: Reference | None = None

    def describe(self) -> dict[str, Any]:
        """Return name, paper, options and hooks, with the teacher's name in its place."""
        described = super().describe()
        described["options"]["teacher"] = self.teacher.config.name_or_path or type(self.teacher).__name__
        return described

    def setup(self, model: nn.Module, processing_class: Any, args: TrainingArguments) -> None:
        """Check and move the teacher."""
        config: Any = model.config
        mine, theirs = (c.get_text_config(decoder=True).vocab_size for c in (config, self.teacher.config))
        if mine != theirs:
            raise ValueError(
                f"{self.name} compares distributions over the same tokens, but the teacher has a vocabulary of {theirs}"
                f" and the student one of {mine}: take a teacher with the student's tokenizer; if only the padding of "
                "the vocabulary differs, call resize_token_embeddings on one of them"
            )
        if self.weight:
            self.teacher.requires_grad_(False).to(next(model.parameters()).device)
            self._reference = Reference(self.teacher, with_logits=self.without_logits is False)

    def is_plain(self) -> bool:
        """Tell whether the options are those of plain training."""
        return self.weight == 0

    def remove(self) -> None:
        """Take the objective off the model, and its hook off the teacher."""
        super().remove()
        if self._reference is not None:
            self._reference.remove()
            self._reference = None

    def installed(self) -> list[str]:
        """Say what is on the models."""
        return [*super().installed(), *([] if self._reference is None else [f"teacher: {self._reference.line}"])]

    def distribution_loss(self, logits: Any, targets: Tensor, **extra: Any) -> tuple[Tensor, Tensor]:
        """Return the sum of the tokens' losses and the number of targets."""
        assert self._reference is not None
        teacher = self._reference.read(self.batch, self.rows, self.columns)
        on_target: Tensor | float = 1.0
        on_rest = None
        if self.adaptive:
            uncertainty = (-odds_of(teacher, targets.to(teacher.device))).sigmoid()
            on_target, on_rest = self._weights(uncertainty.to(targets.device))
            on_rest *= self.weight
        found = distillation(logits, teacher, targets, on_target * self.weight, on_rest, 1 - self.weight)
        self.record("divergence", (found.target + found.uncertainty * found.rest).sum(), len(targets))
        self.record("uncertainty", found.uncertainty.sum(), len(targets))
        return found.total, torch.as_tensor(len(targets))

    def _weights(self, uncertainty: Tensor) -> tuple[Tensor, Tensor]:
        """Weigh the target part and the rest part of each token by whether its teacher finds it hard."""
        texts, count = texts_of(self.batch, self.rows, self.columns)
        hard = top_share(uncertainty, texts.to(uncertainty.device), count, self.hard_share)
        easy_weight, hard_weight = self.easy_weight / (1 - self.hard_share), (1 - self.easy_weight) / self.hard_share
        on_target = torch.where(hard, hard_weight, 0.0).to(uncertainty.dtype)
        return on_target, torch.where(hard, hard_weight, easy_weight).to(uncertainty.dtype)
