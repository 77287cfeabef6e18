"""Which tokens of a vocabulary end in given text, such as punctuation."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

#: Ends a phrase: the characters of the paper's implementation and their counterparts in other scripts.
PUNCTUATION = (*".,?!:;)]}\n", *"…。，、？！：；）】」』．｡､؟،؛۔।॥։።")

_known: weakref.WeakKeyDictionary[Any, dict[tuple[int, tuple[str, ...]], frozenset[int]]] = weakref.WeakKeyDictionary()


def tokens_ending_in(tokenizer: Any, endings: Iterable[str]) -> frozenset[int]:
    """Find the tokens whose text ends in one of `endings`, blanks after it aside; special tokens never do.

    Decoding a vocabulary takes seconds at worst, so what was found is kept for as long as the
    tokenizer lives.

    Args:
        tokenizer: any tokenizer with `decode`, `__len__` and `all_special_ids`.
        endings: non-empty texts.

    Returns:
        Their ids.

    Example:
        >>> class Words:
        ...     all_special_ids, words = [0], ["[PAD]", "a", ".", "b, ", "\\n\\n"]
        ...     def __len__(self): return len(self.words)
        ...     def decode(self, ids, **_): return self.words[ids[0]]
        >>> sorted(tokens_ending_in(Words(), ".,\\n"))
        [2, 3, 4]
    """
    endings = tuple(endings)
    known = _known.setdefault(tokenizer, {})
    key = (len(tokenizer), endings)
    if key not in known:
        special = set(tokenizer.all_special_ids)
        special |= {i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
        known[key] = frozenset(
            index
            for index in range(len(tokenizer))
            if index not in special and _ends(tokenizer.decode([index], clean_up_tokenization_spaces=False), endings)
        )
    return known[key]


def _ends(text: str, endings: tuple[str, ...]) -> bool:
    return text.endswith(endings) or text.rstrip(" \t").endswith(endings)


def tokenizer_beside(model: Any) -> Any | None:
    """Load the tokenizer that was saved with a model's checkpoint, without network; None if there is none.

    Args:
        model: a model; `model.name_or_path` says where it came from.
    """
    from transformers import AutoTokenizer

    origin = getattr(model, "name_or_path", "")
    if not origin or (Path(origin).exists() and not (Path(origin) / "tokenizer_config.json").is_file()):
        return None
    try:
        return AutoTokenizer.from_pretrained(origin, local_files_only=True)
    except (OSError, ValueError):  # what transformers raises where a checkpoint has no usable tokenizer
        return None
