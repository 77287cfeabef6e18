"""UL2's mixture of denoisers: short spans, long or many spans, and the end of a text (arXiv:2205.05131).

text               a b c d e f g h
[R] or [X]         [X] a <0> d e <1> h          <0> b c <1> f g </s>
[S]                [S] a b c d e                f g h
                   what the encoder reads,      what is predicted: the decoder's text,
                   or the first part of a row   or the second part of the row
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from hf_ext.trainer_callbacks.documents import Document
from hf_ext.trainer_callbacks.infilling import special_ids
from hf_ext.trainer_callbacks.rewriting import Rewriting
from hf_ext.trainer_callbacks.token_ids import token_id
from hf_ext.trainer_callbacks.ul2_denoisers import (
    DENOISERS,
    MODES,
    Denoiser,
    corrupt_spans,
    draw_spans,
    restore_spans,
)


@dataclass(eq=False)
class UL2(Rewriting):
    """Train a mixture of denoisers, on decoder-only and on encoder-decoder models.

    For each document a denoiser is drawn. A decoder-only model reads what is left and then what was taken
    out in one row, and learns the latter alone; put `PrefixLMTraining()` beside it among the callbacks, and the
    first part is read both ways. An encoder-decoder gets the one in its encoder and the other in its decoder.
    Prompts (leading labels of -100) and a bos token stay in front; a text that ends in an eos token is
    predicted up to it, as spans are.

    Args:
        share: of the documents that are rewritten; 0 is next-token prediction, bit for bit.
        denoisers: which ones, and how often each is drawn.
        mode: for fine-tuning: put this mode's token in front, and change nothing else.
        mode_tokens: text or id of each mode's token; None for no mode tokens.
        sentinels: texts or ids of the sentinels, in order; a text with `{}` stands for those of 0, 1, ...
        sentinel_count: how many that text stands for.
        bos_token: text or id of what begins a text and stays in front; None for the tokenizer's and the model's.
        eos_token: text or id of what ends the predicted spans; None likewise.
        encoder_decoder: the kind of model; None takes it from the model's config.
        max_length: longest row, or longest encoder's text; the document is cut before it is corrupted, so that
            no target is lost. See `Rewriting`.
        pad_to_multiple_of: see `Rewriting`.
        seed: base of the random numbers; the Trainer's `args.seed` if None.
        clean_loss_every: see `Objective`. For an encoder-decoder's unlabelled texts, 0: its clean loss would be
            that of copying.

    Raises:
        ValueError: an option is out of range; at the beginning, a token is not in the vocabulary; in training, a
            document that needs more sentinels than there are, or pairs of texts without `mode`.

    Source:
        Tay et al., UL2: Unifying Language Learning Paradigms (ICLR 2023), section 3.1 and appendix 9.2.

    Example:
        >>> objective = UL2(sentinels=[90, 91, 92], mode_tokens={"R": 80, "X": 81, "S": 82}, eos_token=2)
        >>> objective.resolve(None, None)
        >>> objective.rewrite(Document([5, 6, 7, 8], [5, 6, 7, 8]), random.Random(9)).tokens
        [80, 5, 90, 7, 8, 90, 6, 2]
    """

    slug: ClassVar[str] = "ul2"
    paper: ClassVar[str] = "UL2: Unifying Language Learning Paradigms (arXiv:2205.05131)"

    share: float = 1.0
    denoisers: Sequence[Denoiser] = DENOISERS
    mode: str | None = None
    mode_tokens: Mapping[str, str | int] | None = field(
        default_factory=lambda: {"R": "[NLU]", "X": "[NLG]", "S": "[S2S]"}, kw_only=True
    )
    sentinels: str | Sequence[str | int] = field(default="<extra_id_{}>", kw_only=True)
    sentinel_count: int = field(default=100, kw_only=True)
    bos_token: str | int | None = field(default=None, kw_only=True)
    eos_token: str | int | None = field(default=None, kw_only=True)
    encoder_decoder: bool | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.share, bool) or not 0 <= self.share <= 1:
            raise ValueError(f"share must be a number from 0 to 1, got {self.share!r}")
        if not any(denoiser.weight for denoiser in self.denoisers):
            raise ValueError(f"denoisers must hold one with a weight above 0, got {self.denoisers!r}")
        if self.mode is not None and (self.mode not in MODES or self.mode_tokens is None):
            raise ValueError(
                f"mode must be one of {', '.join(MODES)} or None, and needs mode_tokens; got {self.mode!r}"
            )
        if self.mode_tokens is not None and set(self.mode_tokens) != set(MODES):
            raise ValueError(f"mode_tokens must have a token for each of {', '.join(MODES)}, got {self.mode_tokens!r}")
        if isinstance(self.sentinels, str) and "{}" not in self.sentinels:
            raise ValueError(f"sentinels must be a text with {{}} for the number, or a list, got {self.sentinels!r}")

    def describe(self) -> dict[str, Any]:
        """Return what `Objective.describe` does, the denoisers as plain data."""
        found = super().describe()
        found["options"]["denoisers"] = [dataclasses.asdict(denoiser) for denoiser in self.denoisers]
        return found

    def resolve(self, tokenizer: Any, config: Any) -> None:
        """Find mode tokens, sentinels, and where texts begin and end."""
        if not self.share:
            return
        self._pairs = bool(getattr(config, "is_encoder_decoder", False) if self.encoder_decoder is None
                           else self.encoder_decoder)  # fmt: skip
        self._modes = {
            mode: token_id(given, tokenizer, config, purpose=f"mode {mode}")
            for mode, given in (self.mode_tokens or {}).items()
        }
        self._begins, self._ends = (
            special_ids(f"{name}_id", tokenizer, config)
            if given is None
            else frozenset({token_id(given, tokenizer, config, purpose=name)})
            for name, given in (("bos_token", self.bos_token), ("eos_token", self.eos_token))
        )
        self._sentinels: list[int] = []
        if self.mode is None:
            given = self.sentinels
            names = [given.format(n) for n in range(self.sentinel_count)] if isinstance(given, str) else given
            self._sentinels = [token_id(name, tokenizer, config, purpose="sentinel") for name in names]
            if not self._ends:
                raise ValueError(
                    "ul2 ends spans with an eos token, but neither tokenizer nor config has one: eos_token=..."
                )

    def rewrite(self, document: Document, draw: random.Random) -> Document:
        """Corrupt the document with one of the denoisers, or mark it with the mode."""
        if draw.random() >= self.share:
            return document
        if document.columns:
            raise ValueError(
                f"ul2 moves tokens, and what another objective says of each ({', '.join(document.columns)}) cannot "
                "follow them: put UL2 first among the callbacks, or leave one out"
            )
        if self.mode is not None:
            return self._marked(document)
        if self._pairs and len(document.labels) != len(document.tokens):
            raise ValueError(
                "ul2 corrupts texts, but the batch holds pairs of texts: to fine-tune on pairs, name the mode, as in "
                "UL2(mode='S')"
            )
        start, stop = self._body(document)
        denoiser = draw.choices(self.denoisers, [denoiser.weight for denoiser in self.denoisers])[0]
        if stop - start < 2:
            return (
                document if not self._pairs else self._joined(document, start, start, stop, denoiser, [(start, stop)])
            )
        length = self._fitting(stop - start, len(document.tokens) - stop + start, denoiser)
        spans = [(start + a, start + b) for a, b in draw_spans(length, denoiser, draw)]
        if len(spans) > len(self._sentinels) and denoiser.mode != "S":
            raise ValueError(
                f"a document of {length} tokens needs {len(spans)} sentinels for {denoiser}, but there are "
                f"{len(self._sentinels)}: add some to the vocabulary, or set max_length"
            )
        return self._joined(document, start, start + length, stop, denoiser, spans)

    # -- for generation -----------------------------------------------------------------------------

    def prompt(self, parts: Sequence[Sequence[int]], mode: str = "X") -> list[int]:
        """Return what a decoder-only model reads before it generates what belongs between the parts.

        Args:
            parts: tokens around the gaps, in order; a single one is continued (`mode="S"`).
            mode: `"R"`, `"X"` or `"S"`.

        Returns:
            Tokens, up to the first sentinel; the model writes the first span, the next sentinel, and so on.
        """
        gaps = self._sentinels[: len(parts) - 1]
        tokens = list(parts[0])
        for sentinel, part in zip(gaps, parts[1:], strict=True):
            tokens += [sentinel, *part]
        front = 1 if tokens[:1] and tokens[0] in self._begins else 0
        marks = [self._modes[mode]] if self._modes else []
        return [*tokens[:front], *marks, *tokens[front:], *gaps[:1]]

    def restore(self, kept: Sequence[int], moved: Sequence[int]) -> list[int]:
        """Put generated spans into their gaps; see `restore_spans`."""
        return restore_spans(kept, [token for token in moved if token not in self._ends], self._sentinels)

    # -- parts --------------------------------------------------------------------------------------

    def _body(self, document: Document) -> tuple[int, int]:
        """Return where the text that may be corrupted begins and ends: without bos, prompt and eos."""
        tokens, labels = document.tokens, document.labels
        trained = next((at for at, label in enumerate(labels) if label != -100), len(tokens))
        start = trained if trained > 1 else int(bool(tokens) and tokens[0] in self._begins)
        stop = len(tokens) - (bool(tokens) and tokens[-1] in self._ends)
        return min(start, stop), stop

    def _fitting(self, length: int, around: int, denoiser: Denoiser) -> int:
        """Return how much of a text may stay so that what becomes of it fits into the longest row."""
        limit = self._limit
        while limit is not None and length > 2:
            taken = min(max(1, round(denoiser.rate * length)), length - 1)
            count = 0 if denoiser.mode == "S" else max(1, round(taken / denoiser.mean))
            needed = around + 2 + (length - taken + count if self._pairs else length + 2 * count)
            if needed <= limit:
                break
            length = max(2, length - max(1, (needed - limit) // 2))
        return length

    def _joined(
        self,
        document: Document,
        start: int,
        end: int,
        stop: int,
        denoiser: Denoiser,
        spans: list[tuple[int, int]],
    ) -> Document:
        """Build the row, or the pair, of what is left and what was taken out of `document[:end]`."""
        tokens, labels = document.tokens[: max(end, spans[-1][1])], document.labels
        whole = max(end, spans[-1][1]) == stop  # not cut: its eos comes after it
        tail = list(zip(document.tokens[stop:], labels[stop:], strict=True)) if whole else []
        marks = [self._modes[denoiser.mode]] if self._modes else []
        front = 1 if tokens and tokens[0] in self._begins else 0
        if denoiser.mode == "S":
            kept, moved = tokens[: spans[0][0]], list(range(*spans[0]))
            targets = [(tokens[at], labels[at]) for at in moved]
        else:
            places, moved = corrupt_spans(range(len(tokens)), spans, [-1 - n for n in range(len(spans))])
            kept = [tokens[at] if at >= 0 else self._sentinels[-1 - at] for at in places]
            targets = [
                (tokens[at], labels[at]) if at >= 0 else (self._sentinels[-1 - at], self._sentinels[-1 - at])
                for at in moved
            ]
            ending = min(self._ends)
            tail = tail or [(ending, ending)]
        source = [*tokens[:front], *marks, *kept[front:]]
        if self._pairs:
            ending = min(self._ends)
            return Document([*source, ending], [label for _, label in [*targets, *(tail or [(ending, ending)])]])
        if denoiser.mode != "S":
            targets[0] = (targets[0][0], -100)  # the first sentinel is given, and parts the row
        pairs = [*targets, *tail]
        return Document([*source, *[token for token, _ in pairs]], [-100] * len(source) + [label for _, label in pairs])

    def _marked(self, document: Document) -> Document:
        """Put the mode's token in front, behind a bos token."""
        front = 1 if document.tokens and document.tokens[0] in self._begins else 0
        mark = self._modes[self.mode or ""]
        tokens = [*document.tokens[:front], mark, *document.tokens[front:]]
        if self._pairs:
            return Document(tokens, document.labels)
        return Document(tokens, [*document.labels[:front], -100, *document.labels[front:]])
