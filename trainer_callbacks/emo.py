"""Earth mover distance optimisation (EMO, arXiv:2310.04691).

Cross-entropy looks only at the probability of the token that came. EMO also asks where the rest of
the probability lies: mass on a token whose embedding is close to the target's costs little, mass on
a distant one much.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import TrainingArguments

from hf_ext.trainer_callbacks.objective import Objective
from hf_ext.trainer_callbacks.starting_weights import starting_weights, whole

#: Below this a term's weight grows no further: both terms vanish together, and rounding would set their ratio.
SMALLEST = 1e-6


def emo_loss(nll: Tensor, cost: Tensor, mode: int = 1) -> Tensor:
    """Weigh negative log-likelihood and transport cost so that both count alike, token by token.

    As in the released code: mode 1 scales the cost up to the likelihood and takes the mean of both,
    so that the value stays the negative log-likelihood; mode 2 scales the likelihood down to the cost
    and adds both. The scales carry no gradient.

    Args:
        nll: -log q(y), of any shape.
        cost: sum over v of q(v) (1 - cos(v, y)), of the same shape.
        mode: 1 or 2.

    Example:
        >>> round(float(emo_loss(torch.tensor(2.0), torch.tensor(0.5))), 4)
        2.0
        >>> round(float(emo_loss(torch.tensor(2.0), torch.tensor(0.5), mode=2)), 4)
        1.0
    """
    fixed_nll, fixed_cost = nll.detach(), cost.detach()
    if mode == 1:
        return 0.5 * (nll + fixed_nll / fixed_cost.clamp_min(SMALLEST) * cost)
    return cost + fixed_cost / fixed_nll.clamp_min(SMALLEST) * nll


@dataclass(eq=False)
class EMO(Objective):
    """Train on negative log-likelihood together with a bound of the earth mover distance.

    The cost of moving probability from token v to the token y that came is 1 - cos(e_v, e_y) for
    frozen embeddings e. With one target token a position, the bound, q^T C p, is the distance itself:
    there is only one way to move all of q onto y. It costs one more matrix product with the
    embeddings, and no logits beyond those that the loss needs anyway.

    Args:
        mode: 1 weighs likelihood and cost alike, with the likelihood's size; 2 with the cost's size (see `emo_loss`).
        cost: the embeddings: `"head"` for the model's output embeddings, as in the paper, `"input"` for its
            input embeddings, both as they are when training begins; or a tensor (vocabulary, any size), for
            example a larger model's.
        strength: share of EMO in the loss; the rest is the plain loss. 1 is the paper's; 0 is plain training,
            bit for bit.
        seed: not used.
        clean_loss_every: see `Objective`.
        without_logits: see `Objective`.

    Raises:
        ValueError: an option is out of range; at the beginning of training, the embeddings do not
            cover the vocabulary.

    Example:
        >>> EMO(mode=2).describe()["options"]["mode"]
        2
        >>> EMO(mode=3)
        Traceback (most recent call last):
        ...
        ValueError: mode must be 1 (size of the likelihood) or 2 (size of the cost), got 3
    """

    slug: ClassVar[str] = "emo"
    paper: ClassVar[str] = (
        "EMO: Earth Mover Distance Optimization for Auto-Regressive Language Modeling (arXiv:2310.04691)"
    )
    statistics_needed: ClassVar[frozenset[str]] = frozenset({"expectation"})

    mode: int = 1
    cost: str | Tensor = "head"
    strength: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.mode, bool) or self.mode not in (1, 2):
            raise ValueError(f"mode must be 1 (size of the likelihood) or 2 (size of the cost), got {self.mode!r}")
        if isinstance(self.cost, Tensor):
            if self.cost.dim() != 2 or not self.cost.is_floating_point():
                raise ValueError(f"cost must have one embedding a token, got shape {tuple(self.cost.shape)}")
        elif self.cost not in ("head", "input"):
            raise ValueError(f'cost must be "head", "input" or a tensor of embeddings, got {self.cost!r}')
        if isinstance(self.strength, bool) or not 0 <= self.strength <= 1:
            raise ValueError(f"strength must be a share from 0 to 1, got {self.strength!r}")

    def setup(self, model: nn.Module, processing_class: Any, args: TrainingArguments) -> None:
        """Take the embeddings, or those that the first run of a resumed training took."""
        source: Any = model
        module = source.get_input_embeddings() if self.cost == "input" else source.get_output_embeddings()
        if module is None or getattr(module, "weight", None) is None:
            raise ValueError(
                f"{type(model).__name__} shows no {'input' if self.cost == 'input' else 'output'} embeddings; "
                "give them as EMO(cost=tensor)"
            )
        weight = module.weight
        if isinstance(self.cost, Tensor):
            table = self.cost.detach().to(weight.device)
        else:
            name = f"emo-{self.cost}"
            taken = starting_weights(
                name, lambda: {"embeddings": whole(weight)}, args, self._state, changes=weight.requires_grad
            )
            table = taken["embeddings"].to(weight.device)
        head = source.get_output_embeddings()
        rows = len(weight) if head is None else len(head.weight)
        if table.dim() != 2 or len(table) != rows:
            raise ValueError(
                f"EMO needs an embedding for each of the model's {rows} tokens, got shape {tuple(table.shape)}"
                + (": the weights are sharded; give them as EMO(cost=tensor)" if table.dim() != 2 else "")
            )
        self._table = functional.normalize(table.float(), dim=-1).to(table.dtype)

    def table(self) -> Tensor:
        """Return the embeddings, of length 1 each."""
        return self._table

    def is_plain(self) -> bool:
        """Tell whether the options are those of plain training."""
        return self.strength == 0

    def statistics_loss(self, statistics: Any, targets: Tensor, **extra: Any) -> tuple[Tensor, Tensor]:
        """Return the weighted sum and the number of targets."""
        count = torch.as_tensor(targets.numel())
        plain = statistics.nll.sum()
        cost = (1 - statistics.expectation).clamp_min(0)  # rounding may leave it below 0
        self.record("transport_cost", cost.sum(), count)
        if self.strength == 0:
            return plain, count
        moved = emo_loss(statistics.nll, cost, self.mode).sum()
        return (moved if self.strength == 1 else self.strength * moved + (1 - self.strength) * plain), count

    def describe(self) -> dict[str, Any]:
        """Return name, paper, options and hooks; embeddings that were given are described by their shape."""
        described = super().describe()
        if isinstance(self.cost, Tensor):
            described["options"]["cost"] = f"tensor of shape {tuple(self.cost.shape)}"
        return described
