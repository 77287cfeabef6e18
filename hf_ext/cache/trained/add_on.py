"""PEFT models with further trained parts, one for each attention layer, saved beside the adapter."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftConfig, PeftModelForCausalLM
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from hf_ext.attention.intercept import Attended, intercept
from hf_ext.layers import in_evaluation


def attention_modules(model: PreTrainedModel, kind: str) -> dict[int, nn.Module]:
    """Return the attention layers of a causal model by the number of their layer, found by running two tokens.

    Args:
        model: changed for the moment only.
        kind: for whom, in errors.

    Raises:
        ValueError: an encoder-decoder, or attention that is not called by number through `AttentionInterface`.
    """
    if model.config.is_encoder_decoder:
        raise ValueError(f"{kind} needs a decoder-only causal LM, {type(model).__name__} is an encoder-decoder")
    found: dict[int, nn.Module] = {}

    def note(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, plain: Any, **call: Any) -> Attended:
        found[int(module.layer_idx)] = module
        return plain(module, query, key, value, mask, **call)

    with torch.no_grad(), in_evaluation(model), intercept(model, note):
        ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
        model(ids, attention_mask=torch.ones_like(ids), use_cache=False)
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    if not found:
        raise ValueError(f"no layer of {type(model).__name__} attends through transformers' AttentionInterface")
    return {number: found[number] for number in range(layers) if number in found}


class AddOnModel(PeftModelForCausalLM):
    """Base of models with an adapter and trained parts beside it.

    Args:
        model: a causal language model; it is changed in place, as by `get_peft_model`.
        peft_config: any method that changes layers (LoRA, DoRA, IA3, ...).
        parts: what is trained besides.
        adapter_name: of the adapter.

    Raises:
        ValueError: prompt tuning.
    """

    #: The file beside the adapter, and the name of the parts in the base model.
    FILE: ClassVar[str]
    NAME: ClassVar[str]

    def __init__(
        self, model: PreTrainedModel, peft_config: PeftConfig, parts: nn.Module, adapter_name: str = "default"
    ) -> None:
        if peft_config.is_prompt_learning:
            raise ValueError(
                f"{type(self).__name__} decides about real tokens, a {type(peft_config).__name__} makes virtual ones"
            )
        super().__init__(model, peft_config, adapter_name)
        model.add_module(self.NAME, parts.to(model.device).requires_grad_(not peft_config.inference_mode))

    @property
    def parts(self) -> Any:
        """What is trained beside the adapter."""
        return getattr(self.get_base_model(), self.NAME)

    def save_pretrained(
        self, save_directory: str | Path, *args: Any, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """Save the adapter, and the trained parts beside it; see `PeftModel.save_pretrained`."""
        super().save_pretrained(str(save_directory), *args, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            tensors = {name: value.detach().cpu().contiguous() for name, value in self.parts.named_parameters()}
            save_file(tensors, Path(save_directory) / self.FILE, metadata={"options": json.dumps(self.own_options())})

    def load_adapter(self, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """Load the adapter together with its trained parts; see `PeftModel.load_adapter`.

        Raises:
            ValueError: the saved parts are of another model.
        """
        trained = self.training
        result = super().load_adapter(str(model_id), adapter_name, *args, **kwargs)
        self._load_parts(_file(model_id, self.FILE, kwargs))
        self.train(trained)  # PEFT leaves the model in evaluation mode, whatever it was in
        return result

    @torch.no_grad()
    def _load_parts(self, file: str) -> None:
        own = dict(self.parts.named_parameters())
        with safe_open(file, "pt") as saved:
            shapes = {name: tuple(saved.get_slice(name).get_shape()) for name in saved.keys()}  # noqa: SIM118
            wanted = {name: tuple(value.shape) for name, value in own.items()}
            if shapes != wanted:
                wrong = sorted(name for name in shapes.keys() | wanted if shapes.get(name) != wanted.get(name))
                raise ValueError(
                    f"{file} was trained on another model: {wrong[0]} has the shape {shapes.get(wrong[0])} there and "
                    f"{wanted.get(wrong[0])} here ({len(wrong)} of {len(wanted)} differ)"
                )
            for name, value in own.items():
                value.copy_(saved.get_tensor(name))

    def own_options(self) -> dict[str, Any]:
        """Return the options beside the adapter's with which the model is made anew."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, model: PreTrainedModel, model_id: str | Path, is_trainable: bool = False, **kwargs: Any
    ) -> Any:
        """Put a saved adapter and its trained parts on a model.

        Args:
            model: the model they were trained on, without adapters; changed in place.
            model_id: a folder or a Hub repository that `save_pretrained` or a checkpoint made.
            is_trainable: go on training; otherwise all is frozen and in evaluation mode.
            **kwargs: where to look on the Hub (`revision`, `token`, `cache_dir`).
        """
        config = PeftConfig.from_pretrained(str(model_id), **kwargs)
        config.inference_mode = not is_trainable
        with safe_open(_file(model_id, cls.FILE, kwargs), "pt") as saved:
            options = json.loads(saved.metadata()["options"])
        made = cls(model, config, **options)
        made.load_adapter(str(model_id), "default", is_trainable=is_trainable, **kwargs)
        return made if is_trainable else made.eval()


def _file(model_id: Any, name: str, kwargs: dict[str, Any]) -> str:
    hub = {key: kwargs[key] for key in ("subfolder", "revision", "token", "cache_dir") if key in kwargs}
    found = cached_file(str(model_id), name, **hub)
    assert found is not None  # cached_file raises what is missing
    return found


@contextlib.contextmanager
def before(modules: Sequence[nn.Module], see: Any) -> Iterator[None]:
    """Call `see(module, hidden)` each time that an attention layer is about to run, with the states it reads."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(module, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
