"""Bidirectional causal language model optimisation, against the reversal curse (arXiv:2311.07468).

some documents      BOS  Ann  is  the  baker  EOS      next token, causal
the others          BOS  [M]  is  the  baker  EOS      every token sees all but the masks,
                      \\__ predicts "Ann"               those after it as if they stood before it
"""

from __future__ import annotations

import contextlib
import random
import weakref
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_ext import adapter
from hf_ext.attention.intercept import intercept
from hf_ext.attention.rotary import Rotary
from hf_ext.layers import base_model
from hf_ext.trainer_callbacks.denoising import CAUSAL, COLUMN, Denoising, chosen, maskable, masked, read_causally
from hf_ext.trainer_callbacks.documents import Document
from hf_ext.trainer_callbacks.mirror import Mirror
from hf_ext.trainer_callbacks.moving import special_tokens


@dataclass(eq=False)
class BICO(Denoising):
    """Fine-tune a causal model so that a fact learnt in one order is known in the other, too.

    A share of the documents is denoised: some of their tokens are masked, attention looks both ways and
    the masked tokens are predicted, each by the state before it; the rest is next-token prediction. Masks
    are hidden from all other tokens. A token `d` places ahead is attended to as if it stood `d` places
    behind (`mirror`), so that rotary positions stay in the range the model was trained in. Afterwards the
    model is a stock causal model again, and is used as one. The form is that of the released code; there
    a coin falls for each batch, here for each document, and a document in which no mask fell gets one.

    Args:
        share: of the documents that are denoised; 0 is next-token prediction, bit for bit.
        mask_ratio: probability that a token of a denoised document is masked. Special tokens, prompts
            (labels of -100) and the first token are never masked.
        mask_token: what masked tokens become, a text or an id. None takes the mask token of the Trainer's
            `processing_class` or of the config, or else the padding token, which the authors take.
        mirror: give what comes after a token the positions of what comes before it. For models whose
            positions are rotations; without it any decoder-only model will do.
        max_length: see `Rewriting`.
        pad_to_multiple_of: see `Rewriting`.
        seed: base of the random numbers; the Trainer's `args.seed` if None.
        clean_loss_every: see `Objective`.

    Raises:
        ValueError: an option is out of range; in training, there is neither mask nor padding token, the
            model is an encoder-decoder, its positions are no rotations, or its attention takes no such masks.

    Source:
        Lv et al., An Analysis and Mitigation of the Reversal Curse (EMNLP 2024), first called Are We Falling
        in a Middle-Intelligence Trap?

    Example:
        >>> BICO(share=0.25).describe()["options"]["share"]
        0.25
        >>> BICO(mask_ratio=15)
        Traceback (most recent call last):
        ...
        ValueError: mask_ratio must be a share above 0 and up to 1 (0.15 masks 15 %), got 15
    """

    slug: ClassVar[str] = "bico"
    paper: ClassVar[str] = "An Analysis and Mitigation of the Reversal Curse (arXiv:2311.07468)"

    share: float = 0.5
    mask_ratio: float = 0.15
    mask_token: str | int | None = None
    mirror: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.share, bool) or not 0 <= self.share <= 1:
            raise ValueError(f"share must be a number from 0 to 1, got {self.share!r}")
        if isinstance(self.mask_ratio, bool) or not 0 < self.mask_ratio <= 1:
            raise ValueError(
                f"mask_ratio must be a share above 0 and up to 1 (0.15 masks 15 %), got {self.mask_ratio!r}"
            )
        self._mirror: Mirror | None = None
        self._undo = contextlib.ExitStack()

    def resolve(self, tokenizer: Any, config: Any) -> None:
        """Find the mask token and the tokens that are never masked."""
        if self.share:
            self._mask = self._mask_id(self.mask_token, tokenizer, config, or_padding=True)
        self._special = special_tokens(tokenizer, config)

    def rewrite(self, document: Document, draw: random.Random) -> Document:
        """Denoise the document, or leave it to next-token prediction."""
        if self.share == 0:
            return document
        where = maskable(document, self._special) if draw.random() < self.share else []
        if not where:
            return read_causally(document)
        return masked(document, chosen(where, self.mask_ratio, draw), self._mask, hidden=True)

    def corrupt(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Open the attention mask, and tell the attention at which positions the tokens stand."""
        if self._mirror is not None:
            kinds = inputs.get(COLUMN)
            self._mirror.begin(
                inputs if kinds is not None else None, None if kinds is None else (kinds > CAUSAL).any(-1)
            )
        return super().corrupt(inputs)

    # A wrapper that shards the model may not run it in parts, so its rotations are looked at before.

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look how the model turns its queries and keys."""
        model = kwargs.get("model")
        if self.share and self.mirror and model is not None and not base_model(model).config.is_encoder_decoder:
            self._rotations(model)

    def setup(self, model: nn.Module, processing_class: Any, args: TrainingArguments) -> None:
        """Let the model's attention look both ways at mirrored positions until training ends."""
        super().setup(model, processing_class, args)
        if self.share and self.mirror:
            inner = base_model(model)
            windows = [adapter.layer_window(layer) for layer in adapter.empty_cache(inner).layers]
            self._mirror = Mirror(self._rotations(model), windows)
            self._undo.enter_context(intercept(inner, self._mirror))
            weakref.finalize(self, self._undo.close)

    def remove(self) -> None:
        """Take the objective off the model; see `Objective.remove`."""
        super().remove()
        self._undo.close()
        self._mirror = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what a worker of the dataloader does not need."""
        return {name: value for name, value in super().__getstate__().items() if name not in ("_mirror", "_undo")}

    def _rotations(self, model: Any) -> Rotary:
        try:
            return Rotary.of(base_model(model))
        except ValueError as error:
            raise ValueError(
                f"BICO turns what comes after a token to the positions before it, but {error}. "
                "Use BICO(mirror=False), which leaves all positions as they are."
            ) from error
