"""A second model that drafts: it follows the rows, and evaluates the nodes of its own trees."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_ext import adapter
from hf_ext.generation.speculative.chain import draft_chain
from hf_ext.generation.speculative.context import DraftContext
from hf_ext.generation.speculative.drafter import Drafter, Verified
from hf_ext.generation.speculative.probe import tree_problem
from hf_ext.generation.speculative.stopping import Stopping
from hf_ext.generation.speculative.tree import DraftTree
from hf_ext.generation.speculative.tree_state import TreeState
from hf_ext.generation.speculative.vocabulary import check_vocabularies, fit_logits, fit_tokens, vocabulary_size
from hf_ext.layers import base_model


class DraftModel:
    """A draft model and what it has read of each lane.

    Args:
        model: a causal language model with the target's tokens, padded or not, or the name or folder of one.
        context: the call.
        tokenizers: the target's and the model's; those given to `Strategy.generate` by default.

    Raises:
        ValueError: the model has another vocabulary, or cannot evaluate trees.
    """

    def __init__(
        self, model: PreTrainedModel | str | Path, context: DraftContext, tokenizers: tuple[Any, Any] | None = None
    ) -> None:
        model = as_model(model, context.run.model)
        run = context.run
        known = (run.tokenizer, run.draft_tokenizer) if tokenizers is None else tokenizers
        check_draft_model(model, run.model, run.report.strategy, known)
        self.model = model
        self._tokens, self._target_tokens = vocabulary_size(model), vocabulary_size(context.run.model)
        self.common = min(self._tokens, self._target_tokens)
        self.state = TreeState.fresh(model, len(context.lanes))
        #: For every lane, which of its nodes have been read, in the order of reading.
        self.read_nodes: list[list[int]] = [[] for _ in context.lanes]
        #: For every lane the place of the root among what has been read since the last `observe`; -1 where it is held.
        self.roots: list[int] = [-1] * len(context.lanes)

    @property
    def calls(self) -> int:
        """Forward passes so far."""
        return self.state.calls

    @torch.no_grad()
    def catch_up(self, context: DraftContext) -> torch.Tensor:
        """Read what the texts have got since the last time; return the `(lanes, vocabulary)` logits that follow."""
        tokens, counts = self._unread(context)
        logits = self.state.read(tokens, counts)
        self.read_nodes = [[] for _ in counts]
        return fit_logits(logits, self._target_tokens).to(context.device)

    @torch.no_grad()
    def catch_up_and_extend(
        self, context: DraftContext, tokens: torch.Tensor, nodes: list[list[int]], parents: list[list[int]]
    ) -> torch.Tensor:
        """Read what the texts have got since the last time and, in the same forward pass, nodes under the roots.

        Args:
            context: the call.
            tokens: `(lanes, n)` int64 of the nodes.
            nodes: their numbers, as in `extend`.
            parents: likewise.

        Returns:
            `(lanes, 1 + n, vocabulary)` logits that follow the text and each node.
        """
        text, counts = self._unread(context)
        longest, device = text.shape[1], self.state.device
        # The texts stay a part of the tree until `observe` settles them: what hangs below must not be forgotten.
        self.roots = [count - 1 for count in counts]
        self.read_nodes = [[-1] * longest + row for row in nodes]
        chain = tuple(range(-1, longest - 1))
        above = [chain + row for row in self._places(parents)]
        below = self._known(tokens.to(device))
        logits = fit_logits(self.state.extend(torch.cat([text, below], dim=1), above).logits, self._target_tokens)
        places = [[root, *range(longest, logits.shape[1])] for root in self.roots]
        lanes = torch.arange(len(counts), device=logits.device)[:, None]
        return logits[lanes, torch.tensor(places, device=logits.device)].to(tokens.device)

    def _unread(self, context: DraftContext) -> tuple[torch.Tensor, list[int]]:
        """Return what the model has not read of the texts, padded on the right, and the tokens of each."""
        counts = [len(text) - held for text, held in zip(context.texts, self.state.lengths, strict=True)]
        longest = max(counts)
        rows = [text[-count:] + [0] * (longest - count) for text, count in zip(context.texts, counts, strict=True)]
        return self._known(torch.tensor(rows, device=self.state.device)), counts

    def _known(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return tokens as the model can read them; the target may have more of them."""
        return tokens if self.common == self._target_tokens else fit_tokens(tokens, self.common)

    def _places(self, parents: list[list[int]]) -> list[tuple[int, ...]]:
        """Turn numbers of nodes that are noted as read into their places."""
        found = []
        for read, root, row in zip(self.read_nodes, self.roots, parents, strict=True):
            at = {node: place for place, node in enumerate(read)}
            found.append(tuple(at[parent] if parent >= 0 else root for parent in row))
        return found

    @torch.no_grad()
    def extend(
        self, tokens: torch.Tensor, nodes: list[list[int]], parents: list[list[int]] | None = None
    ) -> torch.Tensor:
        """Read nodes of the trees that are being drafted.

        Args:
            tokens: `(lanes, n)` int64.
            nodes: their numbers in each lane's tree.
            parents: the number of the node above each, which has been read or stands before it here, -1 for
                the root; a chain by default.

        Returns:
            `(lanes, n, vocabulary)` logits that follow them.
        """
        for read, new in zip(self.read_nodes, nodes, strict=True):
            read.extend(new)
        above = None if parents is None else self._places(parents)
        known = self._known(tokens.to(self.state.device))
        return fit_logits(self.state.extend(known, above).logits, self._target_tokens).to(tokens.device)

    def observe(self, verified: Verified) -> None:
        """Keep what was read of the accepted paths, and go on with the lanes that go on."""
        paths = []
        for read, root, outcome in zip(self.read_nodes, self.roots, verified.outcomes, strict=True):
            at = {node: place for place, node in enumerate(read)}
            paths.append([*range(root + 1), *(at[node] for node in outcome.nodes if node in at)])
        self.state.settle(paths)
        if len(verified.continues) < len(verified.outcomes) and verified.continues:
            self.state.select(verified.continues)
        self.read_nodes = [[] for _ in verified.continues]
        self.roots = [-1] * len(verified.continues)


def as_model(draft: Any, target: PreTrainedModel) -> PreTrainedModel:
    """Return a draft model, loaded with the target's dtype and on its device if only its name or folder was given.

    Raises:
        ValueError: it is neither a model nor a name or folder, or none can be loaded from there.
    """
    if isinstance(draft, torch.nn.Module):
        if getattr(getattr(draft, "active_peft_config", None), "is_prompt_learning", False):
            raise ValueError(
                "draft_model has a learned prompt, which a draft model does not read; pass one with adapters in its "
                "layers (LoRA), or without"
            )
        return base_model(draft)
    if isinstance(draft, (str, Path)):
        try:
            return _load(str(draft), target.dtype, adapter.device_of(target))
        except (OSError, ValueError) as error:  # what transformers raises for a folder or name without a model
            raise ValueError(f"cannot load the draft model {str(draft)!r}: {error}") from error
    raise ValueError(
        "draft_model must be a causal language model, or the name or folder of one, got an object of type "
        f"{type(draft).__name__}"
    )


@functools.lru_cache(maxsize=2)
def _load(name: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device).eval()


def check_draft_model(
    draft: PreTrainedModel, target: PreTrainedModel, strategy: str, tokenizers: tuple[Any, Any] = (None, None)
) -> None:
    """Raise ValueError unless `draft` can draft for `target`; `tokenizers` are the target's and its own, if known."""
    check_vocabularies(draft, target, strategy, tokenizers)
    problem = tree_problem(draft)
    if problem is not None:
        raise ValueError(f"{strategy}: draft_model evaluates trees: {problem}")


class ModelDrafter(Drafter):
    """Base of drafters that ask a second model; keeps it in step with the rows.

    Args:
        model: the draft model.

    Attributes:
        tokenizers: the target's and the draft model's; those of the call by default.
    """

    tokenizers: tuple[Any, Any] | None = None

    def __init__(self, model: PreTrainedModel) -> None:
        self.draft_model = model

    def start(self, context: DraftContext) -> None:
        """Give the draft model its lanes. It reads the prompts with the first draft."""
        self.draft = DraftModel(self.draft_model, context, self.tokenizers)

    @property
    def calls(self) -> int:  # type: ignore[override]
        """Forward passes of the draft model."""
        return self.draft.calls if hasattr(self, "draft") else 0

    @property
    def positions(self) -> int:  # type: ignore[override]
        """Token positions they evaluated."""
        return self.draft.state.positions if hasattr(self, "draft") else 0

    def observe(self, context: DraftContext, verified: Verified) -> None:
        """Follow the rows."""
        self.draft.observe(verified)


class ChainDrafter(ModelDrafter):
    """Drafts a chain, one forward pass of the draft model a token.

    Args:
        model: the draft model.
        length: tokens to draft at most.
        stopping: says when a chain is long enough before that.

    Attributes:
        seen: the draft model's `(lanes, vocabulary)` logits at the root and at every node but the last.
    """

    seen: list[torch.Tensor]

    def __init__(self, model: PreTrainedModel, length: int, stopping: Stopping | None = None) -> None:
        super().__init__(model)
        self.length, self.stopping = length, stopping
        self.ahead = length

    def propose(self, context: DraftContext) -> DraftTree:
        """Draft a chain under every root."""
        lanes = len(context.lanes)
        tree, self.seen = draft_chain(
            context,
            self.length,
            lambda: self.draft.catch_up(context),
            lambda tokens, place: self.draft.extend(tokens[:, None], [[place]] * lanes)[:, 0],
            self.stopping,
        )
        return tree
