"""cDPO: preference optimisation that punishes the tokens that lead a wrong answer astray (arXiv:2411.19943)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import TrainingArguments

from hf_ext.kernels.linear_logits import Logits
from hf_ext.trainer_callbacks.attachment import ObjectiveMixin
from hf_ext.trainer_callbacks.objective import Objective
from hf_ext.trainer_callbacks.reference import Reference


def contrastive_scores(positive: Tensor, negative: Tensor, targets: Tensor, beta: float = 1.0) -> Tensor:
    """Return the contrastive estimate of how well each token goes with a right answer: low for critical tokens.

    The probability of the token in `softmax((1 + beta) * positive - beta * negative)`, that is
    `p_positive ** (1 + beta) / p_negative ** beta`, normalised over the vocabulary.

    Args:
        positive: (..., vocabulary) logits of the model tuned on right answers.
        negative: likewise, of the one tuned on wrong answers.
        targets: (...) token ids.
        beta: weight of the contrast, from 0.

    Returns:
        (...) from 0 to 1.

    Example:
        >>> positive = torch.tensor([[0.0, 0.0]])
        >>> negative = torch.tensor([[2.0, 0.0]])  # the negative model prefers token 0
        >>> contrastive_scores(positive, negative, torch.tensor([0]))
        tensor([0.1192])
    """
    mixed = (1 + beta) * positive.float() - beta * negative.float()
    return (mixed.gather(-1, targets[..., None])[..., 0] - mixed.logsumexp(-1)).exp()


def critical_scores(positive: nn.Module, negative: nn.Module, batch: Mapping[str, Tensor], beta: float = 1.0) -> Tensor:
    """Score the tokens of texts with two models, without gradients.

    Args:
        positive: model tuned on right answers.
        negative: model tuned on wrong answers.
        batch: `input_ids` (batch, length), and what else the models read.
        beta: see `contrastive_scores`.

    Returns:
        (batch, length - 1): the score of every token but the first.
    """
    references = [Reference(model) for model in (positive, negative)]
    try:
        return _scored([reference.read(batch, *_predicting(batch)) for reference in references], batch, beta)
    finally:
        for reference in references:
            reference.remove()


def _predicting(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return rows and columns of all tokens that predict another."""
    rows, columns = torch.ones_like(batch["input_ids"][:, 1:]).nonzero().unbind(-1)
    return rows, columns


@torch.no_grad()
def _scored(read: Sequence[Logits], batch: Mapping[str, Tensor], beta: float) -> Tensor:
    """Return the scores of the predicted tokens, from a piece of both models' logits at a time: (batch, length - 1)."""
    positive, negative = read
    targets = batch["input_ids"][:, 1:]
    flat, found = targets.flatten().to(positive.device), []
    at_first, at_second = positive.reader(), negative.reader(positive.rows)
    for at in positive.places():
        found.append(contrastive_scores(at_first(at), at_second(at).to(positive.device), flat[at], beta))
    return torch.cat(found).view(targets.shape) if found else targets.new_empty(targets.shape, dtype=positive.dtype)


def weighted_dpo_loss(chosen: Tensor, rejected: Tensor, weights: Tensor, beta: float) -> Tensor:
    """Return the loss of each pair: `-log sigmoid(beta * (sum chosen - sum weights * rejected))`.

    This is what `CDPO` makes TRL's DPOTrainer compute; it stands here by itself to be read and tested.

    Args:
        chosen: (pairs, length) log-ratios of the policy to the reference for tokens of right answers, 0 elsewhere.
        rejected: (pairs, length) for tokens of wrong answers.
        weights: (pairs, length) of the rejected tokens: 1 minus their score. Ones give plain DPO.
        beta: temperature of DPO.

    Example:
        >>> weighted_dpo_loss(torch.zeros(1, 2), torch.tensor([[0.0, 5.0]]), torch.tensor([[1.0, 0.0]]), 0.1)
        tensor([0.6931])
    """
    return -functional.logsigmoid(beta * (chosen.sum(-1) - (weights * rejected).sum(-1)))


@dataclass(eq=False)
class CDPO(Objective):
    """Weigh the rejected tokens of TRL's DPOTrainer by how critical they are.

    Two models, tuned on right and on wrong answers, say how well each token of a rejected answer goes with a right
    one: `s = softmax((1 + beta) * positive - beta * negative)[token]`. In the sum over the rejected answer, the
    log-ratio of policy to reference of a token has the weight `1 - s`. So tokens that only the negative model would say
    are pushed down, and those that a right answer shares are let be. Everything else is DPOTrainer's: its losses (the
    weights enter where it sums over tokens), its reference, its logs (whose log-probabilities are weighted sums).

    The released code takes the logistic loss of aligned token pairs before it sums; this is the sum first, as
    token-level DPO is derived, so that weights of 1 are DPO. Use it with `attach(DPOTrainer(...), CDPO(...))`. Each
    batch costs one pass of both models over the rejected answers without gradients.

    Args:
        positive: the model tuned on right answers, or the name of an adapter of the PEFT model that trains.
        negative: the model tuned on wrong answers, or an adapter's name.
        beta: weight of the contrast; the paper takes 1.
        strength: rejected tokens weigh `1 - strength * s`; 0 is DPO, bit for bit, and asks neither model.
        weigh_chosen: also weigh the chosen tokens, by `1 - strength * (1 - s)`, an option of the released code.
        clean_loss_every: how often the loss of DPO itself (the logistic one, reverse KL) is measured on the same
            pairs, see `Objective`; it is logged as `dpo_loss` and costs nothing.

    Raises:
        ValueError: options are out of range; in training, the trainer is no DPOTrainer, it precomputes the
            reference's sums or weighs by WPO, or an adapter is not there.

    Source:
        "Critical Tokens Matter: Token-Level Contrastive Estimation Enhances LLM's Reasoning Capability"
        (arXiv:2411.19943).

    Example:
        >>> CDPO(positive="right", negative="wrong").describe()["options"]["strength"]
        1.0
        >>> CDPO(positive="right", negative="wrong", strength=2)
        Traceback (most recent call last):
        ...
        ValueError: strength must be a number from 0 to 1, got 2
    """

    slug: ClassVar[str] = "cdpo"
    paper: ClassVar[str] = (
        "Critical Tokens Matter: Token-Level Contrastive Estimation Enhances LLM's Reasoning Capability "
        "(arXiv:2411.19943)"
    )

    positive: Any = field(repr=False)
    negative: Any = field(repr=False)
    beta: float = 1.0
    strength: float = 1.0
    weigh_chosen: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("positive", "negative"):
            value = getattr(self, name)
            if not isinstance(value, nn.Module | str):
                raise ValueError(f"{name} must be a model or the name of an adapter, got {type(value).__name__}")
        if isinstance(self.strength, bool) or not 0 <= self.strength <= 1:
            raise ValueError(f"strength must be a number from 0 to 1, got {self.strength!r}")
        if isinstance(self.beta, bool) or not self.beta >= 0:
            raise ValueError(f"beta must be a number from 0, got {self.beta!r}")

    def describe(self) -> dict[str, Any]:
        """Return name, paper, options and hooks, with the models' names in their places."""
        described = super().describe()
        for name in ("positive", "negative"):
            value = getattr(self, name)
            if isinstance(value, nn.Module):
                described["options"][name] = value.config.name_or_path or type(value).__name__  # type: ignore[union-attr]
        return described

    def setup(self, model: nn.Module, processing_class: Any, args: TrainingArguments) -> None:
        """Check the trainer's arguments, find adapters, move models."""
        if getattr(args, "precompute_ref_log_probs", False):
            raise ValueError(
                f"{self.name} weighs the tokens of the reference as well, so their sums cannot be precomputed: drop "
                "precompute_ref_log_probs=True"
            )
        if getattr(args, "use_weighting", False):
            raise ValueError(f"{self.name} and WPO both weigh the log-probabilities: drop use_weighting=True")
        for name in ("positive", "negative"):
            value = getattr(self, name)
            if isinstance(value, nn.Module):
                value.requires_grad_(False).to(next(model.parameters()).device)
            elif value not in getattr(model, "peft_config", {}):
                known = ", ".join(getattr(model, "peft_config", {})) or "no adapters"
                raise ValueError(
                    f"{name}={value!r} is no adapter of the model that trains, which has {known}: load it with "
                    f"model.load_adapter(path, adapter_name={value!r})"
                )

    def refuse_unknown_count(self) -> None:
        """Accept batches without counts: the loss is a mean over pairs, averaged over micro-batches."""

    def step(
        self, trainer: Any, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        """Return DPOTrainer's loss on weighted tokens."""
        compute: Any = super(ObjectiveMixin, trainer).compute_loss  # type: ignore[misc]
        if not {"input_ids", "completion_mask"} <= set(inputs):
            raise ValueError(
                f"{self.name} weighs the tokens of pairs in TRL's DPOTrainer, but this {type(trainer).__name__} has "
                f"batches of {', '.join(inputs)}: use attach(DPOTrainer(...), CDPO(...))"
            )
        bare = trainer.accelerator.unwrap_model(model)
        weights = self.token_weights(bare, inputs) if self.strength else None
        read = [bare, *([trainer.accelerator.unwrap_model(trainer.ref_model)] if trainer.ref_model is not None else [])]
        with _weighted(read, weights) as plain:
            loss: Tensor = compute(model, inputs, num_items_in_batch=num_items_in_batch)
        if self.clean_loss_due():
            policy, reference = plain
            chosen, rejected = (policy - reference).chunk(2)
            self.record("dpo_loss", -functional.logsigmoid(trainer.beta * (chosen - rejected)).sum(), len(chosen))
        return loss

    def token_weights(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """Return the weight of every token but the first: (pairs of chosen, then pairs of rejected, length - 1)."""
        ids, mask, counted = (inputs[name] for name in ("input_ids", "attention_mask", "completion_mask"))
        pairs = len(ids) // 2
        first = 0 if self.weigh_chosen else pairs
        scores = self._scores(model, {"input_ids": ids[first:], "attention_mask": mask[first:]})
        weights = torch.ones(len(ids), ids.shape[1] - 1, device=scores.device)
        weights[pairs:] = 1 - self.strength * scores[pairs - first :]
        if self.weigh_chosen:
            weights[:pairs] = 1 - self.strength * (1 - scores[:pairs])
        rejected = counted[pairs:, 1:]
        self.record("rejected_weight", (weights[pairs:] * rejected).sum(), rejected.sum())
        return weights

    def _scores(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        if isinstance(self.positive, nn.Module) and isinstance(self.negative, nn.Module):
            return critical_scores(self.positive, self.negative, batch, self.beta)
        logits = []
        for source in (self.positive, self.negative):
            with _adapter(model, source) as reader:
                reference = Reference(reader)
                try:
                    logits.append(reference.read(batch, *_predicting(batch)))
                finally:
                    reference.remove()
        return _scored(logits, batch, self.beta)


@contextlib.contextmanager
def _adapter(model: Any, source: nn.Module | str) -> Iterator[nn.Module]:
    """Yield a model, or the trained one with another adapter; then its own is back, and trains as before."""
    if isinstance(source, nn.Module):
        yield source
        return
    own, trains = model.active_adapter, {key: value.requires_grad for key, value in model.named_parameters()}
    model.set_adapter(source)
    try:
        yield model
    finally:
        model.set_adapter(own)
        for key, value in model.named_parameters():
            value.requires_grad_(trains[key])


@contextlib.contextmanager
def _weighted(models: list[nn.Module], weights: Tensor | None) -> Iterator[list[Tensor]]:
    """Multiply the log-probabilities that TRL's fused heads return by weights, as long as the block runs.

    Args:
        models: whose heads.
        weights: (rows, length - 1); None changes nothing.

    Yields:
        The sums of the log-probabilities as they were, (rows,), one entry a pass.
    """
    plain: list[Tensor] = []

    def weigh(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if getattr(output, "log_probs", None) is None:
            raise RuntimeError("this version of TRL's DPOTrainer does not return log-probabilities of tokens")
        if weights is not None:
            output.log_probs = output.log_probs[:, -weights.shape[1] :]
        plain.append(output.log_probs.detach().float().sum(-1))
        if weights is not None:
            output.log_probs = output.log_probs * weights.to(output.log_probs)
        return output

    with contextlib.ExitStack() as stack:
        for model in models:
            stack.callback(model.register_forward_hook(weigh, with_kwargs=True).remove)
        yield plain
