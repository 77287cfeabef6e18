"""Fill in what is missing from a text, with a model that was trained for it.

The objective says how: where parts, sentinels and end stand is the same in training and here. Everything
else is `model.generate`, with all its options and with any decoding strategy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import torch

from hf_ext import adapter
from hf_ext.generation.checks import check_context

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_ext.trainer_callbacks.infilling import Infilling

#: Arguments of `generate` that would change what comes back.
REFUSED = ("return_dict_in_generate", "num_return_sequences", "input_ids", "inputs", "attention_mask", "inputs_embeds")

Part = str | Sequence[int]


@dataclass(frozen=True)
class Filled:
    """A text with its holes filled.

    Args:
        text: the whole text; empty if the parts were given as tokens.
        spans: what was filled in, in order; texts, or tokens if the parts were given as tokens.
        tokens: tokens of each span, without the end.
        finished: whether each span came to its end, rather than to `max_new_tokens`.
    """

    text: str
    spans: list[Any]
    tokens: list[list[int]]
    finished: list[bool]


@overload
def infill(
    model: PreTrainedModel, tokenizer: Any, prefix: str, suffix: str, method: Infilling, **options: Any
) -> Filled: ...
@overload
def infill(
    model: PreTrainedModel,
    tokenizer: Any,
    prefix: Sequence[str],
    suffix: Sequence[str],
    method: Infilling,
    **options: Any,
) -> list[Filled]: ...
def infill(
    model: PreTrainedModel, tokenizer: Any, prefix: Any, suffix: Any, method: Infilling, **options: Any
) -> Filled | list[Filled]:
    """Generate what belongs between a prefix and a suffix.

    Args:
        model: a causal LM that was trained so; its own `generate` does the work.
        tokenizer: the model's.
        prefix: text before the gap, or one for each row.
        suffix: text after it, likewise.
        method: the objective it was trained with, such as `FIM()`; names of sentinels included.
        **options: see `fill_holes`.

    Returns:
        A `Filled`, or one for each row.

    Raises:
        ValueError: as `fill_holes`; or prefixes and suffixes differ in number.

    Example:
        >>> from hf_ext.claims.held_out import load
        >>> from hf_ext.trainer_callbacks import FIM
        >>> model, tokenizer = load("draft")  # was not trained so; any tokens may play the sentinels
        >>> method = FIM(prefix_token="<|mask|>", suffix_token="=", middle_token="#")
        >>> filled = infill(model, tokenizer, "def area(", "):", method, max_new_tokens=4, do_sample=False)
        >>> filled.text.startswith("def area("), filled.text.endswith("):"), len(filled.tokens[0]) <= 4
        (True, True, True)
    """
    if isinstance(prefix, str) and isinstance(suffix, str):
        return fill_holes(model, tokenizer, [(prefix, suffix)], method, **options)[0]
    if isinstance(prefix, str) or isinstance(suffix, str) or len(prefix) != len(suffix):
        raise ValueError("give one prefix and one suffix, or lists of both that are equally long")
    return fill_holes(model, tokenizer, list(zip(prefix, suffix, strict=True)), method, **options)


@torch.no_grad()
def fill_holes(
    model: PreTrainedModel,
    tokenizer: Any,
    rows: Sequence[Sequence[Part]],
    method: Infilling,
    *,
    max_new_tokens: int = 64,
    ending: str | None = None,
    **options: Any,
) -> list[Filled]:
    """Fill all holes of several texts, hole by hole; each sees those that were filled before it.

    Args:
        model: a causal LM that was trained so.
        tokenizer: the model's; may be None if all parts are tokens.
        rows: for each text the parts around its holes, in order; equally many in all rows. Texts, or lists of tokens.
        method: the objective it was trained with.
        max_new_tokens: longest span.
        ending: text that stands after the last part, where the objective would put the end-of-text token (CM3,
            CodeGen2) or nothing (FIM). InCoder wants `"<|mask:1|>"` here.
        **options: whatever else `model.generate` takes, `custom_generate` included.

    Returns:
        A `Filled` for each row.

    Raises:
        ValueError: rows with different numbers of parts, more holes than the method has, a prompt beyond the
            model's context, texts without a tokenizer, or an option of `generate` that would return something else.
    """
    for name in REFUSED:
        given = options.pop(name, None)
        if given is not None and given is not False and not (name == "num_return_sequences" and given == 1):
            raise ValueError(f"{name} cannot be used for filling in; call model.generate on a prompt of your own")
    holes = _holes(rows, method)
    method.resolve(tokenizer, model.config)
    write = _writer(method, tokenizer)
    kept = [[write(part) for part in row] for row in rows]
    after = None if ending is None else write(ending)
    head = _head(tokenizer)
    stops = sorted(
        {method.end_of_span, *_listed(options.pop("eos_token_id", None) or model.generation_config.eos_token_id)}
    )
    unwanted = sorted(method.sentinels - set(stops) | set(_listed(options.pop("suppress_tokens", None))))
    filled: list[list[list[int]]] = [[] for _ in rows]
    finished: list[list[bool]] = [[] for _ in rows]
    for _ in range(holes):
        prompts = [head + method.prompt(parts, spans, after) for parts, spans in zip(kept, filled, strict=True)]
        check_context(model, max(map(len, prompts)))
        ids, mask = _left_padded(prompts, stops[0])
        made = model.generate(
            input_ids=ids.to(adapter.device_of(model)),
            attention_mask=mask.to(adapter.device_of(model)),
            max_new_tokens=max_new_tokens,
            eos_token_id=stops,
            pad_token_id=stops[0],
            return_dict_in_generate=False,
            num_return_sequences=1,
            suppress_tokens=unwanted or None,
            **options,
        )
        for row, tokens in enumerate(made[:, ids.shape[1] :].tolist()):
            end = next((at for at, token in enumerate(tokens) if token in stops), None)
            filled[row].append(tokens[:end])
            finished[row].append(end is not None)
    return [_joined(*found, method) for found in zip(rows, filled, finished, kept, strict=True)]


def _holes(rows: Sequence[Sequence[Part]], method: Infilling) -> int:
    counts = {len(row) - 1 for row in rows}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(f"rows must have equally many holes and at least one, got {[len(row) - 1 for row in rows]}")
    holes = counts.pop()
    if holes > method.holes:
        raise ValueError(f"{method.name} fills {method.holes} hole(s) at a time, but the rows have {holes}")
    return holes


def _writer(method: Infilling, tokenizer: Any) -> Any:
    def write(part: Part) -> list[int]:
        if not isinstance(part, str):
            return list(part)
        if method.characters is None:
            raise ValueError("the parts are texts: pass the tokenizer, or give the parts as lists of tokens")
        return method.characters.write([part])[0]

    return write


def _joined(
    row: Sequence[Part], spans: list[list[int]], finished: list[bool], kept: list[list[int]], method: Infilling
) -> Filled:
    if not all(isinstance(part, str) for part in row):
        return Filled("", list(spans), spans, finished)
    assert method.characters is not None
    texts = [method.characters.read(span) for span in spans]
    whole = str(row[0]) + "".join(text + str(part) for text, part in zip(texts, row[1:], strict=True))
    return Filled(whole, texts, spans, finished)


def _head(tokenizer: Any) -> list[int]:
    """Return the bos token, if the tokenizer begins texts with it."""
    if tokenizer is None or tokenizer.bos_token_id is None:
        return []
    return [tokenizer.bos_token_id] if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] else []


def _listed(value: Any) -> list[int]:
    if value is None:
        return []
    return [int(item) for item in (value if isinstance(value, (list, tuple, set)) else [value])]


def _left_padded(prompts: Sequence[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask
