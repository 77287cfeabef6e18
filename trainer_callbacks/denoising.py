"""What objectives that fill in masked tokens share: where masks fall, and who sees whom.

A document is read in one of two ways, which a column of the batch says for every token:

    CAUSAL   sees itself and what comes before it
    SEEN     of a denoised document: sees the whole document, and is seen by it
    MASK     of a denoised document: the same, and is a mask
    HIDDEN   of a denoised document: a mask that sees the whole document, but that no token sees
    0        padding

Labels stay unshifted as everywhere in transformers, so the state of token `i - 1` predicts the masked
token `i`: a model that was pretrained on next tokens keeps the meaning of its states. The first
token of a document has none before it and is never masked.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_ext.attention import AttentionStructure, Tokens, masks_for
from hf_ext.attention.structure import NEVER
from hf_ext.layers import base_model
from hf_ext.trainer_callbacks.conflicts import refuse_balanced_experts
from hf_ext.trainer_callbacks.documents import Document
from hf_ext.trainer_callbacks.noise import document_positions
from hf_ext.trainer_callbacks.rewriting import Rewriting
from hf_ext.trainer_callbacks.token_ids import token_id

#: Name of the column, and its values.
COLUMN = "denoised"
CAUSAL, SEEN, MASK, HIDDEN = 1, 2, 3, 4


def maskable(document: Document, special: Collection[int] = ()) -> list[int]:
    """Return the positions of a document that may be masked: trained, not special, not the first.

    Args:
        document: tokens, and labels that are -100 where nothing is trained.
        special: ids that are never masked.

    Example:
        >>> maskable(Document([1, 5, 6, 7, 2], [-100, -100, 6, 7, 2]), special={2})
        [2, 3]
    """
    pairs = enumerate(zip(document.tokens, document.labels, strict=True))
    return [at for at, (token, label) in pairs if at and label != -100 and token not in special]


def chosen(positions: Sequence[int], rate: float, draw: random.Random) -> list[int]:
    """Draw each position with probability `rate`; if none was drawn, take one at random.

    Args:
        positions: where masks may fall.
        rate: probability.
        draw: random numbers.

    Example:
        >>> chosen([2, 3, 5], 1.0, random.Random(0)), len(chosen([2, 3, 5], 0.0, random.Random(0)))
        ([2, 3, 5], 1)
    """
    found = [at for at in positions if draw.random() < rate]
    return found or ([draw.choice(positions)] if positions else [])


def masked(document: Document, positions: Collection[int], mask: int, *, hidden: bool) -> Document:
    """Return a denoised document: masks at some positions, labels there and nowhere else.

    Args:
        document: what is masked.
        positions: which of its tokens.
        mask: id of the mask token.
        hidden: whether masked tokens are hidden from the others.

    Example:
        >>> masked(Document([1, 5, 6], [1, 5, 6]), [2], 3, hidden=True)
        Document(tokens=[1, 5, 3], labels=[-100, -100, 6], columns={'denoised': [2, 2, 4]})
    """
    tokens, labels = list(document.tokens), [-100] * len(document.labels)
    kinds = [SEEN] * len(tokens)
    for at in positions:
        tokens[at], labels[at] = mask, document.labels[at]
        kinds[at] = HIDDEN if hidden else MASK
    return Document(tokens, labels, {**document.columns, COLUMN: kinds})


def read_causally(document: Document) -> Document:
    """Return a document as it is, with the column that says so."""
    return Document(document.tokens, document.labels, {**document.columns, COLUMN: [CAUSAL] * len(document.tokens)})


def structure_of(kinds: Tensor, inputs: Mapping[str, Any]) -> AttentionStructure:
    """Return who sees whom in a batch.

    Args:
        kinds: (batch, length), the column.
        inputs: the batch, whose `position_ids` part packed rows into documents.

    Example:
        >>> kinds = torch.tensor([[SEEN, HIDDEN, SEEN, 0]])
        >>> structure_of(kinds, {"input_ids": kinds, "attention_mask": (kinds > 0).int()}).dense()[0, 0].int()
        tensor([[1, 0, 1, 0],
                [1, 0, 1, 0],
                [1, 0, 1, 0],
                [0, 0, 0, 0]], dtype=torch.int32)
    """
    real = kinds > 0
    position = document_positions(inputs)
    columns = torch.arange(kinds.shape[1], device=kinds.device).expand(kinds.shape)
    starts = torch.ones_like(real)
    starts[:, 1:] = (position[:, 1:] != position[:, :-1] + 1) | (real[:, 1:] != real[:, :-1])
    ends = torch.ones_like(real)
    ends[:, :-1] = starts[:, 1:]
    last = torch.where(ends, columns, kinds.shape[1]).flip(-1).cummin(-1).values.flip(-1)
    order = torch.where(kinds > CAUSAL, last, columns).int()
    place = position.clamp_min(0).int().expand(kinds.shape)
    packed = inputs.get("position_ids") is not None
    parts = {"group": real.int(), "segment": starts.int().cumsum(-1, dtype=torch.int32)} if packed else {}
    queries = Tokens(order.masked_fill(~real, -1), place, **parts)
    seen = real & (kinds != HIDDEN)
    return AttentionStructure(queries, dataclasses.replace(queries, order=order.masked_fill(~seen, NEVER)))


class Denoising(Rewriting):
    """Base of the objectives whose documents are read both ways; see the module's head.

    Few tokens of them are predicted, so that logits are made of these alone where nobody else reads them.
    """

    few_targets: ClassVar[bool] = True

    def setup(self, model: Any, processing_class: Any, args: Any) -> None:
        """Keep the model, whose attention decides which form the masks take."""
        if base_model(model).config.is_encoder_decoder:
            raise ValueError(
                f"{self.name} lifts the causal mask of a decoder-only model; {type(base_model(model)).__name__} is an "
                "encoder-decoder, whose encoder looks both ways already: train that with UL2"
            )
        if getattr(self, "share", 1.0):
            refuse_balanced_experts(self, model)
        super().setup(model, processing_class, args)
        self._model = base_model(model)

    def corrupt(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Take the column out of the batch and say the same in the attention mask."""
        kinds = inputs.pop(COLUMN, None)
        self._targets_only = kinds is not None
        if kinds is None:
            return inputs
        self.record("denoised_share", (kinds > CAUSAL).sum(), (kinds > 0).sum())
        self.record("masked_share", (kinds >= MASK).sum(), (kinds > CAUSAL).sum())
        return {**inputs, "attention_mask": masks_for(self._model, structure_of(kinds, inputs))}

    def map(self, tokenizer: Any = None) -> Any:
        """Refuse: data cannot lift the causal mask."""
        raise ValueError(self._only_callback)

    def collator(self, inner: Any, tokenizer: Any = None) -> Any:
        """Refuse: data cannot lift the causal mask."""
        raise ValueError(self._only_callback)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the model, which a worker of the dataloader does not need."""
        return {name: value for name, value in super().__getstate__().items() if name != "_model"}

    @property
    def _only_callback(self) -> str:
        return (
            f"{self.name} changes the attention as well as the data, so rewriting the data alone would train something "
            f"else: use Trainer(..., callbacks=[{type(self).__name__}(...)])"
        )

    def _mask_id(self, given: str | int | None, tokenizer: Any, config: Any, *, or_padding: bool) -> int:
        """Find the mask token: as given, the tokenizer's, the config's, or else its padding token."""
        if given is not None:
            return token_id(given, tokenizer, config, purpose="mask")
        for name in ("mask_token_id", "pad_token_id") if or_padding else ("mask_token_id",):
            for source in (tokenizer, config, config.get_text_config() if config is not None else None):
                found = getattr(source, name, None)
                if found is not None:
                    return token_id(int(found), tokenizer, config, purpose="mask")
        raise ValueError(
            f"{self.name} needs a mask token, and neither the Trainer's processing_class nor the config has one. "
            "Either tokenizer.add_special_tokens({'mask_token': '<mask>'}), model.resize_token_embeddings(len("
            "tokenizer)) and Trainer(..., processing_class=tokenizer), or name a token that the data never uses: "
            f"{type(self).__name__}(mask_token=...)."
        )
