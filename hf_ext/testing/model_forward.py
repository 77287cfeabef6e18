"""Model contract, part 1: what the forward pass and `generate` compute."""

# ruff: noqa: D102 (the name of a test says what it shows)
from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import flash_attention_mask

from hf_ext.testing.model_base import ContractBase, assert_close, left_pad

#: Name of the stand-in backend below. It is registered next to the real ones and replaces none.
STAND_IN = "hf_ext_contract"


def stand_in_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as FlashAttention does: from a two-dimensional padding mask and `sliding_window` alone.

    Without a GPU this shows that a model hands such a backend all it needs. Queries are `[batch, heads, length,
    width]` and end where the keys end; returns `[batch, length, heads, width]`.
    """
    queries = torch.arange(query.shape[2])[:, None] + key.shape[2] - query.shape[2]
    keys = torch.arange(key.shape[2])
    visible = (keys <= queries)[None, None]
    if sliding_window is not None:
        visible = visible & (keys > queries - sliding_window)
    if attention_mask is not None:
        visible = visible & attention_mask[:, None, None, :].bool()
    visible = visible | ~visible.any(-1, keepdim=True)  # padding sees anything, so that it gets no NaN
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


def cached_logits(model: PreTrainedModel, ids: torch.Tensor, chunks: list[int], **kwargs: Any) -> torch.Tensor:
    """Compute the logits of `ids` chunk by chunk through the cache; what is left goes token by token."""
    chunks = [*chunks, *[1] * (ids.shape[1] - sum(chunks))]
    cache, parts, start = None, [], 0
    for size in chunks:
        piece = {name: value[:, start : start + size] for name, value in kwargs.items() if name == "position_ids"}
        if "attention_mask" in kwargs:
            piece["attention_mask"] = kwargs["attention_mask"][:, : start + size]
        output = model(ids[:, start : start + size], past_key_values=cache, use_cache=True, **piece)
        cache, start = output.past_key_values, start + size
        assert cache is not None, "use_cache=True returned no past_key_values"
        parts.append(output.logits)
    return torch.cat(parts, dim=1)


class ForwardContract(ContractBase):
    """Logits do not depend on how they are computed."""

    def backends(self) -> list[str]:
        """Attention implementations that the model says it supports and that run on a CPU."""
        declared = {
            "sdpa": self.model_class._supports_sdpa,
            "flex_attention": self.model_class._supports_flex_attn,
            STAND_IN: self.model_class._supports_attention_backend or self.model_class._supports_flash_attn,
        }
        return [name for name, supported in declared.items() if supported]

    @torch.no_grad()
    def test_cached_decoding_equals_the_full_forward_pass(self) -> None:
        model, ids = self.make_model(), self.tokens()
        full = model(ids).logits
        for chunks in ([3], [ids.shape[1] - 5], [5, 1, 7, 2]):
            assert_close(
                cached_logits(model, ids, chunks), full, self.tolerance, f"logits with the cache, {chunks} at once,"
            )

    @torch.no_grad()
    def test_left_padding_changes_no_logits(self) -> None:
        model, ids = self.make_model(), self.tokens()
        rows = [ids[0, 9:], ids[1]]
        batch = left_pad(rows)
        together = model(**batch).logits
        stepwise = cached_logits(model, chunks=[ids.shape[1] - 4], ids=batch.pop("input_ids"), **batch)
        for row, alone in enumerate(model(r[None]).logits[0] for r in rows):
            assert_close(together[row, -len(alone) :], alone, self.tolerance, f"padded and plain logits of row {row}")
            assert_close(stepwise[row, -len(alone) :], alone, self.tolerance, f"padded, cached logits of row {row}")

    @torch.no_grad()
    def test_attention_backends_agree(self) -> None:
        AttentionInterface.register(STAND_IN, stand_in_attention)
        AttentionMaskInterface.register(STAND_IN, flash_attention_mask)
        model, ids = self.make_model(), self.tokens()
        batch = left_pad([ids[0, 9:], ids[1]])
        shown = batch["attention_mask"].bool()

        def run(name: str) -> tuple[torch.Tensor, torch.Tensor]:
            model.set_attn_implementation(name)
            assert model.config._attn_implementation == name, f"set_attn_implementation({name!r}) had no effect"
            # Uncompiled FlexAttention computes the same, without minutes of compilation.
            with torch.compiler.set_stance("force_eager"):
                padded = model(**batch, use_cache=False).logits[shown]
                return padded, model(ids, use_cache=False).logits

        expected = run("eager")
        for name in self.backends():
            for actual, reference, what in zip(run(name), expected, ("padded", "plain"), strict=True):
                assert_close(actual, reference, self.tolerance, f"{what} logits of {name} and eager")

    def test_undeclared_attention_backends_are_refused(self) -> None:
        undeclared = {"sdpa": self.model_class._supports_sdpa, "flex_attention": self.model_class._supports_flex_attn}
        for name in [name for name, supported in undeclared.items() if not supported]:
            with pytest.raises(ValueError, match="support"):
                self.make_model().set_attn_implementation(name)

    @torch.no_grad()
    def test_declared_fullgraph_compilation_has_no_graph_break(self) -> None:
        model, ids = self.make_model(), self.tokens()
        if not model._can_compile_fullgraph:
            return
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        actual = compiled(ids, use_cache=False).logits
        assert_close(actual, model(ids).logits, self.tolerance, "logits of the traced model and the plain one")

    @torch.no_grad()
    def test_generate_gives_each_row_of_a_batch_what_it_gets_alone(self) -> None:
        model, ids = self.make_model(), self.tokens()
        rows = [ids[0, 9:], ids[1]]
        batch = left_pad(rows)
        batch.pop("position_ids")
        for options in ({}, {"num_beams": 3}, {"use_cache": False}, {"cache_implementation": "static"}):
            together = model.generate(**batch, max_new_tokens=6, do_sample=False, **options)[:, -6:]
            alone = [model.generate(r[None], max_new_tokens=6, do_sample=False, **options)[0, -6:] for r in rows]
            different = (together != torch.stack(alone)).sum().item()
            assert not different, f"generate({options}): {different} of {together.numel()} tokens differ in a batch"

    @torch.no_grad()
    def test_generate_is_the_argmax_of_the_full_forward_pass(self) -> None:
        model, ids = self.make_model(), self.tokens(batch=1)
        made = model.generate(ids, max_new_tokens=8, do_sample=False)
        expected = model(made[:, :-1]).logits[:, -8:].argmax(-1)
        assert torch.equal(made[:, -8:], expected), f"generate made {made[0, -8:].tolist()}, not {expected[0].tolist()}"

    @torch.no_grad()
    def test_prompts_beyond_the_context_behave_as_documented(self) -> None:
        model = self.make_model()
        ids = self.tokens(batch=1, length=model.config.max_position_embeddings + 9)
        if self.beyond_context != "works":
            with pytest.raises(self.beyond_context):
                model(ids)
            return
        full = model(ids).logits
        assert full.isfinite().all(), "logits beyond max_position_embeddings are not finite"
        actual = cached_logits(model, ids, [ids.shape[1] - 12])
        assert_close(actual, full, self.tolerance, "cached and full logits beyond max_position_embeddings")

    @torch.no_grad()
    def test_logits_to_keep_selects_positions(self) -> None:
        model, ids = self.make_model(), self.tokens()
        full = model(ids).logits
        assert_close(model(ids, logits_to_keep=3).logits, full[:, -3:], self.tolerance, "the last logits")
        picked = torch.tensor([1, 4])
        assert_close(model(ids, logits_to_keep=picked).logits, full[:, picked], self.tolerance, "the picked logits")

    @torch.no_grad()
    def test_embeddings_can_replace_token_ids(self) -> None:
        model, ids = self.make_model(), self.tokens()
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
        assert_close(embedded, model(ids).logits, self.tolerance, "logits from embeddings and from ids")

    @torch.no_grad()
    def test_hidden_states_and_attentions_are_returned_when_asked_for(self) -> None:
        model, ids = self.make_model(), self.tokens()
        model.set_attn_implementation("eager")
        output = model(ids, output_hidden_states=True, output_attentions=True)
        layers = model.config.num_hidden_layers
        assert len(output.hidden_states) == layers + 1, f"{len(output.hidden_states)} hidden states, {layers} layers"
        assert len(output.attentions) == layers, f"{len(output.attentions)} attention maps, {layers} layers"
        future = max(weights.triu(1).abs().max().item() for weights in output.attentions)
        assert future == 0, f"a token attends to its future with weight {future:.3g}"

    @torch.no_grad()
    def test_bfloat16_is_finite_and_close(self) -> None:
        model, ids = self.make_model(), self.tokens()
        expected = model(ids).logits
        actual = model.to(torch.bfloat16)(ids).logits
        assert actual.dtype == torch.bfloat16, f"a bfloat16 model returned {actual.dtype} logits"
        error = ((actual.float() - expected).norm() / expected.norm()).item()
        assert error < 0.1, f"bfloat16 logits are off by {error:.3g} of their norm (allowed: 0.1)"
