"""Quantised storage against a stock model whose old keys and values are quantised by the definition."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from hf_ext.attention.intercept import intercept, visible
from hf_ext.cache import CachePolicy, CompressedCache, Entries, Knorm, Seen, StreamingLLM
from hf_ext.cache.policies.kivi import KIVI
from hf_ext.cache.quantisation import Quantisation
from hf_ext.cache.stores.packed import PackedStore
from hf_ext.cache.stores.steps import columns_of, joined, steps_of
from hf_ext.testing import tiny_models
from hf_ext.testing.cache import SHAPES
from hf_ext.testing.cache_base import TOLERANCE, added, positions
from hf_ext.testing.cache_base import columns_of as held_columns

GROUP, RESIDUAL = 4, 6
#: Prompt in two chunks, an answer longer than a group, a second turn, an answer, a third turn of many queries.
TURNS = (9, 7, 1, 1, 1, 1, 1, 1, 5, 1, 1, 18, 1)
FULL_SHAPES = tuple(name for name in SHAPES if name != "sliding")


def by_definition(x: Tensor, axis: int, bits: int, real: Tensor | None = None) -> Tensor:
    """Quantise along an axis and come back; what is not real has no say."""
    there = torch.ones_like(x, dtype=torch.bool) if real is None else real.expand_as(x)
    least = x.masked_fill(~there, torch.inf).amin(axis, keepdim=True)
    step = (x.masked_fill(~there, -torch.inf).amax(axis, keepdim=True) - least) / (2**bits - 1)
    codes = torch.where(step > 0, (x - least) / step, 0).round()
    back = least + codes.clamp(0, 2**bits - 1) * step
    return torch.where(there, back, x)


class Reference:
    """A run of passes over the same tokens with a quantised cache, and with a stock model and a full one."""

    def __init__(
        self, model: Any, policy: CachePolicy, bits: int, implementation: str = "hf_ext", **options: Any
    ) -> None:
        self.model, self.bits, self.implementation = model, bits, implementation
        self.quantise = Quantisation(bits=bits, group=GROUP, channels=4, residual=RESIDUAL)
        self.ours = CompressedCache(model.config, policy, quantise=self.quantise, **options)
        self.full = DynamicCache()
        self.packed = 0
        self.recording = False
        self.codes: list[dict[str, Tensor]] = []

    def step(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Run a pass with both, compare the logits and return ours."""
        count, before, seen = ids.shape[1], held_columns(self.ours), self.ours.get_seq_length()
        where = positions(mask, count)
        self.model.set_attn_implementation(self.implementation)
        with torch.no_grad():
            found = self.model(ids, attention_mask=mask, position_ids=where, past_key_values=self.ours).logits
            self.model.set_attn_implementation("eager")
            with self.quantised(before, seen):
                wanted = self.model(ids, attention_mask=mask, position_ids=where, past_key_values=self.full).logits
        real = mask[:, -count:].bool()
        gap = (found - wanted).abs().amax(-1)[real].max().item()
        assert gap < TOLERANCE, f"after {seen} tokens, a pass of {count}: the largest difference of logits is {gap:.2e}"
        if not self.recording:
            self.settled()
        return found

    def settled(self) -> None:
        """Pack, by the definition: whole groups of what is more than the residual window."""
        held = max(self.ours.held())
        self.packed += max(held - self.packed - RESIDUAL, 0) // GROUP * GROUP
        for number, layer in enumerate(x for x in self.ours.layers if hasattr(x, "store")):
            assert layer.store.frozen == self.packed, (layer.store.frozen, self.packed)
            now = (
                dict(zip("abcdef", (part.clone() for part in layer.store.codes()), strict=True)) if self.packed else {}
            )
            if number < len(self.codes):
                for name, old in self.codes[number].items():
                    assert torch.equal(old, now[name][:, :, : old.shape[2]]), f"codes {name} were written again"
                self.codes[number] = now
            else:
                self.codes.append(now)

    def each(self, change: Callable[[Any], None]) -> None:
        """Change both caches alike."""
        change(self.ours)
        change(self.full)

    @contextlib.contextmanager
    def quantised(self, held: dict[int, Tensor], seen: int) -> Iterator[None]:
        """Let the layers of the stock model see what is held, packed entries as they come back."""

        def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, plain: Any, **call: Any) -> Any:
            columns = held.get(module.layer_idx)
            if columns is None or not seen:
                return plain(module, query, key, value, mask, **call)
            mask = visible(mask, query, key).expand(len(query), -1, query.shape[2], -1)
            offset = seen + query.shape[2] - key.shape[2]
            assert not offset
            rows, heads, _ = columns.shape
            kept = torch.zeros(rows, heads, seen + query.shape[2] + 1, dtype=torch.bool)
            kept.scatter_(2, columns.long() % kept.shape[2], True)
            kept = kept[:, :, :-1]
            kept[:, :, seen:] = True
            if self.packed:
                place = columns[:, :, : self.packed].long()
                key, value = self.come_back(key, place, True), self.come_back(value, place, False)
            groups = query.shape[1] // heads
            sees = mask & kept.repeat_interleave(groups, 1)[:, :, None]
            return plain(module, query, key, value, added(sees), **call)

        with intercept(self.model, attend):
            yield

    def come_back(self, x: Tensor, place: Tensor, keys: bool) -> Tensor:
        """Return a tensor in which the entries at some columns are as after quantisation."""
        real = place >= 0
        at = place.clamp(min=0)[..., None].expand(-1, -1, -1, x.shape[-1])
        old = x.gather(2, at)
        if keys:
            grouped = old.unflatten(2, (-1, GROUP))
            new = by_definition(grouped, 3, self.bits, real.unflatten(2, (-1, GROUP))[..., None]).flatten(2, 3)
        else:
            size = max(n for n in range(1, 5) if x.shape[-1] % n == 0)
            new = by_definition(old.unflatten(3, (-1, size)), 4, self.bits).flatten(3)
        # What stands for nothing goes to a place behind the end.
        wide = torch.cat([x, x[:, :, :1]], dim=2)
        where = torch.where(real, place, x.shape[2])[..., None].expand_as(new)
        return wide.scatter(2, where, new)[:, :, :-1]


def nothing_dropped() -> CachePolicy:
    return KIVI(bits=4, group=GROUP, channels=4, residual=RESIDUAL, guard=False)


def reference(shape: str = "grouped", bits: int = 4, policy: CachePolicy | None = None, **options: Any) -> Reference:
    kind, changes = SHAPES[shape]
    return Reference(tiny_models.build(kind, **changes), policy or Knorm(budget=1.0), bits, **options)


def run(script: Reference, rows: int = 3) -> tuple[Tensor, Tensor]:
    """Run all turns in a padded batch."""
    total = sum(TURNS)
    ids, mask = tiny_models.prompts((total, total - 7, total - 2)[:rows])
    start = 0
    for size in TURNS:
        script.step(ids[:, start : start + size], mask[:, : start + size])
        start += size
    return ids, mask


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", FULL_SHAPES)
def test_logits_are_those_of_a_cache_whose_old_entries_were_quantised(shape: str, bits: int) -> None:
    """Chunks, turns and padding, whatever the heads share; and what is packed is never written again."""
    script = reference(shape, bits)
    run(script)
    assert script.packed >= 36, script.packed


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_other_attentions_read_what_comes_back(implementation: str) -> None:
    total = sum(TURNS)
    _, mask = tiny_models.prompts((total, total - 7, total - 2))
    script = reference(bits=4, implementation=implementation, attention_mask=mask)
    run(script)
    assert script.packed >= 36, script.packed


def test_rows_may_be_reordered_repeated_and_left_out() -> None:
    """Beam search moves codes, scales and the recent window."""
    script = reference(bits=2)
    ids, mask = tiny_models.prompts((40, 33, 38))
    script.step(ids[:, :20], mask[:, :20])
    rows = [2, 0, 0]
    for change in (
        lambda cache: cache.reorder_cache(torch.tensor(rows)),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.batch_select_indices(torch.tensor([5, 1, 3])),
    ):
        script.each(change)
    script.codes = []
    order = [[row for row in rows for _ in range(2)][i] for i in (5, 1, 3)]
    ids, mask = ids[order], mask[order]
    for column in range(20, 30):
        script.step(ids[:, column : column + 1], mask[:, : column + 1])
    script.step(ids[:, 30:40], mask)


def test_recorded_tokens_can_be_forgotten() -> None:
    """Assisted decoding: nothing is packed that may be taken back."""
    script = reference(bits=4)
    ids, mask = tiny_models.prompts((40, 33))
    script.step(ids[:, :20], mask[:, :20])
    script.recording = True
    script.each(lambda cache: cache.activate_past_recording())
    for start, wrong in ((20, 2), (23, 0), (28, 4)):
        script.step(ids[:, start : start + 5], mask[:, : start + 5])
        script.each(lambda cache, wrong=wrong: cache.crop(-wrong))
        script.settled()
    script.step(ids[:, 29:30], mask[:, :30])


def test_crop_reaches_into_the_residual_window_and_no_further() -> None:
    script = reference(bits=4)
    ids, mask = tiny_models.prompts((30,))
    script.step(ids[:, :20], mask[:, :20])
    script.each(lambda cache: cache.crop(-RESIDUAL))
    script.step(ids[:, 14:16], mask[:, :16])
    with pytest.raises(ValueError, match="are packed"):
        script.ours.crop(-9)


@pytest.mark.parametrize("budget", [26, 0.6])
@pytest.mark.parametrize("kind", [Knorm, StreamingLLM])
def test_eviction_at_prefill_composes(kind: type[CachePolicy], budget: int | float) -> None:
    """Dropped entries are hidden, those kept are packed as they are kept; every head has its own."""
    script = reference(bits=4, policy=kind(budget=budget, when="prefill"))
    ids, mask = tiny_models.prompts((40, 36))
    for start, stop in ((0, 32), (32, 33), (33, 34), (34, 35), (35, 36), (36, 40)):
        script.step(ids[:, start:stop], mask[:, :stop])
    assert script.packed >= 8, script.packed
    # Four decoded tokens made the oldest of 26 entries leave the window, which at the second turn keeps its place.
    assert script.ours.held() == ([30, 30] if budget == 26 else [24, 24]), script.ours.held()


@dataclass(kw_only=True)
class Mass(CachePolicy):
    """Keep what got most attention so far."""

    column_sums: ClassVar[bool] = True

    def field_names(self) -> tuple[str, ...]:
        return ("mass",)

    def observe(self, entries: Entries, seen: Seen) -> dict[str, Tensor]:
        assert seen.column_sums is not None
        return {"mass": entries.fields["mass"] + seen.column_sums}

    def scores(self, entries: Entries, seen: Seen) -> Tensor:
        return entries.fields["mass"]


def test_attention_is_counted_beside_packed_entries() -> None:
    """What the recent entries got, as packed codes are read directly, is what the dequantised way counts."""
    script = reference(bits=8, policy=Mass(budget=0.8, when="prefill"))
    ids, mask = tiny_models.prompts((40, 36))
    for start, stop in ((0, 25), (25, 26), (26, 27), (27, 30), (30, 40)):
        script.step(ids[:, start:stop], mask[:, :stop])
    first, second = (CompressedCache(script.model.config, Mass(budget=1.0), quantise=script.quantise) for _ in range(2))
    script.model.set_attn_implementation("hf_ext")
    with torch.no_grad():
        for cache, options in ((first, {}), (second, {"output_attentions": True})):
            script.model(ids[:, :30], attention_mask=mask[:, :30], past_key_values=cache)
            for stop in (31, 32, 36):
                at = slice(cache.get_seq_length(), stop)
                script.model(ids[:, at], attention_mask=mask[:, :stop], past_key_values=cache, **options)
    for ours, theirs in zip(first.layers, second.layers, strict=True):
        gap = (ours.store.recent.buffers["mass"] - theirs.store.recent.buffers["mass"]).abs().max().item()
        assert gap < TOLERANCE, f"the largest difference of counted attention is {gap:.2e}"


@dataclass(kw_only=True)
class Halving(CachePolicy):
    """Merge each two neighbours, with a bias for what they stand for."""

    biased: ClassVar[bool] = True

    def compress(self, entries: Entries, seen: Seen, keep: Tensor) -> Entries:
        half = entries.map(lambda x: x[:, :, 1::2])
        fields = {"bias": torch.full_like(half.columns, 0.7, dtype=torch.float32)}
        return dataclasses.replace(half, fields=fields)


def test_merged_entries_are_packed_with_their_bias() -> None:
    """Reading codes gives what reading dequantised entries with their bias gives."""
    model = tiny_models.build("llama")
    model.set_attn_implementation("hf_ext")
    ids, _ = tiny_models.prompts((34,))
    logits = []
    for options in ({}, {"output_attentions": True}):
        cache = CompressedCache(
            model.config,
            Halving(budget=0.5, when="prefill"),
            quantise=Quantisation(bits=4, group=GROUP, residual=RESIDUAL),
        )
        with torch.no_grad():
            model(ids[:, :30], past_key_values=cache)
            assert cache.layers[0].store.frozen == 8
            logits.append(model(ids[:, 30:], past_key_values=cache, **options).logits)
    gap = (logits[0] - logits[1]).abs().max().item()
    assert gap < TOLERANCE, f"the largest difference of logits is {gap:.2e}"
    bias = cache.entries(0).fields["bias"][..., :8]
    assert bool((bias == 0.7).all())


def test_eight_bits_are_close_to_a_full_cache_and_fewer_are_further() -> None:
    model = tiny_models.build("llama")
    model.set_attn_implementation("hf_ext")
    ids, mask = tiny_models.prompts((60, 50))
    laws = {}
    for bits in (None, 8, 4, 2):
        policy = Knorm(budget=1.0) if bits is None else KIVI(bits=bits, group=16, residual=16)
        cache = CompressedCache(model.config, policy)
        with torch.no_grad():
            model(ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache)
            laws[bits] = model(ids[:, -1:], attention_mask=mask, past_key_values=cache).logits.softmax(-1)
    errors = [float((laws[bits] - laws[None]).abs().sum(-1).max()) for bits in (8, 4, 2)]
    assert 0 < errors[0] < errors[1] < errors[2], errors
    assert errors[0] < 0.02, errors


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_entries_come_back_within_half_a_step(bits: int) -> None:
    store = PackedStore((), Quantisation(bits=bits, group=8, channels=4, residual=0))
    keys, values = torch.randn(2, 2, 2, 24, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    store.append(keys, values, 0, None)
    store.flush()
    assert store.frozen == 24
    assert not len(store.recent)
    key_error = (store.keys - keys).abs().unflatten(2, (3, 8)) / store.part("key_scale")[:, :, :, None]
    value_error = (store.values - values).abs().unflatten(3, (4, 4)) / store.part("value_scale")[..., None]
    worst = max(float(key_error.max()), float(value_error.max()))
    assert worst <= 0.5 + 1e-3, f"{worst} steps"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_held_is_near_the_nominal_bytes(dtype: torch.dtype) -> None:
    """At most 5 % above codes, scales and the window, with and without eviction; and far below full precision."""
    model = tiny_models.build("llama", head_dim=64, max_position_embeddings=2048).to(dtype)
    model.set_attn_implementation("hf_ext")
    ids, _ = tiny_models.prompts((1200,))
    for bits in (2, 4, 8):
        for policy in (Knorm(budget=1.0), Knorm(budget=0.5, when="prefill"), StreamingLLM(budget=600, when="prefill")):
            cache = CompressedCache(model.config, policy, quantise=Quantisation(bits=bits, guard=False))
            out = model.generate(ids, past_key_values=cache, max_new_tokens=2, do_sample=False)
            share = cache.resident_bytes() / cache.nominal_bytes()
            assert 0.95 < share < 1.05, f"{bits} bits, {policy}: {share:.3f} times the nominal bytes"
            if policy.budget == 1.0:
                model.generate(out, past_key_values=cache, max_new_tokens=70, do_sample=False)
                assert cache.get_seq_length() == 1271
                share = cache.resident_bytes() / cache.nominal_bytes()
                assert 0.95 < share < 1.05, f"{bits} bits, decoding: {share:.3f} times the nominal bytes"
                full = 2 * 2 * cache.get_seq_length() * 2 * 64 * dtype.itemsize
                assert cache.resident_bytes() < 0.8 * full, (bits, cache.resident_bytes(), full)


def test_generate_runs_with_every_way_to_decode() -> None:
    model = tiny_models.build("llama")
    ids, mask = tiny_models.prompts((24, 19))
    for implementation in ("hf_ext", "sdpa"):
        model.set_attn_implementation(implementation)
        for settings in (
            {"do_sample": False},
            {"do_sample": True},
            {"do_sample": False, "num_beams": 3},
            {"do_sample": False, "prefill_chunk_size": 5},
        ):
            cache = CompressedCache(model.config, nothing_dropped())
            out = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=12, **settings)
            assert out.shape == (2, 36)
            assert cache.get_seq_length() == 35, settings
            assert cache.layers[0].store.frozen == 28, settings


def test_half_precision_reads_codes_as_it_reads_what_comes_back() -> None:
    model = tiny_models.build("llama").to(torch.bfloat16)
    model.set_attn_implementation("hf_ext")
    ids, mask = tiny_models.prompts((30, 22))
    logits = []
    for options in ({}, {"output_attentions": True}):
        cache = CompressedCache(model.config, nothing_dropped())
        with torch.no_grad():
            model(ids[:, :29], attention_mask=mask[:, :29], past_key_values=cache)
            logits.append(model(ids[:, 29:], attention_mask=mask, past_key_values=cache, **options).logits.float())
    gap = (logits[0] - logits[1]).abs().max().item()
    assert gap < 0.05 * logits[0].abs().max().item(), f"the largest difference of logits is {gap:.2e}"


def test_a_saved_cache_goes_on_as_it_would_have(tmp_path: Any) -> None:
    model = tiny_models.build("llama")
    model.set_attn_implementation("hf_ext")
    ids, mask = tiny_models.prompts((40, 33))
    for policy, quantise in (
        (nothing_dropped(), None),
        (Knorm(budget=0.6, when="prefill"), Quantisation(bits=2, group=GROUP, residual=RESIDUAL)),
    ):
        cache = CompressedCache(model.config, policy, quantise=quantise)
        with torch.no_grad():
            model(ids[:, :30], attention_mask=mask[:, :30], past_key_values=cache)
            cache.save(tmp_path / "cache.safetensors")
            again = CompressedCache.load(tmp_path / "cache.safetensors", model.config)
            assert again.quantise == cache.quantise
            assert again.resident_bytes() == cache.resident_bytes()
            for column in range(30, 40):
                call = {"attention_mask": mask[:, : column + 1]}
                wanted = model(ids[:, column : column + 1], past_key_values=cache, **call).logits
                found = model(ids[:, column : column + 1], past_key_values=again, **call).logits
                assert torch.equal(wanted, found)


def test_offloaded_layers_come_back() -> None:
    model = tiny_models.build("llama")
    model.set_attn_implementation("hf_ext")
    ids, _ = tiny_models.prompts((30,))
    cache = CompressedCache(model.config, nothing_dropped())
    with torch.no_grad():
        model(ids[:, :29], past_key_values=cache)
        wanted = cache.layers[0].store.keys
        cache.layers[0].offload()
        cache.layers[0].prefetch()
    assert torch.equal(wanted, cache.layers[0].store.keys)


@dataclass(kw_only=True)
class Ragged(Knorm):
    storage: ClassVar[Literal["dense", "ragged"]] = "ragged"


def test_what_cannot_be_combined_says_why() -> None:
    llama, mistral = tiny_models.shared("llama").config, tiny_models.shared("mistral").config
    for config, policy, options, reason in (
        (llama, Knorm(budget=0.5), {"quantise": 4}, "when='prefill'"),
        (llama, Ragged(budget=0.5), {"quantise": 4}, "other tokens in every head"),
        (mistral, KIVI(), {}, "sliding window"),
        (llama, KIVI(bits=2), {"quantise": 4}, "leave quantise"),
        (llama, KIVI(), {"layer_budgets": [0.5, 0.5]}, "when='prefill'"),
        (llama, Knorm(), {"quantise": 3}, "bits must be one of"),
    ):
        with pytest.raises(ValueError, match=reason):
            CompressedCache(config, policy, **options)
    with pytest.raises(ValueError, match="drops nothing"):
        KIVI(budget=0.5)
    with pytest.raises(ValueError, match="residual must be"):
        Quantisation(residual=-1)
    narrow = tiny_models.build("llama", head_dim=6)
    with pytest.raises(ValueError, match="do not fill whole bytes; use bits=4"):
        narrow(tiny_models.prompts((9,))[0], past_key_values=CompressedCache(narrow.config, KIVI()))


def test_a_budget_that_packed_entries_fill_keeps_the_window_and_says_so() -> None:
    model = tiny_models.build("llama")
    model.set_attn_implementation("hf_ext")
    ids, _ = tiny_models.prompts((60,))
    policy = Knorm(budget=20, when="prefill")
    cache = CompressedCache(model.config, policy, quantise=Quantisation(group=GROUP, residual=RESIDUAL))
    with torch.no_grad():
        model(ids[:, :30], past_key_values=cache)
        for column in range(30, 50):
            model(ids[:, column : column + 1], past_key_values=cache)
        frozen = cache.layers[0].store.frozen
        with pytest.warns(UserWarning, match="never dropped"):
            model(ids[:, 50:], past_key_values=cache)
    assert frozen == 32
    assert cache.held() == [frozen + RESIDUAL] * 2


def test_columns_come_back_from_their_steps() -> None:
    for gap in (1, 300, 70000):
        columns = torch.tensor([[[-1, -1, 2, 3, 3 + gap], [-1, 0, 1, 5, 9]]], dtype=torch.int32)
        steps = steps_of(columns)
        assert torch.equal(columns_of(steps, 2), columns)
        more = torch.tensor([[[3 + gap + 2, -1, 4 + gap + 2], [10, 300, 301]]], dtype=torch.int32)
        last = torch.tensor([[3 + gap, 9]])
        both = columns_of(joined(steps, steps_of(more, last)), 2)
        assert torch.equal(both, torch.cat([columns, more], dim=-1))
    assert steps_of(torch.arange(9).expand(3, 4, 9)).shape == (3, 1, 9)
    assert steps_of(torch.arange(9).expand(3, 4, 9)).dtype == torch.uint8
