"""Draft heads for tests: random ones that fit whatever target they meet."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from hf_ext.generation.speculative.headed import HeadedSpeculative
from hf_ext.testing import tiny_models

#: How a head of a tiny model is made, by its class.
_OPTIONS: dict[str, dict[str, Any]] = {"HiddenTransferHead": {"transfer_layers": (1, 1, 1)}}


def random_head(head_class: type, target: Any, noise: float = 0.2, seed: int = 1) -> Any:
    """Return an untrained head for a target, all of its weights disturbed so that each of them matters.

    Args:
        head_class: the class of head.
        target: a tiny model.
        noise: spread of the disturbance.
        seed: of all its random numbers.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = head_class.for_target(target, **_OPTIONS.get(head_class.__name__, {}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(parameter + noise * torch.randn(parameter.shape, generator=generator).to(parameter))
    return head.eval()


def late_token(free: torch.Tensor, row: int = 1) -> int:
    """Return a token for `eos_token_id` that ends a row in the middle and no row with its first token.

    Args:
        free: `(rows, n)` new tokens of a run without it.
        row: the row.

    Example:
        >>> late_token(torch.tensor([[5, 6, 7, 8, 9], [5, 5, 5, 8, 8]]))
        8
    """
    said = free.tolist()
    return next(t for at, t in enumerate(said[row]) if t not in said[row][:at] and all(other[0] != t for other in said))


def with_random_head(strategy_class: type[HeadedSpeculative], **options: Any) -> Any:
    """Return a strategy that drafts with a random head for any target, for checks that run on many.

    Args:
        strategy_class: a speculative method with a head.
        **options: its options, the head left out.

    Example:
        >>> from hf_ext.generation.recurrent_drafter import RecurrentDrafter
        >>> strategy = with_random_head(RecurrentDrafter, beam_width=2)
        >>> strategy.head_for(tiny_models.shared("gpt2")).config.target["model_type"]
        'gpt2'
    """
    made: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    def head_for(self: Any, target: Any) -> Any:
        key = (target.device, target.dtype)
        if target not in made or made[target][0] != key:
            # As a user would who trained it: made in float32, moved by the strategy.
            strategy = strategy_class(random_head(strategy_class.head_class, target), **options)
            made[target] = key, strategy.head_for(target)
        return made[target][1]

    # The module is that of the method itself, which is what the checks look at.
    body = {"head_for": head_for, "__module__": strategy_class.__module__}
    any_target = type(strategy_class.__name__, (strategy_class,), body)
    return any_target(random_head(strategy_class.head_class, tiny_models.shared("llama")), **options)
