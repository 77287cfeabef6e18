"""AutoCompressors: summaries by hand, one segment as the plain model, where gradients stop, what a segment costs."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional
from transformers import AutoModelForCausalLM, DynamicCache, Trainer

from hf_ext import adapter
from hf_ext.cache.soft import AutoCompressor, AutoCompressorModel, SegmentCollator, Slots
from hf_ext.testing import tiny_models
from hf_ext.testing.objective import ONE_GRADIENT
from hf_ext.testing.objective_training import arguments, largest_difference, tiny_model
from hf_ext.testing.strategy_base import close, refusal

KINDS = ["llama", "gpt2", "opt", "qwen3", "mistral", "gemma3"]
IDS, MASK = tiny_models.prompts((13, 8, 3), seed=3)
PROMPT, PROMPT_MASK = tiny_models.prompts((5, 3, 1), seed=4)
COLLATE = SegmentCollator(3, 5)


def built(kind: str = "llama", tokens: int = 2, stop_after: int = 2):
    model = AutoCompressor(summary_tokens=tokens, stop_after=stop_after).convert(tiny_models.build(kind))
    noise = torch.randn(model.summary_tokens.weight.shape, generator=torch.Generator().manual_seed(1))
    model.summary_tokens.weight.data += 0.2 * noise
    return model


def texts(count: int = 8) -> list[dict[str, list[int]]]:
    draw = torch.Generator().manual_seed(5)
    lengths = [2, 5, 9, 14, 20, 7, 3, 11]
    return [{"input_ids": torch.randint(4, 60, (lengths[i % 8],), generator=draw).tolist()} for i in range(count)]


def trainable_model(stop_after: int = 2):
    torch.manual_seed(4)
    return AutoCompressor(summary_tokens=2, stop_after=stop_after).convert(tiny_model())


def by_hand(model, plain, ids: torch.Tensor, segments: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and summaries of one row, by plain calls of the stock model, positions zeroed where there are none."""
    table = {"gpt2": "wpe", "opt": "embed_positions"}.get(plain.config.model_type)
    embed, summaries, logits = plain.get_input_embeddings(), model.summary_tokens.weight[:0], []
    for part in ids.split(segments):
        before, k = len(summaries), len(model.summary_tokens.weight)
        rows = torch.cat([summaries, embed(part), model.summary_tokens.weight])[None]
        given, hooks = {"position_ids": torch.arange(rows.shape[1])[None]}, []
        if table:
            free = torch.tensor([[0.0] * before + [1.0] * len(part) + [0.0] * k])[..., None]
            positions = functional.pad(torch.arange(len(part)), (before, k))[None]
            module = plain.get_decoder().get_submodule(table)
            given = {"position_ids": positions}
            hooks = [module.register_forward_hook(lambda _, args, out, free=free: out * free)]
        out = plain(inputs_embeds=rows, output_hidden_states=True, **given)
        for hook in hooks:
            hook.remove()
        logits.append(out.logits[0, before : before + len(part)])
        summaries = torch.cat([summaries, out.hidden_states[-1][0, -k:]])
    return torch.cat(logits), summaries


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_summaries_accumulate_as_by_hand_and_a_batch_reads_as_its_rows(kind: str):
    model, plain = built(kind), tiny_models.build(kind)
    out, slots = model(IDS, attention_mask=MASK, segments=4).logits, model.compress(IDS, MASK, segments=4)
    assert slots.mask.sum(-1).tolist() == [8, 4, 2]
    for row in range(3):
        real = MASK[row].bool()
        logits, summaries = by_hand(model, plain, IDS[row][real], 4)
        close(out[row][real], logits, f"{kind}, logits of row {row}", tolerance=3e-5)
        close(slots.vectors[row][slots.mask[row]], summaries, f"{kind}, summaries of row {row}", tolerance=3e-5)
    order = (1 - MASK).argsort(dim=1, stable=True)  # the same, padded on the right
    given = {"input_ids": IDS.gather(1, order), "attention_mask": MASK.gather(1, order)}
    turned = model.compress(**given, segments=4)
    close(turned.vectors[slots.mask], slots.vectors[slots.mask], f"{kind}, padded on the right", tolerance=3e-5)
    on_the_right = model(**given, labels=given["input_ids"], segments=4).loss
    close(model(IDS, attention_mask=MASK, labels=IDS, segments=4).loss, on_the_right, f"{kind}, loss", tolerance=3e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_one_segment_is_the_plain_model_exactly(kind: str):
    model, plain = built(kind), tiny_models.build(kind)
    row = IDS[:1]
    assert torch.equal(model(row, labels=row).loss, plain(row, labels=row).loss)
    ours, theirs = model(row, labels=row, segments=100), plain(row, labels=row)
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.loss, theirs.loss)
    assert torch.equal(model(IDS, attention_mask=MASK).logits, plain(IDS, attention_mask=MASK).logits)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    given = {"input_ids": PROMPT, "attention_mask": PROMPT_MASK}
    assert torch.equal(model.generate(**given, **settings), plain.generate(**given, **settings))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "qwen3"])
def test_going_on_from_a_cached_prefix_equals_the_uncached_pass(kind: str):
    model, plain = built(kind), tiny_models.build(kind)
    slots = model.compress(IDS, MASK, segments=4)
    prefix = model.prefix(slots)
    assert isinstance(prefix, DynamicCache)
    expected = model(PROMPT, attention_mask=PROMPT_MASK, slots=slots).logits
    cached = plain(**model.continuing(slots, PROMPT, PROMPT_MASK, cache=copy.deepcopy(prefix))).logits
    close(cached[PROMPT_MASK.bool()], expected[PROMPT_MASK.bool()], kind, tolerance=2e-5)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    found = plain.generate(**model.continuing(slots, PROMPT, PROMPT_MASK, cache=prefix), **settings)
    assert torch.equal(found, model.generate(slots=slots, input_ids=PROMPT, attention_mask=PROMPT_MASK, **settings))
    for row in range(3):  # alone and without padding
        own = Slots(slots.vectors[row][slots.mask[row]][None])
        alone = model.generate(slots=own, input_ids=PROMPT[row][PROMPT_MASK[row].bool()][None], **settings)
        assert torch.equal(alone[0, -5:], found[row, -5:]), f"row {row}"


def test_gradients_stop_where_they_are_said_to_stop():
    def reached(stop_after: int) -> list[bool]:
        """Whether the loss of the last of five segments depends, by gradient, on each of the four summaries."""
        model, made = built(stop_after=stop_after), []
        ids = torch.randint(4, 60, (1, 15), generator=torch.Generator().manual_seed(2))
        labels = torch.where(torch.arange(15) > 12, ids, -100)
        decoder = model.get_decoder()

        def keep(_, args, out):
            out.last_hidden_state.retain_grad()
            made.append(out.last_hidden_state)

        hook = decoder.register_forward_hook(keep)
        model(ids, labels=labels, segments=3).loss.backward()
        hook.remove()
        return [state.grad is not None and bool(state.grad[:, -2:].any()) for state in made[:4]]

    assert reached(9) == [True] * 4
    assert reached(2) == [False] * 4  # the fifth segment opens a block of its own
    assert reached(3) == [False, False, False, True]


def test_summaries_that_are_cut_off_leave_gradients_of_a_run_that_was_given_them():
    model, ids = built(), torch.randint(4, 60, (1, 12), generator=torch.Generator().manual_seed(2))
    labels = torch.where(torch.arange(12) > 6, ids, -100)
    model(ids, labels=labels, segments=3).loss.backward()
    found = {name: value.grad.clone() for name, value in model.named_parameters()}
    model.zero_grad()
    with torch.no_grad():
        slots = model.compress(ids[:, :6], segments=3)
    model(ids[:, 6:], labels=labels[:, 6:], segments=3, slots=slots).loss.backward()
    difference = largest_difference(found, {name: value.grad for name, value in model.named_parameters()})
    assert difference < 1e-5, f"gradients differ by up to {difference:.3g}"


@torch.no_grad()
def test_a_segment_costs_summaries_in_place_of_the_tokens_that_they_stand_for():
    model = built()
    for segment in (4, 40):
        ids = torch.randint(4, 60, (1, 3 * segment), generator=torch.Generator().manual_seed(2))
        slots = model.compress(ids, segments=segment)
        _, calls = tiny_models.calls_of(model, lambda slots=slots: model(PROMPT[:1], slots=slots))
        assert calls[-1] == (1, 3 * 2 + 5), f"after {ids.shape[1]} tokens: {calls}"
    _, calls = tiny_models.calls_of(model.get_decoder(), lambda: model.compress(ids, segments=40))
    assert calls == [(1, 40 + 2), (1, 2 + 40 + 2), (1, 4 + 40 + 2)]


def test_segments_are_cut_by_the_text_alone_and_read_row_by_row():
    model, batch = trainable_model().eval(), COLLATE(texts())
    assert not batch["segments"].eq(batch["segments"][:1]).all(), "all rows are cut alike"
    assert (batch["segments"].sum(-1) == batch["attention_mask"].sum(-1)).all()
    total, count = 0.0, 0
    with torch.no_grad():
        loss = model(**batch).loss
        for row, text in enumerate(texts()):
            alone = COLLATE([text])
            lengths = batch["segments"][row]
            assert torch.equal(alone["segments"][0], lengths[lengths > 0])
            logits = by_hand(model, model, alone["input_ids"][0], lengths[lengths > 0].tolist())[0]
            targets = alone["input_ids"][0, 1:]
            total += float(functional.cross_entropy(logits[:-1], targets, reduction="sum"))
            count += len(targets)
    assert abs(float(loss) - total / count) < 2e-5, f"loss {float(loss)}, of the rows {total / count}"


def test_gradients_do_not_depend_on_how_the_batch_is_split(tmp_path: Path):
    moved = []
    for parts in (1, 4):
        model = trainable_model()
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        split = {"per_device_train_batch_size": 8 // parts, "gradient_accumulation_steps": parts}
        args = arguments(tmp_path, **{**ONE_GRADIENT, **split})
        Trainer(model, args, train_dataset=texts(), data_collator=COLLATE).train()
        moved.append({name: before[name] - value.detach() for name, value in model.named_parameters()})
    difference = largest_difference(*moved)
    assert difference < 1e-5, f"gradients differ by up to {difference:.3g}"
    assert float(moved[0]["summary_tokens.weight"].abs().max()) > 1e-3


def test_layers_that_are_recomputed_and_bfloat16_train_too():
    batch, found = COLLATE(texts()), []
    for prepare in (
        lambda m: m,
        lambda m: adapter.checkpoint_activations(m, use_reentrant=False),
        lambda m: m.bfloat16(),
    ):
        model = trainable_model().train()
        prepare(model)
        model(**batch).loss.backward()
        found.append({name: value.grad for name, value in model.named_parameters()})
    difference = largest_difference(found[0], found[1])
    assert difference < 1e-6, f"gradients of recomputed layers differ by up to {difference:.3g}"
    assert all(bool(value.isfinite().all()) for value in found[2].values())
    assert bool(found[2]["summary_tokens.weight"].any())


def test_a_whole_model_is_saved_resumed_and_loaded(tmp_path: Path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4}
    models = [trainable_model(), trainable_model()]
    for model, resume in zip(models, (None, str(tmp_path / "checkpoint-2")), strict=True):
        args = arguments(tmp_path if resume is None else tmp_path / "again", **settings)
        trainer = Trainer(model, args, train_dataset=texts(16), data_collator=COLLATE)
        trainer.train(resume_from_checkpoint=resume)
    difference = largest_difference(*(dict(model.named_parameters()) for model in models))
    assert difference == 0, f"weights differ by up to {difference:.3g}"
    batch = COLLATE(texts())
    loaded = AutoCompressorModel.from_pretrained(tmp_path / "checkpoint-4")
    assert isinstance(loaded, AutoCompressorModel)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, models[0].eval()(**batch).logits)
    models[0].save_pretrained(tmp_path / "plain")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")  # the model without its summary tokens
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    assert torch.equal(stock(**given).logits, loaded(**given).logits)
    tiny_model().save_pretrained(tmp_path / "other")
    refusal(lambda: AutoCompressorModel.from_pretrained(tmp_path / "other"), "holds no AutoCompressor", what="other")


def test_adapters_of_stock_peft_train_it_with_its_summary_tokens(tmp_path: Path):
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["summary_tokens"])
    model, batch = get_peft_model(trainable_model(), config), COLLATE(texts())
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    args = arguments(tmp_path, remove_unused_columns=False)
    Trainer(model, args, train_dataset=texts(16), data_collator=COLLATE).train()
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert any("summary_tokens" in name for name in changed)
    assert all("lora" in name or "summary_tokens.modules_to_save" in name for name in changed), changed
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(trainable_model(), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model.eval()(**batch).logits)
        slots = loaded.compress(batch["input_ids"], batch["attention_mask"], segments=4)
        said = loaded.generate(slots=slots, input_ids=batch["input_ids"][:, :3], max_new_tokens=3, do_sample=False)
    assert said.shape == (8, 6)


def test_what_cannot_be_honoured_is_refused():
    model, gpt = built(), built("gpt2")
    long = torch.ones(1, 129, dtype=torch.long)
    peft = get_peft_model(tiny_models.build("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    for run, words in (
        (lambda: AutoCompressor(summary_tokens=0), "summary_tokens must be a positive int"),
        (lambda: AutoCompressor(stop_after=0), "stop_after must be a positive int"),
        (lambda: AutoCompressor().convert(tiny_models.build("t5")), "encoder-decoder"),
        (lambda: AutoCompressor().convert(model), "already"),
        (lambda: AutoCompressor().convert(peft), "put adapters on after it"),
        (lambda: gpt.compress(long), "need 129 positions, and AutoCompressorGPT2LMHeadModel has learned 128"),
        (lambda: model.compress(IDS, torch.zeros_like(MASK)), "has no token"),
        (lambda: model.compress(IDS, segments=0), "one token at least"),
        (lambda: model.compress(IDS, segments=torch.ones(2, 2)), "for 3 rows"),
        (lambda: model.compress(IDS, segments=[3, -1]), "one token at least"),
        (lambda: model(IDS, labels=IDS[:, 1:], segments=3), "labels have the shape (3, 12), expected (3, 13)"),
        (lambda: model(IDS, segments=3, output_attentions=True), "takes no output_attentions"),
        (lambda: model(PROMPT, slots=Slots(torch.zeros(2, 2, 32))), "2 rows of slots and 3 rows"),
        (lambda: SegmentCollator(4, 3), "one at least"),
        (lambda: COLLATE([{"input_ids": []}]), "row 0 of the batch has no tokens"),
    ):
        refusal(run, words, what=words)
    assert gpt.compress(long, segments=100).mask.shape == (1, 4), "in pieces it fits"
