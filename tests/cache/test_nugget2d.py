"""Nugget2D: contexts of which nuggets are kept, in training as in the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import Trainer

from hf_ext import adapter
from hf_ext.attention.intercept import intercept, visible
from hf_ext.cache import CompressedCache, Knorm, Nugget2D, Nugget2DModel, NuggetCollator
from hf_ext.layers import captured
from hf_ext.testing import tiny_models
from hf_ext.testing.cache import SHAPES
from hf_ext.testing.cache_base import positions
from hf_ext.testing.objective import ONE_GRADIENT
from hf_ext.testing.objective_training import arguments, largest_difference, tiny_model
from hf_ext.testing.strategy_base import close, refusal

TOLERANCE = 3e-5
COLLATE = NuggetCollator(context=9)


def wrapped(shape: str = "grouped", budget: int | float = 0.3, implementation: str = "hf_ext") -> Nugget2DModel:
    kind, more = SHAPES[shape]
    base = tiny_models.build(kind, **more)
    base.set_attn_implementation(implementation)
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    return Nugget2DModel(base, lora, budget=budget).eval()


def inputs(contexts: tuple[int, ...] = (12, 7, 3), after: int = 6) -> dict[str, Tensor]:
    ids, mask = tiny_models.prompts(contexts)
    more, _ = tiny_models.prompts((after,) * len(contexts), seed=9)
    return {"context_ids": ids, "context_mask": mask, "input_ids": more}


def texts(count: int = 8) -> list[dict[str, list[int]]]:
    draw = torch.Generator().manual_seed(5)
    lengths = [5, 7, 9, 14, 20, 7, 4, 11]
    return [{"input_ids": torch.randint(4, 60, (lengths[i % 8],), generator=draw).tolist()} for i in range(count)]


def adapted(seed: int = 3, **changes: Any) -> Nugget2DModel:
    model = tiny_model()
    torch.manual_seed(seed)
    lora = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **changes}
    return Nugget2DModel(model, LoraConfig(**lora), budget=0.4)


def train(model: Any, folder: Any, resume: str | None = None, **changes: Any) -> Trainer:
    trainer = Trainer(
        model, arguments(folder, **changes), train_dataset=texts(16), eval_dataset=texts(), data_collator=COLLATE
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def trainable(model: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("budget", [2, 0.3])
@pytest.mark.parametrize("shape", ["grouped", "each", "one", "learned-positions", "normed", "offset-positions"])
def test_what_training_hides_is_what_leaves_the_cache(shape: str, budget: int | float) -> None:
    model, given = wrapped(shape, budget), inputs()
    with torch.no_grad():
        wanted = model(**given).logits
        cache = model.compress(given["context_ids"], given["context_mask"])
        assert cache.get_seq_length() == 12
        assert cache.held() == [2 if budget == 2 else 3] * 2
        seen = given["context_mask"]
        for part in (slice(0, 3), slice(3, 4), slice(4, 6)):
            ids = given["input_ids"][:, part]
            seen = torch.cat([seen, torch.ones_like(ids)], dim=1)
            found = model(
                ids, attention_mask=seen, position_ids=positions(seen, ids.shape[1]), past_key_values=cache
            ).logits
            close(found, wanted[:, part], f"{shape}, {part}", tolerance=TOLERANCE)
        full = model.get_base_model()(
            torch.cat([given["context_ids"], given["input_ids"]], dim=1), attention_mask=seen,
            position_ids=positions(seen, 18),
        ).logits[:, 12:]  # fmt: skip
    assert (full - wanted)[0].abs().max() > 0.1, "what is dropped does not matter, so this shows nothing"


def test_nuggets_are_the_best_tokens_and_the_last_one_in_all_layers() -> None:
    model, given = wrapped(), inputs()
    base = model.get_base_model()
    ids, mask = given["context_ids"], given["context_mask"]
    with torch.no_grad(), captured(base, [1]) as states:
        base(ids, attention_mask=mask, position_ids=positions(mask, 12))
        scores = model.parts(states[1])
    cache = model.compress(ids, mask)
    for row, count in enumerate((12, 7, 3)):
        keep = max(1, int(0.3 * count))
        real = [column for column in range(11) if mask[row, column]]
        best = sorted(real, key=lambda column: -float(scores[row, column]))[: keep - 1]
        for layer in range(2):
            for head in range(2):
                held = [c for c in cache.columns(layer)[row, head].tolist() if c >= 0]
                assert held == sorted([*best, 11]), (row, layer, head)


def test_a_full_budget_is_the_plain_model() -> None:
    model, given = wrapped(budget=1.0), inputs()
    seen = torch.cat([given["context_mask"], torch.ones_like(given["input_ids"])], dim=1)
    with torch.no_grad():
        ids = torch.cat([given["context_ids"], given["input_ids"]], dim=1)
        wanted = model.get_base_model()(ids, attention_mask=seen, position_ids=positions(seen, 18)).logits[:, 12:]
        close(model(**given).logits, wanted, "a full budget", tolerance=TOLERANCE)


def test_the_scorer_learns_what_adding_its_scores_to_attention_teaches() -> None:
    """The gradient of the scorer is that of a model in which the scores are added for real, at the point 0."""
    model, given = wrapped(), inputs((12,))
    labels = given["input_ids"]
    model.zero_grad()
    model(**given, labels=labels).loss.backward()
    found = {name: value.grad.clone() for name, value in model.parts.named_parameters()}
    assert all(bool(value.any()) for value in found.values())
    base = model.get_base_model()
    with torch.no_grad(), captured(base, [1]) as states:
        base(given["context_ids"])
    scores = model.parts(states[1])
    chosen = Nugget2D(budget=0.3).chosen(scores, torch.ones(1, 12, dtype=torch.bool))
    offset = torch.zeros(1, 12, requires_grad=True)
    ids = torch.cat([given["context_ids"], given["input_ids"]], dim=1)

    def biased(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, plain: Any, **call: Any) -> Any:
        seen = visible(mask, q, k).expand(1, 1, 18, 18).clone()
        seen[:, :, 12:, :12] &= chosen[:, None, None]
        bias = torch.zeros(18, 18)
        bias = torch.cat([bias[:12], torch.cat([offset.expand(6, 12), bias[12:, 12:]], dim=1)])
        return plain(module, q, k, v, bias.masked_fill(~seen, torch.finfo(bias.dtype).min), **call)

    with intercept(base, biased):
        logits = base(ids).logits[:, 12:]
    torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:]).backward()
    model.parts.zero_grad()
    (scores * offset.grad).sum().backward()
    for name, value in model.parts.named_parameters():
        close(found[name], value.grad, name, tolerance=1e-5)


def test_later_contexts_are_compressed_in_their_turn() -> None:
    model, given = wrapped(budget=3), inputs((12, 9))
    ids, mask = given["context_ids"], given["context_mask"]
    cache = model.compress(ids, mask)
    first = cache.columns(0)[:, 0].tolist()
    said, seen = given["input_ids"], torch.cat([mask, torch.ones_like(given["input_ids"])], dim=1)
    with torch.no_grad():
        model(said, attention_mask=seen, position_ids=positions(seen, 6), past_key_values=cache)
    assert cache.columns(0)[:, 0].tolist() == [[*row, *range(12, 18)] for row in first]
    more, more_mask = tiny_models.prompts((8, 5), seed=11)
    model.compress(more, more_mask, cache)
    for row in range(2):
        held = cache.columns(1)[row, 0].tolist()
        assert held[:9] == [*first[row], *range(12, 18)]
        assert len(held) == 12
        assert held[-1] == 25
    real = torch.cat([seen, more_mask], dim=1)
    assert cache.layers[0].tokens == real.sum(1).tolist()


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"output_logits": True}])
def test_generate_goes_on_after_nuggets(settings: dict[str, Any]) -> None:
    model, given = wrapped(), inputs()
    if "output_logits" in settings:
        settings = {**settings, "return_dict_in_generate": True}
    found = model.generate(**given, max_new_tokens=5, do_sample=False, **settings)
    found = found if isinstance(found, Tensor) else found.sequences
    assert found.shape == (len(given["input_ids"]), 11)
    assert torch.equal(found[:, :6], given["input_ids"])
    if "num_beams" not in settings:
        with torch.no_grad():
            logits = model(**{**given, "input_ids": found}).logits[:, 5:-1]
        assert torch.equal(found[:, 6:], logits.argmax(-1))


def test_a_saved_cache_goes_on_and_is_small(tmp_path: Path) -> None:
    model, given = wrapped(), inputs((96, 90))
    cache = model.compress(given["context_ids"], given["context_mask"])
    keys_and_values = 2 * 2 * 2 * 2 * 28 * 8 * 4  # layers, rows, heads, both, entries, width, bytes
    assert cache.resident_bytes() < 1.1 * keys_and_values
    cache.save(tmp_path / "context.safetensors")
    again = CompressedCache.load(tmp_path / "context.safetensors", model.config)
    seen = torch.cat([given["context_mask"], torch.ones_like(given["input_ids"])], dim=1)
    call = {"attention_mask": seen, "position_ids": positions(seen, 6)}
    with torch.no_grad():
        wanted = model(given["input_ids"], past_key_values=cache, **call).logits
        close(model(given["input_ids"], past_key_values=again, **call).logits, wanted, "loaded", tolerance=1e-6)


def test_losses_and_gradients_do_not_depend_on_padding() -> None:
    model, rows = adapted(), texts(4)
    batch, total, count = COLLATE(rows), 0.0, 0
    with torch.no_grad():
        for row in rows:
            alone = COLLATE([row])
            targets = int((alone["labels"][:, 1:] != -100).sum())
            total += float(model.eval()(**alone).loss) * targets
            count += targets
        assert float(model(**batch).loss) == pytest.approx(total / count, abs=2e-5)
        pads = (batch["attention_mask"] == 0).sum(1).tolist()
        names = ("input_ids", "attention_mask", "labels")
        left = {n: torch.stack([r.roll(p) for r, p in zip(batch[n], pads, strict=True)]) for n in names}
        left["labels"][left["attention_mask"].cumsum(1) == 1] = 5  # a first token is never a target
        assert float(model(**{**batch, **left}).loss) == pytest.approx(total / count, abs=2e-5)


def test_gradients_do_not_depend_on_how_the_batch_is_split_and_the_base_stays(tmp_path: Path) -> None:
    moved = []
    for parts in (1, 4):
        model = adapted()
        base = {n: v.clone() for n, v in model.named_parameters() if not v.requires_grad}
        before = trainable(model)
        split = {"per_device_train_batch_size": 8 // parts, "gradient_accumulation_steps": parts}
        train(model, tmp_path, **{**ONE_GRADIENT, **split})
        after = dict(model.named_parameters())
        assert all(torch.equal(base[name], after[name]) for name in base), "training changed base weights"
        moved.append({name: before[name] - after[name].detach() for name in before})
    difference = largest_difference(*moved)
    assert difference < 1e-5, f"gradients differ by up to {difference:.3g}"
    assert all(bool(value.any()) for value in moved[0].values())


def test_checkpoints_resume_bit_for_bit_and_hold_its_own_parts(tmp_path: Path) -> None:
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4}
    model, fresh = adapted(lora_dropout=0.1), adapted(seed=8, lora_dropout=0.1)
    trainer = train(model, tmp_path / "once", **settings)
    again = train(fresh, tmp_path / "again", resume=str(tmp_path / "once" / "checkpoint-2"), **settings)
    difference = largest_difference(trainable(model), trainable(fresh))
    assert difference == 0, f"weights differ by up to {difference:.3g}"
    assert trainer.evaluate()["eval_loss"] == again.evaluate()["eval_loss"]
    folder = tmp_path / "once" / "checkpoint-4"
    assert "model.safetensors" not in {path.name for path in folder.iterdir()}
    loaded = Nugget2DModel.from_pretrained(tiny_model(), folder)
    assert (loaded.budget, loaded.layer) == (0.4, 1)
    with torch.no_grad():
        assert torch.equal(loaded(**COLLATE(texts())).logits, model.eval()(**COLLATE(texts())).logits)


def test_it_trains_in_bfloat16(tmp_path: Path) -> None:
    model = adapted()
    before = trainable(model)
    train(model, tmp_path, bf16=True)
    after = trainable(model)
    assert all(bool(value.isfinite().all()) for value in after.values())
    assert all(bool((after[n] != before[n]).any()) for n in before if "nugget2d" in n)
    half = adapted()
    half.get_base_model().to(torch.bfloat16)
    half(**COLLATE(texts())).loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in half.parameters() if p.requires_grad)


def test_the_collator_cuts_texts_and_repeats_them() -> None:
    batch = NuggetCollator(context=3, pad_token_id=9)([{"input_ids": [4, 5, 6, 7, 8]}, {"input_ids": [4, 5, 6]}])
    assert batch["context_ids"].tolist() == [[4, 5, 6], [9, 9, 4]]
    assert batch["context_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["input_ids"].tolist() == [[7, 8], [5, 6]]
    assert batch["labels"].tolist() == [[-100, 8], [-100, 6]]
    given = {"context_ids": [4], "input_ids": [5, 6], "labels": [-100, 6]}
    assert NuggetCollator()([given])["labels"].tolist() == [[-100, 6]]
    refusal(lambda: NuggetCollator()([{"input_ids": [4, 5]}]), "too short", what="two tokens")
    refusal(lambda: NuggetCollator(autoencode=True), "start_token_id", what="no start")
    refusal(lambda: NuggetCollator(context=0), "context must be", what="no context")


def test_wrong_use_gets_a_clear_error() -> None:
    model, given = wrapped(), inputs()
    ids, mask = given["context_ids"], given["context_mask"]
    right = mask.flip(1)
    for call, words in (
        (lambda: Nugget2D(budget=0.1, window=2), "takes a budget alone"),
        (lambda: Nugget2D(budget=0), "budget"),
        (lambda: model.compress(ids, right), "padded on the left"),
        (lambda: model.compress(ids, mask[:, 1:]), "expected (3, 12)"),
        (lambda: model.compress(ids, mask, CompressedCache(model.config, Knorm())), "Nugget2D"),
        (lambda: model(**given, position_ids=ids), "position_ids"),
        (lambda: model(context_ids=ids), "row of input_ids"),
        (lambda: model.generate(context_ids=ids, max_new_tokens=2), "input_ids"),
        (lambda: model.generate(**given, prompt_lookup_num_tokens=2), "prompt_lookup_num_tokens"),
        (lambda: model.generate(**given, prefill_chunk_size=2), "prefill_chunk_size"),
        (lambda: wrapped(implementation="sdpa").compress(ids, mask), "hf_ext"),
        (lambda: wrapped("alternating"), "slide"),
        (lambda: Nugget2DModel(tiny_models.build("llama"), LoraConfig(r=2), layer=2), "from 0 to 1"),
    ):
        refusal(call, words, what=words)
    model.train()
    adapter.checkpoint_activations(model.get_base_model(), use_reentrant=False)
    refusal(lambda: model(**given), "gradient checkpointing", what="checkpointing")
