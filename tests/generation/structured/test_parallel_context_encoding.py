"""Parallel context encoding: what is read side by side, what is selected, and the entropy that is reported."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hf_ext.attention import AttentionStructure, masks_for
from hf_ext.attention.intercept import intercept, visible
from hf_ext.generation import PromptLookup
from hf_ext.generation.parallel_context_encoding import ParallelContextEncoding
from hf_ext.generation.set_based_prompting import SetBasedPrompting
from hf_ext.generation.structured.prompting import Prompt
from hf_ext.testing import structured, tiny_models
from hf_ext.testing.strategy import StrategyConformance
from hf_ext.testing.strategy_base import close, refusal, same_tokens
from hf_ext.testing.structured import row_of

SETTINGS: dict[str, Any] = {"do_sample": False, "pad_token_id": tiny_models.PAD}


class TestConformance(StrategyConformance):
    """Without pieces it is plain decoding, whatever else is asked for."""

    models = ("llama", "gpt2")

    def strategy(self):
        return ParallelContextEncoding(top_pieces=1)


def reported(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> dict[str, Any]:
    strategy = ParallelContextEncoding(**options)
    strategy.generate(model, **inputs, max_new_tokens=1, **SETTINGS)
    assert strategy.report is not None
    return strategy.report.details


@pytest.mark.parametrize("kind", tiny_models.DECODERS)
def test_one_piece_is_full_attention(kind):
    model, inputs = tiny_models.shared(kind), structured.prompts(([3, (4,), 3], [2, (2,), 2]))
    plain = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True, **SETTINGS}
    expected = model.generate(**plain, **settings)
    for strategy in (ParallelContextEncoding(), ParallelContextEncoding(top_pieces=1)):
        ours = strategy.generate(model, **inputs, **settings)
        assert torch.equal(torch.stack(ours.logits), torch.stack(expected.logits)), f"{kind}: logits differ"
        same_tokens(ours.sequences, expected.sequences, kind)


@pytest.mark.parametrize("kind", tiny_models.DECODERS)
def test_with_all_pieces_it_is_set_based_prompting(kind):
    model, inputs = tiny_models.shared(kind), structured.prompts()
    expected = SetBasedPrompting().generate(model, **inputs, max_new_tokens=8, **SETTINGS)
    for top in (None, 3):
        ours = ParallelContextEncoding(top_pieces=top).generate(model, **inputs, max_new_tokens=8, **SETTINGS)
        same_tokens(ours, expected, f"{kind}, top_pieces={top}")


def selecting(inputs: dict[str, torch.Tensor], top: int, entropies: list[torch.Tensor]) -> Any:
    """Return the attention of the definition: query by query, head by head."""

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, plain: Any, **call: Any) -> Any:
        out, shared = torch.zeros_like(query).transpose(1, 2), query.shape[1] // key.shape[1]
        seen = visible(mask, query, key).expand(len(query), -1, -1, -1)
        for row in range(len(query)):
            segment, group = inputs["segment_ids"][row], inputs["group_ids"][row]
            last = int(group.nonzero().max()) if group.any() else len(group) - 2
            for head in range(query.shape[1]):
                for column in inputs["attention_mask"][row].nonzero()[:, 0].tolist():
                    found = key[row, head // shared] @ query[row, head, column] * call["scaling"]
                    sees = seen[row, 0, column].clone()
                    share = found.masked_fill(~sees, -math.inf).softmax(-1)
                    for number in set(group[group > 0].tolist()):
                        pieces = segment[group == number].unique().tolist()
                        pieces.sort(key=lambda piece: float(share[segment == piece].sum()), reverse=True)
                        for piece in pieces[top:]:
                            sees &= segment != piece
                    share = found.masked_fill(~sees, -math.inf).softmax(-1)
                    if column > last:
                        entropies.append(-(share * share.clamp_min(1e-300).log()).sum())
                    out[row, column, head] = share @ value[row, head // shared]
        return out, None

    return attend


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("top", [1, 2])
def test_selection_and_entropy_are_those_of_the_definition(kind, top):
    model, inputs, entropies = tiny_models.build(kind).double(), structured.prompts(), []
    strategy = ParallelContextEncoding(canonical=False, top_pieces=top)
    ours = strategy.forward(model, **inputs).logits
    prompt = Prompt(inputs["input_ids"], inputs["attention_mask"].bool(), inputs["segment_ids"], inputs["group_ids"])
    structure = strategy.structure(prompt)
    with torch.no_grad(), intercept(model, selecting(inputs, top, entropies)):
        expected = model(
            inputs["input_ids"], attention_mask=masks_for(model, structure),
            position_ids=structure.queries.position.long(),
        ).logits  # fmt: skip
    close(ours[prompt.mask], expected[prompt.mask], f"{kind}, top {top}, against query by query", 1e-8)
    found = reported(model, inputs, canonical=False, top_pieces=top)
    mean = float(torch.stack(entropies).mean())
    assert abs(found["entropy"] - mean) < 1e-9, f"{kind}: entropy {found['entropy']}, by the definition {mean}"
    assert abs(sum(found["entropy_per_layer"]) / 2 - mean) < 1e-9
    assert found["pieces"] == [[3, 2], [2], []]


def test_cached_steps_select_anew():
    model, inputs = tiny_models.shared("llama"), structured.prompts()
    strategy = ParallelContextEncoding(canonical=False, top_pieces=1)
    out = strategy.generate(model, **inputs, max_new_tokens=8, **SETTINGS)
    for _ in range(8):
        tokens = strategy.forward(model, **inputs).logits[:, -1].argmax(-1, keepdim=True)
        more = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        inputs = {
            name: torch.cat([value, more.get(name, torch.zeros_like(tokens))], 1) for name, value in inputs.items()
        }
    same_tokens(out, inputs["input_ids"], "cached steps against the whole text each time")


@pytest.mark.parametrize("kind", tiny_models.DECODERS)
def test_a_row_of_a_batch_gets_what_it_gets_alone(kind):
    model, inputs = tiny_models.shared(kind), structured.prompts()
    batch = ParallelContextEncoding(top_pieces=1).generate(model, **inputs, max_new_tokens=8, **SETTINGS)
    for row in range(len(batch)):
        alone = ParallelContextEncoding(top_pieces=1)
        single = alone.generate(model, **row_of(inputs, row), max_new_tokens=8, **SETTINGS)
        same_tokens(batch[row : row + 1, -8:], single[:, -8:], f"{kind}, row {row} of a batch against the row alone")


@pytest.mark.parametrize("kind", tiny_models.DECODERS)
def test_the_order_of_the_pieces_changes_nothing(kind):
    model = tiny_models.shared(kind)
    laws = [
        ParallelContextEncoding(canonical=False, top_pieces=2).forward(model, **inputs).logits[0, -1].softmax(-1)
        for inputs in structured.orders(structured.prompts(([2, (2, 1, 3, 2), 3],)))
    ]
    spread = (torch.stack(laws) - laws[0]).abs().max().item()
    assert spread < 1e-5, f"{kind}: probabilities differ by {spread:.3g} between orders"


def test_without_shared_sinks_pieces_do_not_see_the_prefix():
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]]).bool()
    segments = torch.tensor([[0, 0, 0, 1, 2, 2, 0], [0, 0, 0, 0, 0, 0, 0]])
    prompt = Prompt(torch.arange(14).view(2, 7), mask, segments)
    structure = ParallelContextEncoding(shared_sinks=False).structure(prompt)
    assert structure.keys.position[0].tolist() == [0, 0, 1, 0, 0, 1, 2]
    assert structure.dense()[0, 0, 1:, 1:].int().tolist() == [
        [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 0],
        [1, 1, 1, 1, 1, 1],
    ]  # fmt: skip
    assert torch.equal(structure.dense()[1], AttentionStructure.causal(mask).dense()[1])


def test_selection_lowers_the_entropy_that_is_reported():
    model, inputs = tiny_models.shared("llama"), structured.prompts(([2, (6, 6, 6, 6), 4],))
    found = [reported(model, inputs, top_pieces=top)["entropy"] for top in (1, 2, 3, None)]
    assert found == sorted(found), f"entropies with 1, 2, 3 and all pieces: {found}"
    assert found[0] < found[-1] - 0.05


def test_prompt_lookup_goes_on_from_a_single_prompt():
    model, inputs = tiny_models.shared("llama"), row_of(structured.prompts(), 0)
    plain = ParallelContextEncoding(top_pieces=1).generate(model, **inputs, max_new_tokens=12, **SETTINGS)
    strategy = ParallelContextEncoding(top_pieces=1, decode_with=PromptLookup(4))
    same_tokens(strategy.generate(model, **inputs, max_new_tokens=12, **SETTINGS), plain, "prompt lookup inside")


@pytest.mark.parametrize("top", [0, -1, 1.5, True])
def test_options_that_make_no_sense_are_refused(top):
    refusal(lambda: ParallelContextEncoding(top_pieces=top), "top_pieces", what=f"top_pieces={top}")
