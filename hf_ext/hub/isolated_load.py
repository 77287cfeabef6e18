"""Load an exported repository with transformers alone; run as a script in a process of its own.

Usage: `python -P isolated_load.py strategy|model FOLDER BLOCKED[,BLOCKED...]`. The packages named last
cannot be imported in that process, installed or not. Exits with 1 and one line on stderr if the
repository does not load.
"""

import sys
from collections.abc import Collection
from importlib.abc import MetaPathFinder
from pathlib import Path


class Block(MetaPathFinder):
    """Hides packages from the import system."""

    def __init__(self, packages: Collection[str]) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Refuse the hidden packages, leave all others to the next finder."""
        if name.split(".")[0] in self.packages:
            raise ModuleNotFoundError(f"No module named {name!r} (a repository must not need it)", name=name)


def load_strategy(folder: str) -> None:
    """Fetch `generate` as `model.generate(custom_generate=folder)` does."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=8, n_embd=4, n_layer=1, n_head=1))
    generate = model.load_custom_generate(folder, trust_remote_code=True)
    assert callable(generate), "custom_generate/generate.py defines no function `generate`"


def load_model(folder: str) -> None:
    """Load config and weights, all of them."""
    import json

    import transformers

    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    classes = {reference.partition(".")[2]: auto for auto, reference in config["auto_map"].items()}
    auto = getattr(transformers, classes[config["architectures"][0]])
    model, info = auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    where = type(model).__module__
    assert where.startswith("transformers_modules."), f"the class came from {where}, not from the repository"
    problems = {name: keys for name, keys in info.items() if keys}
    assert not problems, f"the weights do not fit: {problems}"


if __name__ == "__main__":
    kind, folder, blocked = sys.argv[1:]
    sys.meta_path.insert(0, Block(set(blocked.split(","))))
    try:
        {"strategy": load_strategy, "model": load_model}[kind](folder)
    except Exception as error:
        sys.exit(" ".join(f"{type(error).__name__}: {error}".split()))
