"""Prompts that are read as `generate` reads them: for models that take no masks and positions from outside.

    other tokens, their mask --the model's own way--> state --decode_with--> text behind the caller's prompt

A recurrent model folds all it reads into a state. Nothing can be taken back from there, and no token in it can be
addressed; but a method that only puts other tokens before the model needs neither. What it does need is that the
model goes on from its state, and that padding leaves no trace there. Each model is asked, with a few tokens.
"""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from hf_ext import adapter
from hf_ext.generation.checks import check_context
from hf_ext.generation.run import DecodingRun
from hf_ext.generation.speculative.probe import TOLERANCE
from hf_ext.generation.structured.prompting import Prompt, read_instead

_KNOWN: weakref.WeakKeyDictionary[PreTrainedModel, dict[bool, str | None]] = weakref.WeakKeyDictionary()

#: Tokens that are tried out: those of the longer prompt, those that follow it, and the padding of the shorter one.
PROMPT, STEPS, PADDING = 6, 2, 3


def read_plainly(run: DecodingRun, given: Prompt, prompt: Prompt, name: str) -> None:
    """Make a call read other tokens than its prompt, in the model's own way.

    Args:
        run: the call, before its prompt has been read.
        given: its prompts.
        prompt: what is read in their place.
        name: of the method, for messages.

    Raises:
        ValueError: a model that does not go on from its state, or reads padding into it; a prompt that is too long,
            or not given as ids into a state of its own.
    """
    states = adapter.states_of(run.model_kwargs)
    given_states = len(states) > 1 or any(map(adapter.is_user_state, states))  # generate makes one at most
    if run.model_kwargs.get("inputs_embeds") is not None or given_states:
        raise ValueError(
            f"{name} reads whole prompts given as input_ids into a cache of its own; leave past_key_values, "
            "cache_params, state and inputs_embeds out"
        )
    if not all(adapter.layer_grows(layer) for state in states for layer in state.layers):
        raise ValueError(f"{name} needs a cache that grows; leave cache_implementation out")
    if run.config.prefill_chunk_size is not None:
        raise ValueError(f"{name} reads the prompt in one piece; leave prefill_chunk_size out")
    check_context(run.model, int(prompt.mask.sum(-1).max()))
    problem = state_problem(run.model, padded=False)
    if problem is not None:
        raise ValueError(f"{name} goes on from the cache or state that a prompt leaves: {problem}")
    if not bool(prompt.mask.all()):
        problem = state_problem(run.model, padded=True)
        if problem is not None:
            raise ValueError(
                f"{name} got prompts of different lengths, but {problem}; give prompts of one length, or one at a time"
            )
    read_instead(run, given, prompt, name)
    if run.model_kwargs.get("position_ids") is not None:
        run.model_kwargs["position_ids"] = (prompt.mask.long().cumsum(-1) - 1).clamp_min(0)

    def read(ids: torch.Tensor, kwargs: dict[str, Any]) -> ModelOutput:
        more = ids[:, given.ids.shape[1] :]
        return adapter.prefill(run.model, torch.cat([prompt.ids, more], dim=1), run.config, kwargs)

    run.reader = read


@torch.no_grad()
def state_problem(model: PreTrainedModel, padded: bool) -> str | None:
    """Say why a model does not go on from what it keeps of a prompt as if it read all at once, or None if it does.

    A prompt, or two of different lengths, are read, then some tokens one by one; each time the logits must be those
    of the whole text without padding. The answer is remembered for as long as the model lives.

    Args:
        model: a decoder-only model.
        padded: ask about a batch with padding on the left.

    Example:
        >>> from hf_ext.testing import tiny_models
        >>> state_problem(tiny_models.shared("mamba"), padded=True) is None
        True
        >>> state_problem(tiny_models.shared("openai-gpt"), padded=False)
        'OpenAIGPTLMHeadModel returned neither a cache nor a state'
    """
    answers = _KNOWN.setdefault(model, {})
    if padded not in answers:
        answers[padded] = _ask(model, padded)
    return answers[padded]


def _ask(model: PreTrainedModel, padded: bool) -> str | None:
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    ids = ((torch.arange(PROMPT + STEPS, device=adapter.device_of(model)) * 17 + 5) % config.vocab_size)[None]
    mask = torch.ones_like(ids)
    if padded:
        ids, mask = ids.repeat(2, 1), mask.repeat(2, 1)
        mask[1, :PADDING] = 0
    # Not through the hooks of the model, where somebody may be counting; a sharded one needs them.
    call = model if adapter.needs_synced_gpus(model) else model.forward
    kwargs: dict[str, Any] = {"attention_mask": mask[:, :PROMPT], "use_cache": True}
    if "position_ids" in inspect.signature(model.forward).parameters:
        kwargs["position_ids"] = (kwargs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    worst = spread = 0.0
    for length in range(PROMPT, PROMPT + STEPS + 1):
        first = length == PROMPT
        inputs = (adapter.first_inputs if first else adapter.next_inputs)(model, ids[:, :length], kwargs)
        outputs = call(**inputs, return_dict=True)
        kwargs = adapter.extend_kwargs(model, outputs, kwargs)
        if not adapter.states_of(kwargs):
            return f"{name} returned neither a cache nor a state"
        for row, real in enumerate(mask.bool()):
            text = ids[row, :length][real[:length]][None]
            plain = call(input_ids=text, use_cache=False, return_dict=True).logits[0, -1].float()
            worst = max(worst, (plain - outputs.logits[row, -1].float()).abs().max().item())
            spread = max(spread, plain.std().item())
    size = next(model.parameters()).element_size()
    if not worst <= TOLERANCE.get(size, 0.2) * max(spread, 1e-12):
        what = "reads padding into its state" if padded else "does not go on from its state as if it read all at once"
        return f"{name} {what} (largest difference of a logit {worst:.3g}, spread of the logits {spread:.3g})"
    return None
