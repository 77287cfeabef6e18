"""MixCE: forward and reverse cross-entropy, mixed (arXiv:2305.16958).

Forward cross-entropy asks that the model gives probability to all that people write; reverse
cross-entropy, that people would write what the model gives probability to. The reverse one needs
samples of the model and people's probabilities; the paper puts in its place a weight on the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_ext.trainer_callbacks.objective import Objective


def mixce_loss(nll: Tensor, eta: float) -> Tensor:
    """Weigh each token's negative log-likelihood by eta + (1 - eta) q, q the token's probability without gradient.

    The gradient of the second part is that of the probability itself, so a token that the model
    thinks impossible is not pulled up (equation 6 of the paper, token by token).

    Args:
        nll: -log q(y), of any shape.
        eta: share of the forward cross-entropy.

    Example:
        >>> nll = torch.tensor(0.5).log().neg()  # q = 0.5
        >>> bool(mixce_loss(nll, eta=0.2) == nll * (0.2 + 0.8 * 0.5))
        True
    """
    if eta == 1:
        return nll
    return (eta + (1 - eta) * (-nll.detach()).exp()) * nll


@dataclass(eq=False)
class MixCE(Objective):
    """Train on a mixture of forward cross-entropy and self-reinforced reverse cross-entropy.

    The paper gains in text sampled without truncation and loses some likelihood. It chose eta on
    development data from 0, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99 and 1.

    Args:
        eta: share of the forward cross-entropy, from 0 to 1; 1 is plain training, bit for bit.
        seed: not used.
        clean_loss_every: see `Objective`.
        without_logits: see `Objective`.

    Raises:
        ValueError: `eta` is not a share.

    Example:
        >>> MixCE(eta=0.5).describe()["options"]["eta"]
        0.5
        >>> MixCE(eta=2)
        Traceback (most recent call last):
        ...
        ValueError: eta must be a share from 0 (reverse cross-entropy) to 1 (plain training), got 2
    """

    slug: ClassVar[str] = "mixce"
    paper: ClassVar[str] = (
        "MixCE: Training Autoregressive Language Models by Mixing Forward and Reverse Cross-Entropies "
        "(arXiv:2305.16958)"
    )
    statistics_needed: ClassVar[frozenset[str]] = frozenset()

    eta: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.eta, bool) or not 0 <= self.eta <= 1:
            raise ValueError(
                f"eta must be a share from 0 (reverse cross-entropy) to 1 (plain training), got {self.eta!r}"
            )

    def is_plain(self) -> bool:
        """Tell whether the options are those of plain training."""
        return self.eta == 1

    def statistics_loss(self, statistics: Any, targets: Tensor, **extra: Any) -> tuple[Tensor, Tensor]:
        """Return the weighted sum and the number of targets."""
        return mixce_loss(statistics.nll, self.eta).sum(), torch.as_tensor(targets.numel())
