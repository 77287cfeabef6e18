"""Extended mind: what is remembered, what each query takes of it, and what is cited."""

from __future__ import annotations

import copy
import math
from typing import Any

import accelerate
import pytest
import torch
import transformers as tf

from hf_ext import adapter
from hf_ext.attention.intercept import intercept, visible
from hf_ext.attention.memory import Memories
from hf_ext.attention.rotary import Rotary
from hf_ext.generation import ContrastiveSearch, PromptLookup, extended_mind
from hf_ext.generation.extended_mind import ExtendedMind
from hf_ext.testing import tiny_models
from hf_ext.testing.strategy import StrategyConformance
from hf_ext.testing.strategy_base import close, refusal, same_tokens

SETTINGS: dict[str, Any] = {"do_sample": False, "pad_token_id": tiny_models.PAD}
KINDS = ("llama", "qwen2", "qwen3", "mistral", "gemma3")
TEXTS = tiny_models.prompts((11,), seed=3)[0].tolist() + tiny_models.prompts((6,), seed=4)[0].tolist()


class TestConformance(StrategyConformance):
    """Without memories it is the model itself."""

    models = ("llama", "gemma3")

    def strategy(self):
        return ExtendedMind()


def full(kind: str) -> Any:
    """Return a model whose layers see everything."""
    if kind == "neighbouring pairs":
        shape = tiny_models.shared("llama").config.to_dict()
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "max_position_embeddings", "pad_token_id", "bos_token_id",
                 "eos_token_id")  # fmt: skip
        return tiny_models.fill(tf.CohereForCausalLM(tf.CohereConfig(**{name: shape[name] for name in names})))
    changes: dict[str, dict[str, Any]] = {
        "mistral": {"sliding_window": None}, "gemma3": {"layer_types": ["full_attention"] * 2}
    }  # fmt: skip
    return tiny_models.build(kind, **changes.get(kind, {}))


def logits(model: Any, strategy: ExtendedMind, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad(), strategy.attached(model):
        return model(ids, attention_mask=mask, position_ids=positions).logits


# What follows from the definition


@pytest.mark.parametrize("kind", KINDS)
def test_without_memories_it_is_the_model_to_the_last_bit(kind):
    model, (ids, mask) = tiny_models.shared(kind), tiny_models.prompts()
    memories, positions = Memories.of(model, TEXTS), (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, position_ids=positions).logits
    for strategy in (ExtendedMind(), ExtendedMind(memories, top_memories=0), ExtendedMind(memories, layers=())):
        assert torch.equal(logits(model, strategy, ids, mask), expected), f"{kind}: {strategy.options()}"


@pytest.mark.parametrize("kind", [*KINDS, "neighbouring pairs"])
def test_all_memories_at_their_true_positions_are_full_attention(kind):
    model, text, ids = full(kind), torch.tensor(TEXTS[:1]), tiny_models.prompts((7,))[0]
    strategy = ExtendedMind(Memories.of(model, TEXTS[:1]), top_memories=11, min_similarity=-1, positions="before")
    with torch.no_grad():
        expected = model(torch.cat([text, ids], dim=1)).logits[:, 11:]
    close(logits(model, strategy, ids), expected, f"{kind}, memories against the text itself", 2e-5)
    mask = torch.ones_like(ids)
    ours = strategy.generate(model, ids, attention_mask=mask, max_new_tokens=10, **SETTINGS)
    plain = model.generate(torch.cat([text, ids], dim=1), max_new_tokens=10, **SETTINGS)
    same_tokens(ours[:, 7:], plain[:, 18:], f"{kind}, ten tokens with a cache")


class Definition:
    """Attention query by query and head by head, memories one by one."""

    def __init__(self, model: Any, memories: Memories, **options: Any) -> None:
        self.rotary, self.memories, self.options = Rotary.of(model), memories, options
        self.given = torch.zeros(len(memories), dtype=torch.float64)  # by the last query of the last row

    def __call__(self, module: Any, query: Any, key: Any, value: Any, mask: Any, plain: Any, **call: Any) -> Any:
        layer, out = module.layer_idx, torch.zeros_like(query).transpose(1, 2)
        if layer not in self.options.get("layers", (0, 1)):
            return plain(module, query, key, value, mask, **call)
        seen = visible(mask, query, key).expand(len(query), -1, -1, -1)
        for row in range(len(query)):
            place = seen[row, 0].sum(-1) - 1 if self.options["positions"] == "here" else None
            for head in range(query.shape[1]):
                of = head // (query.shape[1] // key.shape[1])
                for column in range(query.shape[2]):
                    sees = seen[row, 0, column].nonzero()[:, 0].tolist()
                    if not sees:
                        continue
                    q = query[row, head, column]
                    bare = q if place is None else self.rotary.rotate(layer, q, -place[column])
                    candidates = []
                    for i in range(len(self.memories)):
                        k = self.memories.keys[layer, of, i].double()
                        if self.options["positions"] == "before":
                            length = int((self.memories.texts == self.memories.texts[i]).sum())
                            k = self.rotary.rotate(layer, k, self.memories.places[i] - length)
                        candidates.append((float(bare @ k / bare.norm() / k.norm()), float(bare @ k), i))
                    taken = sorted(candidates, key=lambda found: (-round(found[0] * 2**20), found[2]))
                    taken = taken[: self.options["top_memories"]]
                    taken = [found for found in taken if found[0] >= self.options["min_similarity"]]
                    found = [score * call["scaling"] for _, score, _ in taken]
                    found += [float(q @ key[row, of, x]) * call["scaling"] for x in sees]
                    weights = torch.tensor(found, dtype=torch.float64).softmax(-1)
                    for weight, (_, _, i) in zip(weights, taken, strict=False):
                        out[row, column, head] += weight * self.memories.values[layer, of, i].double()
                        if (row, column) == (len(query) - 1, query.shape[2] - 1):
                            self.given[i] += weight
                    out[row, column, head] += weights[len(taken) :] @ value[row, of, sees]
        return out, None


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("positions", ["start", "here", "before"])
def test_attention_is_that_of_the_definition(kind, positions):
    model, (ids, mask) = full(kind).double(), tiny_models.prompts((6, 4))
    memories = Memories.of(model, TEXTS)
    options = {"top_memories": 4, "min_similarity": 0.1, "positions": positions}
    ours = logits(model, ExtendedMind(memories, **options), ids, mask)
    reference = Definition(model, memories, **options)
    with torch.no_grad(), intercept(model, reference):
        expected = model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0)).logits
    close(ours[mask.bool()], expected[mask.bool()], f"{kind}, {positions}, against query by query", 1e-6)
    assert reference.given.sum() > 0.01, "the last query took no memories"
    # What is cited is what the last query gave to the memories, over all layers and heads.
    strategy = ExtendedMind(memories, citations=len(memories), **options)
    strategy.generate(model, ids, attention_mask=mask, max_new_tokens=1, **SETTINGS)
    assert strategy.report is not None
    cited = torch.zeros(len(memories), dtype=torch.float64)
    for span in strategy.report.details["citations"][-1]:
        first = int((memories.texts == span["text"]).nonzero()[0]) + span["start"]
        assert memories.ids[first : first + span["stop"] - span["start"]].tolist() == span["ids"]
        assert abs(float(reference.given[first : first + len(span["ids"])].sum() / reference.given.sum())
                   - span["weight"]) < 1e-6  # fmt: skip
        cited[first : first + len(span["ids"])] = 1
    assert bool((cited[reference.given > 0] == 1).all()), "some memories that were attended to are not cited"


def test_only_the_chosen_layers_remember():
    model, (ids, mask) = tiny_models.build("llama").double(), tiny_models.prompts((6, 4))
    memories = Memories.of(model, TEXTS)
    options = {"top_memories": 3, "min_similarity": -1.0, "positions": "start", "layers": (1,)}
    reference = Definition(model, memories, **options)
    with torch.no_grad(), intercept(model, reference):
        expected = model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0)).logits
    ours = logits(model, ExtendedMind(memories, **options), ids, mask)
    close(ours[mask.bool()], expected[mask.bool()], "memories in layer 1 only", 1e-6)


def test_memories_that_are_not_similar_enough_are_as_good_as_none():
    model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
    strategy = ExtendedMind(Memories.of(model, TEXTS), min_similarity=1.0)
    ours = logits(model, strategy, ids, mask)
    close(ours[mask.bool()], logits(model, ExtendedMind(), ids, mask)[mask.bool()], "no memory is similar enough", 1e-5)
    strategy.generate(model, ids, attention_mask=mask, max_new_tokens=2, **SETTINGS)
    assert strategy.report is not None
    assert strategy.report.details["citations"] == [[], [], []]


def test_many_memories_are_looked_through_in_parts(monkeypatch):
    model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
    strategy = ExtendedMind(Memories.of(model, TEXTS), top_memories=5, min_similarity=-1)
    whole = logits(model, strategy, ids, mask)
    cited = strategy.generate(model, ids, attention_mask=mask, max_new_tokens=4, **SETTINGS), strategy.report
    monkeypatch.setattr(extended_mind, "AT_ONCE", 3 * 4 * 17 * 5)  # five queries at a time
    close(logits(model, strategy, ids, mask)[mask.bool()], whole[mask.bool()], "five queries at a time", 1e-5)
    strategy.generate(model, ids, attention_mask=mask, max_new_tokens=4, **SETTINGS)
    assert strategy.report is not None
    found = [[span["ids"] for span in row] for row in strategy.report.details["citations"]]
    assert found == [[span["ids"] for span in row] for row in cited[1].details["citations"]]


# Decoding


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_a_batch_gets_what_it_gets_alone(kind):
    model, (ids, mask) = tiny_models.shared(kind), tiny_models.prompts()
    strategy = ExtendedMind(Memories.of(model, TEXTS), top_memories=4, min_similarity=-1, positions="here")
    batch = strategy.generate(model, ids, attention_mask=mask, max_new_tokens=8, **SETTINGS)
    cited = strategy.report.details["citations"]
    for row in range(len(ids)):
        alone = ids[row : row + 1, mask[row].bool()]
        single = strategy.generate(model, alone, attention_mask=torch.ones_like(alone), max_new_tokens=8, **SETTINGS)
        same_tokens(batch[row : row + 1, -8:], single[:, -8:], f"{kind}, row {row} of a batch against the row alone")
        mine = strategy.report.details["citations"][0]
        assert [span["ids"] for span in cited[row]] == [span["ids"] for span in mine]


@pytest.mark.parametrize("kind", KINDS)
def test_with_a_cache_as_without(kind):
    model, (ids, mask) = tiny_models.shared(kind), tiny_models.prompts()
    strategy = ExtendedMind(Memories.of(model, TEXTS), top_memories=4, min_similarity=0.0)
    out = strategy.generate(model, ids, attention_mask=mask, max_new_tokens=8, **SETTINGS)
    for _ in range(8):
        tokens = logits(model, strategy, ids, mask)[:, -1].argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, tokens], dim=1), torch.cat([mask, torch.ones_like(tokens)], dim=1)
    same_tokens(out, ids, f"{kind}, with a cache against without")


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_static_cache_is_as_good_as_one_that_grows(kind):
    """Of its first pass SDPA gets no mask, and keys that nobody has written yet."""
    model, (ids, mask) = tiny_models.shared(kind), tiny_models.prompts((12,))
    strategy = ExtendedMind(Memories.of(model, TEXTS), top_memories=4, min_similarity=0.0)
    wanted = {**SETTINGS, "max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
    grown, static = (
        torch.stack(strategy.generate(model, ids, attention_mask=mask, **wanted, **cache).logits)
        for cache in ({}, {"cache_implementation": "static"})
    )
    close(static, grown, f"{kind}, a static cache", 2e-5)


@pytest.mark.parametrize("inner", [PromptLookup(4), ContrastiveSearch(penalty_alpha=0.0, top_k=3)], ids=repr)
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_other_strategies_decode_with_memories(kind, inner):
    model, (ids, mask) = tiny_models.shared(kind), tiny_models.prompts()
    memories = Memories.of(model, TEXTS)
    settings = {"attention_mask": mask, "max_new_tokens": 12, **SETTINGS}
    plain = ExtendedMind(memories, top_memories=4).generate(model, ids, **settings)
    ours = ExtendedMind(memories, top_memories=4, decode_with=inner).generate(model, ids, **settings)
    same_tokens(ours, plain, f"{kind}, {inner} with memories against greedy search with memories")


def test_rows_that_have_ended_cite_nothing_more():
    model, (ids, mask) = tiny_models.shared("llama"), tiny_models.prompts()
    memories = Memories.of(model, TEXTS)
    first = ExtendedMind(memories, citations=50, min_similarity=-1)
    free = first.generate(model, ids, attention_mask=mask, max_new_tokens=1, **SETTINGS)
    longer = ExtendedMind(memories, citations=50, min_similarity=-1)
    longer.generate(model, ids, attention_mask=mask, max_new_tokens=6, eos_token_id=[int(free[0, -1])], **SETTINGS)
    assert longer.report is not None
    assert first.report is not None
    assert longer.report.details["citations"][0] == first.report.details["citations"][0]


# Memories


def test_memories_can_be_saved(tmp_path):
    model = tiny_models.shared("qwen3")
    memories = Memories.of(model, TEXTS)
    memories.save(tmp_path / "memories.safetensors")
    loaded = Memories.load(tmp_path / "memories.safetensors")
    assert loaded.model == memories.model
    for name in ("keys", "values", "ids", "texts", "places"):
        assert torch.equal(getattr(loaded, name), getattr(memories, name)), name
    ids = tiny_models.prompts((7,))[0]
    assert torch.equal(logits(model, ExtendedMind(loaded), ids), logits(model, ExtendedMind(memories), ids))


@pytest.mark.parametrize("tied", [False, True])
def test_an_offloaded_model_remembers_as_the_model_itself(tied):
    model = tiny_models.build("llama", tie_word_embeddings=tied)
    ids, memories = tiny_models.prompts((7,))[0], Memories.of(model, TEXTS)
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device="cpu")
    assert next(offloaded.parameters()).is_meta, "there is nothing to fetch"
    found = Memories.of(offloaded, TEXTS)
    assert found.model == memories.model, "the same weights have another mark"
    close(found.values, memories.values, "values of an offloaded model", 0)
    expected, strategy = logits(model, ExtendedMind(memories), ids), ExtendedMind(found)
    close(logits(offloaded, strategy, ids), expected, "logits of an offloaded model", 0)


def test_long_texts_are_read_in_overlapping_pieces():
    model = tiny_models.build("llama", num_hidden_layers=3)
    text = tiny_models.prompts((30,))[0][0]
    memories = Memories.of(model, [text.tolist()], window=12, stride=5)
    rotary = Rotary.of(model)
    assert memories.places.tolist() == list(range(30))
    for done, stop in ((0, 12), (12, 17), (17, 22), (22, 27), (27, 30)):
        start = max(0, stop - 12)
        with torch.no_grad():
            cache = model(text[None, start:stop], use_cache=True).past_key_values
        for layer in range(3):
            keys = rotary.rotate(layer, cache.layers[layer].keys[0], -torch.arange(stop - start))[:, done - start :]
            difference = (memories.keys[layer, :, done:stop] - keys).abs().max().item()
            assert difference < 1e-5, f"tokens {done} to {stop}, layer {layer}: {difference:.3g}"
            assert torch.equal(memories.values[layer, :, done:stop], cache.layers[layer].values[0, :, done - start :])


def test_spans_are_neighbours_of_like_weight():
    memories = Memories.of(tiny_models.shared("llama"), [[5, 6, 7, 8], [9, 10]])
    found = memories.spans(torch.tensor([0.1, 1.0, 0.8, 0.6, 0.9, 0.0]), 3)
    assert [(span["text"], span["start"], span["stop"], span["ids"]) for span in found] == [
        (0, 1, 4, [6, 7, 8]), (1, 0, 1, [9]), (0, 0, 1, [5])
    ]  # fmt: skip
    assert math.isclose(sum(span["weight"] for span in found), 1.0, abs_tol=1e-6)


# What is refused


def test_memories_of_another_model_are_refused():
    memories, other = Memories.of(tiny_models.shared("llama"), TEXTS), tiny_models.shared("qwen2")
    ids = tiny_models.prompts((5,))[0]
    message = refusal(
        lambda: ExtendedMind(memories).generate(other, ids, attention_mask=torch.ones_like(ids), max_new_tokens=2),
        "another model", what="memories of another model",
    )  # fmt: skip
    assert "Qwen2" in message
    assert adapter.attention_implementation(other) == "sdpa"


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_absolute_positions_are_refused(kind):
    refusal(lambda: Memories.of(tiny_models.shared(kind), TEXTS), "absolute", what=f"memories of {kind}")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"top_memories": -1}, "top_memories"), ({"top_memories": 1.5}, "top_memories"),
        ({"min_similarity": 1.1}, "cosine"),
        ({"positions": "nowhere"}, "start, here, before"), ({"citations": -1}, "citations"),
        ({"memories": [1]}, "Memories.of"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(options, word):
    refusal(lambda: ExtendedMind(**options), word, what=str(options))


def test_a_layer_that_attends_twice_is_refused():
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = tf.DiffLlamaForCausalLM(
        tf.DiffLlamaConfig(vocab_size=tiny_models.VOCABULARY, num_key_value_heads=2, **shape)
    )
    refusal(lambda: Memories.of(model, TEXTS), "attends more than once", what="DiffLlama")


def test_layers_and_texts_that_do_not_exist_are_refused(tmp_path):
    model, ids = tiny_models.shared("llama"), tiny_models.prompts((5,))[0]
    strategy = ExtendedMind(Memories.of(model, TEXTS), layers=(2,))
    refusal(lambda: strategy.generate(model, ids, max_new_tokens=2), "from 0 to 1", what="layer 2 of two")
    refusal(lambda: Memories.of(model, []), "no texts", what="no texts")
    refusal(lambda: Memories.of(model, [[5], []]), "text 1", what="an empty text")
    refusal(lambda: Memories.of(model, TEXTS, window=500), "window", what="a window beyond the context")
