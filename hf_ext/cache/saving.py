"""Write a compressed cache to a safetensors file, and go on with it in another process."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_ext.cache.quantisation import Quantisation

if TYPE_CHECKING:
    from hf_ext.cache.cache import CompressedCache
    from hf_ext.cache.policy import CachePolicy

#: Marks the files, with the number of their layout: what stands for columns has changed once.
MARK = "hf_ext compressed cache"
FORMAT = f"{MARK} 2"


def save(cache: CompressedCache, path: str | Path) -> None:
    """Write what a cache holds.

    Args:
        cache: after a prompt.
        path: of the file.

    Raises:
        ValueError: the cache is empty, or records past tokens that are not settled.
    """
    from hf_ext.cache.layer import CompressedLayer

    if not cache.get_seq_length():
        raise ValueError("the cache is empty: run the model with past_key_values=cache before saving it")
    tensors: dict[str, Tensor] = {}
    layers: list[dict[str, Any]] = []
    for number, layer in enumerate(cache.layers):
        if isinstance(layer, CompressedLayer):
            if layer.pending:
                raise ValueError("the cache records tokens that may be forgotten; call cache.crop(0) before saving it")
            state = layer.state()
            layers.append({"seen": layer.seen, "prefilled": layer.prefilled, "pads": layer.pads})
        else:
            state = {
                name: getattr(layer, name) for name in ("keys", "values") if getattr(layer, name, None) is not None
            }
            layers.append({"seen": layer.get_seq_length() if state else 0})
        tensors |= {f"layers.{number}.{name}": tensor.contiguous().cpu() for name, tensor in state.items()}
    policy, fitted = describe(cache.policy)
    tensors |= {f"policy.{name}": tensor.contiguous().cpu() for name, tensor in fitted.items()}
    metadata = {
        "format": FORMAT, "policy": json.dumps(policy), "layers": json.dumps(layers), "sliding": cache.sliding,
        "layer_budgets": json.dumps(cache.layer_budgets), "shape": json.dumps(shape_of(cache.config)),
        "skip_layers": str(cache.skip_layers), "ragged": str(cache.policy.storage == "ragged"),
        "quantise": json.dumps(None if cache.quantise is None else dataclasses.asdict(cache.quantise)),
    }  # fmt: skip
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, str(path), metadata=metadata)


def load(kind: type[CompressedCache], path: str | Path, config: Any, device: torch.device | str) -> CompressedCache:
    """Read what `save` has written; see `CompressedCache.load`."""
    from hf_ext.cache.layer import CompressedLayer

    with safe_open(str(path), framework="pt", device=str(device)) as file:
        metadata = file.metadata() or {}
        if not metadata.get("format", "").startswith(MARK):
            raise ValueError(f"{path} holds no compressed cache; write one with cache.save(path)")
        if metadata["format"] != FORMAT:
            raise ValueError(
                f"{path} has the layout {metadata['format']!r}, this version of hf_ext reads {FORMAT!r}; write it "
                "again with cache.save(path)"
            )
        wanted, found = json.loads(metadata["shape"]), shape_of(config.get_text_config(decoder=True))
        if wanted != found:
            raise ValueError(f"the cache was made with a model of the shape {wanted}, this one has {found}")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    fitted = {name.removeprefix("policy."): t for name, t in tensors.items() if name.startswith("policy.")}
    quantise = json.loads(metadata.get("quantise", "null"))
    cache = kind(
        config,
        revive(json.loads(metadata["policy"]), fitted),
        layer_budgets=json.loads(metadata["layer_budgets"]),
        skip_layers=int(metadata["skip_layers"]),
        sliding=metadata["sliding"],  # type: ignore[arg-type]
        quantise=None if quantise is None else Quantisation(**quantise),
    )
    for number, (layer, noted) in enumerate(zip(cache.layers, json.loads(metadata["layers"]), strict=True)):
        head = f"layers.{number}."
        state = {name.removeprefix(head): t for name, t in tensors.items() if name.startswith(head)}
        if isinstance(layer, CompressedLayer):
            layer.restore(state, noted["seen"], noted["prefilled"], noted["pads"], torch.device(device))
        elif state:
            layer.update(state["keys"], state["values"])
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length = noted["seen"]
    return cache


def shape_of(config: Any) -> dict[str, Any]:
    """Return what two models must have in common to read each other's caches."""
    names = ("model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim")
    return {name: getattr(config, name, None) for name in names}


def describe(policy: CachePolicy) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a policy as JSON and the tensors among its options."""
    plain: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for name, value in policy.options().items():
        if isinstance(value, Tensor):
            tensors[name] = value
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            inner, more = describe(value)  # type: ignore[arg-type]
            plain[name] = inner
            tensors |= {f"{name}.{key}": tensor for key, tensor in more.items()}
        else:
            plain[name] = value
    return {"class": f"{type(policy).__module__}:{type(policy).__qualname__}", "options": plain}, tensors


def revive(described: dict[str, Any], tensors: dict[str, Tensor]) -> CachePolicy:
    """Return the policy that `describe` has described.

    Raises:
        ValueError: its class is none of an installed policy.
    """
    from hf_ext import plugins
    from hf_ext.cache.policy import CachePolicy

    known = {plugin.target for plugin in plugins.all(kind="cache")}
    if described["class"] not in known:  # a file must not name just any class to be imported
        raise ValueError(
            f"the cache was made with the policy {described['class']!r}, which no installed plugin offers; there are "
            f"{', '.join(sorted(known))}"
        )
    kind = plugins.resolve(described["class"], described["class"])
    if not (isinstance(kind, type) and issubclass(kind, CachePolicy)):
        raise ValueError(f"{described['class']!r} is no cache policy")
    options = dict(described["options"])
    for name, value in options.items():
        if isinstance(value, dict) and set(value) == {"class", "options"}:
            inner = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
            options[name] = revive(value, inner)
    options |= {name: tensor for name, tensor in tensors.items() if "." not in name}
    return kind(**options)
