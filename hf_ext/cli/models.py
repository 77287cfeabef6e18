"""Load a model and its tokenizer for the command line, with errors that say what is wrong with them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hf_ext.cli.output import CliError

#: Names of the embedded models, usable wherever a model is asked for.
EMBEDDED = ("target", "draft")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def load(name: str, device: str | None, dtype: str, trust_remote_code: bool) -> tuple[Any, Any]:
    """Load the model and the tokenizer called `name`.

    Args:
        name: `target` or `draft` for an embedded model, a folder with a model or with adapters, or a repository on
            the Hub.
        device: where it goes; a GPU if there is one by default.
        dtype: one of `DTYPES`.
        trust_remote_code: run code that comes with the model.

    Raises:
        CliError: there is no such model, or it cannot be read.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    if dtype not in DTYPES:
        raise CliError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    place = torch.device("cpu") if device is None and not torch.cuda.is_available() else _device(device or "cuda")
    source = find(name)
    try:
        config = AutoConfig.from_pretrained(_base(source), trust_remote_code=trust_remote_code)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model, info = auto.from_pretrained(
            source, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except Exception as error:  # whatever a damaged or foreign folder makes the loaders raise
        raise CliError(f"cannot load the model {name}: {_reason(error)}") from error
    if missing := sorted(info["missing_keys"]):
        # transformers fills such tensors with random numbers; what is generated then means nothing.
        raise CliError(f"the weights of {name} lack {len(missing)} tensors that its config asks for: {missing[0]}, ...")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:
        if Path(source).is_dir() and not any(Path(source).glob("tokenizer*")):
            raise CliError(f"{name} holds no tokenizer: save one there, tokenizer.save_pretrained(folder)") from error
        raise CliError(f"cannot load the tokenizer of {name}: {_reason(error)}") from error
    return model.to(place).eval(), tokenizer


def _device(name: str) -> Any:
    import torch

    try:
        torch.empty(0, device=name)
    except Exception as error:
        raise CliError(f"--device {name}: {_reason(error)}") from error
    return torch.device(name)


def find(name: str, option: str = "--model") -> str:
    """Return the folder or the Hub id that `name` stands for.

    Args:
        name: as for `load`.
        option: where it was given; error messages name it.

    Raises:
        CliError: there is no such folder and no such repository, or it holds no model.
    """
    if not name:
        raise CliError(f"{option} is empty; it takes a folder, a Hub id or the name of what is embedded")
    path = Path(name).expanduser()
    if path.is_dir():
        if not ((path / "config.json").is_file() or holds_adapters(path)):
            raise CliError(f"{name} is no model folder: it holds no config.json")
        return str(path)
    if name in EMBEDDED:
        from hf_ext import demo

        return str(demo.path(name))
    if path.exists():
        raise CliError(f"{name} is a file; {option} takes a folder that save_pretrained wrote, or a Hub id")
    if name.startswith((".", "~", os.sep)) or name.count("/") > 1:
        raise CliError(f"no such folder: {name!r}")
    _check_hub(name)
    return name


def holds_adapters(folder: str | Path) -> bool:
    """Tell whether a folder holds adapters, as `hf-ext train --lora` writes them, and not a whole model."""
    return (Path(folder) / "adapter_config.json").is_file() and not (Path(folder) / "config.json").is_file()


def _base(source: str) -> str:
    """Return where the config is: with the model itself, or with the one that adapters are for."""
    if not holds_adapters(source):
        return source
    return json.loads((Path(source) / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]


def _check_hub(name: str) -> None:
    """Refuse a repository that is neither in the cache nor to be had from the Hub: at once, and in one sentence.

    The loaders ask for half a minute where there is no network, and then explain at length.
    """
    from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    hub = constants.ENDPOINT
    try:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            get_hf_file_metadata(hf_hub_url(name, "config.json", endpoint=hub))
    except errors.HFValidationError:
        raise CliError(f"no such folder, and no name of a repository: {name!r}") from None
    except errors.GatedRepoError as error:
        raise CliError(f"{name} is gated: ask for access at {hub}/{name}, then run `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise CliError(
            f"{name} is neither a folder here nor a repository at {hub}; a private one needs `hf auth login`"
        ) from error
    except errors.EntryNotFoundError as error:
        raise CliError(f"{hub}/{name} is no model: it holds no config.json") from error
    except Exception as error:  # which, depends on the client's HTTP library
        raise CliError(
            f"{name} is neither a folder here nor in the local cache, and {hub} does not answer ({_reason(error)})"
        ) from error


def _reason(error: Exception) -> str:
    """Say what an exception of the loaders means for the user: its first paragraph, advice comes after it."""
    text = (str(error).strip() or type(error).__name__).split("\n\n")[0].strip()
    if "trust_remote_code=True" in text:
        return "it comes with code of its own; read that, and pass --trust-remote-code to run it"
    if type(error).__name__ == "SafetensorError":
        return f"its safetensors file is damaged or incomplete ({text}); save or download it again"
    return f"{type(error).__name__}: {text}"
