"""ssToken: fine-tune on the tokens that the model has begun to learn or that lean on the prompt (arXiv:2510.18250)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_ext.attention.intercept import intercept
from hf_ext.layers import base_model, decoder_layers
from hf_ext.trainer_callbacks.clean_loss import as_in_evaluation
from hf_ext.trainer_callbacks.history import History
from hf_ext.trainer_callbacks.objective import Objective
from hf_ext.trainer_callbacks.reference import Reference
from hf_ext.trainer_callbacks.tap import Tap, document_numbers, texts_of


def scaled(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """Scale the values of each group to [0, 1] by its least and its greatest one.

    Args:
        values: (tokens,).
        groups: (tokens,) int64, below `count`.
        count: number of groups.

    Example:
        >>> scaled(torch.tensor([1.0, 3.0, 2.0, 5.0]), torch.tensor([0, 0, 0, 1]), 2)
        tensor([0.0000, 1.0000, 0.5000, 0.0000])
    """
    empty = values.new_zeros(count)
    least = empty.scatter_reduce(0, groups, values, "amin", include_self=False)
    greatest = empty.scatter_reduce(0, groups, values, "amax", include_self=False)
    return (values - least[groups]) / (greatest - least + 1e-8)[groups]


def top_share(scores: Tensor, groups: Tensor, count: int, share: float) -> Tensor:
    """Tell which tokens are among the highest `share` of their group, rounded up to whole tokens.

    Args:
        scores: (tokens,); of equal ones, the earlier wins.
        groups: (tokens,) int64, below `count`.
        count: number of groups.
        share: above 0, up to 1.

    Returns:
        (tokens,) bool.

    Example:
        >>> top_share(torch.tensor([0.1, 0.9, 0.5, 0.3]), torch.tensor([0, 0, 0, 1]), 2, 0.5)
        tensor([False,  True,  True,  True])
    """
    order = scores.argsort(descending=True, stable=True)
    order = order[groups[order].argsort(stable=True)]  # group by group, each from its highest score down
    sizes = torch.zeros(count, dtype=torch.long, device=groups.device).index_add_(0, groups, torch.ones_like(groups))
    rank = torch.arange(len(order), device=order.device) - (sizes.cumsum(0) - sizes)[groups[order]]
    kept = torch.empty_like(groups, dtype=torch.bool)
    kept[order] = rank < (sizes * share - 1e-9).ceil()[groups[order]]  # 0.55 * 20 is a little more than 11
    return kept


@dataclass(eq=False)
class SSToken(Objective):
    """Fine-tune on the most promising share of each response's tokens.

    A response token's score is `gamma * excess + (1 - gamma) * attention`. The excess loss is the token's
    loss under an earlier version of the model minus its loss now, scaled to [0, 1] within its text: tokens that
    the model has begun to learn. The attention is what the token, as a query of the last layer, gives to the
    prompt (all tokens of its text that are not trained), averaged over heads. The `share` of highest scores within
    each text counts in the loss; a text weighs as much as all of its targets would.

    Selecting within a text, as the released code does, no split of the batch changes anything. (The released
    code then averages over the tokens selected in a micro-batch.) The attention is computed by the model's own
    attention with an indicator of the prompt in place of the values, so it needs no matrix and no eager attention:
    the last layer runs once more without gradients. With `gamma` above 0 the earlier version runs on every batch.

    Args:
        share: of each text's targets that are trained on, above 0; 1 is plain training, bit for bit. The paper
            takes 0.6.
        gamma: weight of the excess loss against the attention, from 0 to 1; the paper takes 0.5. At 0 no earlier
            version is needed, at 1 no attention.
        history: the earlier version as a model; None for the model as it is when training begins (a copy of the
            weights that train; for LoRA that is the base model and a copy of the adapters).
        decay: with `history=None`, share of itself that the earlier version keeps at each step, moving towards
            the present one; 1 leaves it at the beginning.
        clean_loss_every: see `Objective`.
        without_logits: see `Objective`. False also has the earlier version's logits built.

    Raises:
        ValueError: options are out of range; in training, weights are sharded and `history` is None.

    Source:
        "ssToken: Self-modulated and Semantic-aware Token Selection for LLM Fine-tuning" (arXiv:2510.18250).

    Example:
        >>> SSToken(share=0.6).describe()["options"]["gamma"]
        0.5
        >>> SSToken(share=0)
        Traceback (most recent call last):
        ...
        ValueError: share must be above 0 and at most 1 (0.6 trains on 60 % of the targets), got 0
    """

    slug: ClassVar[str] = "sstoken"
    paper: ClassVar[str] = (
        "ssToken: Self-modulated and Semantic-aware Token Selection for LLM Fine-tuning (arXiv:2510.18250)"
    )

    #: which tokens are chosen depends on all of their text
    additive: ClassVar[bool] = False

    share: float = 0.6
    gamma: float = 0.5
    history: Any = None
    decay: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not _number(self.share) or not 0 < self.share <= 1:
            raise ValueError(
                f"share must be above 0 and at most 1 (0.6 trains on 60 % of the targets), got {self.share!r}"
            )
        if not _number(self.gamma) or not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma must be a number from 0 to 1, got {self.gamma!r}")
        if not _number(self.decay) or not 0 <= self.decay <= 1:
            raise ValueError(f"decay must be a number from 0 to 1, got {self.decay!r}")
        if self.history is not None and not isinstance(self.history, nn.Module):
            raise ValueError(f"history must be a model or None, got {type(self.history).__name__}")
        if self.history is not None and self.decay != 1:
            raise ValueError("decay moves a copy of the trained weights, so it does not go with a history model")
        self._tap: Tap | None = None
        self._past: History | None = None
        self._reference: Reference | None = None

    def describe(self) -> dict[str, Any]:
        """Return name, paper, options and hooks, with the history model's name in its place."""
        described = super().describe()
        if self.history is not None:
            described["options"]["history"] = self.history.config.name_or_path or type(self.history).__name__
        return described

    def setup(self, model: nn.Module, processing_class: Any, args: TrainingArguments) -> None:
        """Listen at the last layer and keep the weights as they are."""
        if self.share == 1:
            return
        self._model = model
        if self.gamma < 1:
            self._tap = Tap(decoder_layers(model)[-1])
        if self.history is not None:
            self.history.requires_grad_(False).to(next(model.parameters()).device)
        if self.gamma > 0:
            if self.history is None:
                self._past = History(self.name, model, args, self._state, self.decay)
            before, weights = (self.history, None) if self._past is None else (model, self._past.weights)
            self._reference = Reference(before, weights, with_logits=self.without_logits is False)

    def installed(self) -> list[str]:
        """Say what is on the model."""
        lines = ["forward pre-hook on the last layer: its input"] if self._tap else []
        lines += ["a copy of the trained weights"] if self._past else []
        lines += [f"earlier version: {self._reference.line}"] if self._reference else []
        return [*super().installed(), *lines]

    def remove(self) -> None:
        """Take the objective off the model and drop the copy of its weights."""
        super().remove()
        if self._tap is not None:
            self._tap.remove()
        if self._reference is not None:
            self._reference.remove()
        self._tap = self._past = self._reference = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the earlier version."""
        if self._past is not None:
            self._past.update()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save the moving average with the checkpoint."""
        super().on_save(args, state, control, **kwargs)
        if self._past is not None and state.is_world_process_zero:
            self._past.save(Path(args.output_dir, f"checkpoint-{state.global_step}"))

    def is_plain(self) -> bool:
        """Tell whether the options are those of plain training."""
        return self.share == 1

    def statistics_loss(self, statistics: Any, targets: Tensor, **extra: Any) -> tuple[Tensor, Tensor]:
        """Return the sum over the selected tokens, weighted to the size of their texts, and the number of targets."""
        losses, total = statistics.nll, torch.as_tensor(len(targets))
        if self.share == 1:
            return losses.sum(), total
        device = losses.device
        groups, count = texts_of(self.batch, self.rows, self.columns)
        groups = groups.to(device)
        with torch.no_grad():
            scores = torch.zeros_like(losses)
            if self._reference is not None:
                before = self._reference.read(self.batch, self.rows, self.columns)
                past = before.statistics(targets.to(before.device)).nll.to(losses)
                scores += self.gamma * scaled(past - losses, groups, count)
            if self.gamma < 1:
                scores += (1 - self.gamma) * self._attention_to_prompt().to(scores)
            kept = top_share(scores, groups, count, self.share)
            ones = torch.ones_like(losses)
            sizes = torch.zeros(count, device=device, dtype=ones.dtype)
            weight = sizes.index_add(0, groups, ones) / sizes.index_add(0, groups, ones * kept).clamp_min(1)
        self.record("selected_share", kept.sum(), len(kept))
        self.record("selected_loss", (losses.detach() * kept).sum(), kept.sum())
        return (losses * kept * weight[groups]).sum(), total

    def _attention_to_prompt(self) -> Tensor:
        """Return for each target the attention that it gives to the prompt in the last layer: (targets,)."""
        assert self._tap is not None
        args, kwargs = self._tap.take()
        layer = decoder_layers(self._model)[-1]
        documents = document_numbers(self.batch)
        rows, places = (at.to(documents.device) for at in (self.rows, self.columns + 1))  # of the targets themselves
        trained = functional.pad(torch.zeros_like(documents, dtype=torch.bool), (0, 1))
        trained[rows, places] = True
        prompt = (documents >= 0) & ~trained[:, :-1]
        found: list[Tensor] = []

        def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, plain: Any, **kw: Any) -> Any:
            if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[-1] != key.shape[2]:
                raise ValueError(
                    f"{self.name} runs the last layer again, which then has no keys of a prefix (prefix tuning): use "
                    "gamma=1, which looks at no attention"
                )
            # virtual tokens, which prompt tuning puts first, belong to the prompt
            whole = functional.pad(prompt, (value.shape[2] - prompt.shape[1], 0), value=True)
            indicator = whole.to(value.device, value.dtype)[:, None, :, None].expand_as(value).contiguous()
            found.append(plain(module, query, key, indicator, mask, **kw)[0][..., 0].float().mean(-1))
            return plain(module, query, key, value, mask, **kw)

        with torch.no_grad(), as_in_evaluation(layer), intercept(base_model(self._model), attend):
            layer(*args, **{**kwargs, "past_key_values": None})
        if not found:
            raise ValueError(
                f"{self.name} found no attention in the last layer of {type(self._model).__name__}; use gamma=1"
            )
        [attention] = found
        given = functional.pad(attention[:, attention.shape[1] - documents.shape[1] :], (0, 1))
        return given[rows.to(given.device), places.to(given.device)]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
