"""The conformance suite of cache policies: what every one of them has to keep to."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from hf_ext.cache import CachePolicy, CompressedCache
from hf_ext.testing import tiny_models
from hf_ext.testing.cache_base import Script, passes

#: Prompt in two chunks, an answer, a second turn, an answer, a third turn, an answer.
TURNS = (9, 7, 1, 1, 1, 5, 1, 1, 4, 1, 1)
#: The heads of a model share keys in groups, not at all, or all of them.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped": ("llama", {}),
    "each": ("llama", {"num_key_value_heads": 4}),
    "one": ("llama", {"num_key_value_heads": 1}),
    "learned-positions": ("gpt2", {}),
    "normed": ("qwen3", {}),
    "alternating": ("gemma3", {}),
    "sliding": ("mistral", {}),
    "offset-positions": ("opt", {}),
    "sinks": ("gpt_oss", {}),
}
#: Those on which a budget that is a share of the tokens is tried as well.
IN_SHARES = ("grouped", "alternating", "learned-positions")
#: How the full budget is tried.
GREEDY = {"do_sample": False, "max_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True}


def model_of(shape: str) -> Any:
    """Return a tiny model of a shape, fresh."""
    kind, changes = SHAPES[shape]
    return tiny_models.build(kind, **changes)


@functools.cache
def with_a_full_cache(shape: str) -> Any:
    """Return what `generate` gives for two prompts with a `DynamicCache`, the same for all policies."""
    model, (ids, mask) = model_of(shape), tiny_models.prompts((12, 7))
    model.set_attn_implementation("hf_ext")
    return model.generate(ids, attention_mask=mask, past_key_values=DynamicCache(config=model.config), **GREEDY)


class CacheConformance:
    """Checks that any cache policy, of this package or of another, runs through under pytest.

    Subclass it in a test module under a name that starts with `Test` and define `policy(budget, **options)`.
    Everything runs on tiny models built in memory, on the CPU.

    Attributes:
        shapes: names in `SHAPES` that the policy is for.
        merges: whether entries may be other than the model's own; the checks against a full cache that hides what was
            dropped are left to the policy's own tests then.

    Example:
        >>> from hf_ext.cache import Knorm
        >>> class TestMine(CacheConformance):
        ...     def policy(self, budget, **options):
        ...         return Knorm(budget=budget, **options)
        >>> TestMine().test_dropped_entries_are_as_if_hidden("grouped", 6)
    """

    shapes: tuple[str, ...] = tuple(SHAPES)
    merges = False

    def policy(self, budget: int | float, **options: Any) -> CachePolicy:
        """Return the policy under test."""
        raise NotImplementedError

    def model(self, shape: str) -> Any:
        """Return a tiny model of a shape, fresh."""
        return model_of(shape)

    def script(self, shape: str, budget: int | float, rows: int = 3, **options: Any) -> tuple[Script, Any, Any]:
        """Return a run, and `(rows, columns)` ids and mask of its tokens, padded on the left."""
        if shape not in self.shapes:
            pytest.skip(f"{type(self).__name__} is not for models of the shape {shape!r}")
        if self.merges:
            pytest.skip("merged entries are not those of the model")
        lengths = [sum(TURNS), sum(TURNS) - 5, sum(TURNS) - 2][:rows]
        ids, mask = tiny_models.prompts(tuple(lengths))
        policy = self.policy(budget, **options)
        return Script(self.model(shape), policy, mask), ids, mask

    @pytest.mark.parametrize(("shape", "budget"), [*((shape, 6) for shape in SHAPES), *((s, 0.4) for s in IN_SHARES)])
    def test_dropped_entries_are_as_if_hidden(self, shape: str, budget: int | float) -> None:
        """Chunks, turns and padding: logits are those of a full cache in which what was dropped is hidden."""
        script, ids, mask = self.script(shape, budget)
        for part in passes(ids.shape[1], TURNS):
            script.step(ids[:, part], mask[:, : part.stop])
        held, seen = max(script.compressed.held()), script.compressed.get_seq_length()
        assert seen == ids.shape[1]
        assert held < seen, (held, seen)

    def test_rows_may_be_reordered_repeated_and_left_out(self) -> None:
        """Beam search moves all that is held."""
        script, ids, mask = self.script(self.shapes[0], 6)
        script.step(ids[:, :12], mask[:, :12])
        for change in (
            lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])),
            lambda cache: cache.batch_repeat_interleave(2),
            lambda cache: cache.batch_select_indices(torch.tensor([5, 1, 3])),
        ):
            script.each(change)
        order = [2, 0, 0]
        order = [row for row in order for _ in range(2)]
        order = [order[row] for row in (5, 1, 3)]
        ids, mask = ids[order], mask[order]
        for column in range(12, 18):
            script.step(ids[:, column : column + 1], mask[:, : column + 1])
        script.step(ids[:, 18:24], mask[:, :24])

    def test_recorded_tokens_can_be_forgotten(self) -> None:
        """Assisted decoding: steps of several tokens of which some are taken back."""
        script, ids, mask = self.script(self.shapes[0], 6)
        script.step(ids[:, :12], mask[:, :12])
        script.each(lambda cache: cache.activate_past_recording())
        for start, wrong in ((12, 2), (15, 0), (20, 4)):
            script.step(ids[:, start : start + 5], mask[:, : start + 5])
            script.each(lambda cache, wrong=wrong: cache.crop(-wrong))
        assert script.compressed.get_seq_length() == 21
        script.step(ids[:, 21:22], mask[:, :22])

    def test_a_batch_holds_what_its_rows_hold(self) -> None:
        """Padding is dropped first and counts for nothing."""
        shape = self.shapes[0]
        ids, mask = tiny_models.prompts((24, 17, 9))
        model = self.model(shape)
        model.set_attn_implementation("hf_ext")
        batch = CompressedCache(model.config, self.policy(0.5))
        with torch.no_grad():
            model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), past_key_values=batch)
            for row in range(3):
                pads = int((mask[row] == 0).sum())
                alone = CompressedCache(model.config, self.policy(0.5))
                model(ids[row : row + 1, pads:], past_key_values=alone)
                for layer in range(model.config.num_hidden_layers):
                    found, wanted = batch.columns(layer)[row], alone.columns(layer)[0]
                    for head in range(len(found)):
                        ours = [c - pads for c in found[head].tolist() if c >= 0]
                        theirs = [c for c in wanted[head].tolist() if c >= 0]
                        assert ours == theirs, f"row {row}, layer {layer}, head {head}: {ours} and {theirs}"

    @pytest.mark.parametrize("shape", SHAPES)
    def test_a_full_budget_is_a_full_cache(self, shape: str) -> None:
        """Nothing dropped, nothing changed: `generate` gives the very logits of a `DynamicCache`."""
        if shape not in self.shapes:
            pytest.skip(f"{type(self).__name__} is not for models of the shape {shape!r}")
        model = self.model(shape)
        model.set_attn_implementation("hf_ext")
        ids, mask = tiny_models.prompts((12, 7))
        cache = CompressedCache(model.config, self.policy(1.0))
        ours = model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
        theirs = with_a_full_cache(shape)
        gap = max((a - b).abs().max().item() for a, b in zip(ours.logits, theirs.logits, strict=True))
        assert gap < 1e-5, f"the largest difference of logits is {gap:.2e}"
        assert ours.sequences.tolist() == theirs.sequences.tolist()

    def test_generate_runs_with_every_way_to_decode(self) -> None:
        """Greedy, sampling, beams and assisted decoding, in a padded batch, with and without chunks."""
        model = self.model(self.shapes[0])
        model.set_attn_implementation("hf_ext")
        ids, mask = tiny_models.prompts((14, 9))
        for settings in (
            {"do_sample": False},
            {"do_sample": True},
            {"do_sample": False, "num_beams": 3},
            {"do_sample": False, "prefill_chunk_size": 5},
        ):
            cache = CompressedCache(model.config, self.policy(6))
            out = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=8, **settings)
            assert out.shape == (2, 22)
            assert cache.get_seq_length() == 21, settings

    def test_what_is_held_stays_near_the_budget(self) -> None:
        """`resident_bytes` is at most 5 % above the keys and values of the budget, for heads of width 64."""
        model = tiny_models.build("llama", head_dim=64, max_position_embeddings=1024)
        model.set_attn_implementation("hf_ext")
        ids, _ = tiny_models.prompts((400,))
        for when in ("prefill", "both"):
            policy = self.policy(192, when=when)
            cache = CompressedCache(model.config, policy)
            model.generate(ids, past_key_values=cache, max_new_tokens=2 if when == "prefill" else 40, do_sample=False)
            share = cache.resident_bytes() / cache.nominal_bytes()
            assert share < 1.05, f"{when}: {share:.3f} times the nominal bytes"
