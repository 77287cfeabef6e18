"""Find out whether a model takes trees: explicit positions and a mask of its own for every query.

Most models do. One that derives distances from the columns of its keys, or ignores the mask it is
given, would silently decode something else; so each model is asked once, with a few tokens.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation import MaxLengthCriteria

from hf_ext import adapter
from hf_ext.generation.run import DecodingRun
from hf_ext.generation.speculative.tree_state import TreeState

_KNOWN: weakref.WeakKeyDictionary[PreTrainedModel, dict[str, str | None]] = weakref.WeakKeyDictionary()

#: Kinds of layers whose masks the engine can make.
KINDS = ("full_attention", "sliding_attention")
#: Longest window that is tried out.
LONGEST = 1024
#: Largest difference of logits, as a share of their spread, that rounding may explain, by bytes of a number.
TOLERANCE = {4: 1e-3, 8: 1e-6, 2: 0.2}


@torch.no_grad()
def tree_problem(model: PreTrainedModel) -> str | None:
    """Say why a model cannot evaluate draft trees, or None where it can.

    Two lanes of different lengths read a prompt and then a tree with two branches; every branch must
    give the logits of the plain sequence. The answer is remembered for as long as the model lives.

    Args:
        model: a decoder-only model.

    Example:
        >>> from hf_ext.testing import tiny_models
        >>> tree_problem(tiny_models.shared("llama")) is None
        True
    """
    problem = _adapter_problem(model)
    if problem is not None:
        return problem
    implementation = adapter.attention_implementation(model)
    answers = _KNOWN.setdefault(model, {})
    if implementation not in answers:
        answers[implementation] = _ask(model)
    return answers[implementation]


def _adapter_problem(model: PreTrainedModel) -> str | None:
    """Say what PEFT does in this very call that depends on its rows or columns, or None."""
    by_row = adapter.adapters_by_row(model)
    if by_row is not None:
        return (
            f"PEFT tells the adapters of every row apart ({by_row}), but rows leave the batch when they end and bring "
            "several tokens to a call; generate for one adapter at a time (model.set_adapter)"
        )
    if adapter.has_learned_prompt(model):
        return (
            "PEFT puts a learned prompt before the text, in columns that the positions and masks of a tree do not "
            "count; decode with plain generate, or tune layers instead (LoRA)"
        )
    return None


def length_problem(run: DecodingRun) -> str | None:
    """Say why the text of a call would depend on what is drafted, or None where it does not.

    Some rotary embeddings turn all tokens of a forward pass by the longest text in it. Where a text gets
    beyond the place from which on they do, what is drafted behind it decides how it is turned.

    Args:
        run: the decoding call, before its prompt has been read.
    """
    switch = adapter.rotation_switch(run.model)
    if switch is None:
        return None
    kind, place = switch
    prompts = run.attention_mask.sum(1)
    shortest, longest = int(prompts.min()), int(prompts.max())
    room = [int(c.max_length) - run.prompt_length for c in run.stopping_criteria if isinstance(c, MaxLengthCriteria)]
    if longest + min(room, default=place) - 1 <= place or (kind == "longrope" and shortest > place):
        return None
    allowed = place - longest + 1
    advice = f"with a prompt of {longest} ask for at most {allowed} new ones" if allowed > 0 else "shorten the prompt"
    if allowed <= 0 and kind == "longrope":
        advice = f"decode prompts of up to {place} and of more tokens apart"
    return (
        f"the rotary embeddings of {type(run.model).__name__} ({kind}) turn a text of more than {place} tokens in "
        f"another way, so that it would depend on what is drafted; {advice}, or decode with plain generate"
    )


def _own_window(config: Any) -> int:
    """Return the longest window, up to `LONGEST`, that a model may apply by itself: a number in its config says so."""
    found = [v for name, v in config.to_dict().items() if "window" in name and type(v) is int and v <= LONGEST]
    context = getattr(config, "max_position_embeddings", None) or LONGEST
    return max((value for value in found if value + 5 <= context), default=0)


def _ask(model: PreTrainedModel) -> str | None:
    if not hasattr(model, "config") or model.config.is_encoder_decoder:
        return f"{type(model).__name__} is not a decoder-only language model"
    config = model.config.get_text_config(decoder=True)
    problem = adapter.row_addressing_problem(adapter.empty_cache(model))
    if problem is not None:
        return f"the cache of {type(model).__name__} has no tokens that could be addressed one by one: {problem}"
    other = set(getattr(config, "layer_types", None) or ()) - set(KINDS)
    if other:
        return f"{type(model).__name__} has layers of the kind {', '.join(sorted(other))}"
    length = max(4, _own_window(config) + 2)
    ids = (torch.arange(length + 3, device=adapter.device_of(model)) * 17 + 5) % config.vocab_size
    prompts = [ids[:length], ids[1:length]]
    branches = [[length, length + 1], [length + 2]]  # two children of the prompt, the first with a child
    # Not through the hooks of the model, where somebody may be counting; a sharded one needs them.
    call = model if adapter.needs_synced_gpus(model) else model.forward
    plainly = call(ids[None, :4], use_cache=True, return_dict=True)
    if getattr(plainly, "past_key_values", None) is None:
        return f"{type(model).__name__} returned no cache"
    try:
        state = TreeState.fresh(model, lanes=2)
        state.call = call
        padded = torch.stack([prompts[0], torch.cat([prompts[1], ids[:1]])])
        state.read(padded, [length, length - 1])
        nodes = torch.stack([ids[[length, length + 2, length + 1]]] * 2)
        found = state.extend(nodes, [(-1, -1, 0)] * 2).logits
        worst = spread = 0.0
        for lane, prompt in enumerate(prompts):
            for branch, at in zip(branches, (2, 1), strict=True):
                plain = call(torch.cat([prompt, ids[branch]])[None], use_cache=False, return_dict=True).logits[0, -1]
                worst = max(worst, (plain - found[lane, at]).abs().max().item())
                spread = max(spread, plain.float().std().item())
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError) as error:
        said = str(error).splitlines()[0] if str(error) else "no message"
        return (
            f"{type(model).__name__} does not take positions and a mask of its own for every token "
            f"({type(error).__name__}: {said})"
        )
    size = next(model.parameters()).element_size()
    if not worst <= TOLERANCE.get(size, 0.2) * max(spread, 1e-12):
        return (
            f"{type(model).__name__} gives other logits for a branch of a tree than for the same tokens in a row "
            f"(largest difference {worst:.3g}, spread of the logits {spread:.3g}): it does not follow the positions "
            "and masks it is given"
        )
    return None
