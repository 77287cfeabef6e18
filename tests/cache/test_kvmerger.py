"""KVMerger: what is merged, what it becomes, and that merging equal keys changes nothing."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import DynamicCache

from hf_ext.cache import CachePolicy, CompressedCache, Entries, KVMerger, Seen
from hf_ext.cache.policies.kvmerger import gaussian, numbered, pivots_of
from hf_ext.testing import tiny_models
from hf_ext.testing.cache import CacheConformance
from hf_ext.testing.cache_base import positions

#: Nothing is kept from being merged.
FREE = {"heavy": 0.0, "recent": 0.0, "sinks": 0, "least": -1.0}


class TestKVMerger(CacheConformance):
    merges = True

    def policy(self, budget, **options) -> CachePolicy:
        return KVMerger(budget=budget, **options)


def entries_of(*shape: int, seed: int = 0, nothing: int = 0) -> Entries:
    """Random entries `(rows, heads, n, width)`, the first `nothing` of which stand for nothing."""
    generator = torch.Generator().manual_seed(seed)
    rows, heads, n, _ = shape
    columns = torch.arange(n, dtype=torch.int32).expand(rows, heads, n).clone()
    columns[..., :nothing] = -1
    fields = {"attention": torch.rand(rows, heads, n, generator=generator), "bias": torch.zeros(rows, heads, n)}
    padding = torch.full((rows,), nothing)
    keys, values = torch.randn(*shape, generator=generator), torch.randn(*shape, generator=generator)
    return Entries(keys, values, columns, n, padding, fields)


def compress(policy: KVMerger, entries: Entries, keep: int) -> Entries:
    return policy.compress(entries, Seen(0, 1), torch.full((len(entries.keys),), keep))


def runs_model() -> object:
    """A model of one layer without positions: equal tokens have equal keys and values."""
    model = tiny_models.build("gpt2", n_layer=1)
    with torch.no_grad():
        model.transformer.wpe.weight.zero_()
    model.set_attn_implementation("hf_ext")
    return model


def differences(policy: KVMerger, lengths: tuple[int, ...] = (14, 11)) -> float:
    """Largest difference of logits to a full cache, for runs of equal tokens, in two chunks and while decoding."""
    model = runs_model()
    rows = [torch.tensor([5] * 4 + [9] * 3 + [7] * 1 + [8] * (length - 8) + [11] * 3 + [6] * 5) for length in lengths]
    total = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (total - len(row), 0)) for row in rows])
    mask = (ids > 0).long()
    ours, full = CompressedCache(model.config, policy), DynamicCache(config=model.config)
    worst, start = 0.0, 0
    for size in (10, total - 16, *[1] * 6):
        part = slice(start, start + size)
        start += size
        found, wanted = (
            model(
                ids[:, part], attention_mask=mask[:, :start], position_ids=positions(mask[:, :start], size),
                past_key_values=cache,
            ).logits
            for cache in (ours, full)
        )  # fmt: skip
        gap = (found - wanted).abs().amax(-1)[mask[:, part].bool()]
        worst = max(worst, gap.max().item())
    assert max(ours.held()) <= 6 < total
    return worst


@torch.no_grad()
def test_merging_equal_keys_changes_no_logits() -> None:
    gap = differences(KVMerger(budget=6, interval=1, **FREE))
    assert gap < 1e-5, f"the largest difference of logits is {gap:.2e}"


@torch.no_grad()
def test_without_the_bias_merging_equal_keys_does_change_them() -> None:
    assert differences(KVMerger(budget=6, interval=1, biased=False, **FREE)) > 1e-3


def test_equal_keys_with_other_values_are_merged_without_loss() -> None:
    entries = entries_of(1, 1, 5, 4)
    entries.keys[:] = entries.keys[:, :, :1]
    query = torch.randn(1, 1, 3, 4, generator=torch.Generator().manual_seed(5))

    def output(held: Entries) -> torch.Tensor:
        scores = query @ held.keys.transpose(2, 3) + held.fields["bias"][:, :, None]
        return scores.softmax(-1) @ held.values

    once = compress(KVMerger(**FREE), entries, 3)
    again = compress(KVMerger(**FREE), once, 1)
    for held, count in ((once, 3), (again, 1)):
        assert len(held) == count
        gap = (output(held) - output(entries)).abs().max().item()
        assert gap < 1e-6, f"{count} entries: the largest difference is {gap:.2e}"


@torch.no_grad()
def test_a_threshold_above_one_leaves_the_cache_unchanged() -> None:
    model = tiny_models.build("llama")
    model.set_attn_implementation("hf_ext")
    ids, mask = tiny_models.prompts((14, 9))
    cache = CompressedCache(model.config, KVMerger(budget=4, threshold=1.01))
    settings = {"do_sample": False, "max_new_tokens": 5, "output_logits": True, "return_dict_in_generate": True}
    ours = model.generate(ids, attention_mask=mask, past_key_values=cache, **settings)
    full = model.generate(ids, attention_mask=mask, past_key_values=DynamicCache(config=model.config), **settings)
    gap = max((a - b).abs().max().item() for a, b in zip(ours.logits, full.logits, strict=True))
    assert gap < 1e-5, f"the largest difference of logits is {gap:.2e}"
    assert cache.held() == [18, 18]


@torch.no_grad()
def test_every_head_holds_its_budget_and_stands_for_all_tokens_through_chunks_and_decoding() -> None:
    model = tiny_models.build("llama")
    model.set_attn_implementation("hf_ext")
    ids, mask = tiny_models.prompts((30, 22, 17))
    cache = CompressedCache(model.config, KVMerger(budget=8, interval=1, sinks=2, least=-1.0))
    start = 0
    for size in (20, 4, *[1] * 6):
        part = slice(start, start + size)
        start += size
        where = positions(mask[:, :start], size)
        model(ids[:, part], attention_mask=mask[:, :start], position_ids=where, past_key_values=cache)
        for layer in range(2):
            entries = cache.entries(layer)
            tokens = mask[:, :start].sum(1)
            assert (entries.real.sum(-1) == tokens.clamp(max=8)[:, None]).all(), (start, entries.columns)
            masses = entries.fields["bias"].exp().where(entries.real, 0.0).sum(-1)
            assert torch.allclose(masses, tokens[:, None].expand_as(masses).float()), (start, masses)
            assert (entries.columns.diff(dim=-1) > 0).logical_or(~entries.real[..., :-1]).all()


def test_sets_are_those_of_a_scan_from_the_last_token_to_the_first() -> None:
    entries, policy = entries_of(2, 2, 40, 3, nothing=4), KVMerger(threshold=0.3, heavy=0.1, recent=0.2, sinks=3)
    keep = torch.full((2,), 20)
    joined = policy.similarities(entries, Seen(0, 1), keep) >= 0.3
    sets, count = numbered(entries.real, joined)
    merged = compress(policy, entries, 20)
    for row in range(2):
        for head in range(2):
            attention, keys = entries.fields["attention"][row, head], entries.keys[row, head]
            middle = range(4 + 3, 40 - 4)  # the first 3, and a fifth of 20 last ones, stay as they are
            heavy = sorted(middle, key=lambda i: -attention[i])[:2]
            alone = [*range(4, 7), *range(36, 40), *heavy]
            wanted: list[list[int]] = [[39]]
            for i in range(38, 3, -1):
                alike = torch.cosine_similarity(keys[i], keys[i + 1], dim=0) >= 0.3
                if alike and i not in alone and i + 1 not in alone:
                    wanted[-1].insert(0, i)
                else:
                    wanted.append([i])
            found = [(sets[row, head] == number).nonzero().flatten().tolist() for number in range(count)]
            assert [members for members in found if members] == wanted[::-1]
            assert int(merged.real[row, head].sum()) == len(wanted) < 36


def test_what_a_set_becomes_is_the_formula_gone_through_in_a_loop() -> None:
    entries = entries_of(2, 2, 24, 5, seed=3)
    entries.fields["bias"][:] = torch.rand(2, 2, 24, generator=torch.Generator().manual_seed(4))
    policy = KVMerger(threshold=0.2, bandwidth=0.7, **FREE)
    joined = policy.similarities(entries, Seen(0, 1), torch.full((2,), 12)) >= 0.2
    sets, count = numbered(entries.real, joined)
    merged = compress(policy, entries, 12)
    sizes, worst = [], 0.0
    for row in range(2):
        for head in range(2):
            for number in range(count):
                members = (sets[row, head] == number).nonzero().flatten().tolist()
                if not members:
                    assert merged.columns[row, head, number] == -1
                    continue
                sizes.append(len(members))
                keys, values = entries.keys[row, head].double(), entries.values[row, head].double()
                pivot = max(members, key=lambda i: entries.fields["attention"][row, head, i])
                others = [(keys[pivot] - keys[i]).norm().item() for i in members if i != pivot]
                sigma = 0.7 * sum(others) / max(len(others), 1)
                weights = [
                    torch.exp(-(keys[pivot] - keys[i]).square().sum() / (2 * sigma**2))
                    if i != pivot
                    else torch.tensor(1.0)
                    for i in members
                ]
                masses = [entries.fields["bias"][row, head, i].exp() for i in members]
                shares = torch.stack([w * m for w, m in zip(weights, masses, strict=True)]).double()
                shares /= shares.sum()
                for tensor, held in ((keys, merged.keys), (values, merged.values)):
                    gap = ((shares[:, None] * tensor[members]).sum(0) - held[row, head, number]).abs().max()
                    worst = max(worst, gap.item())
                assert merged.columns[row, head, number] == pivot
                assert merged.fields["bias"][row, head, number] == pytest.approx(sum(masses).log().item(), abs=1e-5)
                attention = entries.fields["attention"][row, head, members].sum().item()
                assert merged.fields["attention"][row, head, number] == pytest.approx(attention, abs=1e-5)
    assert max(sizes) >= 3
    assert worst < 1e-5, f"the largest difference is {worst:.2e}"


def test_heavy_first_and_last_tokens_are_not_merged_while_there_are_others() -> None:
    entries = entries_of(1, 2, 32, 4)
    entries.fields["attention"][:, :, 15] = 9.0
    merged = compress(KVMerger(heavy=0.1, recent=0.25, sinks=2, least=-1.0), entries, 12)
    for head in range(2):
        kept = dict(zip(merged.columns[0, head].tolist(), merged.fields["bias"][0, head].tolist(), strict=True))
        assert {0, 1, 15, 29, 30, 31} <= set(kept)
        assert [kept[column] for column in (0, 1, 15, 29, 30, 31)] == [0.0] * 6


def test_pairs_that_are_less_alike_than_told_are_dropped_instead_the_least_attended_first() -> None:
    entries = entries_of(1, 2, 32, 4)
    attention = entries.fields["attention"]
    dropped = compress(KVMerger(heavy=0.25, recent=0.25, sinks=2, least=1.01), entries, 12)
    for head in range(2):
        middle = sorted(range(2, 29), key=lambda i: -attention[0, head, i])[: 12 - 2 - 3]
        assert dropped.columns[0, head].tolist() == sorted([0, 1, *middle, 29, 30, 31])
    assert (dropped.fields["bias"] == 0).all()
    both = compress(KVMerger(**{**FREE, "least": 0.7}), entries, 12)
    assert (both.real.sum(-1) == 12).all()
    assert both.fields["bias"].max() > 0
    cosine = torch.cosine_similarity(entries.keys[0, :, :-1], entries.keys[0, :, 1:], dim=-1)
    assert both.fields["bias"].exp().sum() <= 2 * 12 + (cosine >= 0.7).sum() + 1e-3


def test_a_budget_of_one_merges_everything() -> None:
    merged = compress(KVMerger(least=-1.0), entries_of(1, 2, 12, 4, nothing=3), 1)
    assert merged.fields["bias"].exp().flatten().tolist() == pytest.approx([9.0, 9.0])


@torch.no_grad()
def test_attention_is_counted_with_the_bias_also_where_past_tokens_are_recorded() -> None:
    model = tiny_models.build("llama")
    model.set_attn_implementation("hf_ext")
    ids, mask = tiny_models.prompts((26, 20))
    found = []
    for record in (False, True):
        cache = CompressedCache(model.config, KVMerger(budget=7, sinks=1, least=0.0))
        if record:
            cache.activate_past_recording()
        for start, stop in ((0, 14), (14, 20), (20, 26)):
            where = positions(mask[:, :stop], stop - start)
            part, seen = ids[:, start:stop], mask[:, :stop]
            model(part, attention_mask=seen, position_ids=where, past_key_values=cache)
            if record:
                cache.crop(0)
        found.append([cache.entries(layer) for layer in range(2)])
    for direct, recorded in zip(*found, strict=True):
        assert torch.equal(direct.columns, recorded.columns)
        gap = (direct.fields["attention"] - recorded.fields["attention"]).abs().max().item()
        assert gap < 1e-4, f"the largest difference of attention is {gap:.2e}"
        assert direct.fields["bias"].max() > 0


@torch.no_grad()
def test_only_decoding_merges_if_told_so() -> None:
    model = tiny_models.build("llama")
    model.set_attn_implementation("hf_ext")
    ids, _ = tiny_models.prompts((20,))
    cache = CompressedCache(model.config, KVMerger(budget=8, when="decode"))
    model(ids, past_key_values=cache)
    assert cache.held() == [20, 20]
    model(ids[:, :1], past_key_values=cache)
    assert cache.held() == [8, 8]


@torch.no_grad()
def test_heads_with_a_threshold_hold_their_own_numbers_and_can_be_saved(tmp_path) -> None:
    model = tiny_models.build("llama")
    model.set_attn_implementation("hf_ext")
    ids, mask = tiny_models.prompts((24, 15))
    cache = CompressedCache(model.config, KVMerger(budget=6, threshold=0.2, sinks=1))
    model(ids, attention_mask=mask, position_ids=positions(mask, 24), past_key_values=cache)
    counts = {int(n) for layer in range(2) for n in cache.entries(layer).real.sum(-1).flatten()}
    assert len(counts) > 1, counts
    assert max(counts) < 24, counts
    cache.save(tmp_path / "cache.safetensors")
    again = CompressedCache.load(tmp_path / "cache.safetensors", model.config)
    mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    found, wanted = (
        model(ids[:, :1], attention_mask=mask, position_ids=positions(mask, 1), past_key_values=held).logits
        for held in (again, cache)
    )
    assert again.policy == cache.policy
    assert torch.equal(found, wanted)


def test_far_members_of_a_set_have_weights_above_zero_and_equal_ones_the_same() -> None:
    keys = torch.tensor([0.0] * 60 + [1e4]).view(1, 1, -1, 1)
    sets, pivots = torch.zeros(1, 1, 61, dtype=torch.int64), torch.zeros(1, 1, 1, dtype=torch.int64)
    weights = gaussian(keys, sets, pivots)
    assert (weights[..., :60] == 1).all()
    assert 0 < weights[..., 60] < 1e-30
    assert pivots_of(torch.zeros(1, 1, 61), sets, 1).tolist() == [[[0]]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"heavy": 1.0}, "heavy must be a share"),
        ({"heavy": 0.6, "recent": 0.4}, "leave nothing to merge"),
        ({"bandwidth": 0.0}, "bandwidth must be above 0"),
        ({"least": -1.5}, "least must be a cosine from -1.0"),
        ({"budget": 0}, "budget in tokens must be at least 1"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        KVMerger(**options)


def test_options_survive_a_copy() -> None:
    policy = KVMerger(threshold=0.8, biased=False)
    assert dataclasses.replace(policy, budget=7).options() == {**policy.options(), "budget": 7}
