"""Cautious decoding against a slow reference: no cache, one row, one trial at a time."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from hf_ext.generation import CautiousDecoding
from hf_ext.generation.cautious import entropy, majority, trials_for
from hf_ext.generation.endings import tokens_ending_in
from hf_ext.testing import tiny_models

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


def reference(model, prompt, seed, options, *, new, eos=EOS, process=lambda ids, logits: logits):
    """The method, as plainly as it can be said. Returns the new tokens and what happened on the way."""
    ids, segments, drawn = list(prompt), [], 0

    def scores_after(tokens):
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].float()
        return process(torch.tensor([tokens]), logits[None])[0]

    while True:
        scores = scores_after(ids)
        p = scores.softmax(-1)
        nats = -sum(x * math.log(x) for x in p.tolist() if x > 0)
        clipped = min(max((nats - options.low_entropy) / (options.high_entropy - options.low_entropy), 0), 1)
        count = options.min_trials + math.floor((options.max_trials - options.min_trials) * clipped)
        trials = []
        for number in range(count):
            tokens, nll = [], 0.0
            while True:
                p = scores_after(ids + tokens).softmax(-1)
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
            drawn += len(tokens)
        ids += min(trials, key=lambda trial: trial[0])[1]
        segments.append(trials)
        if ids[-1] == eos or len(ids) - len(prompt) == new:
            return ids[len(prompt) :], segments, drawn


def padded(rows, length=None):
    """Put rows of token ids into a tensor, padded on the right."""
    length = length or max(map(len, rows))
    return torch.tensor([[*row, *[tiny_models.PAD] * (length - len(row))] for row in rows])


def double(kind, **changes):
    """A tiny model whose padded and unpadded results differ by no more than 1e-12."""
    model = tiny_models.build(kind, **changes).double()
    model.set_attn_implementation("sdpa")
    return model


@pytest.mark.parametrize("kind", tiny_models.DECODERS)
def test_a_padded_batch_gives_every_row_what_the_reference_gives_it_alone(kind):
    model = double(kind)
    lengths, seeds, new = (9, 4, 2), (11, 22, 33), 26
    ids, mask = tiny_models.prompts(lengths)
    strategy = Keyed(max_trials=5, stop_tokens=STOPS, low_entropy=0.5, high_entropy=4.5, seeds=seeds)
    found = model.generate(
        ids, attention_mask=mask, custom_generate=strategy, do_sample=True, top_k=0, max_new_tokens=new,
        eos_token_id=EOS,
    )  # fmt: skip
    alone = [
        reference(model, row[-length:].tolist(), seed, strategy, new=new)
        for row, length, seed in zip(ids, lengths, seeds, strict=True)
    ]
    assert found[:, ids.shape[1] :].tolist() == padded([tokens for tokens, _, _ in alone]).tolist()
    details = strategy.report.details
    segments = [segment for _, segments, _ in alone for segment in segments]
    assert details["segments"] == len(segments)
    assert details["trials"] == sum(map(len, segments))
    assert details["discarded_tokens"] == sum(drawn - len(tokens) for tokens, _, drawn in alone)
    assert strategy.report.tokens_per_row == [len(tokens) for tokens, _, _ in alone]
    assert len({len(tokens) for segment in segments for _, tokens in segment}) > 2, "trials should differ in length"
