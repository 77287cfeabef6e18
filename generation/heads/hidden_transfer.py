"""Hidden transfer: the states of future tokens, mapped from the state of the last one.

"Parallel Decoding via Hidden Transfer for Lossless Large Language Model Acceleration". For step j
a linear map `W_j` turns the state of the last token after `transfer_layers[j - 1]` layers into a
pseudo state for the token j places later. Pseudo tokens run through the remaining layers beside the
real ones; they see the context and the pseudo tokens before them, nobody else sees them. The
logits of pseudo token j predict the token after it, j + 1 places after the last real one.

They travel as extra columns of an ordinary forward pass: what enters the layers below is never
looked at, and on its way into the transfer layer it is replaced (`hf_ext.layers.edited`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_ext import adapter
from hf_ext.generation.heads.base import DraftHead, DraftHeadConfig, Terms, distillation, visible
from hf_ext.layers import TargetEnds, edited, only_layers
from hf_ext.trainer_callbacks.noise import document_positions

Edits = dict[int, Callable[[Tensor], Tensor]]


class HiddenTransferConfig(DraftHeadConfig):
    """Config of a `HiddenTransferHead`.

    Args:
        transfer_layers: for each step, after how many layers of the target its state is mapped;
            the numbers may not fall, so that no pseudo token sees one that is not there yet.
        anchors: positions of each row that training transfers from.
        **kwargs: see `DraftHeadConfig`.
    """

    model_type = "hidden-transfer-head"

    def __init__(self, transfer_layers: Sequence[int] = (1, 1, 1), anchors: int = 32, **kwargs: Any) -> None:
        self.transfer_layers, self.anchors = list(transfer_layers), anchors
        super().__init__(**kwargs)


class HiddenTransferHead(DraftHead):
    """One linear map a step, the identity at first.

    Args:
        config: sizes.

    Example:
        >>> from hf_ext.testing.tiny_models import build
        >>> head = HiddenTransferHead.for_target(build("llama"), transfer_layers=(1, 1))
        >>> sorted(head.edits(step=torch.tensor([[0, 1, 2]]), source=torch.tensor([[0, 0, 0]])))
        [1]
    """

    config_class = HiddenTransferConfig
    needs_cache: ClassVar[bool] = True

    def __init__(self, config: HiddenTransferConfig) -> None:
        super().__init__(config)
        layers, width = config.transfer_layers, config.hidden_size
        if not layers or sorted(layers) != layers or layers[0] < 1:
            raise ValueError(f"transfer_layers must be numbers of layers from 1 that do not fall, got {layers}")
        self.maps = nn.ModuleList([nn.Linear(width, width, bias=False) for _ in layers])
        self.post_init()

    @classmethod
    def defaults(cls, known: Mapping[str, Any], config: Any) -> dict[str, Any]:
        """Transfer three steps, after half of the layers."""
        return {"transfer_layers": [max(1, known["num_hidden_layers"] // 2)] * 3}

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear) and not adapter.is_loaded(module):
            nn.init.eye_(module.weight)

    @property
    def steps(self) -> int:
        """How many future tokens the head maps to."""
        return len(self.maps)

    def forward(self, states: Tensor, step: int) -> Tensor:
        """Map states (..., hidden) of real tokens to pseudo states `step` (from 1) places later."""
        return self.maps[step - 1](states)

    def edits(self, step: Tensor, source: Tensor | Mapping[int, Tensor]) -> Edits:
        """Return what to pass to `hf_ext.layers.edited` around a forward pass with pseudo tokens.

        Args:
            step: (rows, n), for each column of the pass 0 if it is a real token, else the step of
                the pseudo token that it stands for.
            source: (rows, n), for each pseudo token the column of this pass with the real token it
                is transferred from (anything where `step` is 0). Or, if the real tokens are not in
                this pass, their states: number of layers to (rows, n, hidden).

        Returns:
            Number of the state to a function that writes the pseudo tokens into it.
        """
        return {layer: self._edit(layer, step, source) for layer in sorted(set(self.config.transfer_layers))}

    def _edit(self, layer: int, step: Tensor, source: Tensor | Mapping[int, Tensor]) -> Callable[[Tensor], Tensor]:
        def write(hidden: Tensor) -> Tensor:
            if isinstance(source, Tensor):
                origin = hidden.gather(1, source[..., None].expand(*source.shape, hidden.shape[-1]))
            else:
                origin = source[layer]
            for number, at in enumerate(self.config.transfer_layers, start=1):
                if at == layer:
                    hidden = torch.where((step == number)[..., None], self(origin, number).to(hidden.dtype), hidden)
            return hidden

        return write

    # -- training ----------------------------------------------------------------------------------

    @property
    def trained_on(self) -> tuple[int, ...]:
        """The states that are mapped."""
        return tuple(sorted(set(self.config.transfer_layers)))

    def training_terms(
        self,
        ends: TargetEnds,
        batch: Mapping[str, Any],
        targets: Tensor,
        states: Mapping[int, Tensor],
        outputs: Any,
        uniform: Callable[..., Tensor],
    ) -> Terms:
        """Cross-entropy of the pseudo tokens against the target's distributions at the true tokens.

        `anchors` positions of each row are drawn, and stand for all of the row's targets.
        """
        steps, targeted = self.steps, targets != -100
        anchors, valid = self.draw_anchors(targeted, uniform(batch, per_document=True))
        logits = self._pseudo_logits(ends, batch, anchors, states, outputs.past_key_values)
        share = targeted.sum(-1) / valid.sum(-1).clamp(min=1) / steps  # (rows,): what one anchor's step stands for
        weight = share[:, None].expand(valid.shape)[valid]
        rows = torch.arange(len(anchors), device=anchors.device)[:, None].expand(anchors.shape)[valid]
        total = logits.new_zeros((), dtype=torch.float32)
        terms: Terms = {}
        for step in range(1, steps + 1):
            teacher = outputs.logits[rows, anchors[valid] + step]
            drafted = logits[:, :, step - 1][valid].float()
            each = nn.functional.cross_entropy(drafted, teacher.float().softmax(-1), reduction="none")
            total = total + (each * weight).sum()
            loss, hits = distillation(drafted.detach(), teacher)
            terms |= {f"loss_{step}": (loss, len(rows)), f"agreement_{step}": (hits, len(rows))}
        return {"loss": (total, targeted.sum()), **terms}

    def draw_anchors(self, targeted: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Choose positions that have all their future tokens in the row.

        Args:
            targeted: (rows, length) bool, positions whose next token trains.
            numbers: (rows, length), random; the largest win.

        Returns:
            Positions (rows, anchors) and which of them are valid, both with a row's best first.
        """
        length = targeted.shape[1]
        allowed = targeted.clone()
        for step in range(1, self.steps + 1):
            allowed[:, : max(length - step, 0)] &= targeted[:, step:]
            allowed[:, max(length - step, 0) :] = False
        best = torch.where(allowed, numbers, -1.0).topk(min(self.config.anchors, length), dim=-1)
        return best.indices, best.values >= 0

    def _pseudo_logits(
        self, ends: TargetEnds, batch: Mapping[str, Any], anchors: Tensor, states: Mapping[int, Tensor], cache: Any
    ) -> Tensor:
        """Run the pseudo tokens of all anchors, over the cache of the real ones: (rows, anchors, steps, vocabulary)."""
        rows, count, steps = *anchors.shape, self.steps
        length, layers = batch["input_ids"].shape[1], self.config.transfer_layers
        window = getattr(ends.model.config.get_text_config(decoder=True), "sliding_window", None)
        if window is not None and window < length + steps:
            raise ValueError(f"rows of {length} tokens and {steps} steps do not fit the target's window of {window}")
        context = visible(batch).gather(1, anchors[..., None].expand(-1, -1, length)).repeat_interleave(steps, dim=1)
        number = torch.arange(1, steps + 1, device=anchors.device).repeat(count)
        owner = torch.arange(count, device=anchors.device).repeat_interleave(steps)
        among = (owner[:, None] == owner) & (number[:, None] >= number)
        mask = torch.cat((context, among.expand(rows, -1, -1)), dim=-1)[:, None]
        positions = document_positions(batch).gather(1, anchors).repeat_interleave(steps, dim=1) + number
        origin = {
            layer: found.gather(1, anchors[..., None].expand(-1, -1, found.shape[-1])).repeat_interleave(steps, dim=1)
            for layer, found in states.items()
        }
        edits = self.edits(number.expand(rows, -1), origin)
        with only_layers(ends.model, min(layers)), edited(ends.model, edits):
            out = ends.model.forward(
                input_ids=torch.zeros_like(positions),
                attention_mask=as_attention_mask(ends.model, mask),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
        return out.logits.view(rows, count, steps, -1)


def as_attention_mask(model: Any, mask: Tensor) -> Tensor:
    """Turn a boolean mask (rows, 1, queries, columns) into the form the model's attention takes.

    Raises:
        ValueError: the attention implementation takes no such mask.
    """
    implementation = model.config.get_text_config(decoder=True)._attn_implementation
    if implementation == "sdpa":
        return mask
    if implementation == "eager":
        return torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill_(
            ~mask, torch.finfo(model.dtype).min
        )
    raise ValueError(
        f"hidden transfer trains under attn_implementation 'sdpa' or 'eager', not {implementation!r}: load the target "
        "with one of these"
    )
