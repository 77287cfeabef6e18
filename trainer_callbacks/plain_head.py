"""The last states of a training pass and the head that would make logits of them, for losses that do without."""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from hf_ext.layers import base_model, in_evaluation
from hf_ext.trainer_callbacks.clean_loss import is_plain_linear


class PlainHead:
    """The head of a causal LM, and the states that enter it in a training pass that builds no logits.

    A probe finds out what the model does to its head's output: nothing, a factor or soft-capping; and that what
    the head reads are the decoder's last states.

    Args:
        model: the model that trains (a PEFT wrapper is looked through).

    Raises:
        ValueError: the model's forward takes no `logits_to_keep`, its head is more than a linear
            layer (an adapter on the head, say), or its logits are more than the head's output.

    Example:
        >>> from hf_ext.testing.tiny_models import build
        >>> PlainHead(build("llama")).scale
        1.0
    """

    def __init__(self, model: nn.Module) -> None:
        base = base_model(model)
        self._name = type(base).__name__
        self._base = weakref.ref(base)
        head = base.get_output_embeddings()
        if "logits_to_keep" not in inspect.signature(base.forward).parameters:
            raise ValueError(f"{self._name}.forward takes no logits_to_keep; train with the logits")
        if not is_plain_linear(head):
            found = "no head" if head is None else f"a {type(head).__name__} as its head, which does more than that"
            raise ValueError(
                f"training without logits needs a model with a plain linear head, and {self._name} has {found} (by an "
                "adapter on the head, for example); train with the logits, or leave the head out of the adapters"
            )
        self._head = weakref.ref(head)
        self._state: Tensor | None = None
        self._armed = False
        decoder = base.get_decoder()
        self._handle = decoder.register_forward_hook(_StateHook(self))
        try:
            self.scale, self.softcap = self._probe(base, head)
        except BaseException:
            self._handle.remove()
            raise
        self.line = f"forward hook on {type(decoder).__name__}: last states, where the loss does without logits"

    def begin(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the batch with a request for no logits, and keep the states that the pass over it makes."""
        self._armed, self._state = True, None
        ids = next(value for value in batch.values() if isinstance(value, Tensor))
        return {**batch, "logits_to_keep": torch.empty(0, dtype=torch.long, device=ids.device)}

    @property
    def armed(self) -> bool:
        """Whether the pass that is under way builds no logits."""
        return self._armed

    def take(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the states (batch, length, hidden), the head's weight and its bias, and keep them no longer."""
        states, head = self._state, self._head()
        self._armed, self._state = False, None
        if states is None or head is None:
            raise RuntimeError(
                f"{self._name} computed a loss without a pass through its decoder; set without_logits=False"
            )
        weight, bias = _whole(head.weight), _whole(head.bias)
        kind = states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        return states.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)

    def remove(self) -> None:
        """Take the hook off the model."""
        self._handle.remove()
        self._state = None

    @torch.no_grad()
    def _probe(self, base: Any, head: nn.Linear) -> tuple[float, float | None]:
        device = base.get_input_embeddings().weight.device
        size = base.config.get_text_config(decoder=True).vocab_size
        calls: list[tuple[Tensor, Tensor]] = []
        hook = head.register_forward_hook(lambda module, given, output: calls.append((given[0], output)))
        self._armed = True
        try:
            with in_evaluation(base):
                expected = base(torch.arange(8, device=device)[None] % size, use_cache=False).logits.float()
        finally:
            hook.remove()
            state, self._armed, self._state = self._state, False, None
        if not calls:
            raise ValueError(f"{self._name} does not call its head; train with the logits")
        read, plain = calls[-1][0], calls[-1][1].float()
        near = 1e-4 if calls[-1][1].dtype in (torch.float32, torch.float64) else 2e-2  # autocast may have been at work
        if state is None or state.shape != read.shape or not _close(state.float(), read.float(), near):
            raise ValueError(
                f"the head of {self._name} reads something else than its decoder's last states; train with the logits"
            )
        if _close(plain, expected, near):
            return 1.0, None
        cap = getattr(base.config.get_text_config(decoder=True), "final_logit_softcapping", None)
        if cap and _close(cap * (plain / cap).tanh(), expected, near):
            return 1.0, float(cap)
        factor = float((plain * expected).sum() / plain.square().sum())
        if _close(factor * plain, expected, near):
            return factor, None
        raise ValueError(
            f"the logits of {self._name} are not those of its head, nor these scaled or "
            "soft-capped, so the loss cannot be computed from its last states; train with the logits"
        )


class _StateHook:
    """Keep what the decoder returns, while a pass without logits is under way."""

    def __init__(self, owner: PlainHead) -> None:
        self._owner = weakref.ref(owner)

    def __deepcopy__(self, memo: dict[int, Any]) -> _StateHook:
        return self

    @torch.compiler.disable
    def __call__(self, decoder: nn.Module, args: Any, output: Any) -> None:
        owner = self._owner()
        base = owner._base() if owner is not None else None
        # a copy of the model carries this hook, too, and is not the model that trains
        if owner is None or base is None or not owner._armed or decoder is not base.get_decoder():
            return
        owner._state = output if isinstance(output, Tensor) else output[0]


def _whole(weight: Any) -> Any:
    """Gather a weight that is sharded over processes; outside its module's forward it is in parts."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def _close(found: Tensor, expected: Tensor, near: float) -> bool:
    return bool((found - expected).abs().max() <= near * expected.abs().max().clamp(min=1e-6))
