"""Reach into the layers of a stock causal LM: read, replace or leave out what flows between them.

The *state* `e` of a model is its residual stream after `e` layers: state 0 enters the first layer,
state `n` (of `n` layers) goes through the final norm and the LM head. Early exits, draft heads and
self-speculation all read or write such states. Everything here is done on one model instance, by
hooks or by its layers' own `forward`, inside a `with` block, and undone at the end of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_ext import adapter


def base_model(model: Any) -> Any:
    """Return the transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the list of decoder layers of a causal LM.

    It is the first module list (from the outside in) that is as long as the config says; of a model that reads images
    as well, the first in what reads text, for the other part may have as many layers.

    Raises:
        ValueError: the model is an encoder-decoder, or no such list is found.

    Example:
        >>> from hf_ext.testing.tiny_models import build
        >>> len(decoder_layers(build("gpt2")))
        2
    """
    inner = base_model(model)
    config: Any = inner.config
    if config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; this needs a decoder-only causal LM")
    count = config.get_text_config(decoder=True).num_hidden_layers
    decoder = inner.get_decoder() if hasattr(inner, "get_decoder") else None
    for part in (decoder, model):
        for module in part.modules() if part is not None else ():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return module
    raise ValueError(f"found no list of {count} layers in {type(model).__name__}, as its config announces")


@contextlib.contextmanager
def in_evaluation(model: nn.Module, but: nn.Module | None = None) -> Iterator[None]:
    """Switch every module to evaluation mode for a while, except those inside `but`."""
    kept = set(but.modules()) if but is not None else set()
    modes = [(module, module.training) for module in model.modules() if module not in kept]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def captured(model: nn.Module, states: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """Collect states of the forward passes run inside the block; a later pass overwrites an earlier one.

    Args:
        model: a causal LM.
        states: which ones, from 0 to the number of layers.

    Yields:
        A dictionary that fills up: number of the state to a tensor (batch, length, hidden).

    Example:
        >>> from hf_ext.testing.tiny_models import build
        >>> model = build("llama")
        >>> with captured(model, [1, 2]) as found:
        ...     _ = model(torch.tensor([[5, 6, 7]]))
        >>> found[2].shape
        torch.Size([1, 3, 32])
    """
    layers = decoder_layers(model)
    found: dict[int, Tensor] = {}
    with contextlib.ExitStack() as stack:
        for state in sorted(set(states)):
            _check(state, len(layers))
            if state == 0:
                hook = layers[0].register_forward_pre_hook(_reader(found, 0), with_kwargs=True)
            else:
                hook = layers[state - 1].register_forward_hook(_writer(found, state))
            stack.callback(hook.remove)
        yield found


@contextlib.contextmanager
def edited(model: nn.Module, edits: Mapping[int, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Change states on their way into the next layer, in all forward passes run inside the block.

    Args:
        model: a causal LM.
        edits: number of the state (0 up to but not including the number of layers) to a function
            that gets it, (batch, length, hidden), and returns what the layer shall read instead.

    Example:
        >>> from hf_ext.testing.tiny_models import build
        >>> model, ids = build("llama"), torch.tensor([[5, 6, 7]])
        >>> with edited(model, {1: torch.zeros_like}), captured(model, [2]) as found:
        ...     _ = model(ids)
        >>> bool(found[2].any())  # nothing in, nothing out
        False
    """
    layers = decoder_layers(model)
    with contextlib.ExitStack() as stack:
        for state, edit in edits.items():
            _check(state, len(layers) - 1)
            stack.callback(layers[state].register_forward_pre_hook(_editor(edit), with_kwargs=True).remove)
        yield


@contextlib.contextmanager
def only_layers(model: nn.Module, start: int = 0, stop: int | None = None, states: Tensor | None = None) -> Iterator:
    """Run only the layers `start` to `stop` (not included); the others pass their input on.

    A layer that is left out computes nothing and leaves its part of the KV cache alone. With
    explicit masks and positions the passes inside the block may use such a cache.

    Args:
        model: a causal LM.
        start: the first layer that runs.
        stop: the first layer after it that does not; all the rest run if None.
        states: (batch, length, hidden), what enters the first layer that runs in place of the
            embeddings. The ids given to the model then only say batch and length.

    Example:
        >>> from hf_ext.testing.tiny_models import build
        >>> model, ids = build("llama"), torch.tensor([[5, 6, 7]])
        >>> with captured(model, [1]) as found:
        ...     whole = model(ids).logits
        >>> with only_layers(model, 1, states=found[1]):
        ...     rest = model(ids).logits
        >>> bool((whole == rest).all())
        True
    """
    layers = decoder_layers(model)
    stop = len(layers) if stop is None else stop
    if not 0 <= start <= stop <= len(layers):
        raise ValueError(f"cannot run layers {start} to {stop} of a model of {len(layers)}")
    skipped = [layer for index, layer in enumerate(layers) if not start <= index < stop]
    with contextlib.ExitStack() as stack:
        if states is not None:
            edit = _editor(lambda _: states)
            stack.callback(layers[0].register_forward_pre_hook(edit, with_kwargs=True).remove)
        for layer in skipped:
            stack.callback(_restore, layer, {name: vars(layer).get(name) for name in _OVERRIDDEN})
            vars(layer).update(_OVERRIDDEN)
        yield


class TargetEnds:
    """Both ends of a causal LM: the embeddings of its tokens and the logits of its states.

    `logits` does what the model does after its last layer: final norm, output projection, LM head,
    soft-capping and whatever else. Where a probe shows that norm and head are all there is, it calls
    just these; otherwise it runs the model without its layers.

    Args:
        model: a causal LM (a PEFT wrapper is looked through).

    Example:
        >>> from hf_ext.testing.tiny_models import build
        >>> model = build("gpt2")
        >>> with captured(model, [2]) as found:
        ...     whole = model(torch.tensor([[5, 6, 7]])).logits
        >>> bool((TargetEnds(model).logits(found[2]) == whole).all())
        True
    """

    def __init__(self, model: Any) -> None:
        self.model = base_model(model)
        self.layers = len(decoder_layers(self.model))
        self.shortcut = self._find_shortcut()

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the input embeddings of tokens of any shape."""
        return self.model.get_input_embeddings()(tokens)

    def logits(self, states: Tensor) -> Tensor:
        """Return the logits (..., vocabulary) of states (..., hidden) that have not been normed."""
        if self.shortcut is not None:
            norm, head = self.shortcut
            return head(norm(states))
        return self._run(states)

    def _run(self, states: Tensor) -> Tensor:
        flat = states.reshape(-1, 1, states.shape[-1])
        places = torch.zeros(flat.shape[:2], dtype=torch.long, device=states.device)
        with only_layers(self.model, self.layers, states=flat):
            # The class's forward, not a call: hooks and wrappers on this model belong to whoever is running it.
            out = type(self.model).forward(
                self.model,
                input_ids=places,
                attention_mask=torch.ones_like(places),
                position_ids=places,
                use_cache=False,
            )
        return out.logits.reshape(*states.shape[:-1], -1)

    @torch.no_grad()
    def _find_shortcut(self) -> tuple[nn.Module, nn.Module] | None:
        head, last = self.model.get_output_embeddings(), decoder_layers(self.model)[-1]
        seen: dict[str, Any] = {}

        def after_last(_: nn.Module, args: tuple, output: Tensor) -> None:
            seen["state"] = output

        def after_any(module: nn.Module, args: tuple, output: Any) -> None:
            if "norm" not in seen and args and args[0] is seen.get("state"):
                seen["norm"] = module

        width = self.model.config.get_text_config(decoder=True).hidden_size
        states = torch.randn(2, 1, width, generator=torch.Generator().manual_seed(0))
        states = states.to(adapter.device_of(self.model), next(self.model.parameters()).dtype)
        with contextlib.ExitStack() as stack:
            stack.enter_context(in_evaluation(self.model))
            stack.callback(last.register_forward_hook(after_last).remove)
            for module in self.model.modules():
                if module is not last:
                    stack.callback(module.register_forward_hook(after_any).remove)
            try:
                expected = self._run(states)
            except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
                layer, said = type(last).__name__, (str(error).splitlines() or [""])[0]
                raise ValueError(
                    f"{type(self.model).__name__} does not run without its layers ({type(error).__name__}: {said}): "
                    f"{layer} does not take states and return states alone, so no head can draft for it"
                ) from error
        norm = seen.get("norm")
        if norm is None or head is None:
            return None
        with in_evaluation(self.model):
            try:
                found = head(norm(states))
            except RuntimeError:  # another width: there is a projection between norm and head
                return None
        return (norm, head) if torch.equal(found, expected) else None


def _check(state: int, most: int) -> None:
    if not 0 <= state <= most:
        raise ValueError(f"state {state} is not among those from 0 to {most}")


def _pass_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


#: Attributes of a layer that is left out. One that recomputes itself would find its own forward again by then.
_OVERRIDDEN = {"forward": _pass_on, "gradient_checkpointing": False}


def _restore(layer: nn.Module, had: Mapping[str, Any]) -> None:
    for name, value in had.items():
        if value is None:
            vars(layer).pop(name, None)
        else:
            vars(layer)[name] = value


def _reader(found: dict[int, Tensor], state: int) -> Any:
    def read(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found[state] = args[0] if args else kwargs["hidden_states"]

    return read


def _writer(found: dict[int, Tensor], state: int) -> Any:
    def write(layer: nn.Module, args: tuple, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise ValueError(f"{type(layer).__name__} returns a {type(output).__name__}, not its hidden states")
        found[state] = output

    return write


def _editor(edit: Callable[[Tensor], Tensor]) -> Any:
    def change(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if args:
            return (edit(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

    return change
