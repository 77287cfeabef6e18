"""Claim checks of MetaLM (arXiv:2206.06336): exact properties on the embedded target, and trained comparisons.

The trained models are small and read the same rows in the same order: a MetaLM, the same MetaLM whose encoder is masked
so that tokens of a span see only what is before them, and a causal language model of as many layers, all in one stack.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    PreTrainedModel,
)

from hf_ext import demo
from hf_ext.claims import held_out
from hf_ext.claims.held_out import mean
from hf_ext.claims.swan_gpt import corpus
from hf_ext.demo.train import optimizers
from hf_ext.modeling.metalm.configuration_metalm import MetaLMConfig
from hf_ext.modeling.metalm.modeling_metalm import MetaLMForCausalLM
from hf_ext.modeling.metalm.semi_causal_metalm import SemiCausalCollator
from hf_ext.verify import Claim, Measurement, Threshold

SEEDS = (0, 1, 2)
SEED_RANGE = f"lowest and highest of {len(SEEDS)} seeds"
WIDTH, HEADS, RATE = 48, 4, 5e-3
BOTH_WAYS, LEFT_TO_RIGHT, CAUSAL = "MetaLM", "MetaLM with a causal encoder", "causal language model"
KINDS = (BOTH_WAYS, LEFT_TO_RIGHT, CAUSAL)


def small(kind: str, vocabulary: int, context: int, layers: tuple[int, int]) -> PreTrainedModel:
    """Return an untrained model.

    Args:
        kind: one of `KINDS`.
        vocabulary: tokens there are.
        context: positions there are.
        layers: of the encoder and of the decoder; a causal language model has all of them.
    """
    shape = {"vocab_size": vocabulary, "hidden_size": WIDTH, "num_attention_heads": HEADS}
    shape |= {"max_position_embeddings": context, "intermediate_size": 3 * WIDTH}
    depth = sum(layers) if kind == CAUSAL else layers[1]
    decoder = LlamaConfig(**shape, num_hidden_layers=depth, tie_word_embeddings=True)
    if kind == CAUSAL:
        return LlamaForCausalLM(decoder)
    no_specials = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, "cls_token_id": None}
    encoder = ModernBertConfig(
        **shape, **no_specials, sep_token_id=None, num_hidden_layers=layers[0],
        layer_types=["full_attention"] * layers[0],
    )  # fmt: skip
    model = MetaLMForCausalLM(MetaLMConfig(text_config=decoder, encoder_config=encoder))
    if kind == LEFT_TO_RIGHT:
        model.encoder.register_forward_pre_hook(left_to_right, with_kwargs=True)
    return model


def left_to_right(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Mask an encoder so that tokens see only what is before them; all else stays as it is."""
    real = kwargs["attention_mask"].bool()
    causal = torch.ones(real.shape[1], real.shape[1], dtype=torch.bool).tril()
    return args, {**kwargs, "attention_mask": (causal & real[:, None]).unsqueeze(1)}


def train(model: PreTrainedModel, steps: int, batch: Callable[[], dict[str, torch.Tensor]]) -> PreTrainedModel:
    """Train on batches; a causal language model gets them without the spans.

    Args:
        model: trained in place.
        steps: how long.
        batch: makes the next batch, with `input_ids`, `labels` and `spans`.
    """
    optimizer_list = optimizers(model, RATE)
    for step in range(steps):
        share = min(1.0, (step + 1) / 20, (steps - step) / (0.3 * steps))
        model(**readable(model, batch()), use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizer_list:
            for group in optimizer.param_groups:
                group["lr"] = RATE * share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return model.eval()


def readable(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a batch as the model takes it."""
    if isinstance(model, MetaLMForCausalLM):
        return batch
    return {name: value for name, value in batch.items() if name != "spans"}


def over_seeds(values: Sequence[float], **details: object) -> Measurement:
    """Return the mean over seeds with its range."""
    return Measurement(mean(values), (min(values), max(values)), SEED_RANGE, SEEDS, details)


# -- exact properties ------------------------------------------------------------------------------------


@functools.cache
def docked() -> tuple[MetaLMForCausalLM, PreTrainedModel]:
    """Return the embedded target with an untrained encoder, and the target alone."""
    target = AutoModelForCausalLM.from_pretrained(demo.path("target"), dtype=torch.float32).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = {"vocab_size": target.config.vocab_size, "hidden_size": WIDTH, "num_attention_heads": HEADS}
        encoder = BertModel(BertConfig(**shape, num_hidden_layers=2, intermediate_size=4 * WIDTH))
        return MetaLMForCausalLM.from_parts(encoder, target).eval(), target


@torch.no_grad()
def nothing_encoded() -> Measurement:
    """Count bits of logits and tokens of generated text that differ where there are no spans."""
    model, target = docked()
    inputs = held_out.batch(held_out.prompts(8))
    ours, theirs = model(**inputs).logits, target(**inputs).logits
    made = [m.generate(**inputs, max_new_tokens=24, do_sample=False) for m in (model, target)]
    different = int((ours != theirs).sum()) + int((made[0] != made[1]).sum())
    return Measurement(different, details={"logits": ours.numel(), "tokens": made[0].numel()})


@torch.no_grad()
def visibility() -> Measurement:
    """Change each token in turn and see which logits move."""
    model, _ = docked()
    wrong = looked = 0
    for prompt in held_out.prompts(4):
        ids = held_out.batch([prompt])["input_ids"][:, -24:]
        columns = torch.arange(ids.shape[1])
        spans = torch.tensor([[[3, 9], [12, 20]]])
        starts = columns.clone()  # where the first token stands that sees a column
        for start, end in spans[0].tolist():
            starts[start:end] = start
        before = model(ids, spans=spans).logits[0]
        for column in columns.tolist():
            changed = ids.clone()
            changed[0, column] = (changed[0, column] + 1) % model.config.vocab_size
            moved = (model(changed, spans=spans).logits[0] != before).any(-1)
            wrong, looked = wrong + int((moved != (columns >= starts[column])).sum()), looked + len(columns)
    return Measurement(wrong, details={"pairs of tokens": looked, "prompts": 4})


@torch.no_grad()
def encoded_once() -> Measurement:
    """Generate from prompts with spans, cached and anew for every token."""
    model, _ = docked()
    inputs = held_out.batch(held_out.prompts(8))
    first = (inputs["attention_mask"] == 0).sum(1)
    spans = torch.stack([first + 1, first + 5], 1)[:, None]
    made, read = [], []
    hook = model.encoder.register_forward_pre_hook(lambda *_: read.append(1))
    try:
        for use_cache in (True, False):
            out = model.generate(
                **inputs, spans=spans, max_new_tokens=16, min_new_tokens=16, do_sample=False, use_cache=use_cache
            )
            made.append(out[:, -16:])
            read.append(0)
    finally:
        hook.remove()
    calls = read.index(0)
    return Measurement(
        calls,
        details={"without a cache": sum(read) - calls, "tokens": made[0].numel(),
                 "tokens that differ from those without a cache": int((made[0] != made[1]).sum())},
    )  # fmt: skip


# -- a task that needs both directions -------------------------------------------------------------------

SYMBOLS, ITEMS, TASK_STEPS, TASK_ROWS, TASK_LAYERS = 8, 8, 250, 48, (2, 1)
SEPARATOR, BEGIN, NO, YES = SYMBOLS, SYMBOLS + 1, SYMBOLS + 2, SYMBOLS + 3
TASK = "synthetic: of each symbol of a list in turn, whether it comes again later in the list"


def repeats(rows: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Return lists of symbols, each followed by whether its symbols come again later in the list.

    Example:
        >>> batch = repeats(1, torch.Generator().manual_seed(0))
        >>> listed, answers = batch["input_ids"][0, 1 : ITEMS + 1], batch["input_ids"][0, ITEMS + 2 :]
        >>> listed.tolist(), (answers == YES).long().tolist()
        ([4, 7, 5, 0, 3, 3, 3, 7], [0, 1, 0, 0, 1, 1, 0, 0])
    """
    listed = torch.randint(SYMBOLS, (rows, ITEMS), generator=generator)
    later = torch.ones(ITEMS, ITEMS, dtype=torch.bool).triu(1)
    again = ((listed[:, :, None] == listed[:, None]) & later).any(-1)
    edges = [torch.full((rows, 1), token) for token in (BEGIN, SEPARATOR)]
    answers = torch.where(again, YES, NO)
    ids = torch.cat([edges[0], listed, edges[1], answers], dim=1)
    labels = torch.cat([torch.full((rows, ITEMS + 2), -100), answers], dim=1)
    return {"input_ids": ids, "labels": labels, "spans": torch.tensor([[[1, ITEMS + 1]]]).expand(rows, 1, 2)}


def untrained(kind: str) -> PreTrainedModel:
    """Return a model for the task."""
    return small(kind, SYMBOLS + 4, 2 * ITEMS + 2, TASK_LAYERS)


@functools.cache
def accuracy(kind: str, seed: int) -> float:
    """Return the share of right answers on new lists, after training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        draw = torch.Generator().manual_seed(seed)
        model = train(untrained(kind), TASK_STEPS, lambda: repeats(TASK_ROWS, draw))
    test = repeats(512, torch.Generator().manual_seed(99))
    with torch.no_grad():
        chosen = model(**readable(model, test)).logits[:, :-1].argmax(-1)
    counted = test["labels"][:, 1:] != -100
    return float((chosen == test["labels"][:, 1:])[counted].float().mean())


def compared(kind: str) -> Measurement:
    """Compare the accuracy of MetaLM with that of another kind."""
    answers = repeats(512, torch.Generator().manual_seed(99))["labels"]
    details: dict[str, object] = {
        f"accuracy of {name}": [round(accuracy(name, seed), 4) for seed in SEEDS] for name in (BOTH_WAYS, kind)
    }
    details["always no"] = round(float((answers == NO).sum() / (answers >= NO).sum()), 4)
    details["parameters"] = [untrained(name).num_parameters() for name in (BOTH_WAYS, kind)]
    details["layers of encoder and decoder"] = TASK_LAYERS
    return over_seeds(
        [accuracy(BOTH_WAYS, seed) - accuracy(kind, seed) for seed in SEEDS],
        **details,
        steps=TASK_STEPS,
        rows=TASK_ROWS,
    )


# -- semi-causal language modelling of bytes -------------------------------------------------------------

CONTEXT, BYTE_STEPS, BYTE_ROWS, BYTE_LAYERS, BEHIND = 96, 120, 24, (2, 2), 8
BYTES = "Python standard library source, bytes of held-out modules"


def windows(held_out_bytes: bool, starts: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Return rows of bytes that begin at `starts`."""
    data = corpus(held_out=held_out_bytes)
    return [{"input_ids": data[start : start + CONTEXT]} for start in starts.tolist()]


@functools.cache
def byte_losses(kind: str, seed: int) -> tuple[float, float]:
    """Return nats per byte of held-out rows after semi-causal training: right behind spans, and without any spans."""
    collator = SemiCausalCollator(min_length=6, max_length=12, seed=seed)
    draw, size = torch.Generator().manual_seed(seed), len(corpus(held_out=False)) - CONTEXT

    def batch() -> dict[str, torch.Tensor]:
        return collator(windows(False, torch.randint(size, (BYTE_ROWS,), generator=draw)))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = train(small(kind, 256, CONTEXT, BYTE_LAYERS), BYTE_STEPS, batch)
    test = collator(windows(True, torch.arange(128) * 3001))
    behind = torch.zeros_like(test["input_ids"], dtype=torch.bool)
    for row, spans in enumerate(test["spans"].tolist()):
        for _, end in spans:
            behind[row, end : end + BEHIND] = end > 0
    behind &= test["labels"] != -100
    with torch.no_grad():
        spanned = nats(model(**readable(model, test)).logits, test["input_ids"])
        plain = nats(model(input_ids=test["input_ids"]).logits, test["input_ids"])
    return float(spanned[behind[:, 1:]].mean()), float(plain.mean())


def nats(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the surprise `[batch, length - 1]` at every byte but the first."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")


def behind_spans() -> Measurement:
    """Compare losses behind spans."""
    runs = {kind: [byte_losses(kind, seed) for seed in SEEDS] for kind in (BOTH_WAYS, CAUSAL)}
    details = {f"nats of {kind} behind spans": [round(run[0], 4) for run in of] for kind, of in runs.items()}
    details |= {f"nats of {kind} without spans": [round(run[1], 4) for run in of] for kind, of in runs.items()}
    sizes = [small(kind, 256, CONTEXT, BYTE_LAYERS).num_parameters() for kind in runs]
    gain = [b[0] - a[0] for a, b in zip(runs[BOTH_WAYS], runs[CAUSAL], strict=True)]
    return over_seeds(gain, **details, parameters=sizes, steps=BYTE_STEPS, rows=BYTE_ROWS)


CLAIMS = (
    Claim(
        name="plain-without-spans",
        paper="(derived) Without spans a semi-causal language model is the causal one.",
        measures="logits that differ in any bit from those of the embedded target, and generated tokens that differ",
        threshold=Threshold("==", 0),
        check=nothing_encoded,
        unit="differences",
        seconds=10,
        data=held_out.DATA,
    ),
    Claim(
        name="visibility",
        paper="(derived) Tokens of a span see each other, what follows sees them, what stands before sees none.",
        measures="pairs of tokens of which one sees the other and should not, or does not and should",
        threshold=Threshold("==", 0),
        check=visibility,
        unit="pairs",
        seconds=10,
        data=held_out.DATA,
    ),
    Claim(
        name="encoded-once",
        paper="(derived) Encoders read the spans of a prompt, generation goes on causally from a cache.",
        measures="runs of the encoder while tokens are generated from a batch of prompts with spans",
        threshold=Threshold("==", 1),
        check=encoded_once,
        unit="runs",
        seconds=10,
        data=held_out.DATA,
    ),
    Claim(
        name="both-ways",
        paper="Once the whole input is given, all of its tokens should see each other, not only those before them.",
        measures="share of right answers: of a MetaLM less that of the same one whose encoder sees only what is before",
        threshold=Threshold(">", 0),
        check=functools.partial(compared, LEFT_TO_RIGHT),
        unit="share of answers",
        seconds=60,
        data=TASK,
    ),
    Claim(
        name="against-causal",
        paper="MetaLM does better than a causal language model when both are fine-tuned on inputs with answers.",
        measures="share of right answers: of a MetaLM less that of a causal language model with as many layers",
        threshold=Threshold(">", 0),
        check=functools.partial(compared, CAUSAL),
        unit="share of answers",
        seconds=60,
        data=TASK,
    ),
    Claim(
        name="behind-spans",
        paper="Semi-causal language modelling combines reading in both directions with causal generation.",
        measures=f"loss of the {BEHIND} bytes behind each span, both trained from scratch: of a causal language model "
        "with as many layers less that of a MetaLM",
        threshold=Threshold(">=", 0),
        check=behind_spans,
        unit="nats per byte",
        seconds=80,
        data=BYTES,
    ),
)
