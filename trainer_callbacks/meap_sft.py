"""The fine-tuning form of mask-enhanced autoregressive prediction (arXiv:2502.07490)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from hf_ext.trainer_callbacks.moving import special_tokens
from hf_ext.trainer_callbacks.rewriting import Document, Rewriting
from hf_ext.trainer_callbacks.token_ids import token_id


def masked_copy(document: Document, places: Sequence[int], mask: int) -> Document:
    """Return a document in which some tokens are hidden and only these are learned.

    Args:
        document: the example.
        places: positions of the tokens to hide; their labels become the only ones.
        mask: id of the mask token.

    Example:
        >>> masked_copy(Document([5, 6, 7, 8], [-100, 6, 7, 8]), [2], mask=3)
        Document(tokens=[5, 6, 3, 8], labels=[-100, -100, 7, -100], columns={})
    """
    tokens, labels = list(document.tokens), [-100] * len(document.labels)
    for place in places:
        tokens[place], labels[place] = mask, document.labels[place]
    return Document(tokens, labels, document.columns)


@dataclass(eq=False)
class MEAPSFT(Rewriting):
    """Fine-tune on every example and, if its answer is long, on a copy with hidden answer tokens.

    The plain example is trained as ever. An answer of more than `min_target` tokens is trained a
    second time: a share of its tokens become the mask token in the input, and only these are
    learned, each from what stands before it, of which a part is hidden as well. So a step over long
    answers reads twice the tokens. The released code does the same; pre-training is `MEAP`.

    Args:
        mask_ratio: share of the answer's tokens that are hidden in the copy, rounded down, at least
            one; 0 is plain fine-tuning.
        min_target: an answer needs more tokens than this to be trained a second time. The answer is
            what has a label, special tokens left out.
        mask_token: the mask token, as a text or an id. None takes the mask token of the Trainer's
            `processing_class`, or else `mask_token_id` of the model's config.
        special_tokens: ids that are never hidden. None takes those of the Trainer's
            `processing_class` and the model's config; `map` and `collator` know them from the tokenizer they get.
        max_length: see `Rewriting`.
        seed: base of all random numbers; the Trainer's `args.seed` if None.
        clean_loss_every: see `Objective`.

    Raises:
        ValueError: an option is out of range; when training begins, no mask token is known or the
            model cannot embed it.

    Source:
        Zhuang et al., Mask-Enhanced Autoregressive Prediction: Pay Less Attention to Learn More
        (2025), fine-tuning; checked against the authors' released code.

    Example:
        >>> objective = MEAPSFT(mask_ratio=0.5, min_target=1, mask_token=3)
        >>> objective.resolve(None, None)
        >>> plain, copy = objective.rewrite(Document([5, 6, 7], [-100, 6, 7]), random.Random(0))
        >>> sum(token == 3 for token in copy.tokens), sum(copy.trained)
        (1, 1)
    """

    slug: ClassVar[str] = "meap-sft"
    paper: ClassVar[str] = (
        "Mask-Enhanced Autoregressive Prediction: Pay Less Attention to Learn More (arXiv:2502.07490)"
    )

    mask_ratio: float = 0.1
    min_target: int = 50
    mask_token: str | int | None = None
    special_tokens: Sequence[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        ratio, least = self.mask_ratio, self.min_target
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio <= 1:
            raise ValueError(f"mask_ratio must be a share from 0 to 1 (0.1 hides 10 %), got {ratio!r}")
        if isinstance(least, bool) or not isinstance(least, int) or least < 0:
            raise ValueError(f"min_target must be a number of tokens from 0, got {least!r}")

    def resolve(self, tokenizer: Any, config: Any) -> None:
        """Find the mask token and the tokens that are never hidden."""
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor holds a tokenizer
        self._special = special_tokens(tokenizer, config, self.special_tokens)
        given = self.mask_token
        for source in (tokenizer, config, config.get_text_config() if config is not None else None):
            given = getattr(source, "mask_token_id", None) if given is None else given
        if given is None:
            raise ValueError(
                "MEAPSFT needs a mask token, but neither the tokenizer nor the model's config has one. Either "
                "tokenizer.add_special_tokens({'mask_token': '<mask>'}), model.resize_token_embeddings(len(tokenizer)) "
                "and processing_class=tokenizer, or name a token that the data never uses: MEAPSFT(mask_token=...)."
            )
        self._mask = token_id(given, tokenizer, config, purpose="mask")

    def rewrite(self, document: Document, draw: random.Random) -> Document | Sequence[Document]:
        """Add the copy with hidden answer tokens."""
        if self.mask_ratio == 0:
            return document
        if len(document.labels) != len(document.tokens):
            raise ValueError("MEAPSFT hides tokens of an answer that the model reads; an encoder-decoder does not")
        pairs = enumerate(zip(document.tokens, document.trained, strict=True))
        # the first token is never predicted
        target = [place for place, (token, trained) in pairs if place and trained and token not in self._special]
        if len(target) <= self.min_target:
            return document
        hidden = draw.sample(target, max(1, int(len(target) * self.mask_ratio)))
        return [document, masked_copy(document, hidden, self._mask)]
