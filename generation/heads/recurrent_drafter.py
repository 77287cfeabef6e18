"""The recurrent draft head of ReDrafter (arXiv:2403.09919).

    s_j = SiLU(U s_{j-1} + W e(x_j) + b),   s_0 = 0
    z   = [s_j ; RMSNorm(h)],   then for each residual block  z <- z + SiLU(R z + c)
    logits = the target's final norm and LM head, on P z

`h` is the target's last state (before its final norm) at the last position it has read, and stays
the same over all steps of a draft; `x_1` is the token that was accepted there. This is the paper's
recurrence with its residual blocks; its own output matrix of vocabulary size is replaced by a
projection `P` to the target's LM head, which keeps the head small.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_ext.generation.heads.base import DraftHead, DraftHeadConfig, Terms, distillation
from hf_ext.layers import TargetEnds


class RecurrentDrafterConfig(DraftHeadConfig):
    """Config of a `RecurrentDrafterHead`.

    Args:
        blocks: residual blocks between the recurrence and the projection.
        train_steps: how many tokens ahead training goes from each position.
        **kwargs: see `DraftHeadConfig`.
    """

    model_type = "recurrent-drafter-head"

    def __init__(self, blocks: int = 2, train_steps: int = 4, **kwargs: Any) -> None:
        self.blocks, self.train_steps = blocks, train_steps
        super().__init__(**kwargs)


class RecurrentDrafterHead(DraftHead):
    """One recurrent step a drafted token, all from the same state of the target.

    Args:
        config: sizes.

    Example:
        >>> from hf_ext.testing.tiny_models import build
        >>> target = build("llama")
        >>> head, ends = RecurrentDrafterHead.for_target(target), TargetEnds(target)
        >>> hidden, tokens = torch.zeros(3, 32), torch.tensor([5, 6, 7])
        >>> logits, state = head.step(tokens, head.first_state(hidden), hidden, ends)
        >>> logits.shape, state.shape
        (torch.Size([3, 96]), torch.Size([3, 32]))
    """

    config_class = RecurrentDrafterConfig

    def __init__(self, config: RecurrentDrafterConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.from_state = nn.Linear(width, width, bias=False)
        self.from_token = nn.Linear(config.embedding_size, width)
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.blocks = nn.ModuleList([nn.Linear(2 * width, 2 * width) for _ in range(config.blocks)])
        self.out = nn.Linear(2 * width, width, bias=False)
        self.post_init()

    def first_state(self, hidden: Tensor) -> Tensor:
        """Return the state before the first token, zeros of the shape of `hidden`."""
        return torch.zeros_like(hidden)

    def step(self, tokens: Tensor, state: Tensor, hidden: Tensor, ends: TargetEnds) -> tuple[Tensor, Tensor]:
        """Read one token and predict the next.

        Args:
            tokens: (N,), the last token of each candidate (at first: the last accepted token).
            state: (N, hidden), what the step before returned, or `first_state`.
            hidden: (N, hidden), the target's last state before its final norm (state `n` of `n`
                layers), at the position that predicted the last accepted token.
            ends: embeddings and LM head of the target.

        Returns:
            Logits (N, vocabulary) of the token after `tokens`, and the new state.
        """
        state = self(ends.embed(tokens), state)
        return ends.logits(self.mix(state, hidden)), state

    def forward(self, embedded: Tensor, state: Tensor) -> Tensor:
        """Return the next state from token embeddings (..., embedding) and states (..., hidden)."""
        return functional.silu(self.from_state(state) + self.from_token(embedded))

    def mix(self, state: Tensor, hidden: Tensor) -> Tensor:
        """Return what goes into the target's final norm, from the recurrent state and the target's."""
        mixed = torch.cat((state, self.norm(hidden)), dim=-1)
        for block in self.blocks:
            mixed = mixed + functional.silu(block(mixed))
        return self.out(mixed)

    # -- training ----------------------------------------------------------------------------------

    @property
    def trained_on(self) -> tuple[int, ...]:
        """The last state."""
        return (self.config.target["num_hidden_layers"],)

    def training_terms(
        self,
        ends: TargetEnds,
        batch: Mapping[str, Any],
        targets: Tensor,
        states: Mapping[int, Tensor],
        outputs: Any,
        uniform: Callable[..., Tensor],
    ) -> Terms:
        """Cross-entropy against the target's distributions, `train_steps` tokens ahead of each position.

        The tokens read are those of the text. Step j from position t reads token t + j and is
        compared with the target's distribution after that token; each step weighs 1 / `train_steps`.
        """
        tokens, steps = batch["input_ids"], self.config.train_steps
        embedded, hidden = ends.embed(tokens), states[self.trained_on[0]]
        state, total = self.first_state(hidden), hidden.new_zeros((), dtype=torch.float32)
        terms: Terms = {}
        usable = targets != -100  # every token on the way from t to t + j must be one that trains
        for step in range(1, min(steps, tokens.shape[1] - 1) + 1):
            state = self(embedded[:, step:], state[:, : tokens.shape[1] - step])
            usable = usable[:, :-1] & (targets[:, step:] != -100)
            mixed = self.mix(state[usable], hidden[:, :-step][usable])
            loss, hits = distillation(ends.logits(mixed), outputs.logits[:, step:][usable])
            count = usable.sum()
            total = total + loss / steps
            terms |= {f"loss_{step}": (loss, count), f"agreement_{step}": (hits, count)}
        return {"loss": (total, (targets != -100).sum()), **terms}
