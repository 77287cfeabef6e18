"""An architecture as a Hub repository: its code, a config that points to it, weights and a card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_ext import plugins
from hf_ext.hub import cards
from hf_ext.hub.code import write_code
from hf_ext.hub.errors import ExportError
from hf_ext.plugins import Plugin

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Shape of the model that stands in where no checkpoint is given; only what a config knows is set.
SMALL = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
#: Files of a tokenizer, copied from a checkpoint.
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja")


def write_model(plugin: Plugin, folder: Path, repo_id: str, model: PreTrainedModel | str | Path | None) -> None:
    """Write the repository of an architecture into `folder`.

    Args:
        plugin: a plugin of the kind `"model"`.
        folder: an empty folder.
        repo_id: what the card's example calls the repository.
        model: a model, or a folder with a checkpoint of it; without it a small one with fresh weights.

    Raises:
        ExportError: the model is of another architecture or cannot be read, or the code cannot be flattened.
    """
    if "AutoConfig" not in plugin.auto:
        raise ExportError(f"cannot export {plugin.name}: the plugin names no class for AutoConfig in `auto`")
    heads = [name for name in plugin.auto if name != "AutoConfig"]
    if not heads:
        raise ExportError(f"cannot export {plugin.name}: the plugin names no model class in `auto`")
    live = _model(plugin, heads, model)
    live.save_pretrained(folder)
    for path in folder.glob("*.py"):  # save_pretrained may have copied code, but does not follow absolute imports
        path.unlink()
    modules = dict.fromkeys(target.partition(":")[0] for target in (*plugin.auto.values(), plugin.target))
    names = write_code(plugin, list(modules), folder)

    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    places = {auto: target.partition(":")[::2] for auto, target in plugin.auto.items()}
    config["auto_map"] = {auto: f"{names[module]}.{name}" for auto, (module, name) in places.items()}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    if isinstance(model, str | Path):
        for pattern in TOKENIZER_FILES:
            for file in Path(model).glob(pattern):
                shutil.copy(file, folder)
    auto_class = next((auto for auto in heads if places[auto][1] == type(live).__name__), heads[0])
    card = cards.model_card(plugin, auto_class, repo_id, own_weights=model is not None)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _model(plugin: Plugin, heads: list[str], model: PreTrainedModel | str | Path | None) -> PreTrainedModel:
    """Return the model to write, of one of the plugin's classes."""
    classes = {auto: plugins.resolve(plugin.auto[auto], plugin.name) for auto in heads}
    if model is None:
        return _fresh(plugin, plugin.load())
    if not isinstance(model, str | Path):
        if type(model) not in classes.values():
            names = ", ".join(sorted({cls.__name__ for cls in classes.values()}))
            raise ExportError(f"cannot export {plugin.name}: the model is a {type(model).__name__}, expected {names}")
        return model
    folder = Path(model)
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise ExportError(f"cannot export {plugin.name}: {folder} is no folder with a checkpoint (no config.json)")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        expected = plugins.resolve(plugin.auto["AutoConfig"], plugin.name).model_type
        if config.get("model_type") != expected:
            raise ExportError(
                f"cannot export {plugin.name}: {folder} holds a model of type {config.get('model_type')!r}, "
                f"expected {expected!r}; convert it first"
            )
        wanted = (config.get("architectures") or [plugin.load().__name__])[0]
        cls = next((cls for cls in classes.values() if cls.__name__ == wanted), plugin.load())
        loaded, info = cls.from_pretrained(folder, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise _unreadable(folder, error) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("safetensors", "safetensors_rust"):
            raise
        raise _unreadable(folder, error) from error
    if info["missing_keys"]:
        raise ExportError(f"cannot export {plugin.name}: {folder} lacks the weights {sorted(info['missing_keys'])[:3]}")
    return loaded


def _unreadable(folder: Path, error: Exception) -> ExportError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ExportError(f"cannot read the checkpoint in {folder}: {reason}")


def _fresh(plugin: Plugin, cls: Any) -> PreTrainedModel:
    """Return a small model with fresh weights, the same at every call."""
    import torch

    config_class = plugins.resolve(plugin.auto["AutoConfig"], plugin.name)
    known = vars(config_class()).keys()
    try:
        config = config_class(**{name: value for name, value in SMALL.items() if name in known})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return cls(config)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ExportError(
            f"cannot export {plugin.name}: a small {cls.__name__} cannot be built ({error}); give a model or a folder "
            "with a checkpoint"
        ) from error
