"""Objectives that rewrite documents: move, mask or add tokens, and change labels along with them.

What changes labels must happen before the Trainer counts them, so this works in the collator:
as a callback it wraps the train dataloader's `collate_fn` while training lasts; the same rewriting
is there for `datasets.map` (before packing) and as a collator. Each document's random numbers come
from (seed, epoch, objective, the document's tokens), so that no split of the batch, no padding, no
worker, no number of processes and no resume changes them.
"""

from __future__ import annotations

import hashlib
import random
import uuid
import weakref
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_ext.trainer_callbacks.documents import Document, batch_of, documents_of, split_clean, with_clean
from hf_ext.trainer_callbacks.objective import Objective

_EPOCH, _CALLS = 0, 1


@dataclass(eq=False)
class Rewriting(Objective):
    """Base of the objectives that rewrite documents before the Trainer counts their targets.

    A subclass defines `rewrite(document, draw)`, and `resolve(tokenizer, config)` where it needs
    token ids. Three ways to use it:

    - `Trainer(..., callbacks=[Objective()])`: every epoch draws anew; evaluation is untouched.
    - `dataset.map(Objective().map(tokenizer), batched=True)`: once, before packing.
    - `Objective().collator(collator, tokenizer)`: for a training loop of your own.

    Packed rows (with `position_ids` that start again) are rewritten document by document.

    Args:
        max_length: cut what has become longer than this, on the right. None takes the model's
            `max_position_embeddings`; `map` and `collator`, which know no model, cut nothing then.
        pad_to_multiple_of: pad rewritten batches to a multiple of this length.
        seed: base of the random numbers; the Trainer's `args.seed` if None (0 for `map` and `collator`).
        clean_loss_every: see `Objective`; the clean loss is that of the documents as they were.

    Raises:
        ValueError: the train dataloader has no `collate_fn`, or batches cannot be rewritten (see
            `hf_ext.trainer_callbacks.documents.documents_of`).

    Example:
        >>> @dataclass(eq=False)
        ... class Backwards(Rewriting):
        ...     def rewrite(self, document, draw):
        ...         return Document(document.tokens[::-1], document.labels[::-1])
        >>> Backwards().map()({"input_ids": [[5, 6, 7]]})["input_ids"]
        [[7, 6, 5]]
    """

    max_length: int | None = field(default=None, kw_only=True)
    pad_to_multiple_of: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_length", "pad_to_multiple_of"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a number of tokens from 1, or None, got {value!r}")
        self._limit = self.max_length
        self._encoder_decoder = False
        # the dataloader's workers are other processes: they see the epoch, and we their calls, through shared memory
        self._shared = torch.zeros(2, dtype=torch.long).share_memory_()

    # -- what a subclass defines --------------------------------------------------------------------

    def resolve(self, tokenizer: Any, config: Any) -> None:
        """Find token ids; called before the first document. Either argument may be None."""

    def rewrite(self, document: Document, draw: random.Random) -> Document | Sequence[Document]:
        """Return the document that the model shall read, or several; the same object for no change.

        Args:
            document: tokens and labels without padding.
            draw: random numbers of this document.
        """
        raise NotImplementedError

    # -- what a user calls --------------------------------------------------------------------------

    def map(self, tokenizer: Any = None) -> Callable[[Mapping[str, list[Any]]], dict[str, list[Any]]]:
        """Return a function for `datasets.Dataset.map(..., batched=True)`.

        It reads the columns `input_ids` and, if there, `labels`, and returns them rewritten
        (`labels` wherever they differ from the tokens). An objective that makes several documents
        of one needs `remove_columns=dataset.column_names`.

        Args:
            tokenizer: where special tokens are looked up.
        """
        self._begin(tokenizer, None, 0)

        def rewritten(columns: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
            given = columns.get("labels") or columns["input_ids"]
            pairs = zip(columns["input_ids"], given, strict=True)
            new = [part for ids, labels in pairs for part in self._rewritten(Document.of(list(ids), list(labels)))]
            found: dict[str, list[Any]] = {"input_ids": [document.tokens for document in new]}
            if "labels" in columns or any(document.tokens != document.labels for document in new):
                found["labels"] = [document.labels for document in new]
            if "attention_mask" in columns:
                found["attention_mask"] = [[1] * len(document.tokens) for document in new]
            for name in sorted({name for document in new for name in document.columns}):
                found[name] = [list(document.columns.get(name, [0] * len(document.tokens))) for document in new]
            return found

        return rewritten

    def collator(self, inner: Callable[[Any], Any], tokenizer: Any = None) -> Callable[[Any], dict[str, Any]]:
        """Return a collator that rewrites the batches that `inner` builds.

        Args:
            inner: the collator to wrap; its batches need `input_ids` and `labels`.
            tokenizer: where special tokens are looked up.
        """
        self._begin(tokenizer, None, 0)
        return RewritingCollator(self, inner, keep_clean=False)

    # -- Trainer events -----------------------------------------------------------------------------

    def setup(self, model: nn.Module, processing_class: Any, args: TrainingArguments) -> None:
        """Resolve token ids and the longest row."""
        config: Any = model.config
        self._begin(getattr(processing_class, "tokenizer", processing_class), config, self._seed)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Install the hooks, and wrap the train dataloader's collator."""
        super().on_train_begin(args, state, control, **kwargs)
        loader: Any = kwargs.get("train_dataloader")
        while hasattr(loader, "base_dataloader"):  # accelerate wraps the loader that collates
            loader = loader.base_dataloader
        inner = getattr(loader, "collate_fn", None)
        if inner is None:
            self.remove()
            raise ValueError(
                f"{self.name} rewrites batches in the collator, but the train dataloader, a {type(loader).__name__}, "
                f"has no collate_fn. Rewrite the data instead: dataset.map({type(self).__name__}(...).map(tokenizer), "
                "batched=True)."
            )
        wrapped = RewritingCollator(self, inner, keep_clean=self.clean_loss_every != 0)
        loader.collate_fn = wrapped
        # neither the loader nor the collator may be held: both lead back to the objective
        key, where = wrapped.key, weakref.ref(loader)

        def unwrap() -> None:
            if (found := where()) is not None:
                found.collate_fn = _without(found.collate_fn, key)

        assert self._installation is not None
        self._installation.add(f"collate_fn of {type(loader).__name__}: {self.name}.rewrite", unwrap)
        self._shared.zero_()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the collator, wherever it runs, which epoch begins."""
        self._shared[_EPOCH] = int((state.epoch or 0) + 1e-6)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop before an update on batches that were not rewritten."""
        super().on_pre_optimizer_step(args, state, control, **kwargs)
        if not int(self._shared[_CALLS]):
            raise RuntimeError(
                f"{self.name} rewrote no batch: the Trainer does not draw its batches from the dataloader that it "
                "gives to its callbacks. Rewrite the data instead, with dataset.map or collator."
            )

    # -- the engine ---------------------------------------------------------------------------------

    def _begin(self, tokenizer: Any, config: Any, seed: int) -> None:
        self._seed = seed if self.seed is None else self.seed
        known = getattr(config.get_text_config(), "max_position_embeddings", None) if config is not None else None
        self._limit = known if self.max_length is None else self.max_length
        self._encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
        self.resolve(tokenizer, config)

    def _rewritten(self, document: Document) -> list[Document]:
        key = array("q", [self._seed, int(self._shared[_EPOCH]), *document.tokens]).tobytes()
        digest = hashlib.blake2b(key, digest_size=8, person=self.name.encode()[:16]).digest()
        new = self.rewrite(document, random.Random(int.from_bytes(digest, "little")))
        parts = [new] if isinstance(new, Document) else list(new)
        return [part if part is document else part.cut(self._limit) for part in parts]

    def rewrite_batch(self, batch: Mapping[str, Any], *, keep_clean: bool = False) -> dict[str, Any]:
        """Rewrite all documents of a batch; the same tensors if none changed.

        Args:
            batch: as `documents_of` takes it.
            keep_clean: put the batch as it was beside the new one, under names with `clean_` before them.
        """
        self._shared[_CALLS] = 1
        given, _ = split_clean(batch)
        rows, layout = documents_of(given, encoder_decoder=self._encoder_decoder)
        new = [[self._rewritten(document) for document in row] for row in rows]
        if all(map(_unchanged, new, rows)):
            return dict(batch)
        if layout.packed:
            changed = [[document for parts in row for document in parts] for row in new]
        else:
            changed = [[document] for row in new for parts in row for document in parts]
        tensors = batch_of(changed, layout, self.pad_to_multiple_of)
        if len(changed) != len(rows):
            _refuse_row_values(given, len(rows), self.name)
        rest = {name: value for name, value in batch.items() if name not in given or name not in tensors}
        result = {**rest, **tensors}
        return with_clean(result, given) if keep_clean else result

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to the training process; a worker only rewrites."""
        return {name: value for name, value in vars(self).items() if name not in _OF_THE_TRAINING_PROCESS}


_OF_THE_TRAINING_PROCESS = ("_installation", "_state", "_args", "_meters", "_popped_labels", "_inputs")


class RewritingCollator:
    """Collate with another collator, then rewrite.

    Args:
        objective: what rewrites.
        inner: the collator whose batches are rewritten.
        keep_clean: see `Rewriting.rewrite_batch`.
    """

    def __init__(self, objective: Rewriting, inner: Callable[[Any], Any], *, keep_clean: bool) -> None:
        self.objective, self.inner, self.keep_clean = objective, inner, keep_clean
        self.key = uuid.uuid4()

    def __call__(self, rows: Any) -> dict[str, Any]:
        """Return the rewritten batch of `rows`."""
        return self.objective.rewrite_batch(self.inner(rows), keep_clean=self.keep_clean)


def _without(collator: Any, key: uuid.UUID) -> Any:
    """Take one rewriting out of a chain of them, whichever was wrapped around it since."""
    if not isinstance(collator, RewritingCollator):
        return collator
    if collator.key == key:
        return collator.inner
    collator.inner = _without(collator.inner, key)
    return collator


def _unchanged(new: list[list[Document]], row: list[Document]) -> bool:
    return all(len(parts) == 1 and parts[0] is document for parts, document in zip(new, row, strict=True))


def _refuse_row_values(batch: Mapping[str, Any], rows: int, name: str) -> None:
    for key, value in batch.items():
        if isinstance(value, Tensor) and value.dim() and len(value) == rows and key not in _PER_TOKEN:
            raise ValueError(f"{name} makes several documents of one, and does not know what {key} of each is; drop it")


_PER_TOKEN = ("input_ids", "labels", "attention_mask", "position_ids", "token_type_ids")
