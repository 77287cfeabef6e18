"""SequenceMatch (arXiv:2306.05426): texts like the data's as imitation, with logits as soft Q-values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from hf_ext import adapter
from hf_ext.generation.backspace import Walks, tree_mask
from hf_ext.trainer_callbacks import noise
from hf_ext.trainer_callbacks.clean_loss import as_in_evaluation, next_token_loss, shifted_targets
from hf_ext.trainer_callbacks.imitation import Walker, with_slips
from hf_ext.trainer_callbacks.moving import special_tokens
from hf_ext.trainer_callbacks.objective import Objective
from hf_ext.trainer_callbacks.token_ids import token_id

DIVERGENCES = ("chi2-mixture", "chi2")


def step_losses(
    chosen: Tensor, value: Tensor, following: Tensor, of_data: Tensor, *, gamma: float, mixture: bool
) -> Tensor:
    """Compute the loss of single steps of an inverse reinforcement learning with chi-square divergence.

    With the reward `r = Q(a|s) - gamma V(s')` and `phi(r) = r - r^2 / 4`, a step of the data costs
    `-phi(r) + (V(s) - gamma V(s')) / 2` and one of the model `(V(s) - gamma V(s')) / 2`, to which the
    mixture adds `r^2 / 4`. Summed with the weights `gamma^t`, the second terms are V of the first state.

    Args:
        chosen: Q(a|s), the logit of the action.
        value: V(s), the logsumexp of the logits.
        following: V of the next state, 0 after the end.
        of_data: whether a step is the data's.
        gamma: discount.
        mixture: whether the rewards of the model's steps are regularised too.

    Example:
        >>> one = torch.tensor([1.0])
        >>> step_losses(one, 2 * one, 0 * one, torch.tensor([True]), gamma=1.0, mixture=True)  # -(1 - 1/4) + 2/2
        tensor([0.2500])
    """
    reward = chosen - gamma * following
    drop = (value - gamma * following) / 2
    square = reward.square() / 4
    return drop + torch.where(of_data, square - reward, square if mixture else torch.zeros_like(square))


@dataclass(eq=False)
class SequenceMatch(Objective):
    """Train on the data and on the model's own texts, so that it knows what to do where it has erred.

    Next-token logits are read as soft Q-values of an imitation learner. Besides every row of the
    data, the model continues the row's prompt (its untrained tokens, at least the first) by itself;
    the loss makes the data's actions rewarding and the visited states of the model's worthless,
    which minimises a chi-square divergence between the texts of both.

    With a `backspace`, deleting the last token is one more action. It is learned from slips put into
    the data: after some tokens a random one is shown whose right continuation is the backspace. A
    deleted token is seen by nothing that follows. Generate with `hf_ext.generation.BackspaceDecoding`.

    It replaces the training step: `attach(trainer, SequenceMatch(...))`. A step samples
    `sample_tokens` actions a row, one forward pass each, without gradients.

    Args:
        backspace: the token that deletes, as a text or an id: one that the data never use. None
            trains without it.
        sample_tokens: actions that the model samples for each row.
        slips: probability that a target is preceded by a random token that has to be deleted.
        weight: share of this loss, the rest is next-token prediction; 0 is plain training.
        warmup_steps: optimizer steps in which the weight rises from 0.
        gamma: discount of what comes later.
        divergence: "chi2-mixture" is the chi-square divergence of the data from the mixture of data
            and model, "chi2" that of the model from the data.
        replay: optimizer steps for which a row's sampled text is used again. 0 samples at every step.
            What is kept is not part of checkpoints.
        seed: base of all random numbers; the Trainer's `args.seed` if None.
        clean_loss_every: see `Objective`.

    Raises:
        ValueError: an option is out of range; when training begins, the model does not follow masks
            and positions token by token, or its attention takes no such masks.

    Source:
        Cundy and Ermon, SequenceMatch: Imitation Learning for Autoregressive Sequence Modelling with
        Backtracking (ICLR 2024).

    Example:
        >>> SequenceMatch(backspace=3, gamma=0.99).describe()["options"]["gamma"]
        0.99
    """

    slug: ClassVar[str] = "sequencematch"
    paper: ClassVar[str] = (
        "SequenceMatch: Imitation Learning for Autoregressive Sequence Modelling with Backtracking (arXiv:2306.05426)"
    )

    backspace: str | int | None = None
    sample_tokens: int = 16
    slips: float = 0.1
    weight: float = 0.5
    warmup_steps: int = 0
    gamma: float = 0.998
    divergence: Literal["chi2-mixture", "chi2"] = "chi2-mixture"
    replay: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("slips", "weight"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ValueError(f"{name} must be a number from 0 to 1, got {value!r}")
        if isinstance(self.gamma, bool) or not isinstance(self.gamma, (int, float)) or not 0 < self.gamma <= 1:
            raise ValueError(f"gamma must be a discount above 0 and at most 1, got {self.gamma!r}")
        for name, least in (("sample_tokens", 1), ("warmup_steps", 0), ("replay", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an int from {least}, got {value!r}")
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {self.divergence!r}")

    def setup(self, model: nn.Module, processing_class: Any, args: TrainingArguments) -> None:
        """Find the special tokens and make sure that the model follows masks and positions."""
        from hf_ext.generation.speculative.probe import tree_problem

        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        wrapped: Any = model
        bare = wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped
        config = bare.config.get_text_config()
        self._backspace = (
            None if self.backspace is None else token_id(self.backspace, tokenizer, bare.config, purpose="backspace")
        )
        eos = getattr(config, "eos_token_id", None)
        self._ends = tuple(eos) if isinstance(eos, (list, tuple)) else () if eos is None else (eos,)
        self._implementation = adapter.attention_implementation(bare)
        tree_mask(torch.ones(1, 1, 1, dtype=torch.bool), self._implementation, torch.float32)  # may refuse
        with torch.no_grad(), as_in_evaluation(bare):
            problem = tree_problem(bare)
        if problem:
            raise ValueError(f"SequenceMatch hides tokens from each other with masks and positions, but {problem}")
        special = special_tokens(tokenizer, bare.config) | ({self._backspace} if self._backspace is not None else set())
        words = [token for token in range(config.vocab_size) if token not in special]
        self._words = torch.tensor(words)
        self._walker = Walker(self._backspace, self._ends, self.sample_tokens, self.replay)

    def step(
        self, trainer: Any, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        """Return the loss on a batch and on the model's own continuations of its prompts."""
        weight = self.weight
        if self.warmup_steps:
            weight *= min(1.0, self._state.global_step / self.warmup_steps)
        if weight == 0:
            plain: Tensor = model(**inputs, num_items_in_batch=num_items_in_batch).loss
            return plain
        if inputs.get("position_ids") is not None:
            raise ValueError(
                "SequenceMatch continues the prompt of each row, which packed rows do not have; do not pack"
            )
        data = with_slips(
            inputs, self._slips_of(inputs), self._words, noise.document_positions(inputs), self._backspace
        )
        draws = self._draws(inputs, data.steps.first)
        walks, alive = self._walker.walk(trainer, model, inputs, data.steps.first, draws, self._state.global_step)
        columns = max(data.tokens.shape[1], walks.tokens.shape[1])
        data, walks = data.padded(columns), walks.padded(columns)
        visible = torch.cat((data.visible, walks.visible))
        dtype = next(model.parameters()).dtype
        logits = model(
            input_ids=torch.cat((data.tokens, walks.tokens)),
            attention_mask=tree_mask(visible, self._implementation, dtype),
            position_ids=torch.cat((data.positions, walks.positions)),
            use_cache=False,
        ).logits
        rows = len(data.tokens)
        loss, plain_loss = self._sums(logits, data, walks, alive, rows, inputs)
        total = weight * loss + (1 - weight) * plain_loss
        return total / num_items_in_batch if num_items_in_batch is not None else total

    def _sums(
        self, logits: Tensor, data: Any, walks: Walks, alive: Tensor, rows: int, inputs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Return the sums of the imitation loss and of the next-token loss."""
        values = logits.float().logsumexp(-1)
        own = torch.arange(rows, device=logits.device)[:, None] + rows
        steps = data.steps
        taken = walks.actions
        ended = torch.isin(taken, torch.tensor(self._ends, device=taken.device)) if self._ends else taken < 0
        number = torch.arange(taken.shape[1], device=taken.device).expand(rows, -1)
        row = torch.cat((steps.row, own.expand_as(taken)[alive]))
        state = torch.cat((steps.state, walks.states[:, :-1][alive]))
        action = torch.cat((steps.action, taken[alive]))
        after = torch.cat((steps.after, walks.states[:, 1:][alive]))
        over = torch.cat((self._is_end(steps.action), ended[alive]))
        time = torch.cat((steps.time, number[alive]))
        of_data = row < rows
        chosen = logits[row, state, action].float()
        following = torch.where(over, 0.0, values[row, after])
        each = step_losses(
            chosen, values[row, state], following, of_data,
            gamma=self.gamma, mixture=self.divergence == "chi2-mixture",
        )  # fmt: skip
        reward = (chosen - self.gamma * following).detach()
        self.record("reward_data", (reward * of_data).sum(), of_data.sum())
        self.record("reward_model", (reward * ~of_data).sum(), (~of_data).sum())
        if self._backspace is not None:
            deleted = (taken == self._backspace) & alive
            self.record("backspace_share", deleted.sum(), alive.sum())
        length = inputs["labels"].shape[1]
        targets = shifted_targets(inputs["labels"])
        plain, _ = next_token_loss(logits[:rows, :length], targets)
        return (each * self.gamma ** time.float()).sum(), plain

    def _is_end(self, actions: Tensor) -> Tensor:
        if not self._ends:
            return torch.zeros_like(actions, dtype=torch.bool)
        return torch.isin(actions, torch.tensor(self._ends, device=actions.device))

    def _slips_of(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
        """Draw where a random token is shown, and which one, as shares of the list of words."""
        if self._backspace is None or self.slips == 0:
            return None
        where = self.uniform(inputs, stream=1, per_document=True) < self.slips
        return where, self.uniform(inputs, stream=2, per_document=True)

    def _draws(self, inputs: dict[str, Any], first: Tensor) -> Tensor:
        """Draw (rows, actions) numbers that depend on the row alone."""
        rows = torch.arange(len(first), device=first.device)
        settings = {"seed": self._seed, "step": self._state.global_step}
        streams = range(10, 10 + self.sample_tokens)
        drawn = [noise.document_uniform(inputs, stream=stream, **settings)[rows, first] for stream in streams]
        return torch.stack(drawn, 1)
