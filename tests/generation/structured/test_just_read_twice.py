"""The prompt is read several times, and what is returned is the caller's prompt and the text behind it."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers as tf

from hf_ext import adapter
from hf_ext.generation import ContrastiveSearch, PromptLookup, SetBasedPrompting, SpeculativeDecoding
from hf_ext.generation.just_read_twice import JustReadTwice
from hf_ext.generation.plain import PlainDecoding
from hf_ext.generation.structured import plainly
from hf_ext.generation.structured.prompting import Prompt
from hf_ext.testing import structured, tiny_models
from hf_ext.testing.strategy import StrategyConformance
from hf_ext.testing.strategy_base import close, refusal, same_tokens
from hf_ext.testing.strategy_outputs import full_run

PAD = tiny_models.PAD

#: Models with a recurrent state, alone or beside attention, by what they are called here.
RECURRENT = ("mamba", "mamba2", "falcon-mamba", "jamba", "qwen3-next", "lfm2", "rwkv")
#: Those that leave no trace of padding in their state.
PADDED = ("mamba", "mamba2", "falcon-mamba", "jamba", "qwen3-next", "lfm2")


@functools.lru_cache
def recurrent(kind):
    """A tiny model with a recurrent state."""
    if kind == "mamba":
        return tiny_models.shared("mamba")
    tokens = {"vocab_size": tiny_models.VOCABULARY, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": PAD}
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
    heads = {**shape, "num_attention_heads": 4, "num_key_value_heads": 2}
    configs = {
        "mamba2": lambda: tf.Mamba2Config(
            hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=4, head_dim=16, n_groups=1, chunk_size=8,
            **tokens,
        ),
        "falcon-mamba": lambda: tf.FalconMambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, **tokens),
        "jamba": lambda: tf.JambaConfig(
            **heads, **tokens, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, num_experts=2,
            num_experts_per_tok=1, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False,
        ),
        "qwen3-next": lambda: tf.Qwen3NextConfig(
            **heads, **tokens, head_dim=8, linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2,
            linear_num_value_heads=4, layer_types=["linear_attention", "full_attention"], num_experts=0,
        ),
        "lfm2": lambda: tf.Lfm2Config(**heads, **tokens, layer_types=["conv", "full_attention"]),
        "rwkv": lambda: tf.RwkvConfig(hidden_size=32, num_hidden_layers=2, intermediate_size=48, **tokens),
        "bloom": lambda: tf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **tokens),
    }  # fmt: skip
    return tiny_models.fill(tf.AutoModelForCausalLM.from_config(configs[kind]()))


def model_of(kind):
    return tiny_models.shared(kind) if kind in tiny_models.DECODERS else recurrent(kind)


class TestConformance(StrategyConformance):
    models = ("llama", "gpt2", "mistral", "mamba")

    def strategy(self):
        return JustReadTwice()

    def test_scores_and_logits_are_those_of_the_model(self, kind):
        """Against one pass over the prompt, the prompt again, and the text."""
        ids, mask = tiny_models.prompts()
        out = self.run(kind, return_dict_in_generate=True, output_scores=True, output_logits=True)
        twice, real = doubled(ids, mask)
        text = out.sequences[:, ids.shape[1] :]
        raw = full_run(tiny_models.shared(kind), torch.cat([twice, text], 1), real).logits[:, twice.shape[1] - 1 : -1]
        close(torch.stack(out.logits, 1), raw, f"{kind}, logits against one pass over all that is read")
        close(torch.stack(out.scores, 1).argmax(-1).float(), text.float(), f"{kind}, scores")

    def test_hidden_states_and_attentions_come_one_entry_a_token(self):
        """They are those of other columns than the caller's, so they are refused."""
        for kind in ("llama", "mamba"):
            for name in ("output_hidden_states", "output_attentions"):
                call = lambda kind=kind, name=name: self.run(kind, return_dict_in_generate=True, **{name: True})  # noqa: E731
                refusal(call, name, what=f"{kind}, {name}")

    def test_the_returned_cache_serves_the_next_turn(self, kind):
        """A cache of the prompt read twice does not: none is returned."""
        assert self.run(kind, return_dict_in_generate=True).past_key_values is None


def doubled(ids, mask, times=2):
    """Each row repeated by hand, padded on the left."""
    rows = [row[real.bool()].repeat(times) for row, real in zip(ids, mask, strict=True)]
    longest = max(map(len, rows))
    made = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0), value=PAD) for row in rows])
    lengths = torch.tensor([[len(row)] for row in rows])
    return made, (torch.arange(longest) >= longest - lengths).long()


def run(model, ids, mask=None, strategy=None, **settings):
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD, **settings}
    mask = torch.ones_like(ids) if mask is None else mask
    call = strategy.generate if strategy else lambda model, ids, **kwargs: model.generate(ids, **kwargs)
    return call(model, ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **settings)


@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("kind", [*RECURRENT, "bloom", *tiny_models.DECODERS])
def test_the_text_is_that_of_generate_on_the_repeated_prompt(kind, times):
    model, (ids, mask) = model_of(kind), tiny_models.prompts((7, 7))
    out = run(model, ids, strategy=JustReadTwice(times=times))
    expected = run(model, *doubled(ids, mask, times))
    same_tokens(out.sequences[:, :7], ids, f"{kind}, the caller's prompt")
    same_tokens(out.sequences[:, 7:], expected.sequences[:, 7 * times :], kind)
    close(torch.stack(out.logits, 1), torch.stack(expected.logits, 1), kind, tolerance=1e-4)
    if times > 1:
        plain = run(model, ids)
        assert (torch.stack(out.logits, 1) - torch.stack(plain.logits, 1)).abs().max() > 1e-2, "read once is the same"


@pytest.mark.parametrize("kind", [*PADDED, "bloom", *tiny_models.DECODERS])
def test_a_padded_batch_equals_its_rows(kind):
    model, (ids, mask) = model_of(kind), tiny_models.prompts()
    batch = run(model, ids, mask, JustReadTwice())
    for row in range(3):
        alone = ids[row : row + 1, mask[row].bool()]
        single = run(model, alone, None, JustReadTwice())
        what = f"{kind}, row {row}"
        same_tokens(batch.sequences[row : row + 1, 12:], single.sequences[:, alone.shape[1] :], what)
        close(torch.stack(batch.logits, 1)[row], torch.stack(single.logits, 1)[0], what, tolerance=1e-4)


@pytest.mark.parametrize("kind", sorted({*RECURRENT} - {*PADDED}))
def test_a_padded_batch_is_refused_where_padding_enters_the_state(kind):
    model, (ids, mask) = model_of(kind), tiny_models.prompts()
    message = refusal(lambda: run(model, ids, mask, JustReadTwice()), "reads padding into its state", what=kind)
    assert "one length" in message
    plain = run(model, ids, mask).logits[0][1]
    alone = run(model, ids[1:2, mask[1].bool()]).logits[0][0]
    assert (plain - alone).abs().max() > 1e-2, "transformers' own generate is exact there, so nothing need be refused"


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_marked_tokens_are_repeated_in_their_place(kind):
    """Context and question are marked, with a gap between them; one row has no marks, one begins with bos."""
    model = model_of(kind)
    ids = torch.tensor([[0, 5, 6, 7, 8, 9, 10], [0, 0, 1, 12, 13, 14, 15], [0, 0, 0, 1, 16, 17, 18]])
    segments = torch.tensor([[0, 0, 1, 0, 2, 0, 0], [0] * 7, [0, 0, 0, 0, 0, 1, 1]])
    read = [[5, 6, 7, 8, 6, 7, 8, 9, 10], [1, 12, 13, 14, 15, 12, 13, 14, 15], [1, 16, 17, 18, 17, 18]]
    rows = [torch.tensor(row) for row in read]
    expected = [run(model, row[None]).sequences[0, len(row) :] for row in rows]
    out = run(model, ids, (ids > 0).long(), JustReadTwice(), segment_ids=segments).sequences
    same_tokens(out[:, :7], ids, "the caller's prompts")
    same_tokens(out[:, 7:], torch.stack(expected), kind)
    through = model.generate(
        ids, attention_mask=(ids > 0).long(), segment_ids=segments, custom_generate=JustReadTwice(), max_new_tokens=6,
        do_sample=False, pad_token_id=PAD,
    )  # fmt: skip
    same_tokens(through, out, "through custom_generate=")


def test_what_is_read_is_padded_on_the_left():
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    read = JustReadTwice(times=3).reads(Prompt(ids, ids > 0, torch.zeros_like(ids)))
    assert read.ids.tolist() == [[0] * 6 + [5, 6] * 3, [7, 8, 9, 10] * 3]
    assert read.mask.tolist() == (read.ids > 0).tolist()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom"])
def test_other_strategies_go_on_from_the_repeated_prompt(kind):
    model, (ids, mask) = model_of(kind), tiny_models.prompts()
    search = ContrastiveSearch(penalty_alpha=0.5, top_k=3)
    batch = run(model, ids, mask, JustReadTwice(decode_with=search)).sequences[:, 12:]
    for row in range(3):
        whole = ids[row : row + 1, mask[row].bool()].repeat(1, 2)
        single = run(model, whole, None, search).sequences[:, whole.shape[1] :]
        same_tokens(batch[row : row + 1], single, f"{kind}, contrastive search of row {row}, repeated by hand")
    if kind == "bloom":  # which follows no trees
        return
    greedy = run(model, ids, mask, JustReadTwice()).sequences
    assert not torch.equal(batch, greedy[:, 12:]), "the penalty changed nothing"
    for inner in (PromptLookup(draft_tokens=3), SpeculativeDecoding(tiny_models.shared("llama"), draft_tokens=3)):
        same_tokens(run(model, ids, mask, JustReadTwice(decode_with=inner)).sequences, greedy, f"{kind}, {inner}")


class Looks(PlainDecoding):
    """Notes the mask that a strategy sees once the prompt has been read."""

    def decode(self, run):
        super().decode(run)
        self.seen = run.attention_mask


@pytest.mark.parametrize("kind", ["llama", "mamba", "qwen3-next"])
def test_strategies_see_the_padding_of_all_that_was_read(kind):
    model, (ids, mask) = model_of(kind), tiny_models.prompts()
    looks = Looks()
    run(model, ids, mask, JustReadTwice(decode_with=looks), max_new_tokens=3)
    expected = torch.cat([doubled(ids, mask)[1], torch.ones(3, 3, dtype=torch.long)], dim=1)[:, : looks.seen.shape[1]]
    same_tokens(looks.seen.long(), expected, f"{kind}, the mask")
    assert looks.seen.shape[1] >= 24 + 2


def test_strategies_that_need_single_tokens_are_refused_on_recurrent_models():
    model, (ids, _) = tiny_models.shared("mamba"), tiny_models.prompts((5,))
    for inner, words in ((PromptLookup(draft_tokens=3), "recurrent state"), (ContrastiveSearch(), "no cache")):
        refusal(lambda inner=inner: run(model, ids, None, JustReadTwice(decode_with=inner)), words, what=str(inner))


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_sampling_draws_what_generate_draws_from_the_repeated_prompt(kind):
    model, (ids, mask) = model_of(kind), tiny_models.prompts((7, 7))
    settings = {"do_sample": True, "top_k": 20, "temperature": 1.5}
    torch.manual_seed(5)
    expected = run(model, *doubled(ids, mask), **settings).sequences[:, 14:]
    torch.manual_seed(5)
    same_tokens(run(model, ids, mask, JustReadTwice(), **settings).sequences[:, 7:], expected, kind)


@pytest.mark.parametrize("kind", ["mamba", "qwen3-next", "llama"])
def test_the_report_counts_what_was_read(kind):
    model, (ids, mask) = model_of(kind), tiny_models.prompts()
    plainly.state_problem(model, True)
    strategy = JustReadTwice()
    _, calls = tiny_models.calls_of(model, lambda: run(model, ids, mask, strategy))
    assert calls == [(3, 24)] + [(3, 1)] * 5, f"{kind}: {calls}"
    counted = strategy.report.target_positions
    assert counted == 3 * 24 + 3 * 5, f"{kind}: counted {counted} positions, expected {3 * 24 + 3 * 5}"


def test_what_cannot_be_honoured_is_refused():
    mamba, llama, (ids, mask) = tiny_models.shared("mamba"), tiny_models.shared("llama"), tiny_models.prompts()
    refusal(lambda: JustReadTwice(times=0), "times", what="never")
    long = torch.arange(70)[None] % 90 + 3
    for kind in ("llama", "qwen3-next"):
        model = model_of(kind)
        model = recurrent_with_context(model) if kind == "qwen3-next" else model
        refusal(lambda model=model: run(model, long, None, JustReadTwice()), "140", "128", what=f"{kind}, too long")
    state = adapter.empty_cache(mamba)
    refusal(lambda: run(mamba, ids, mask, JustReadTwice(), cache_params=state), "cache_params", what="a given state")
    refusal(lambda: run(llama, ids, mask, JustReadTwice(decode_with="greedy")), "decode_with", what="no strategy")
    refusal(lambda: run(mamba, ids, mask, JustReadTwice(decode_with="greedy")), "decode_with", what="no strategy")
    for model in (llama, recurrent("qwen3-next")):
        refusal(
            lambda model=model: run(model, ids, mask, JustReadTwice(), cache_implementation="static"),
            "cache that grows", what="static",
        )  # fmt: skip
        refusal(
            lambda model=model: run(model, ids, mask, JustReadTwice(), prefill_chunk_size=4), "one piece", what="chunks"
        )
    refusal(lambda: run(tiny_models.shared("openai-gpt"), ids, mask, JustReadTwice()), "state", what="no cache")


def recurrent_with_context(model):
    model.config.max_position_embeddings = tiny_models.CONTEXT
    return model


def test_a_model_whose_state_says_something_else_is_noticed():
    """Guards the question put to every model: a Mamba whose mask is dropped reads padding into its state."""
    model = tiny_models.build("mamba")
    assert plainly.state_problem(model, padded=True) is None
    broken = tiny_models.build("mamba")
    forward = broken.backbone.forward
    broken.backbone.forward = lambda *args, **kwargs: forward(*args, **{**kwargs, "attention_mask": None})
    assert plainly.state_problem(broken, padded=False) is None
    assert "padding" in str(plainly.state_problem(broken, padded=True))


def test_prompts_with_structure_are_still_refused_on_recurrent_models():
    inputs = structured.prompts(([3, (2, 2), 3],))
    message = refusal(
        lambda: SetBasedPrompting().generate(recurrent("mamba2"), **inputs, max_new_tokens=2, do_sample=False),
        "recurrent state", what="sets",
    )  # fmt: skip
    assert "rejected" not in message, f"nothing is rejected in reading a prompt: {message}"
