"""The embedded models and the demonstration that uses them.

A byte-level BPE tokenizer, a Llama-architecture target and a much smaller draft of the same
vocabulary, trained on the standard library's source by `hf_ext.demo.train`. They load offline:

    AutoModelForCausalLM.from_pretrained(hf_ext.demo.path("target"))
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

NAMES = ("target", "draft", "tokenizer")
#: What was trained for the target by `hf_ext.demo.train_heads`, in the folder `heads`.
HEADS = ("kangaroo", "recurrent-drafter", "hidden-transfer", "layerskip")


def path(name: str = "target") -> str:
    """Return the folder of an embedded checkpoint; those of the models hold the tokenizer as well.

    Args:
        name: `"target"`, `"draft"` or `"tokenizer"`; or one of `HEADS`, which draft for the target
            (`"layerskip"` is LoRA adapters of the target itself).

    Raises:
        ValueError: another name.

    Example:
        >>> from transformers import AutoTokenizer
        >>> tokenizer = AutoTokenizer.from_pretrained(path("target"))
        >>> tokenizer.decode(tokenizer("def f(x):\\n    return x")["input_ids"])
        'def f(x):\\n    return x'
    """
    if name not in NAMES + HEADS:
        raise ValueError(f"no embedded model {name!r}; there are {', '.join(NAMES + HEADS)}")
    folder = Path(__file__).parent
    return str(folder / "heads" / name if name in HEADS else folder / name)


def run(**options: Any) -> dict[str, Any]:
    """Run the demonstration; see `hf_ext.demo.demonstration.run`, which this imports when called."""
    from hf_ext.demo.demonstration import run as run_demonstration

    return run_demonstration(**options)
