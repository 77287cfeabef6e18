"""The engine: any tree, any cache, rows at their own pace, and a report that adds up."""

from __future__ import annotations

import copy
import dataclasses
import random

import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache

from hf_ext.generation import SpeculativeDecoding
from hf_ext.generation.speculative.drafter import Drafter
from hf_ext.generation.speculative.engine import Speculative
from hf_ext.generation.speculative.tree import DraftTree
from hf_ext.testing import exactness, tiny_models
from hf_ext.testing.strategy_base import refusal, same_tokens
from hf_ext.testing.tiny_models import PAD

LENGTHS = (12, 7, 3, 1, 9)


class RandomTrees(Drafter):
    """Trees of random shape in which some nodes hold the token that comes next."""

    def __init__(self, answers, nodes, seed):
        self.answers, self.nodes, self.random = answers, nodes, random.Random(seed)

    def propose(self, context):
        tokens, parents = [], []
        for lane, text in enumerate(context.texts):
            answer = self.answers[context.lanes[lane]]
            words, above, right = [], [], {-1: 0}  # nodes on the right way, with their depth
            for node in range(self.random.randint(0, context.useful_nodes(self.nodes))):
                parent = self.random.choice([-1, *range(node)])
                wanted = len(text) + right.get(parent, 0)
                if parent in right and wanted < len(answer) and self.random.random() < 0.7:
                    words.append(answer[wanted])
                    right[node] = right[parent] + 1
                else:
                    words.append(self.random.randrange(3, tiny_models.VOCABULARY))
                above.append(parent)
            tokens.append(words)
            parents.append(above)
        return DraftTree.from_lists(tokens, parents, context.device)


@dataclasses.dataclass
class Random(Speculative):
    answers: list = dataclasses.field(default_factory=list)
    nodes: int = 12
    seed: int = 0

    def drafter(self, run):
        return RandomTrees(self.answers or [[]] * len(run.input_ids), self.nodes, self.seed)


def texts(sequences, mask):
    """Sequences without the padding of their prompts."""
    new = sequences.shape[1] - mask.shape[1]
    return [row[torch.cat([m.bool(), torch.ones(new).bool()])].tolist() for row, m in zip(sequences, mask, strict=True)]


def plain(model, ids, mask, new=40, **settings):
    return model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=new, pad_token_id=PAD, **settings
    )  # fmt: skip


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", [*tiny_models.DECODERS, "qwen2"])
def test_random_trees_give_greedy_text_with_any_cache(kind, attention):
    model = tiny_models.build(kind)
    model.set_attn_implementation(attention)
    for lengths in ((9,), LENGTHS):
        ids, mask = tiny_models.prompts(lengths)
        expected = plain(model, ids, mask)
        strategy = Random(answers=texts(expected, mask))
        caches = {
            "none given": {},
            "static": {"cache_implementation": "static"},
            "a dynamic cache of full layers": {"past_key_values": DynamicCache()},
            "a dynamic cache with windows": {"past_key_values": DynamicCache(config=model.config)},
        }
        for name, given in caches.items():
            ours = strategy.generate(
                model, ids, attention_mask=mask, do_sample=False, max_new_tokens=40, pad_token_id=PAD, **given
            )
            same_tokens(ours, expected, f"{kind}, {attention}, {len(ids)} rows, cache: {name}")
            assert strategy.report.accepted > 10, "the trees hold right tokens, but none were accepted"


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kind", tiny_models.DECODERS)
def test_a_conversation_goes_on_from_the_cache(kind, static):
    """Turn after turn with one cache, sliding windows left far behind, as without any cache."""
    model = tiny_models.shared(kind)
    ids, mask = tiny_models.prompts((9, 4))
    cache = StaticCache(config=model.config, max_cache_len=110) if static else DynamicCache(config=model.config)
    for turn in range(3):
        expected = plain(model, ids, mask, 17)
        strategy = Random(answers=texts(expected, mask), seed=turn)
        ours = strategy.generate(
            model, ids, attention_mask=mask, past_key_values=cache, do_sample=False, max_new_tokens=17, pad_token_id=PAD
        )
        same_tokens(ours, expected, f"{kind}, turn {turn}, static cache: {static}")
        assert int(cache.get_seq_length()) == ours.shape[1] - 1, "the cache must hold all tokens but the last"
        question = torch.randint(3, tiny_models.VOCABULARY, (2, 4), generator=torch.Generator().manual_seed(turn))
        ids = torch.cat([ours, question], dim=1)
        mask = torch.cat([mask, torch.ones(2, ids.shape[1] - mask.shape[1], dtype=torch.long)], dim=1)
    # And transformers can go on from it.
    if not static:
        found = plain(model, ids, mask, 8, past_key_values=cache)
        same_tokens(found, plain(model, ids, mask, 8), f"{kind}, generate from the cache we left")


def test_a_static_cache_bounds_the_trees_and_nothing_else():
    model = tiny_models.shared("llama")
    ids, mask = tiny_models.prompts((9,))
    expected = plain(model, ids, mask, 20)
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + 19)  # no room for a tree at the end
    strategy = Random(answers=texts(expected, mask), nodes=30)
    ours = strategy.generate(
        model, ids, attention_mask=mask, past_key_values=cache, do_sample=False, max_new_tokens=20, pad_token_id=PAD
    )
    same_tokens(ours, expected, "a static cache with room for the text alone")


def test_windows_of_cache_layers_bound_what_is_held():
    """A layer with a window keeps about the window, however long the text."""
    model = tiny_models.build("mistral")
    ids, mask = tiny_models.prompts((6,))
    seen = []

    class Watch(RandomTrees):
        def propose(self, context):
            seen.append(max(layer.keys.shape[2] for layer in context.target.cache.layers))
            return super().propose(context)

    @dataclasses.dataclass
    class Watched(Random):
        def drafter(self, run):
            return Watch(self.answers, self.nodes, self.seed)

    expected = plain(model, ids, mask, 110)
    ours = Watched(answers=texts(expected, mask)).generate(
        model, ids, attention_mask=mask, do_sample=False, max_new_tokens=110, pad_token_id=PAD
    )
    same_tokens(ours, expected, "a long text under a window of 8")
    longest = tiny_models.WINDOW + 64 + 14  # window, slack, a step
    assert max(seen) <= 2 * longest, f"layers with a window of {tiny_models.WINDOW} grew to {max(seen)} columns"


@pytest.mark.parametrize("given", [False, True])
def test_no_token_is_held_twice_and_a_chain_takes_no_room_beyond_the_text(given):
    model = tiny_models.shared("llama")
    ids, mask = tiny_models.prompts((9, 4) if given else (9, 7))
    seen = []

    class Watch(RandomTrees):
        def propose(self, context):
            held = 0 if given else int(context.run.cache.get_seq_length())
            seen.append((held, [layer.keys.shape[2] for layer in context.target.cache.layers]))
            return DraftTree.chain(torch.full((context.target.lanes, context.useful_depth(3)), 5))

    @dataclasses.dataclass
    class Watched(Random):
        def drafter(self, run):
            return Watch(self.answers, self.nodes, self.seed)

    settings = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 20, "pad_token_id": PAD}
    if given:  # as a DynamicCache that the caller keeps is moved, not read into
        settings["past_key_values"] = DynamicCache()
    Watched().generate(model, ids, **settings)
    assert seen, "nothing was drafted"
    assert all(held == 0 and room == [9 + 20] * 2 for held, room in seen), seen


def test_a_row_that_ends_early_costs_nothing_more():
    model = tiny_models.shared("llama")
    ids, mask = tiny_models.prompts(LENGTHS)
    free = plain(model, ids, mask)
    eos = int(free[0, ids.shape[1] + 2])
    strategy = SpeculativeDecoding(exactness.perturbed(model), 3)
    _, calls = tiny_models.calls_of(
        model,
        lambda: strategy.generate(
            model, ids, attention_mask=mask, do_sample=False, max_new_tokens=40, eos_token_id=eos, pad_token_id=PAD
        ),
    )
    alive = [rows for rows, _ in calls]
    assert alive == sorted(alive, reverse=True), f"rows of the target's calls: {alive}"
    rows = strategy.report.details["rows"]
    for row, found in enumerate(rows):
        assert found["target_calls"] == found["steps"], f"row {row}: the first draft is verified with the prompt"
    assert sum(alive) == sum(found["target_calls"] for found in rows), "rows evaluated against rows that took part"


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_the_report_is_what_hooks_count(kind):
    model, draft = tiny_models.build(kind), exactness.perturbed(tiny_models.shared("llama"))
    ids, mask = tiny_models.prompts(LENGTHS)
    settings = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 20, "pad_token_id": PAD}
    strategy = SpeculativeDecoding(draft, 3)
    strategy.generate(model, ids, **settings)  # the first call also finds out whether the models take trees
    (ours, of_target), of_draft = tiny_models.calls_of(
        draft, lambda: tiny_models.calls_of(model, lambda: strategy.generate(model, ids, **settings))
    )
    report = strategy.report
    assert report.target_calls == len(of_target)
    assert report.target_positions == sum(rows * columns for rows, columns in of_target)
    assert report.draft_calls == len(of_draft)
    rows = report.details["rows"]
    assert report.tokens == ours[:, ids.shape[1] :].numel() == sum(row["tokens"] for row in rows)
    assert report.accepted == sum(row["accepted"] for row in rows)
    # Every call adds what was accepted and one token, but where the end of a row cut it.
    for row in rows:
        assert 0 <= row["accepted"] + row["target_calls"] - row["tokens"] <= 3
    parts = sum(report.details[f"{part}_seconds"] for part in ("draft", "verify", "bookkeeping"))
    assert 0 < parts <= report.seconds


def test_drafts_of_length_zero_are_plain_decoding():
    model = tiny_models.shared("llama")
    ids, mask = tiny_models.prompts(LENGTHS)
    strategy = SpeculativeDecoding(model, draft_tokens=0)
    settings = {"attention_mask": mask, "max_new_tokens": 12, "pad_token_id": PAD}
    same_tokens(strategy.generate(model, ids, do_sample=False, **settings), plain(model, ids, mask, 12), "greedy")
    assert (strategy.report.draft_calls, strategy.report.target_calls) == (0, 12)
    torch.manual_seed(4)
    ours = strategy.generate(model, ids, do_sample=True, temperature=1.5, **settings)
    torch.manual_seed(4)
    same_tokens(ours, model.generate(ids, do_sample=True, temperature=1.5, **settings), "sampling with the same seed")


@pytest.mark.parametrize("sample", [False, True])
def test_a_draft_model_that_is_the_target_is_always_right(sample):
    model = tiny_models.shared("llama")
    ids, mask = tiny_models.prompts(LENGTHS)
    strategy = SpeculativeDecoding(model, draft_tokens=4)
    strategy.generate(
        model, ids, attention_mask=mask, do_sample=sample, max_new_tokens=25, pad_token_id=PAD, temperature=1.2
    )
    assert strategy.report.details["mean_accepted"] == 4.0
    assert strategy.report.target_calls == 5, "25 tokens: five a call, that of the prompt included"


def called_with(model, strategy, ids, mask, **settings):
    """Run the strategy greedily; return the text and the `(rows, columns)` of the target's calls."""
    settings = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": PAD, **settings}
    strategy.generate(model, ids, attention_mask=mask, **settings)  # asks whether the models take trees
    return tiny_models.calls_of(model, lambda: strategy.generate(model, ids, attention_mask=mask, **settings))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_the_first_draft_is_verified_with_the_prompt(kind):
    model = tiny_models.build(kind, **({"sliding_window": 64} if kind == "mistral" else {}))
    ids, mask = tiny_models.prompts(LENGTHS)
    for draft in (copy.deepcopy(model), exactness.perturbed(model)):
        ours, calls = called_with(model, SpeculativeDecoding(draft, 3), ids, mask)
        same_tokens(ours, plain(model, ids, mask, 12), kind)
        assert calls[0] == (len(LENGTHS), ids.shape[1] + 3), calls


@pytest.mark.parametrize(
    ("kind", "changes", "settings", "reading"),
    [
        ("mistral", {"sliding_window": 8}, {}, [12]),  # drops tokens that a rejection would need again
        ("llama", {}, {"cache_implementation": "static"}, [12]),
        ("llama", {}, {"prefill_chunk_size": 4}, [4, 4, 4]),
        ("gpt2", {"n_positions": 14}, {"max_new_tokens": 2}, [12]),
    ],
)
def test_where_a_rejected_draft_could_not_be_forgotten_the_prompt_is_read_alone(kind, changes, settings, reading):
    model = tiny_models.build(kind, **changes)
    ids, mask = tiny_models.prompts((12, 9))
    _, calls = called_with(model, SpeculativeDecoding(exactness.perturbed(model), 3), ids, mask, **settings)
    assert calls[: len(reading)] == [(2, columns) for columns in reading], calls


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_computed_positions_go_on_beyond_the_configured_ones(kind):
    """`generate` only warns there: a rotary embedding has no last position."""
    model = tiny_models.build(kind, max_position_embeddings=16)
    ids, mask = tiny_models.prompts(LENGTHS)
    strategy = SpeculativeDecoding(exactness.perturbed(model), 4)
    same_tokens(strategy.generate(
        model, ids, attention_mask=mask, do_sample=False, max_new_tokens=24, pad_token_id=PAD
    ), plain(model, ids, mask, 24), kind)  # fmt: skip
    assert strategy.report.details["mean_accepted"] > 0.5


def test_a_table_of_positions_holds_a_text_to_its_end_and_no_longer():
    model = tiny_models.build("gpt2", n_positions=16)
    ids, mask = tiny_models.prompts(LENGTHS)
    settings = {"attention_mask": mask, "do_sample": False, "pad_token_id": PAD}
    strategy = SpeculativeDecoding(exactness.perturbed(model), 4)
    fits = strategy.generate(model, ids, max_new_tokens=5, **settings)  # the last token is not read
    same_tokens(fits, plain(model, ids, mask, 5), "a text that fills the table")
    refusal(lambda: strategy.generate(model, ids, max_new_tokens=12, **settings), "16 positions", what="a longer text")
    small = SpeculativeDecoding(tiny_models.build("gpt2", n_positions=8), 4)
    target = tiny_models.shared("gpt2")
    ours = small.generate(target, ids, max_new_tokens=12, **settings)
    same_tokens(ours, plain(target, ids, mask, 12), "a draft model with a smaller table")


@pytest.mark.parametrize(("kind", "place"), [("dynamic", 16), ("longrope", 16)])
def test_texts_that_would_depend_on_what_is_drafted_are_refused(kind, place):
    """Past a place some rotary embeddings turn all tokens of a call by the longest text in it."""
    parameters = {"rope_type": kind, "rope_theta": 1e4}
    if kind == "dynamic":
        model = tiny_models.build("llama", max_position_embeddings=place, rope_parameters={**parameters, "factor": 2.0})
    else:
        parameters |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": place}
        model = tiny_models.build("llama", rope_parameters=parameters)
    strategy = SpeculativeDecoding(exactness.perturbed(model), 4)
    settings = {"do_sample": False, "pad_token_id": PAD}
    ids, mask = tiny_models.prompts(LENGTHS)
    before = strategy.generate(model, ids, attention_mask=mask, max_new_tokens=5, **settings)
    same_tokens(before, plain(model, ids, mask, 5), f"{kind}, up to the place")
    refusal(
        lambda: strategy.generate(model, ids, attention_mask=mask, max_new_tokens=6, **settings), "at most 5",
        what=f"{kind}, across the place",
    )  # fmt: skip
    if kind == "longrope":  # the same rotations for everything beyond
        ids, mask = tiny_models.prompts((20, 17))
        after = strategy.generate(model, ids, attention_mask=mask, max_new_tokens=12, **settings)
        same_tokens(after, plain(model, ids, mask, 12), f"{kind}, beyond the place")


@pytest.mark.parametrize("name", ["Phi3", "Gemma3n"])
def test_models_that_prepare_inputs_their_own_way_or_share_keys_take_trees(name):
    shape = {
        "vocab_size": tiny_models.VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": PAD, "eos_token_id": None,
        "tie_word_embeddings": False,
    }  # fmt: skip
    if name == "Gemma3n":  # its last two layers read keys of the first two
        shape |= {
            "num_hidden_layers": 4, "num_kv_shared_layers": 2, "head_dim": 8, "sliding_window": tiny_models.WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 2, "laurel_rank": 4, "intermediate_size": [48] * 4,
            "vocab_size_per_layer_input": tiny_models.VOCABULARY, "hidden_size_per_layer_input": 8,
            "activation_sparsity_pattern": None,
        }  # fmt: skip
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3n" else f"{name}Config")(**shape)
    model = tiny_models.fill(getattr(transformers, f"{name}ForCausalLM")(config))
    ids, mask = tiny_models.prompts(LENGTHS)
    expected = plain(model, ids, mask, 20)
    strategy = Random(answers=texts(expected, mask))
    ours = strategy.generate(model, ids, attention_mask=mask, do_sample=False, max_new_tokens=20, pad_token_id=PAD)
    same_tokens(ours, expected, name)
    assert strategy.report.accepted > 10


def test_models_that_cannot_follow_trees_are_refused():
    ids, mask = tiny_models.prompts((4,))
    for kind, word in (("mamba", "recurrent state"), ("openai-gpt", "cache")):
        strategy = SpeculativeDecoding(tiny_models.shared("llama"))
        refusal(
            lambda k=kind, s=strategy: s.generate(tiny_models.shared(k), ids, attention_mask=mask, max_new_tokens=3),
            word, what=kind,
        )  # fmt: skip


def test_half_precision_decodes_as_the_model_does():
    """bfloat16 rounds differently for different widths, so texts may differ; the first tokens and lengths may not."""
    model = tiny_models.build("llama").to(torch.bfloat16)
    ids, mask = tiny_models.prompts((9, 4))
    ours = SpeculativeDecoding(model, 3).generate(
        model, ids, attention_mask=mask, do_sample=False, max_new_tokens=10, pad_token_id=PAD
    )
    assert torch.equal(ours[:, : ids.shape[1] + 1], plain(model, ids, mask, 1))
    assert ours.shape == (2, ids.shape[1] + 10)
