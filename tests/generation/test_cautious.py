"""Cautious decoding against a slow reference: no cache, one row, one trial at a time."""

from __future__ import annotations

import functools
import math
import zlib
from dataclasses import dataclass

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import DynamicCache, PreTrainedTokenizerFast

from hf_ext.generation import CautiousDecoding
from hf_ext.generation.endings import tokens_ending_in
from hf_ext.generation.trials import Segment, entropy, majority, trials_for
from hf_ext.testing import tiny_models
from hf_ext.testing.strategy import StrategyConformance

STOPS = tuple(range(10, 34))
EOS = 5


def noise(seed: int, position: int, trial: int, size: int) -> torch.Tensor:
    """Gumbel noise that belongs to one draw of one row, wherever it stands in a batch."""
    key = zlib.crc32(f"{seed} {position} {trial}".encode())
    uniform = torch.rand(size, generator=torch.Generator().manual_seed(key), dtype=torch.float64)
    return -(-uniform.log()).log()


@dataclass
class Keyed(CautiousDecoding):
    """Draws by `noise`, so that a row gives the same tokens in any company."""

    seeds: tuple[int, ...] = ()

    def draw(self, probabilities, places):
        chosen = [
            (p.double().log() + noise(self.seeds[row], position, trial, len(p))).argmax()
            for p, (row, position, trial) in zip(probabilities, places, strict=True)
        ]
        return torch.stack(chosen)


@torch.no_grad()
def reference(model, prompt, seed, options, *, new, eos=EOS):
    """The method, as plainly as it can be said. Returns the new tokens and all trials of each segment."""
    ids, segments = list(prompt), []

    @functools.cache
    def distribution(tokens):
        return model(torch.tensor([tokens]), use_cache=False).logits[0, -1].float().softmax(-1)

    while True:
        nats = -sum(x * math.log(x) for x in distribution(tuple(ids)).tolist() if x > 0)
        clipped = min(max((nats - options.low_entropy) / (options.high_entropy - options.low_entropy), 0), 1)
        count = options.min_trials + math.floor((options.max_trials - options.min_trials) * clipped)
        trials = []
        for number in range(count):
            tokens, nll = [], 0.0
            while True:
                p = distribution((*ids, *tokens))
                position = len(ids) - len(prompt) + len(tokens)
                token = int((p.double().log() + noise(seed, position, number, len(p))).argmax())
                tokens.append(token)
                nll -= math.log(p[token])
                full = len(ids) - len(prompt) + len(tokens) == new
                if count == 1 or token in options.stop_tokens or token == eos or full:
                    break
                if len(tokens) == options.max_trial_tokens:
                    break
            trials.append((math.exp(nll / len(tokens)), tokens))
        ids += min(trials, key=lambda trial: trial[0])[1]
        segments.append(trials)
        if ids[-1] == eos or len(ids) - len(prompt) == new:
            return ids[len(prompt) :], segments


def padded(rows, length=None):
    """Put rows of token ids into a tensor, padded on the right."""
    length = length or max(map(len, rows))
    return torch.tensor([[*row, *[tiny_models.PAD] * (length - len(row))] for row in rows])


def double(kind, **changes):
    """A tiny model whose padded and unpadded results differ by no more than 1e-12."""
    model = tiny_models.build(kind, **changes).double()
    model.set_attn_implementation("sdpa")
    return model


def run_keyed(model, strategy, lengths, **settings):
    """Run the strategy on padded prompts; return new tokens, prompts without padding, and the output."""
    ids, mask = tiny_models.prompts(lengths)
    settings = {"do_sample": True, "top_k": 0, "eos_token_id": EOS, **settings}
    out = strategy.generate(model, ids, attention_mask=mask, **settings)
    sequences = getattr(out, "sequences", out)
    rows = [row[-length:].tolist() for row, length in zip(ids, lengths, strict=True)]
    return sequences[:, ids.shape[1] :].tolist(), rows, out


@pytest.mark.parametrize(
    ("kind", "cap"), [("gpt2", None), ("llama", 3), ("qwen3", 5), ("mistral", None), ("gemma3", None), ("opt", 4)]
)
def test_a_padded_batch_gives_every_row_what_the_reference_gives_it_alone(kind, cap):
    model, seeds, new = double(kind), (11, 23, 35), 16  # windows are 8 wide
    strategy = Keyed(
        max_trials=4, stop_tokens=STOPS, low_entropy=1.0, high_entropy=4.5, seeds=seeds, max_trial_tokens=cap
    )
    found, prompts, _ = run_keyed(model, strategy, (9, 4, 2), max_new_tokens=new)
    alone = [reference(model, p, seed, strategy, new=new) for p, seed in zip(prompts, seeds, strict=True)]
    assert found == padded([tokens for tokens, _ in alone]).tolist()

    segments = [segment for _, segments in alone for segment in segments]
    drawn = sum(len(tokens) for segment in segments for _, tokens in segment)
    kept = sum(len(tokens) for tokens, _ in alone)
    assert strategy.report.tokens_per_row == [len(tokens) for tokens, _ in alone]
    assert strategy.report.details == {
        "segments": len(segments),
        "trials": sum(map(len, segments)),
        "mean_trials": sum(map(len, segments)) / len(segments),
        "discarded_tokens": drawn - kept,
    }
    assert len({len(tokens) for segment in segments for _, tokens in segment}) > 2, "trials should differ in length"
    # Trials that have ended do not go on costing: beyond the prompts and the tokens drawn, only the
    # best of a row waits, in at most one lane a row and pass.
    prompt_positions = 3 * 9
    waiting = 3 * strategy.report.target_calls
    assert strategy.report.target_positions - prompt_positions <= drawn + waiting
    assert strategy.report.target_positions - prompt_positions < 0.8 * strategy.report.target_calls * 12


def test_one_trial_is_ordinary_sampling_in_a_batch():
    ids, mask = tiny_models.prompts()
    model = tiny_models.shared("llama")
    settings = {
        "attention_mask": mask, "do_sample": True, "temperature": 1.4, "top_p": 0.9, "max_new_tokens": 20,
        "eos_token_id": list(range(10, 20)), "return_dict_in_generate": True, "output_scores": True,
    }  # fmt: skip
    torch.manual_seed(5)
    expected = model.generate(ids, **settings)
    torch.manual_seed(5)
    found = model.generate(ids, custom_generate=CautiousDecoding(max_trials=1), **settings)
    assert found.sequences.tolist() == expected.sequences.tolist()
    assert torch.equal(torch.stack(found.scores), torch.stack(expected.scores))
    rows = [len(row) for row in expected.sequences.tolist()]
    assert len(set(rows)) == 1
    ended = (expected.sequences[:, ids.shape[1] :] == tiny_models.PAD).any(1).sum()
    assert 0 < ended < 3, "some rows should end early, not all"


def test_a_sure_model_is_sampled_from_as_usual_even_where_trials_are_allowed():
    ids = tiny_models.prompts((6,))[0]
    model = tiny_models.shared("mistral")
    torch.manual_seed(8)
    expected = model.generate(ids, do_sample=True, top_k=0, max_new_tokens=20)
    torch.manual_seed(8)
    strategy = CautiousDecoding(max_trials=9, low_entropy=50, high_entropy=60, stop_tokens=STOPS)
    found = model.generate(ids, custom_generate=strategy, do_sample=True, top_k=0, max_new_tokens=20)
    assert found.tolist() == expected.tolist()
    assert strategy.report.details["mean_trials"] == 1.0


def test_the_better_of_two_draws_has_the_law_that_pairs_give():
    model = tiny_models.build("llama", vocab_size=12)
    ids = torch.tensor([[3, 7, 5]])
    with torch.no_grad():
        p = model(ids).logits[0, -1].float().softmax(-1)
    # The winner of trials a and b of one token each is the likelier of them.
    law = torch.zeros(12)
    for a in range(12):
        for b in range(12):
            law[a if p[a] >= p[b] else b] += p[a] * p[b]
    draws = 3000
    torch.manual_seed(0)
    strategy = CautiousDecoding(max_trials=2, min_trials=2, max_trial_tokens=1, stop_tokens=[11])
    out = model.generate(
        ids, custom_generate=strategy, do_sample=True, top_k=0, num_return_sequences=draws, max_new_tokens=1
    )
    share = out[:, -1].bincount(minlength=12) / draws
    distance, to_plain = (share - law).abs().sum() / 2, (share - p).abs().sum() / 2
    assert distance < 0.03, f"total variation to the law {distance:.4f}: {share.tolist()} against {law.tolist()}"
    assert to_plain > 0.1, f"total variation to plain sampling is only {to_plain:.4f}"


@pytest.mark.parametrize(
    ("nats", "trials"), [(0.0, 1), (0.01, 1), (0.17, 1), (0.18, 2), (0.755, 5), (1.499, 9), (1.5, 10), (7.0, 10)]
)
def test_entropy_decides_the_number_of_trials(nats, trials):
    assert trials_for(nats, 0.01, 1.5, 1, 10) == trials
    assert trials_for(nats, 0.01, 1.5, 3, 3) == 3


def test_entropy_is_in_nats_and_bears_impossible_tokens():
    scores = torch.tensor([0.5, 0.25, 0.25, 0.0]).log()
    assert entropy(scores).item() == pytest.approx(1.5 * math.log(2), abs=1e-6)


def test_the_lowest_perplexity_wins_whenever_its_trial_ended():
    segment = Segment(row=0, lane=4, device=torch.device("cpu"))
    segment.split(3)
    scores = torch.tensor([[0.6, 0.3, 0.1]] * 3).log()
    segment.append(torch.tensor([1, 0, 2]), scores)
    segment.end(torch.tensor([True, False, False]), torch.tensor([False] * 3))  # perplexity 1 / 0.3
    assert (segment.best.number, segment.lanes, segment.numbers) == (0, [4, 4], [1, 2])
    segment.append(torch.tensor([1, 0]), scores[:2])
    segment.end(torch.tensor([False, True]), torch.tensor([False] * 2))  # 1 / sqrt(0.1 * 0.6) = 1 / 0.24
    assert segment.best.number == 0
    segment.append(torch.tensor([1]), scores[:1])
    segment.end(torch.tensor([True]), torch.tensor([True]))  # 1 / cbrt(0.6 * 0.3 * 0.3) = 1 / 0.38
    assert (segment.best.number, segment.best.tokens.tolist(), segment.best.finished) == (1, [0, 1, 1], True)
    assert math.exp(segment.best.mean_nll) == pytest.approx((0.6 * 0.3 * 0.3) ** (-1 / 3))
    assert segment.drawn == 6


def byte_level_tokenizer():
    words = ["a", ".", "Ġb", "),", "],Ġ", "ĊĊ", "Ġ", "x.y", "ãĢĤ", "<"]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="<end.>")


def metaspace_tokenizer():
    words = ["<unk>", "▁a", "▁.", "b,", "<0x0A>", "<0x21>", "▁", "c▁", "?▁"]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_punctuation_is_read_off_byte_level_and_metaspace_vocabularies():
    every = list(".,?!:;)]}\n。")
    assert tokens_ending_in(byte_level_tokenizer(), every) == {1, 3, 4, 5, 8}  # not [PAD], not <end.>
    assert tokens_ending_in(metaspace_tokenizer(), every) == {2, 3, 4, 5, 8}
    tokenizer = byte_level_tokenizer()
    assert tokens_ending_in(tokenizer, ["y"]) == {7}
    tokenizer.add_tokens(["really"])
    assert tokens_ending_in(tokenizer, ["y"]) == {7, 10 + 2}, "tokens added later count, too"


def test_the_tokenizer_comes_from_the_option_the_call_or_the_checkpoint(tmp_path):
    ids = tiny_models.prompts((5,))[0]
    tokenizer = tiny_models.tokenizer()
    stops = sorted(tokens_ending_in(tokenizer, ".,?!:;)]}\n"))
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": 12}
    model = tiny_models.build("llama")

    def tokens(strategy, **more):
        torch.manual_seed(3)
        return strategy.generate(model, ids, **settings, **more).tolist()

    with pytest.raises(ValueError, match=r"tokenizer=tokenizer.*stop_tokens="):
        tokens(CautiousDecoding())
    expected = tokens(CautiousDecoding(stop_tokens=stops))
    assert tokens(CautiousDecoding(tokenizer=tokenizer)) == expected
    assert tokens(CautiousDecoding(), tokenizer=tokenizer) == expected
    assert tokens(CautiousDecoding(stop_tokens=list(".,?!:;)]}")), tokenizer=tokenizer) == expected
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no tokenizer was found"):
        tokens(CautiousDecoding())
    tokenizer.save_pretrained(tmp_path)
    model = type(model).from_pretrained(tmp_path)
    assert tokens(CautiousDecoding()) == expected
    with pytest.raises(ValueError, match="ends in any of"):
        tokens(CautiousDecoding(stop_tokens=["€"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_trials": 0}, "max_trials must be a positive int"),
        ({"min_trials": 3, "max_trials": 2}, "must not exceed"),
        ({"low_entropy": 2.0}, "low_entropy < high_entropy"),
        ({"stop_tokens": "."}, r"list, such as \['.'\]"),
        ({"stop_tokens": []}, "stop_tokens is empty"),
        ({"stop_tokens": [1.5]}, "token ids and non-empty texts, got 1.5"),
        ({"max_trial_tokens": 0}, "max_trial_tokens must be a positive int"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CautiousDecoding(**options)


def test_settings_that_sampling_would_ignore_are_refused():
    ids, strategy = tiny_models.prompts((5,))[0], CautiousDecoding(stop_tokens=STOPS)
    model = tiny_models.build("llama")
    with pytest.raises(ValueError, match=r"temperature=0.5 takes effect with do_sample=True only"):
        strategy.generate(model, ids, temperature=0.5, max_new_tokens=4)
    model.generation_config.do_sample = True
    with pytest.raises(ValueError, match="call generate with do_sample=True"):
        strategy.generate(model, ids, do_sample=False, max_new_tokens=4)
    model.generation_config.do_sample = False  # nobody said anything: the model's own distribution
    torch.manual_seed(1)
    plain = strategy.generate(model, ids, max_new_tokens=8)
    torch.manual_seed(1)
    assert plain.tolist() == strategy.generate(model, ids, do_sample=True, top_k=0, max_new_tokens=8).tolist()


def test_caches_whose_columns_cannot_move_are_refused_and_a_plain_one_is_filled():
    model, ids = tiny_models.shared("mistral"), tiny_models.prompts((6,))[0]
    strategy = CautiousDecoding(min_trials=2, max_trials=4, stop_tokens=STOPS)
    for cache in ({"past_key_values": DynamicCache(config=model.config)}, {"cache_implementation": "static"}):
        with pytest.raises(ValueError, match=r"DynamicCache\(\) made without a config"):
            strategy.generate(model, ids, max_new_tokens=4, **cache)
    cache = DynamicCache()
    out = strategy.generate(model, ids, max_new_tokens=4, past_key_values=cache)
    assert cache.get_seq_length() == out.shape[1] - 1


def test_the_returned_cache_fits_rows_that_ended_at_different_places():
    model = double("gemma3")
    strategy = Keyed(max_trials=4, min_trials=2, stop_tokens=STOPS, seeds=(11, 23, 35))
    new, prompts, out = run_keyed(model, strategy, (9, 4, 2), max_new_tokens=14, return_dict_in_generate=True)
    lengths = strategy.report.tokens_per_row
    assert len(set(lengths)) > 1, "rows should end at different places"
    assert out.past_key_values.get_seq_length() == out.sequences.shape[1] - 1
    mask = torch.zeros_like(out.sequences)
    for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        mask[row, 9 - len(prompt) : 9 + length] = 1
    width = mask.shape[1] - 1
    longest = lengths.index(max(lengths))
    with torch.no_grad():
        last = out.sequences[:, -1:]
        position = (mask.cumsum(1) - 1)[:, -1:]
        settings = {"attention_mask": mask, "position_ids": position, "past_key_values": out.past_key_values}
        found = model(last, **settings).logits[longest, -1]
        whole = torch.tensor([[*prompts[longest], *new[longest]]])
        expected = model(whole, use_cache=False).logits[0, -1]
    assert (found - expected).abs().max() < 1e-9
    keys = out.past_key_values.layers[0].keys
    for row, length in enumerate(lengths):
        assert (keys[row, :, 9 + length - 1 : width] == 0).all()
        assert (keys[row, :, 9 - len(prompts[row]) : 9 + length - 1] != 0).all()


def test_scores_of_rows_that_have_ended_say_padding():
    strategy = Keyed(max_trials=4, min_trials=2, stop_tokens=STOPS, seeds=(11, 23, 35))
    settings = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 14}
    new, _, out = run_keyed(double("gemma3"), strategy, (9, 4, 2), **settings)
    lengths = strategy.report.tokens_per_row
    assert len(set(lengths)) > 1, "rows should end at different places"
    certain = torch.full((tiny_models.VOCABULARY,), -torch.inf)
    certain[tiny_models.PAD] = 0
    for step, scores in enumerate(out.scores):
        for row, length in enumerate(lengths):
            assert torch.equal(scores[row], certain) == (step >= length)
            assert scores[row, new[row][step]].isfinite()


def test_several_answers_are_independent_and_voted_on():
    ids = tiny_models.prompts((5,))[0]
    torch.manual_seed(0)
    strategy = CautiousDecoding(max_trials=3, stop_tokens=STOPS)
    out = strategy.generate(tiny_models.shared("llama"), ids, do_sample=True, num_return_sequences=4, max_new_tokens=8)
    assert len({tuple(row) for row in out.tolist()}) == 4
    assert majority(["b", "a", "a", "b", "a"]) == "a"
    assert majority([3, 1, 1, 3]) == 3


class TestConformance(StrategyConformance):
    def strategy(self) -> CautiousDecoding:
        return CautiousDecoding(max_trials=3, min_trials=2, stop_tokens=STOPS)


class TestConformanceOfOneTrial(StrategyConformance):
    models = ("llama",)

    def strategy(self) -> CautiousDecoding:
        return CautiousDecoding(max_trials=1)
