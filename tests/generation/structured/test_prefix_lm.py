"""A causal model whose prompt sees all of itself."""

from __future__ import annotations

import pytest
import torch

from hf_ext.attention import AttentionStructure
from hf_ext.generation import PromptLookup
from hf_ext.generation.prefix_lm import PrefixLM
from hf_ext.testing import structured, tiny_models
from hf_ext.testing.strategy import StrategyConformance
from hf_ext.testing.strategy_base import close, refusal, same_tokens


class TestConformance(StrategyConformance):
    """On spans of single tokens, which are plain prompts; what longer spans change is tested below."""

    models = ("llama", "gpt2", "mistral")

    def strategy(self):
        return OneTokenSpans()


class OneTokenSpans(PrefixLM):
    __module__ = PrefixLM.__module__  # whose source the suite reads

    def structure(self, prompt):
        columns = torch.arange(prompt.ids.shape[1], device=prompt.ids.device) + 1
        return super().structure(type(prompt)(prompt.ids, prompt.mask, prompt.mask * columns))


def run(model, inputs, strategy=None, **settings):
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **settings}
    return (strategy or PrefixLM()).generate(
        model, **inputs, return_dict_in_generate=True, output_logits=True, **settings
    )


def prompts(**more):
    ids, mask = tiny_models.prompts()
    return {"input_ids": ids, "attention_mask": mask, **more}


@pytest.mark.parametrize("kind", tiny_models.DECODERS)
def test_a_prompt_sees_itself_and_the_text_stays_causal(kind):
    """Against attention by the definition: key before query, or both in the prompt; windows by distance."""
    model, inputs = tiny_models.build(kind, attn_implementation="eager"), prompts()
    start = inputs["input_ids"].shape[1]
    out = run(model, inputs)
    tokens, logits = structured.uncached(model, PrefixLM(), inputs, 6)
    same_tokens(out.sequences[:, start:], tokens, kind)
    close(torch.stack(out.logits, 1), logits, kind, tolerance=1e-4)
    for row in range(3):
        real = inputs["attention_mask"][row].bool()
        text = torch.cat([inputs["input_ids"][row, real], out.sequences[row, start:-1]])[None]
        length, prefix = text.shape[1], int(real.sum())
        q, k = torch.arange(length)[:, None], torch.arange(length)[None]
        seen = (k <= q) | ((k < prefix) & (q < prefix))
        near = seen & (q - k < tiny_models.WINDOW)
        masks = [torch.zeros(1, 1, length, length).masked_fill(~m, -1e9) for m in (seen, near)]
        mask = {"mistral": masks[1], "gemma3": {"full_attention": masks[0], "sliding_attention": masks[1]}}.get(
            kind, masks[0]
        )
        by_hand = model(text, attention_mask=mask, position_ids=torch.arange(length)[None]).logits[0, prefix - 1 :]
        close(torch.stack(out.logits, 1)[row], by_hand, f"{kind}, row {row}", tolerance=2e-4)


def test_every_token_of_the_prompt_sees_every_other():
    model, inputs = tiny_models.shared("llama"), structured.prompts(([6],))
    ids = inputs["input_ids"]
    structure = AttentionStructure.causal(torch.ones(1, 6)).spans(torch.ones(1, 6))

    def states(ids):
        return model(ids, attention_mask=structure.dense(), output_hidden_states=True).hidden_states[1]

    before = states(ids)
    for column in range(6):
        changed = ids.clone()
        changed[0, column] += 1
        moved = (states(changed) - before).abs().amax(-1)[0]
        assert (moved > 1e-4).all(), f"not all see column {column}: {moved.tolist()}"


def test_spans_make_some_of_the_prompt_bidirectional():
    model = tiny_models.shared("llama")
    inputs = prompts(
        segment_ids=torch.tensor([[0, 1, 1, 1, 2, 2, 0, 0, 3, 3, 0, 0], [0] * 7 + [1, 1, 0, 0, 0], [0] * 12])
    )
    out = run(model, inputs)
    tokens, logits = structured.uncached(model, PrefixLM(), inputs, 6)
    same_tokens(out.sequences[:, 12:], tokens, "spans")
    close(torch.stack(out.logits, 1), logits, "spans", tolerance=1e-4)
    plain = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    causal = model.generate(
        **plain, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    assert (torch.stack(out.logits, 1) - torch.stack(causal.logits, 1)).abs().amax((1, 2)).min() > 1e-2
    for row in range(3):  # the last one has no spans: it is one, with such neighbours as without
        alone = run(model, structured.row_of(inputs, row))
        close(torch.stack(out.logits, 1)[row], torch.stack(alone.logits, 1)[0], f"row {row}", tolerance=1e-4)


@pytest.mark.parametrize("kind", tiny_models.DECODERS)
def test_a_batch_equals_its_rows_and_speculation_changes_nothing(kind):
    model, inputs = tiny_models.shared(kind), prompts()
    batch = run(model, inputs).sequences[:, 12:]
    for row in range(3):
        alone = structured.row_of(inputs, row)
        single = run(model, alone).sequences[:, alone["input_ids"].shape[1] :]
        same_tokens(batch[row : row + 1], single, f"{kind}, row {row}")
    fast = run(model, inputs, PrefixLM(decode_with=PromptLookup(draft_tokens=3))).sequences[:, 12:]
    same_tokens(fast, batch, f"{kind}, with prompt lookup")


def test_a_span_in_pieces_is_refused():
    segments = torch.zeros(3, 12, dtype=torch.long)
    segments[0, [2, 3, 6]] = 1
    refusal(lambda: run(tiny_models.shared("llama"), prompts(segment_ids=segments)), "several pieces", what="overlap")
