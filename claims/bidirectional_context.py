"""Claim checks of bidirectional context (arXiv:2505.11754): questions of several hops, small models from scratch.

A document is one token, an edge from a name to a name. A row holds the six edges of two chains of four names, in random
order, and asks where two or three hops from the first name of the first chain lead. Models of two layers are trained,
one with the causal mask, one with documents that see each other, on questions of one, two and three hops. Two layers
follow two edges from the question; for three hops, documents must have read each other.
"""

from __future__ import annotations

import copy
import functools
import itertools

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, set_seed

from hf_ext.attention import masks_for
from hf_ext.claims.held_out import bootstrap, mean
from hf_ext.generation.bidirectional_context import BidirectionalContext
from hf_ext.generation.structured.prompting import Prompt
from hf_ext.verify import Claim, Measurement, Threshold

DATA = "Synthetic questions of two and three hops over six documents"
STEPS, ROWS, RATE, SEEDS, TEST_ROWS = 900, 64, 3e-3, (0, 1), 256
NAMES, HOPS = 8, 3
DOCUMENTS = 2 * HOPS
VOCABULARY = NAMES + NAMES**2 + NAMES * HOPS  # names, which are answers only, edges, and questions
#: Chain, start and hops of every question that a row can ask.
QUESTIONS = [(chain, start, hops) for chain in (0, 1) for hops in (1, 2, 3) for start in range(HOPS - hops + 1)]


def documents(count: int, seed: int, order: str = "random") -> tuple[torch.Tensor, torch.Tensor]:
    """Return `(count, DOCUMENTS)` edges and `(count, 2, HOPS + 1)` the names of their chains.

    Args:
        count: rows.
        seed: of the draw.
        order: of the documents: random, or the first chain's `forward` or `backward` among the others.
    """
    draw = torch.Generator().manual_seed(seed)
    names = torch.rand(count, NAMES, generator=draw).argsort(1).view(count, 2, HOPS + 1)
    edges = (NAMES + NAMES * names[..., :-1] + names[..., 1:]).flatten(1)
    places = torch.rand(count, DOCUMENTS, generator=draw)
    if order != "random":
        places[:, :HOPS] = places[:, :HOPS].sort(1, descending=order == "backward").values
    return edges.gather(1, places.argsort(1)), names


def asked(names: torch.Tensor, chain: int, start: int, hops: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens of a question, `(count,)`, and its answers."""
    return NAMES + NAMES**2 + NAMES * (hops - 1) + names[:, chain, start], names[:, chain, start + hops]


@functools.cache
def models_of(bidirectional: bool, seed: int) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Train a model on all questions of its rows, each of which sees the documents and itself.

    Args:
        bidirectional: with documents that see each other.
        seed: of the weights and of the rows.

    Returns:
        The model after half of its training, and at the end.
    """
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 30) * (1 - 0.9 * step / STEPS)
    )
    length = DOCUMENTS + len(QUESTIONS)
    ids = torch.zeros(1, length, dtype=torch.long)
    number = torch.arange(length)[None] + 1
    owners = torch.where(number <= DOCUMENTS, number, 0)
    structure = BidirectionalContext(bidirectional=bidirectional).structure(Prompt(ids, ids == 0, owners))
    structure = structure.segments(number - owners, (number > owners).long())  # the questions, side by side
    given = {"attention_mask": masks_for(model, structure), "position_ids": structure.queries.position.long()}
    half = model
    for step in range(STEPS):
        if step == STEPS // 2:
            half = copy.deepcopy(model)
        edges, names = documents(ROWS, STEPS * seed + step)
        pairs = [asked(names, *question) for question in QUESTIONS]
        ids = torch.cat([edges, torch.stack([question for question, _ in pairs], dim=1)], dim=1)
        logits = model(ids, **given, use_cache=False).logits[:, DOCUMENTS:]
        answers = torch.stack([answer for _, answer in pairs], dim=1)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return half.eval(), model.eval()


@functools.cache
def right(
    bidirectional: bool, order: str = "random", orders: int = 1, half: bool = False
) -> tuple[list[float], list[float]]:
    """Return 1 for each unseen question that is answered rightly, otherwise 0, and the peaks of attention.

    Questions of two hops come first, and each is asked of a model of every seed.

    Args:
        bidirectional: the models trained and read so.
        order: see `documents`.
        orders: that the method chooses among; with one there are no peaks.
        half: take the model after half of its training.
    """
    edges, names = documents(TEST_ROWS, 10**9, order)
    strategy = BidirectionalContext(orders=orders, bidirectional=bidirectional)
    found: list[float] = []
    peaks: list[float] = []
    for hops, seed in itertools.product((2, 3), SEEDS):
        model = models_of(bidirectional, seed)[0 if half else 1]
        question, answer = asked(names, 0, 0, hops)
        ids = torch.cat([edges, question[:, None]], dim=1)
        owners = torch.cat([torch.arange(DOCUMENTS) + 1, torch.zeros(1, dtype=torch.long)]).expand_as(ids)
        out = strategy.generate(
            model, ids, attention_mask=torch.ones_like(ids), segment_ids=owners, max_new_tokens=1, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
        found += (out[:, -1] == answer).float().tolist()
        peaks += [max(row) for row in strategy.report.details.get("peaks", [])] if strategy.report else []
    return found, peaks


def difference(ours: list[float], theirs: list[float], **details: float) -> Measurement:
    """Compare answers question by question."""
    gain = [a - b for a, b in zip(ours, theirs, strict=True)]
    each = [gain[TEST_ROWS * i :][:TEST_ROWS] + gain[TEST_ROWS * (i + len(SEEDS)) :][:TEST_ROWS] for i in SEEDS]
    return Measurement(
        mean(gain), spread=bootstrap(gain), spread_of=f"95 % bootstrap interval over {len(gain)} answers",
        seeds=SEEDS, details={
            **{f"difference of seed {seed}": mean(own) for seed, own in zip(SEEDS, each, strict=True)}, **details,
            "steps of training": STEPS, "guessing the end of a chain": 0.5},
    )  # fmt: skip


def by_hops(name: str, answers: list[float]) -> dict[str, float]:
    """Return the accuracy on questions of two and of three hops."""
    half = len(answers) // 2
    return {f"{name}, two hops": mean(answers[:half]), f"{name}, three hops": mean(answers[half:])}


def modified_mask() -> Measurement:
    """Compare the models, each read as it was trained."""
    ours, theirs = right(True)[0], right(False)[0]
    return difference(
        ours, theirs, **by_hops("documents that see each other", ours), **by_hops("causal", theirs),
        **by_hops("after half of the steps, documents that see each other", right(True, half=True)[0]),
        **by_hops("after half of the steps, causal", right(False, half=True)[0]),
    )  # fmt: skip


def forward_order() -> Measurement:
    """Compare the orders of the gold documents, for the causal model."""
    forward, backward = right(False, "forward")[0], right(False, "backward")[0]
    return difference(
        forward, backward,
        **by_hops("causal, forward", forward), **by_hops("causal, backward", backward),
        **by_hops("documents that see each other, forward", right(True, "forward")[0]),
        **by_hops("documents that see each other, backward", right(True, "backward")[0]),
    )  # fmt: skip


def choice() -> Measurement:
    """Compare the order chosen by the peak of attention with the one that is given, for the causal model."""
    ours, theirs = right(False, orders=8)[0], right(False)[0]
    return difference(ours, theirs, **by_hops("best of 8 orders", ours), **by_hops("the given order", theirs))


def peaks() -> Measurement:
    """Compare the peaks of attention behind right answers with those behind wrong ones, for the causal model."""
    answers, found = right(False, orders=8)
    good = [peak for peak, answer in zip(found, answers, strict=True) if answer]
    bad = [peak for peak, answer in zip(found, answers, strict=True) if not answer]
    if not good or not bad:
        raise ValueError(f"{len(good)} right and {len(bad)} wrong answers: there is nothing to compare")
    draw = torch.Generator().manual_seed(0)

    def resampled(values: list[float]) -> float:
        return float(torch.tensor(values)[torch.randint(len(values), (len(values),), generator=draw)].mean())

    gaps = sorted(resampled(good) - resampled(bad) for _ in range(2000))
    return Measurement(
        mean(good) - mean(bad), spread=(gaps[50], gaps[1949]), spread_of="95 % bootstrap interval over both groups",
        seeds=SEEDS, details={
            "peak of right answers": mean(good), "peak of wrong answers": mean(bad), "right answers": len(good),
            "wrong answers": len(bad),
        },
    )  # fmt: skip


CLAIMS = (
    Claim(
        name="modified-mask",
        paper="Letting the documents see each other improves multi-hop question answering of decoder-only models.",
        measures="accuracy of a model trained and read with documents that see each other, less that of a causal one "
        "trained as long",
        threshold=Threshold(">", 0),
        check=modified_mask,
        unit="share of questions",
        seconds=90,
        data=DATA,
    ),
    Claim(
        name="forward-order",
        paper="Causal models answer best when the documents of the reasoning chain stand in forward order.",
        measures="accuracy of the causal model with the gold documents in forward order less that in backward order",
        threshold=Threshold(">", 0),
        check=forward_order,
        unit="share of questions",
        seconds=90,
        data=DATA,
    ),
    Claim(
        name="choice-by-peak",
        paper="Choosing among permuted orders by the highest peak of attention improves accuracy.",
        measures="accuracy of the causal model in the order, of 8, with the highest peak, less that in the given order",
        threshold=Threshold(">", 0),
        check=choice,
        unit="share of questions",
        seconds=40,
        data=DATA,
    ),
    Claim(
        name="peaks-tell",
        paper="Attention peaks higher when the answer is right.",
        measures="mean peak of attention behind right answers less that behind wrong ones, best of 8 orders, for the "
        "causal model",
        threshold=Threshold(">", 0),
        check=peaks,
        unit="attention weight",
        seconds=40,
        data=DATA,
    ),
)
