"""Tokens decoded while there is nothing to decide are held and attended to as all others are."""

from __future__ import annotations

import copy

import pytest
import torch

from hf_ext.cache import H2O, TOVA, AdaKV, CachePolicy, CompressedCache, Knorm, KVMerger, SnapKV
from hf_ext.cache.layer import CompressedLayer
from hf_ext.testing import tiny_models

POLICIES: dict[str, CachePolicy] = {
    "keys": Knorm(budget=160), "share": Knorm(budget=0.6), "last query": TOVA(budget=160), "sums": H2O(budget=0.6),
    "prefill": SnapKV(budget=160, window=4), "heads": AdaKV(policy=SnapKV(budget=160, window=4)),
    "heads, always": AdaKV(policy=Knorm(budget=0.6)), "merged": KVMerger(budget=160, least=-1.0),
    "everything": Knorm(budget=1.0),
}  # fmt: skip


@pytest.mark.parametrize("name", POLICIES)
@torch.no_grad()
def test_quiet_tokens_are_held_and_attended_to_as_others_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever happens between them: evictions, tokens taken back, rows that change places, a copy, a further turn."""
    model = tiny_models.build("llama").eval().double()
    ids = torch.randint(3, 60, (2, 300), generator=torch.Generator().manual_seed(0))
    model.set_attn_implementation("hf_ext")
    attend, quiet = CompressedLayer.attend, [0]

    def counted(layer: CompressedLayer, *given: object) -> object:
        quiet[0] += layer._quiet > 0
        return attend(layer, *given)  # type: ignore[arg-type]

    def never(layer: CompressedLayer, *given: object) -> object:
        layer._quiet = 0
        return attend(layer, *given)  # type: ignore[arg-type]

    def run(how: object) -> tuple[list[torch.Tensor], CompressedCache]:
        monkeypatch.setattr(CompressedLayer, "attend", how)
        cache = CompressedCache(model.config, copy.deepcopy(POLICIES[name]))
        found = [model(ids[:, :240], past_key_values=cache, logits_to_keep=1).logits]
        for at in range(240, 290):
            found.append(model(ids[:, at : at + 1], past_key_values=cache).logits)
            if at == 250:
                cache.batch_select_indices(torch.tensor([1, 0]))
            if at == 256 and not cache.policy.column_sums and cache.policy.when == "prefill":
                cache.crop(-2)
            if at == 262:
                cache = copy.deepcopy(cache)
        found.append(model(ids[:, 290:], past_key_values=cache, logits_to_keep=1).logits)
        return found, cache

    (own, held), (wanted, general) = run(counted), run(never)
    assert quiet[0] >= 20, f"{quiet[0]} quiet tokens"
    apart = max(float((a - b).abs().max()) for a, b in zip(own, wanted, strict=True))
    assert apart < 1e-9, f"logits differ by {apart}"
    for layer in range(len(held.layers)):
        one, other = held.entries(layer), general.entries(layer)
        assert torch.equal(one.columns, other.columns)
        for field in one.fields:
            apart = float((one.fields[field] - other.fields[field]).abs().max())
            assert apart < 1e-4, f"{field} differs by {apart}"
    assert held.resident_bytes() == general.resident_bytes()
