"""Claim checks of cautious decoding (arXiv:2507.03038) on the embedded target model."""

from __future__ import annotations

import functools
from typing import Any

import torch

from hf_ext.claims import held_out
from hf_ext.claims.held_out import DATA, bootstrap, mean
from hf_ext.generation import CautiousDecoding
from hf_ext.generation.trials import majority
from hf_ext.metrics import coherence, repetition_diversity
from hf_ext.verify import Claim, Measurement, Threshold

PROMPTS, TOKENS, SEEDS = 12, 40, (0, 1)
#: For the next line of a file: more prompts, fewer tokens, several answers each.
LINE_PROMPTS, LINE_TOKENS, ANSWERS = 32, 12, 3


def sample(
    seed: int, max_trials: int | None = None, count: int = PROMPTS, tokens: int = TOKENS, answers: int = 1
) -> torch.Tensor:
    """Return `(count * answers, new)` ids drawn at temperature 1.

    Args:
        seed: of torch's global generator, whose state is put back afterwards.
        max_trials: of `CautiousDecoding`; `None` is transformers' own sampling.
        count: prompts.
        tokens: new tokens, exactly so many unless answers are short.
        answers: independent continuations of each prompt.
    """
    model, tokenizer = held_out.load()
    inputs = held_out.batch(held_out.prompts(count))
    options: dict[str, Any] = {
        "max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": True, "top_k": 0, "temperature": 1.0,
        "num_return_sequences": answers,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if max_trials is None:
            out = model.generate(**inputs, **options)
        else:
            out = CautiousDecoding(max_trials=max_trials).generate(model, **inputs, tokenizer=tokenizer, **options)
    return out[:, inputs["input_ids"].shape[1] :]


@functools.cache
def texts(max_trials: int | None) -> tuple[torch.Tensor, ...]:
    """Return the continuations of all prompts, one tensor per seed."""
    return tuple(sample(seed, max_trials) for seed in SEEDS)


@functools.cache
def nats(max_trials: int | None) -> list[float]:
    """Return each prompt's surprise in nats per token of its continuations, the mean over seeds."""
    model, _ = held_out.load()
    before = held_out.prompt_ids(held_out.batch(held_out.prompts(PROMPTS)))
    runs = [coherence(model, before, out.tolist())["per_text"] for out in texts(max_trials)]
    return [-mean(values) for values in zip(*runs, strict=True)]


@functools.cache
def answers(max_trials: int | None) -> list[list[str]]:
    """Return for each prompt the lines with which independent continuations begin."""
    tokenizer = held_out.load()[1]
    ids = sample(SEEDS[0], max_trials, LINE_PROMPTS, LINE_TOKENS, ANSWERS)
    lines = [first_line(text) for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    return [lines[i : i + ANSWERS] for i in range(0, len(lines), ANSWERS)]


def first_line(text: str) -> str:
    """Return the first line of a continuation that holds anything, without indentation.

    Example:
        >>> first_line("\\n    return x\\n\\ndef")
        'return x'
    """
    return text.lstrip().split("\n", 1)[0].rstrip()


def one_trial() -> Measurement:
    """Compare token for token with transformers' sampling, in one left-padded batch."""
    different = sum(int((sample(seed, 1) != sample(seed)).sum()) for seed in SEEDS)
    control = int((sample(SEEDS[0], 10) != sample(SEEDS[0])).sum())
    return Measurement(
        different,
        seeds=SEEDS,
        details={
            "tokens compared": len(SEEDS) * PROMPTS * TOKENS,
            "tokens that differ with ten trials": control,
            "of": PROMPTS * TOKENS,
        },
    )


def repeatable() -> Measurement:
    """Run twice with the same seed."""
    first, second = texts(10)[0], sample(SEEDS[0], 10)
    return Measurement(
        int((first != second).sum()),
        seeds=SEEDS,
        details={
            "tokens compared": first.numel(),
            "tokens that differ with another seed": int((first != texts(10)[1]).sum()),
        },
    )


def lower_surprise() -> Measurement:
    """Compare the surprise of texts, prompt by prompt, and how varied they are."""
    gain = [plain - cautious for plain, cautious in zip(nats(None), nats(10), strict=True)]
    names = {None: "sampling", 3: "3 trials at most", 10: "10 trials at most"}
    details = {f"nats per token, {name}": mean(nats(trials)) for trials, name in names.items()}
    for trials in (None, 10):
        diversity = mean([repetition_diversity(out.tolist())["diversity"] for out in texts(trials)])
        details[f"diversity, {names[trials]}"] = diversity
    return Measurement(
        mean(gain),
        spread=bootstrap(gain),
        spread_of=f"95 % bootstrap interval over {PROMPTS} prompts",
        seeds=SEEDS,
        details=details,
    )


def next_line() -> Measurement:
    """Compare how often the next line of the file comes out exactly, alone and by a vote."""
    truth = [first_line(prompt.reference) for prompt in held_out.prompts(LINE_PROMPTS)]
    single, votes = {}, {}
    for name, trials in (("sampling", None), ("cautious", 10)):
        both = list(zip(answers(trials), truth, strict=True))
        single[name] = [mean([float(line == right) for line in lines]) for lines, right in both]
        votes[name] = mean([float(majority(lines) == right) for lines, right in both])
    gain = [ours - plain for ours, plain in zip(single["cautious"], single["sampling"], strict=True)]
    return Measurement(
        mean(gain),
        spread=bootstrap(gain),
        spread_of=f"95 % bootstrap interval over {LINE_PROMPTS} prompts",
        seeds=SEEDS[:1],
        details={
            **{f"{name}, one answer": mean(hits) for name, hits in single.items()},
            **{f"{name}, vote of {ANSWERS}": share for name, share in votes.items()},
        },
    )


CLAIMS = (
    Claim(
        name="one-trial",
        paper="Where the model is sure one trial is made, which is ordinary sampling (algorithm 1).",
        measures="tokens that differ from sampling with the same seed, at max_trials=1",
        threshold=Threshold("==", 0),
        check=one_trial,
        unit="tokens",
        seconds=10,
        data=DATA,
    ),
    Claim(
        name="repeatable",
        paper="(Not of the paper.) The same seed gives the same text, although trials run as one batch.",
        measures="tokens that differ between two runs with the same seed",
        threshold=Threshold("==", 0),
        check=repeatable,
        unit="tokens",
        seconds=15,
        data=DATA,
    ),
    Claim(
        name="lower-surprise",
        paper="Of several trials the one of lowest perplexity is kept, the likeliest and most reliable (section 3).",
        measures="surprise of sampled text minus that of cautious text, at the same temperature",
        threshold=Threshold(">", 0),
        check=lower_surprise,
        unit="nats per token",
        seconds=15,
        data=DATA,
    ),
    Claim(
        name="next-line",
        paper="Answers are right more often than those of sampling (section 4: reasoning, mathematics, images).",
        measures="share of prompts whose next line comes out exactly as in the file, minus that of sampling",
        threshold=Threshold(">", 0),
        check=next_line,
        seconds=20,
        data=DATA,
    ),
)
