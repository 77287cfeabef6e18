"""One layer of a compressed cache.

    update      stores the new tokens, returns what attention reads
    attention   (a) "hf_ext": comes back to this layer, which builds the mask from what it holds
                (b) any other: reads what `update` returned, under transformers' own mask
    settle      the policy looks at what attention did and drops what is too much: in (a) right after the
                layer's attention, in (b) within `update`, as what attention reads is no longer needed by then

In (a) transformers is told that the cache holds nothing but the new tokens, so that its mask is about these
alone, whatever each layer keeps of the others. In (b) it is told how many entries there are and that
they are the last ones: causality is right, and because padding is dropped first and columns stay sorted, the
slice of the padding mask it takes is the padding that is left.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_ext import adapter
from hf_ext.attention.backend import CACHE_LAYER
from hf_ext.cache.budget import tokens_of
from hf_ext.cache.entries import Entries
from hf_ext.cache.passes import Attend, Attended, Pass
from hf_ext.cache.policy import CachePolicy, Selection
from hf_ext.cache.stores.dense import DenseStore
from hf_ext.cache.stores.packed import PackedStore
from hf_ext.cache.stores.ragged import RaggedStore

if TYPE_CHECKING:
    from hf_ext.cache.cache import CompressedCache


class CompressedLayer(adapter.cache_layer_base()):  # type: ignore[misc]
    """Keys and values of one layer; transformers' models use it as any cache layer.

    Args:
        cache: the cache it belongs to.
        number: of the layer among those that are compressed.
        window: how far the layer looks back, if it slides.
        model_layer: number of the layer in the model.
    """

    is_compileable = False
    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(
        self, cache: CompressedCache, number: int, window: int | None = None, model_layer: int | None = None
    ) -> None:
        self.cache, self.number, self.window = cache, number, window
        self.model_layer = number if model_layer is None else model_layer
        self.is_sliding = window is not None
        self.record_past = False
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.store = self._empty_store()
        #: Whether it is known what becomes of attention when keys are quantised.
        self.guarded = False
        self.is_initialized = False
        #: Tokens seen, padding included, up to now and up to the last prefill, and of each row the padding among them.
        self.seen = 0
        self.prefilled = 0
        self.pads: list[int] = []
        self.pending: list[Pass] = []
        #: The last queries, for policies that look at several of them while decoding.
        self.queries: Tensor | None = None
        self.query_real: Tensor | None = None
        self._new: tuple[Tensor, Tensor, Tensor] | None = None
        self._offload_attended = False
        #: How many tokens may be decoded one by one before there is anything to decide; see `quiet.py`.
        self._quiet = 0

    def _empty_store(self) -> DenseStore | PackedStore | RaggedStore:
        fields = self.policy.field_names()
        if self.cache.quantise is not None:
            return PackedStore(fields, self.cache.quantise)
        return (RaggedStore if self.policy.storage == "ragged" else DenseStore)(fields)

    @property
    def policy(self) -> CachePolicy:
        """What decides which entries stay."""
        return self.cache.policy

    @property
    def keys(self) -> Tensor | None:
        """Keys that are held, as a plain tensor; None before the first token."""
        return self.entries().keys if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:
        """Values that are held, as a plain tensor; None before the first token."""
        return self.entries().values if self.is_initialized else None

    def entries(self) -> Entries:
        """Return what is held."""
        if not self.is_initialized:
            raise ValueError("the cache is empty: run the model with past_key_values=cache first")
        self._check_attended()
        padding = torch.tensor(self.pads, dtype=torch.int64, device=self.device)
        return self.store.entries(self.seen, padding)

    def open_entries(self) -> Entries:
        """Return what the policy may still drop or merge: all that is held, but for what is packed."""
        if not isinstance(self.store, PackedStore):
            return self.entries()
        return self.store.open_entries(self.seen, torch.tensor(self.pads, dtype=torch.int64, device=self.device))

    def allowance(self) -> list[int]:
        """Return how many entries each head of each row may hold."""
        return tokens_of(self.cache.budget_of(self.number), self.tokens)

    def tensors(self) -> list[Tensor]:
        """Return all tensors that are in memory between passes."""
        found = [*self.store.tensors().values(), self.queries, self.query_real]
        found += [tensor for step in self.pending for tensor in (step.queries, step.real, step.column_sums)]
        return [tensor for tensor in found if tensor is not None]

    def nominal_bytes(self) -> int:
        """Return the bytes of keys and values that the budget allows for what was seen.

        A policy that drops at prefill only keeps what is decoded afterwards.
        """
        allowed = self.allowance()
        if self.policy.when == "prefill" and self.prefilled <= self.seen:
            since = self.seen - self.prefilled
            budget = self.cache.budget_of(self.number)
            allowed = [kept + since for kept in tokens_of(budget, [tokens - since for tokens in self.tokens])]
        if isinstance(self.store, PackedStore):
            return self.store.nominal_bytes(allowed)
        keys, values = self.store.buffers["keys"], self.store.buffers["values"]
        heads = keys.shape[1] if keys.ndim == 4 else self.store.lengths.shape[1]  # type: ignore[union-attr]
        entry = heads * (keys.shape[-1] * keys.itemsize + values.shape[-1] * values.itemsize)
        return sum(allowed) * entry

    @property
    def tokens(self) -> list[int]:
        """Real tokens of each row so far."""
        return [self.seen - pads for pads in self.pads]

    # What transformers calls.

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note what kind of tensors come."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.pads = [0] * len(key_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new tokens; return what attention reads."""
        self._check_attended()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if len(key_states) != len(self.pads):
            raise ValueError(f"the cache holds {len(self.pads)} rows, the model runs {len(key_states)}")
        first = self.cache.first
        first._check_attended()
        if self is not first and first.seen != self.seen + key_states.shape[2]:
            raise ValueError(
                f"layer {self.model_layer} has seen {self.seen} tokens and gets {key_states.shape[2]}, where layer "
                f"{first.model_layer} has seen {first.seen} with them: an earlier pass ended between the two. Call "
                "cache.reset() and read the text again, or go on with a copy.deepcopy(cache) made before that pass"
            )
        if self is first:  # the others run in the same pass
            self.cache.asked = self.cache.by_backend()
        if self.cache.asked:
            # Keys that a store holds as they come must not lead back to it.
            tagged = key_states if self._quiet else key_states.view_as(key_states)
            setattr(tagged, CACHE_LAYER, self)
            self._new = (key_states, value_states, tagged)
            return tagged, value_states
        return self._update_for_others(key_states, value_states)

    def _check_attended(self) -> None:
        if self._new is not None:
            raise ValueError(
                f"layer {self.number} was updated, but its attention has not come back to the cache. The config that "
                "the cache was given says attn_implementation='hf_ext': the model must run with it, too, not compiled, "
                "and hand what the cache returns to its attention as it is. One that caches something else than keys "
                "and values, as multi-head latent attention does, runs under 'sdpa', with a policy that looks at "
                "neither queries nor attention"
            )

    def _update_for_others(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new tokens and drop what is too much, for an attention that does not come back."""
        self.cache.check_without_backend(self)
        count = keys.shape[2]
        if not self.seen:
            self.cache.note_rows(keys)
        real = self.cache.given_padding(self.seen, count, len(keys))
        self._store(keys, values, real)
        found = self.store.keys, self.store.values  # type: ignore[union-attr]
        self._finish(Pass(count))
        return found

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys that the mask is about, and the column it begins at."""
        if self.cache.by_backend():
            return query_length, self.seen
        held = len(self.store)
        return held + query_length, self.seen - held

    def get_seq_length(self) -> int:
        """Return the number of tokens seen."""
        return self.seen

    def get_max_length(self) -> int:
        """Return -1: any number of tokens may come."""
        return -1

    def activate_past_recording(self) -> None:
        """From now on drop nothing before `crop` has said which of the last tokens stay."""
        self.record_past, self._quiet = True, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens.

        Args:
            tokens_to_remove: how many, as a negative number; 0 ends a step in which past was recorded.

        Raises:
            ValueError: a positive number, or tokens that have been dropped or counted already.
        """
        count = -int(tokens_to_remove)  # older releases of transformers pass a tensor
        if count < 0:
            raise ValueError(f"crop takes the number of tokens to forget as a negative number, got {tokens_to_remove}")
        if not self.is_initialized:
            return
        self._quiet = 0
        if count > self.seen:
            raise ValueError(f"cannot forget {count} tokens, the cache has seen {self.seen}")
        if count:
            self._check_crop(count)
            self.store.drop_last(count)
            self.seen -= count
            left = count
            while left and self.pending:
                part = min(left, self.pending[-1].count)
                self.pending[-1].forget(part)
                left -= part
                if not self.pending[-1].count:
                    self.pending.pop()
        if self.record_past:
            passes, self.pending = self.pending, []
            if passes:
                self._settle(passes, prefill=self._holds_prompt(passes))

    def _check_crop(self, count: int) -> None:
        wanted = torch.arange(self.seen - count, self.seen, device=self.device)
        if count > len(self.store) or not bool((self.store.last_columns(count) == wanted).all()):
            raise ValueError(
                f"cannot forget the last {count} tokens: some of them were dropped, are packed or are padding. Call "
                "activate_past_recording() before the step, or give the policy a window (or quantise a residual) of at "
                "least as many tokens"
            )
        recorded = sum(step.count for step in self.pending)
        if count > recorded and self.policy.column_sums:
            raise ValueError(
                f"cannot forget the last {count} tokens: {type(self.policy).__name__} has counted their attention. "
                "Call activate_past_recording() before the step, as generate does for assisted decoding"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Go on with these rows, for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Go on with these rows."""
        if self.is_initialized:
            index = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
            self.store.select(index)
            self.pads = [self.pads[row] for row in index.tolist()]
            self._change_rows(lambda tensor: tensor.index_select(0, index.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self.is_initialized:
            self.store.repeat(repeats)
            self.pads = [pads for pads in self.pads for _ in range(repeats)]
            self._change_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def _change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self._quiet = 0
        for holder, names in (
            (self, ("queries", "query_real")),
            *((step, ("queries", "real")) for step in self.pending),
        ):
            for name in names:
                if getattr(holder, name) is not None:
                    setattr(holder, name, change(getattr(holder, name)))

    def offload(self) -> None:
        """Move what is held to the CPU, after its attention: transformers asks for it at the end of `update`."""
        self._quiet = 0
        if self._new is not None:
            self._offload_attended = True
        elif self.is_initialized:
            self.store.to("cpu")

    def prefetch(self) -> None:
        """Move what is held back to the device."""
        if self.is_initialized:
            self.store.to(self.device)

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that `restore` needs."""
        queries = {"queries": self.queries, "query_real": self.query_real}
        return {**self.store.state(), **{name: tensor for name, tensor in queries.items() if tensor is not None}}

    def restore(
        self, state: dict[str, Tensor], seen: int, prefilled: int, pads: list[int], device: torch.device
    ) -> None:
        """Hold what `state` has returned.

        Args:
            state: see there.
            seen: tokens seen.
            prefilled: tokens seen up to the last prefill.
            pads: padding among them, for each row.
            device: on which the tensors are.
        """
        self.queries, self.query_real = state.pop("queries", None), state.pop("query_real", None)
        self.store.restore(state)
        self.seen, self.pads, self.device, self.dtype = seen, list(pads), device, state["keys"].dtype
        self.prefilled, self._quiet = prefilled, 0
        self.is_initialized = True

    # What attention calls.

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        mask: Tensor | None,
        scale: float | None,
        attend: Attend,
        softcap: float | None,
        sinks: Tensor | None,
        plain: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend to all that is held, and settle the pass.

        Args:
            module: the attention layer.
            query: `(rows, heads, q, width)`.
            mask: transformers' mask, about the new tokens alone, or a dense one about all columns.
            scale: of the scores, by default one over the root of the width.
            attend: `attend(query, keys, values, mask, sums)` runs attention on plain tensors, and returns its output
                `(rows, q, heads, width)`, the weights or None, and the sums of the columns if they are wanted.
            softcap: of the scores.
            sinks: `(heads,)`.
            plain: whether `attend` has to be called, because it returns weights, drops some or notes statistics.

        Returns:
            `(rows, q, heads, width)`, and the weights over what is held if `attend` returns some.
        """
        from hf_ext.cache import attending, quiet

        if self._quiet and mask is None and not plain and query.shape[2] == 1:
            output = quiet.attend(self, module, query, scale, attend, softcap, sinks)
            if output is not None:
                return output, None
        if isinstance(self.store, PackedStore):
            from hf_ext.cache import attending_packed

        assert self._new is not None
        (keys, values, tagged), self._new = self._new, None
        policy, count, before = self.policy, query.shape[2], self.seen
        given = attending.Given.of(mask, before, query)
        held = 0 if isinstance(self.store, RaggedStore) else len(self.store)
        self._store(keys, values, given.real, policy.arriving(keys, module) if policy.gated else {})
        step = Pass(count, scale=query.shape[-1] ** -0.5 if scale is None else scale, softcap=softcap, module=module)
        step.sinks = sinks
        counts = self.counts
        at_once = counts and not self.record_past
        weights = seen = None
        if isinstance(self.store, PackedStore) and attending_packed.reads_codes(self.store, query, given, plain):
            output, step.column_sums = attending_packed.attend_packed(
                self.store, query, given, step.scale, softcap, sinks, at_once
            )
        elif isinstance(self.store, DenseStore) and at_once and not plain and attending.sees_all(self, given, query):
            store = self.store
            output, step.column_sums = attending.attend_one(
                store.keys, store.values, store.bias, query, step.scale, softcap, sinks
            )
        elif not isinstance(self.store, RaggedStore):
            seen = attending.visible(self, given, held, query)
            if policy.gated:
                seen = attending.gated(self, seen, given, query, module)
            output, weights, step.column_sums = attend(query, self.store.keys, self.store.values, seen, at_once)
        elif not before:  # nothing but the new tokens, all of them in every head
            output, weights, step.column_sums = attend(query, keys, values, mask, at_once and given.real is None)
        elif plain:
            raise ValueError(
                f"{type(policy).__name__} keeps other tokens in every head: there are no weights to return, to drop "
                "or to take statistics of; leave out output_attentions, dropout and collect, or use another policy"
            )
        else:
            output = attending.attend_ragged(self, query, given, step.scale, softcap, sinks)
        setattr(tagged, CACHE_LAYER, self.again(count, seen))
        all_queries = policy.queries < 0 or self.record_past or (counts and step.column_sums is None)
        last = count if all_queries else min(policy.queries, count)
        if last and (policy.queries or counts):
            step.queries = query[:, :, -last:].detach()
            step.real = None if given.real is None else given.real[:, -last:]
        if self.cache.quantise is not None and self.cache.quantise.guard and not self.guarded:
            from hf_ext.cache.sensitivity import guard

            self.guarded = guard(self, query, keys, given.real, step.scale)
        self._finish(step)
        return output, weights

    def again(self, count: int, mask: Tensor | None, held: tuple[Tensor, Tensor] | None = None) -> Attended:
        """Return what layers attend to that share the keys of this pass, right after it and before any is dropped.

        Args:
            count: queries of the pass.
            mask: over all that is held.
            held: keys and values, where they are at hand.
        """
        store = self.store
        if not isinstance(store, DenseStore) or "bias" in store.buffers or self.policy.gated:
            return Attended(self.model_layer, type(self.policy).__name__, count)
        keys, values = held or (store.keys, store.values)
        return Attended(self.model_layer, type(self.policy).__name__, count, (keys, values, mask))

    # What happens to a pass.

    def _store(
        self, keys: Tensor, values: Tensor, real: Tensor | None, fields: Mapping[str, Tensor] | None = None
    ) -> None:
        count = keys.shape[2]
        if real is not None:
            self.pads = [old + new for old, new in zip(self.pads, (~real).sum(1).tolist(), strict=True)]
        if fields:
            assert isinstance(self.store, DenseStore)
            self.store.append(keys, values, self.seen, real, fields)
        else:
            self.store.append(keys, values, self.seen, real)
        self.seen += count

    def _finish(self, step: Pass) -> None:
        if self.record_past:
            self.pending.append(step)
        else:
            self._settle([step], prefill=step.count > 1)
        if self._offload_attended:
            self._offload_attended = False
            self.offload()

    def _holds_prompt(self, passes: list[Pass]) -> bool:
        """Tell whether recorded passes are the first ones: they hold the prompt."""
        return sum(step.count for step in passes) == self.seen and self.seen > 1

    def drops(self) -> bool:
        """Tell whether the budget will ever be exceeded, so that it is worth counting what entries are attended to."""
        budget = self.cache.budget_of(self.number)
        return isinstance(budget, int) or budget < 1

    @functools.cached_property
    def counts(self) -> bool:
        """Whether it is counted what entries are attended to."""
        return self.policy.column_sums and self.drops()

    def _settle(self, passes: list[Pass], prefill: bool) -> None:
        """Let the policy look at what attention did, drop what is too much, and pack what is old enough."""
        from hf_ext.cache import quiet

        self._drop(passes, prefill)
        if isinstance(self.store, PackedStore):
            self.store.flush()
        self._quiet = quiet.passes(self)
        if isinstance(self.store, DenseStore):
            self.store.expected = self._quiet + 1 if self._quiet else 0

    def _drop(self, passes: list[Pass], prefill: bool) -> None:
        policy = self.policy
        if prefill:
            self.prefilled = self.seen
        due = policy.when == "both" or policy.when == ("prefill" if prefill else "decode")
        due = due and (policy.gated or self.drops())
        if not due and not policy.column_sums:
            if prefill:
                self.store.settle()
            return
        from hf_ext.cache import attending

        counts = self.counts
        sums = attending.counted(self, passes) if counts else None
        seen = attending.seen(self, passes, sums) if policy.queries else None
        if sums is not None:
            open_ = self.store.recent if isinstance(self.store, PackedStore) else self.store
            if policy.adds and isinstance(open_, DenseStore):
                open_.add(policy.adds, sums)
            else:
                seen = attending.seen(self, passes, sums) if seen is None else seen
                self.store.note(policy.observe(self.open_entries(), seen))
        keep = self.allowance() if due else []
        allowed = keep if prefill else [count + policy.slack(count) for count in keep]
        if due and (policy.gated or self.store.surplus(allowed)):
            if not self.cache.by_backend():
                self.cache.check_rows(self, keep)
            if isinstance(self.store, PackedStore):
                keep = self.store.left(keep)
            entries = self.open_entries()
            seen = attending.seen(self, passes, sums) if seen is None else seen
            outcome = policy.compress(entries, seen, torch.tensor(keep, device=entries.keys.device))
            if isinstance(outcome, Selection):
                self.store.keep(outcome.index, entries)
            elif outcome is not None:
                self.store.replace(outcome)
            elif prefill:
                self.store.settle()
        elif prefill:
            self.store.settle()
