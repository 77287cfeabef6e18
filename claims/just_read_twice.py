"""Claim checks of reading twice (arXiv:2407.05483): recall by a small recurrent model, trained from scratch.

A row holds sixteen facts, one of each kind, in random order, and asks for the fact of one kind. A fact is one token, a
kind with one of eight values. An RWKV with a small state is trained on rows that are read once, rows that
are read twice, and rows with the question before the facts as well, in turn, so that none of them is new to it.
"""

from __future__ import annotations

import functools

import torch
from transformers import Mamba2Config, Mamba2ForCausalLM, PreTrainedModel, RwkvConfig, RwkvForCausalLM, set_seed

from hf_ext import adapter
from hf_ext.claims import held_out
from hf_ext.claims.held_out import bootstrap, mean
from hf_ext.generation.just_read_twice import JustReadTwice
from hf_ext.verify import Claim, Measurement, Threshold

DATA = "Synthetic facts of sixteen kinds, one of which is asked for"
KINDS, VALUES = 16, 8
VOCABULARY = KINDS + KINDS * VALUES  # questions, facts
STEPS, ROWS, RATE, SEED, TEST_ROWS = 800, 64, 5e-3, 0, 1024


def questions(count: int, seed: int, first: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `(count, length)` facts with a question behind them, and `(count,)` the fact that is right.

    Args:
        count: rows.
        seed: of the draw.
        first: put the question before the facts as well.
    """
    draw = torch.Generator().manual_seed(seed)
    values = torch.randint(VALUES, (count, KINDS), generator=draw)
    facts = KINDS + VALUES * torch.arange(KINDS) + values
    asked = torch.randint(KINDS, (count, 1), generator=draw)
    shuffled = facts.gather(1, torch.rand(count, KINDS, generator=draw).argsort(1))
    return torch.cat([asked, shuffled, asked] if first else [shuffled, asked], dim=1), facts.gather(1, asked)[:, 0]


@functools.cache
def model() -> PreTrainedModel:
    """Train an RWKV of two layers of 24 channels; the answers alone are targets."""
    set_seed(SEED)
    config = RwkvConfig(
        vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=2, intermediate_size=128, rescale_every=0,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    trained = RwkvForCausalLM(config)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 30) * (1 - 0.9 * step / STEPS)
    )
    for step in range(STEPS):
        ids, answers = questions(ROWS, step, first=step % 3 == 2)
        logits = trained(ids.repeat(1, 1 + (step % 3 == 1)), use_cache=False).logits[:, -1]
        torch.nn.functional.cross_entropy(logits, answers).backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return trained.eval()


@functools.cache
def right(times: int, first: bool = False) -> list[float]:
    """Return 1 for each unseen question that is answered rightly, otherwise 0.

    Args:
        times: how often the model reads facts and question.
        first: see `questions`.
    """
    ids, answers = questions(TEST_ROWS, 10**9, first)
    out = JustReadTwice(times=times).generate(
        model(), ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, pad_token_id=0
    )
    return (out[:, -1] == answers).float().tolist()


def recall() -> Measurement:
    """Compare answers after reading twice with answers after reading once, question by question."""
    once, twice = right(1), right(2)
    gain = [a - b for a, b in zip(twice, once, strict=True)]
    return Measurement(
        mean(gain), spread=bootstrap(gain), spread_of=f"95 % bootstrap interval over {TEST_ROWS} questions",
        seeds=(SEED,), details={
            "read once": mean(once), "read twice": mean(twice), "read three times": mean(right(3)),
            "read once, the question before the facts as well": mean(right(1, first=True)), "chance": 1 / VALUES,
            "steps of training": STEPS, "parameters": sum(p.numel() for p in model().parameters()),
        },
    )  # fmt: skip


def random_recurrent() -> PreTrainedModel:
    """Return a Mamba2 with random weights for the vocabulary of the embedded tokenizer."""
    set_seed(SEED)
    size = held_out.load()[0].config.vocab_size
    config = Mamba2Config(
        vocab_size=size, hidden_size=64, num_hidden_layers=2, num_heads=4, head_dim=32, state_size=16, n_groups=1,
        chunk_size=64, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return Mamba2ForCausalLM(config).eval()


def same_text() -> Measurement:
    """Compare with `generate` on prompts repeated by hand, one at a time, for a recurrent model and for another."""
    target, tokenizer = held_out.load()
    prompts = held_out.batch(held_out.prompts(8))
    settings = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    wrong = 0
    for reader in (random_recurrent(), target):
        ours = JustReadTwice().generate(reader, **prompts, **settings)
        for row, ids in enumerate(held_out.prompt_ids(prompts)):
            whole = torch.tensor([ids + ids])
            expected = reader.generate(whole, attention_mask=torch.ones_like(whole), **settings)
            wrong += int((ours[row, -24:] != expected[0, -24:]).sum())
    return Measurement(wrong, details={"tokens compared": 2 * 8 * 24, "models": 2})


def state_size() -> Measurement:
    """Compare the numbers that a model keeps of a prompt read twice and read once."""

    def kept(reader: PreTrainedModel, times: int) -> int:
        ids = torch.tensor([held_out.prompt_ids(held_out.batch(held_out.prompts(8)))[0]]).repeat(1, times)
        [state] = adapter.states_of(adapter.extend_kwargs(reader, reader(ids, use_cache=True), {}))
        found = 0
        for layer in state.layers:
            for value in vars(layer).values():
                parts = value.values() if isinstance(value, dict) else [value]
                found += sum(part.numel() for part in parts if isinstance(part, torch.Tensor))
        return found

    reader, target = random_recurrent(), held_out.load()[0]
    with torch.no_grad():
        once, twice = kept(reader, 1), kept(reader, 2)
        growth = kept(target, 2) / kept(target, 1)
    return Measurement(
        twice / once, details={"numbers kept, read once": once, "the same ratio of a model with attention": growth}
    )


CLAIMS = (
    Claim(
        name="recall",
        paper="Recurrent language models recall more of their context when the prompt is repeated.",
        measures="accuracy of a recurrent model after reading the prompt twice less that after reading it once",
        threshold=Threshold(">", 0),
        check=recall,
        unit="share of questions",
        seconds=60,
        data=DATA,
    ),
    Claim(
        name="same-text",
        paper="(follows from the definition) The text is the one that follows the repeated prompt.",
        measures="tokens that differ from greedy search on prompts repeated by hand, one at a time, from a padded "
        "batch",
        threshold=Threshold("==", 0),
        check=same_text,
        unit="tokens",
        seconds=30,
        data=held_out.DATA,
    ),
    Claim(
        name="state-size",
        paper="Repeating the prompt leaves the memory of a recurrent model at a constant size.",
        measures="numbers in the state of a recurrent model after reading twice over those after reading once",
        threshold=Threshold("==", 1),
        check=state_size,
        unit="times",
        seconds=10,
        data=held_out.DATA,
    ),
)
