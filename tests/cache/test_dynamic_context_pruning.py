"""Dynamic context pruning: what is hidden at training is what leaves the cache, and nothing else changes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from hf_ext.attention.intercept import intercept
from hf_ext.cache import CompressedCache, DynamicContextPruning, DynamicContextPruningModel, Knorm
from hf_ext.cache.trained.add_on import before
from hf_ext.cache.trained.interaction import log_survival
from hf_ext.testing import tiny_models
from hf_ext.testing.cache import SHAPES, TURNS
from hf_ext.testing.cache_base import passes, positions
from hf_ext.testing.strategy_base import close, refusal

TOLERANCE = 3e-5


def wrapped(
    shape: str = "grouped", beta: float = 1.5, rank: int = 6, implementation: str = "hf_ext", **changes: Any
) -> DynamicContextPruningModel:
    """Return a tiny model whose random parts drop a good share."""
    kind, more = SHAPES[shape]
    base = tiny_models.build(kind, **{**more, **changes})
    base.set_attn_implementation(implementation)
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    return DynamicContextPruningModel(base, lora, rank=rank, beta=beta).eval()


def cache_of(model: DynamicContextPruningModel, **options: Any) -> CompressedCache:
    return CompressedCache(model.config, DynamicContextPruning(interval=1, **options))


def whole(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the logits of one pass over whole texts, without a cache."""
    with torch.no_grad():
        where = positions(mask, ids.shape[1])
        return model(ids, attention_mask=mask, position_ids=where, use_cache=False).logits


def step(model: Any, cache: Any, ids: Tensor, mask: Tensor, part: slice) -> Tensor:
    with torch.no_grad():
        return model(
            ids[:, part], attention_mask=mask[:, : part.stop], past_key_values=cache,
            position_ids=positions(mask[:, : part.stop], part.stop - part.start),
        ).logits  # fmt: skip


def same(found: Tensor, wanted: Tensor, mask: Tensor, what: Any) -> None:
    gap = (found - wanted).abs().amax(-1)[mask.bool()].max().item()
    assert gap < TOLERANCE, f"{what}: the largest difference of logits is {gap:.2e}"


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_hidden_in_one_pass_is_what_leaves_the_cache(shape: str) -> None:
    model = wrapped(shape)
    total = sum(TURNS)
    ids, mask = tiny_models.prompts((total, total - 5, total - 2))
    wanted, cache = whole(model, ids, mask), cache_of(model)
    kept = model.kept
    assert kept is not None
    assert kept.min() < 0.99, f"nothing is dropped: {kept}"
    for part in passes(total, TURNS):
        same(step(model, cache, ids, mask, part), wanted[:, part], mask[:, part], (shape, part))
    assert cache.get_seq_length() == total
    assert min(cache.held()) < total
    stock = whole(model.get_base_model(), ids, mask)
    assert (stock - wanted).abs().max() > 0.1, "dropping changes nothing, so this shows nothing"


@pytest.mark.parametrize("alpha", [1.0, 1.7, 4.0, math.inf])
def test_survival_is_the_product_gone_through_in_loops(alpha: float) -> None:
    """A model of one layer against its formula: by loops over queries, keys and droppers."""
    model = wrapped(num_hidden_layers=1, beta=0.3, implementation="sdpa")
    model.alpha = alpha if alpha < math.inf else 1.0
    model.train(alpha < math.inf)
    ids, mask = tiny_models.prompts((9, 6))
    found = whole(model, ids, mask)
    kept = model.kept
    base, part = model.get_base_model(), model.parts["0"]
    states: list[Tensor] = []
    with before([base.model.layers[0].self_attn], lambda module, hidden: states.append(hidden)):
        whole(base, ids, mask)
    query, key = states[0] @ part.query.detach().T, states[0] @ part.key.detach().T
    rows, n, _ = query.shape
    survival = torch.ones(rows, n, n)
    for row in range(rows):
        for i in range(n):
            for j in range(i):
                for t in range(j + 1, i + 1):
                    logit = float(query[row, t] @ key[row, j]) / math.sqrt(6) + 0.3
                    survival[row, i, j] *= _definition(logit, alpha) if mask[row, t] else 1.0

    def biased(module: Any, q: Tensor, k: Tensor, v: Tensor, given: Any, plain: Any, **call: Any) -> Any:
        seen = torch.ones(n, n, dtype=torch.bool).tril() & mask[:, None].bool()
        least = torch.finfo(torch.float32).min
        bias = survival.clamp(min=1e-30).log()
        if alpha == math.inf:
            bias = bias.masked_fill(survival == 0, least)
        return plain(module, q, k, v, bias.masked_fill(~seen, least)[:, None], **call)

    with intercept(base, biased):
        wanted = whole(base, ids, mask)
    same(found, wanted, mask, alpha)
    pairs = torch.ones(n, n).tril(-1) * mask[:, None] * mask[:, :, None]
    close(kept[0], (survival * pairs).sum((1, 2)) / pairs.sum((1, 2)), "the share that is kept", tolerance=1e-5)


def _definition(x: float, alpha: float) -> float:
    if alpha == math.inf:
        return float(x > 0)
    if alpha == 1:
        return 1 / (1 + math.exp(-x))
    low, high = 0.0, 1.0
    for _ in range(60):
        p = (low + high) / 2
        low, high = (p, high) if (p ** (alpha - 1) - (1 - p) ** (alpha - 1)) / (alpha - 1) < x else (low, p)
    return (low + high) / 2


def test_gradients_of_the_survival_are_those_of_differences() -> None:
    logits = torch.randn(2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 0.3
    real = torch.tensor([[True] * 5, [False, True, True, True, True]])
    for alpha in (1.0, 1.6, 3.0):
        assert torch.autograd.gradcheck(lambda x, a=alpha: log_survival(x, a, real), logits.requires_grad_(True))


@pytest.mark.parametrize("shape", ["grouped", "learned-positions", "alternating", "sliding"])
def test_with_nothing_dropped_it_is_the_model_with_its_adapter(shape: str) -> None:
    model = wrapped(shape, beta=100.0)
    base = model.get_base_model()
    ids, mask = tiny_models.prompts((12, 7))
    same(whole(model, ids, mask), whole(base, ids, mask), mask, "a whole pass")
    settings = {"do_sample": False, "max_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True}
    ours = model.generate(input_ids=ids, attention_mask=mask, **settings)
    theirs = base.generate(ids, attention_mask=mask, **settings)
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    close(torch.stack(ours.logits), torch.stack(theirs.logits), "generate", tolerance=TOLERANCE)


def test_without_its_adapter_it_is_the_stock_model() -> None:
    model, stock = wrapped(), tiny_models.build("llama")
    ids, mask = tiny_models.prompts()
    with model.disable_adapter():
        same(whole(model, ids, mask), whole(stock, ids, mask), mask, "disabled")
        found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert torch.equal(found, stock.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False))
    assert (whole(model, ids, mask) - whole(stock, ids, mask)).abs().max() > 0.1


def test_rows_hold_different_tokens_and_a_batch_holds_what_its_rows_hold() -> None:
    model = wrapped()
    ids, mask = tiny_models.prompts((24, 17, 9))
    batch = cache_of(model)
    step(model, batch, ids, mask, slice(0, 24))
    for row in range(3):
        pads = int((mask[row] == 0).sum())
        alone = cache_of(model)
        step(model, alone, ids[row : row + 1, pads:], mask[row : row + 1, pads:], slice(0, 24 - pads))
        for layer in range(2):
            found = [c - pads for c in batch.columns(layer)[row, 0].tolist() if c >= 0]
            assert found == alone.columns(layer)[0, 0].tolist(), (row, layer)
    counts = (batch.columns(0)[:, 0] >= 0).sum(-1).tolist()
    assert len(set(counts)) == 3, counts


def test_rows_may_be_reordered_repeated_and_left_out() -> None:
    model = wrapped()
    ids, mask = tiny_models.prompts((24, 19, 22))
    cache = cache_of(model)
    step(model, cache, ids, mask, slice(0, 12))
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([5, 1, 3]))
    order = [[2, 2, 0, 0, 0, 0][row] for row in (5, 1, 3)]
    ids, mask = ids[order], mask[order]
    wanted = whole(model, ids, mask)
    for part in passes(12, (1, 1, 5, 1, 4)):
        part = slice(part.start + 12, part.stop + 12)
        same(step(model, cache, ids, mask, part), wanted[:, part], mask[:, part], part)


def test_tokens_that_are_forgotten_have_dropped_nothing() -> None:
    """Assisted decoding: wrong tokens are run and taken back, the right ones come in their place."""
    model = wrapped(beta=0.8)
    ids, mask = tiny_models.prompts((24, 19))
    wanted, cache = whole(model, ids, mask), cache_of(model)
    step(model, cache, ids, mask, slice(0, 10))
    cache.activate_past_recording()
    drops = 0
    for start, right, wrong in ((10, 3, 2), (13, 1, 4), (14, 5, 0), (19, 0, 3), (19, 5, 0)):
        other = ids.clone()
        other[:, start + right :] = (ids[:, start + right :] + 7) % 90 + 3
        part = slice(start, start + right + wrong)
        found = step(model, cache, other, torch.ones_like(mask) * mask, part)
        good = slice(start, start + right)
        if right:
            same(found[:, :right], wanted[:, good], mask[:, good], part)
        ends = cache.entries(0).fields["end"]
        drops += int(((ends >= start + right) & (ends < start + right + wrong)).sum())
        cache.crop(-wrong)
    assert drops, "no forgotten token would have dropped anything, so this shows nothing"
    assert cache.get_seq_length() == 24


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "prefill_chunk_size": 5},
        {"do_sample": False, "prompt_lookup_num_tokens": 3},
    ],
)
def test_generate_drops_by_itself_and_says_what_a_masked_pass_says(settings: dict[str, Any]) -> None:
    model = wrapped()
    ids, mask = tiny_models.prompts((14,) if "prompt_lookup_num_tokens" in settings else (14, 9))
    cache = cache_of(model)
    common = {"attention_mask": mask, "max_new_tokens": 8, **settings}
    found = model.generate(input_ids=ids, past_key_values=cache, **common)
    assert max(cache.held()) < cache.get_seq_length() == found.shape[1] - 1
    assert torch.equal(found, model.generate(input_ids=ids, **common)), "without a cache given"
    if "num_beams" not in settings:
        grown = torch.cat([mask, torch.ones(len(ids), 8, dtype=mask.dtype)], dim=1)
        logits = whole(model, found, grown)[:, 13:-1]
        assert torch.equal(found[:, 14:], logits.argmax(-1))


def test_without_a_cache_generate_recomputes_and_gives_the_same() -> None:
    model = wrapped(implementation="sdpa")
    ids, mask = tiny_models.prompts((10, 6))
    settings = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    found = model.generate(input_ids=ids, use_cache=False, **settings)
    model.set_attn_implementation("hf_ext")
    assert torch.equal(found, model.generate(input_ids=ids, **settings))


def test_dropped_tokens_are_gone_from_memory() -> None:
    model = wrapped(beta=0.0, head_dim=64, max_position_embeddings=512)
    ids, mask = tiny_models.prompts((300,))
    cache = CompressedCache(model.config, DynamicContextPruning())
    step(model, cache, ids, mask, slice(0, 300))
    for column in range(300, 320):
        ids = torch.cat([ids, ids[:, -7:-6]], dim=1)
        mask = torch.ones_like(ids)
        step(model, cache, ids, mask, slice(column, column + 1))
    entries = [cache.entries(layer) for layer in range(2)]
    alive = sum(int((e.fields["end"][0, 0] >= 320).sum()) for e in entries)
    held = sum(len(e) for e in entries)
    assert held <= alive + 2 * max(1, held // 64), (held, alive)
    assert alive < 320, alive
    keys_and_values = held * 2 * 2 * 64 * 4
    assert cache.resident_bytes() < 1.15 * keys_and_values, (cache.resident_bytes(), keys_and_values)
    layer = cache.layers[0]
    small = layer.store.buffers["interaction"]
    assert small.shape[-1] * small.shape[1] == model.parts["0"].rank, "a small key is kept once, not in every head"


def test_a_rank_that_no_number_of_heads_divides_is_padded() -> None:
    model = wrapped("each", rank=5)
    ids, mask = tiny_models.prompts((16, 11))
    wanted, cache = whole(model, ids, mask), cache_of(model)
    for part in passes(16, (9, 4, 1, 1, 1)):
        same(step(model, cache, ids, mask, part), wanted[:, part], mask[:, part], part)


def test_a_saved_cache_goes_on(tmp_path: Any) -> None:
    model = wrapped()
    ids, mask = tiny_models.prompts((16, 11))
    wanted, cache = whole(model, ids, mask), cache_of(model)
    step(model, cache, ids, mask, slice(0, 12))
    cache.save(tmp_path / "prompt.safetensors")
    again = CompressedCache.load(tmp_path / "prompt.safetensors", model.config)
    assert again.held() == cache.held()
    same(step(model, again, ids, mask, slice(12, 16)), wanted[:, 12:], mask[:, 12:], "loaded")


def test_only_its_own_parts_are_saved_and_they_load_on_the_stock_model(tmp_path: Any) -> None:
    model = wrapped()
    model.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"adapter_model.safetensors", "dynamic_context_pruning.safetensors"} <= names
    assert "model.safetensors" not in names
    ids, mask = tiny_models.prompts()
    base = tiny_models.build("llama")
    loaded = DynamicContextPruningModel.from_pretrained(base, tmp_path)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(whole(loaded, ids, mask), whole(model, ids, mask))
    go_on = DynamicContextPruningModel.from_pretrained(tiny_models.build("llama"), tmp_path, is_trainable=True)
    trained = {name.split(".")[-1] for name, p in go_on.named_parameters() if p.requires_grad}
    assert {"query", "key", "beta"} <= trained
    assert go_on.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_nearly_the_same_with_and_without_a_cache(dtype: torch.dtype) -> None:
    model = wrapped()
    model.get_base_model().to(dtype)
    ids, mask = tiny_models.prompts((20, 13))
    wanted, cache = whole(model, ids, mask).float(), cache_of(model)
    assert wanted.isfinite().all()
    assert model.parts["0"].query.dtype == dtype, "to() converts everything"
    worst = 0.0
    for part in passes(20, (12, 4, 1, 1, 1, 1)):
        found = step(model, cache, ids, mask, part).float()
        worst = max(worst, (found - wanted[:, part]).abs().amax(-1)[mask[:, part].bool()].median().item())
    assert worst < 0.25, f"the largest median difference of logits is {worst:.2e}"
    assert cache.entries(0).fields["interaction"].dtype == dtype


def test_wrong_use_gets_a_clear_error() -> None:
    model, stock = wrapped(), tiny_models.build("llama")
    stock.set_attn_implementation("hf_ext")
    ids, mask = tiny_models.prompts((8, 6))
    refusal(lambda: DynamicContextPruning(budget=0.5), "the model was trained to decide", what="a budget")
    refusal(lambda: DynamicContextPruning(window=4), "the model was trained to decide", what="a window")
    cache = CompressedCache(stock.config, DynamicContextPruning())
    refusal(lambda: stock(ids, past_key_values=cache), "DynamicContextPruningModel", what="a stock model")
    refusal(lambda: model(ids, past_key_values=CompressedCache(model.config, Knorm())), "Knorm", what="another policy")
    first = model(ids, attention_mask=mask, use_cache=True).past_key_values
    refusal(lambda: model(ids[:, :1], past_key_values=first), "does not know which tokens were dropped", what="stock")
    model.train()
    refusal(lambda: model(ids, past_key_values=cache_of(model)), "call model.eval()", what="a cache in training")
    model.eval().set_attn_implementation("sdpa")
    refusal(lambda: model.generate(input_ids=ids, max_new_tokens=2), "hf_ext", what="generate under sdpa")
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    for rank in (0, 2.5, True):
        refusal(
            lambda rank=rank: DynamicContextPruningModel(stock, lora, rank=rank), "rank must be", what=f"rank {rank}"
        )
    encoder = tiny_models.build("t5")
    refusal(lambda: DynamicContextPruningModel(encoder, LoraConfig(r=2)), "decoder-only", what="an encoder-decoder")
