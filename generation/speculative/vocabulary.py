"""Draft models whose vocabulary has another size than the target's, though the ids mean the same.

    target   0 1 2 ... 151935 | 151936 ... 152063      rows that a model has beyond the other's are padding:
    draft    0 1 2 ... 151935 |                        they are not drafted, and nothing depends on their law

A tokenizer that several models share is often padded by each to a size that suits its matrices.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from typing import Any

import torch
from transformers import PreTrainedModel

#: By so many rows two vocabularies may differ and still pass for one that was padded: matrices are padded to
#: multiples of 64 to 512, and a few tokens are added when a model is trained further.
PADDING = 512
#: Logits of tokens that the draft model does not have: no chance beside any other, and finite, since a logits
#: processor may forbid all others.
UNKNOWN = -1e30


def vocabulary_size(model: PreTrainedModel) -> int:
    """Return the number of tokens of a model."""
    return int(model.config.get_text_config(decoder=True).vocab_size)


def fit_tokens(tokens: torch.Tensor, size: int) -> torch.Tensor:
    """Return ids that a model with `size` tokens can read: its last one stands for those it does not have.

    What a vocabulary ends with is padding, or a special token as those that were added to the other.

    Example:
        >>> fit_tokens(torch.tensor([3, 5, 7]), size=6)
        tensor([3, 5, 5])
    """
    return tokens.clamp(max=size - 1)


def fit_logits(logits: torch.Tensor, size: int) -> torch.Tensor:
    """Return `(..., size)` logits over another model's vocabulary.

    Tokens beyond it go, before a law is made of the logits; those that are missing get no chance as long
    as any other token has one.

    Args:
        logits: `(..., vocabulary)`.
        size: tokens of the other model.

    Example:
        >>> fit_logits(torch.tensor([0.0, 0.0, 9.0]), size=2).softmax(-1)
        tensor([0.5000, 0.5000])
        >>> fit_logits(torch.tensor([0.0, 0.0]), size=3).softmax(-1)
        tensor([0.5000, 0.5000, 0.0000])
    """
    missing = size - logits.shape[-1]
    if missing == 0:
        return logits
    if missing < 0:
        return logits[..., :size]
    lowest = max(UNKNOWN, torch.finfo(logits.dtype).min)
    return torch.nn.functional.pad(logits, (0, missing), value=lowest)


def check_vocabularies(
    draft: PreTrainedModel, target: PreTrainedModel, strategy: str, tokenizers: tuple[Any, Any] = (None, None)
) -> None:
    """Raise ValueError unless the ids of a draft model can be taken for the target's.

    Args:
        draft: the draft model.
        target: the target.
        strategy: name of the strategy, for the message.
        tokenizers: the target's and the draft model's, None where it is not known. With both the ids are
            compared; otherwise the sizes must be those of one vocabulary, padded or not.

    Raises:
        ValueError: the tokenizers give other ids, or the sizes differ by more than padding.
    """
    size, wanted = vocabulary_size(draft), vocabulary_size(target)
    another = "SpeculativeDecoding(draft_model, tokenizer=..., draft_tokenizer=...) drafts through the text"
    if None not in tokenizers:
        if not same_ids(*tokenizers):
            raise ValueError(
                f"{strategy} needs a draft model with the target's tokenizer, but the two tokenizers have other "
                f"tokens; {another}"
            )
        return
    if size == wanted:
        return
    if abs(size - wanted) > PADDING:
        raise ValueError(
            f"{strategy}: draft_model has a vocabulary of {size} tokens and the target one of {wanted}, which is more "
            f"than padding explains; drafting needs a draft model with the target's tokenizer, or {another}"
        )
    _say_padding(size, wanted)


@functools.lru_cache(maxsize=64)
def _say_padding(size: int, wanted: int) -> None:
    warnings.warn(
        f"draft_model has a vocabulary of {size} tokens and the target one of {wanted}: the {min(size, wanted)} ids of "
        "both are taken for the same tokens, the others for padding. The text is right in any case, but another "
        "tokenizer's drafts would never be accepted; Strategy.generate(..., tokenizer=..., assistant_tokenizer=...) "
        "checks that",
        stacklevel=3,
    )


def same_ids(first: Any, second: Any) -> bool:
    """Tell whether two tokenizers give the same tokens the same ids; tokens added to either do not count.

    Example:
        >>> from hf_ext.testing import tiny_models
        >>> one, other = tiny_models.tokenizer(), tiny_models.tokenizer()
        >>> other.add_tokens(["<tool>"], special_tokens=True)
        1
        >>> same_ids(one, other)
        True
    """
    if first is second:
        return True
    compared = _COMPARED.setdefault(first, weakref.WeakKeyDictionary())
    sizes = len(first), len(second)  # tokens may have been added since
    if second not in compared or compared[second][0] != sizes:
        tables = [
            {token: i for token, i in t.get_vocab().items() if i not in t.added_tokens_decoder} for t in (first, second)
        ]
        compared[second] = (sizes, tables[0] == tables[1])
    return compared[second][1]


#: What comparing two tokenizers gave at these sizes: it takes a while for large ones, and neither is kept alive by it.
_COMPARED: weakref.WeakKeyDictionary[Any, weakref.WeakKeyDictionary[Any, tuple[tuple[int, int], bool]]]
_COMPARED = weakref.WeakKeyDictionary()
