"""The methods that the speculative benchmark compares, as a table of records."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from hf_ext import demo, plugins
from hf_ext.benchmarks.speculative_settings import Setting
from hf_ext.cli.output import CliError
from hf_ext.generation.report import DecodeReport

#: A decoding call: `(inputs and settings of generate) -> (ids, our report if there is one)`.
Call = Callable[..., tuple[torch.Tensor, "DecodeReport | None"]]


@dataclass(frozen=True)
class Method:
    """How one row of the table decodes.

    Args:
        name: as it stands in the table; for our methods the plugin's name, unless `plugin` gives that.
        options: options of the strategy's class beside `draft_model` and `draft_tokens`, which are filled in
            from the setting where the class has them.
        baseline: for transformers' own methods, `(setting, draft model, draft tokens) -> Call`.
        needs_draft: for baselines, whether a draft model is needed; for ours the class tells.
        exact: whether greedy output must be that of `generate`. False where the method has another law by design.
        targets: names of the targets that it works with, for methods with parts trained on one; all by default.
        required: `setting -> options` that cannot be defaulted, such as several drafts or trained parts.
        plugin: the plugin's name, for a second row of the same method with other options.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    baseline: Callable[[Setting, PreTrainedModel | None, int], Call] | None = None
    needs_draft: bool = False
    exact: bool = True
    targets: Sequence[str] | None = None
    required: Callable[[Setting], Mapping[str, Any]] | None = None
    plugin: str | None = None

    def strategy_class(self) -> type | None:
        """Return the plugin's class, or None where no such plugin is installed."""
        wanted = self.plugin or self.name
        if all(wanted != plugin.name for plugin in plugins.all(kind="strategy")):
            return None
        return plugins.get(wanted).load()

    def takes_draft(self) -> bool:
        """Return whether the method drafts with a second model."""
        return self.needs_draft if self.baseline else "draft_model" in _fields(self.strategy_class())

    def call(self, setting: Setting, draft: PreTrainedModel | None, draft_tokens: int) -> Call:
        """Return what decodes once, with nothing left over from an earlier call."""
        if self.baseline is not None:
            return self.baseline(setting, draft, draft_tokens)
        kind = self.strategy_class()
        known = _fields(kind)
        options = {**({"draft_tokens": draft_tokens} if "draft_tokens" in known else {}), **self.options}
        if self.required is not None:
            options |= self.required(setting)
        if "draft_model" in known:
            options.setdefault("draft_model", draft)

        def run(**inputs: Any) -> tuple[torch.Tensor, DecodeReport | None]:
            assert kind is not None
            strategy = kind(**options)
            return strategy.generate(setting.target, **inputs), strategy.report

        return run


def _fields(kind: type | None) -> set[str]:
    return {f.name for f in dataclasses.fields(kind) if f.init} if dataclasses.is_dataclass(kind) else set()


def _plain(setting: Setting, draft: PreTrainedModel | None, draft_tokens: int) -> Call:
    return lambda **inputs: (setting.target.generate(**inputs), None)


def _assisted(setting: Setting, draft: PreTrainedModel | None, draft_tokens: int) -> Call:
    def run(**inputs: Any) -> tuple[torch.Tensor, None]:
        assert draft is not None
        # transformers reads them from the draft model's settings and may change them: set for every call.
        draft.generation_config.num_assistant_tokens = draft_tokens
        draft.generation_config.num_assistant_tokens_schedule = "constant"
        draft.generation_config.assistant_confidence_threshold = 0
        return setting.target.generate(**inputs, assistant_model=draft), None

    return run


def _lookup(setting: Setting, draft: PreTrainedModel | None, draft_tokens: int) -> Call:
    return lambda **inputs: (setting.target.generate(**inputs, prompt_lookup_num_tokens=draft_tokens), None)


@functools.cache
def _dispensable(name: str, target: PreTrainedModel) -> tuple[str, ...]:
    """Return the parts of a target that a draft can do without, searched on prompts of the claim checks."""
    from hf_ext.claims import held_out
    from hf_ext.generation import DraftAndVerify

    return DraftAndVerify.search(target, **held_out.batch(held_out.prompts(4)), trials=100, draft_tokens=4)


def _skip(setting: Setting) -> dict[str, Any]:
    return {"skip": _dispensable(setting.name, setting.target)}


def _head(name: str) -> Callable[[Setting], dict[str, Any]]:
    return lambda setting: {"head": demo.path(name)}


def _exit(setting: Setting) -> dict[str, Any]:
    """Exit where the layers of the embedded target end or, in that target itself, before its last layer."""
    own = demo.path("target")
    layers = AutoConfig.from_pretrained(own).num_hidden_layers
    return {"exit_layer": layers if setting.name == "memory-bound" else layers - 1}


#: transformers' own way with a draft model
ASSISTED = "transformers assisted"
PLAIN = Method("plain generate", baseline=_plain)
BASELINES: tuple[Method, ...] = (
    Method(ASSISTED, baseline=_assisted, needs_draft=True),
    Method("transformers lookup", baseline=_lookup),
)
METHODS: tuple[Method, ...] = (
    *BASELINES,
    Method("speculative-decoding"),
    Method("speculative-decoding (12 drafted)", {"draft_tokens": 12}, plugin="speculative-decoding"),
    Method("speculative-decoding (auto)", {"draft_tokens": "auto"}, plugin="speculative-decoding"),
    Method("spectr"),
    Method("recursive-speculative-decoding"),
    Method("opt-tree"),
    Method("dyspec"),
    Method("staged-speculative-decoding"),
    Method("token-recycling"),
    Method("token-recycling (24 nodes)", {"nodes": 24}, plugin="token-recycling"),
    Method("aded"),
    Method("jacobi-decoding"),
    Method("draft-and-verify", required=_skip),
    Method("speculative-contrastive-decoding", exact=False),
    Method("banditspec"),
    Method("prompt-lookup"),
    Method("layerskip", required=_exit),
    Method("kangaroo", targets=("embedded",), required=_head("kangaroo")),
    Method("recurrent-drafter", targets=("embedded",), required=_head("recurrent-drafter")),
    Method("hidden-transfer", targets=("embedded",), required=_head("hidden-transfer")),
)


def select(names: str | None) -> list[Method]:
    """Return the methods of a comma-separated list, all by default; `baselines` stands for those of transformers.

    Raises:
        CliError: a name is unknown.
    """
    if not names:
        return list(METHODS)
    by_name = {method.name: method for method in METHODS}
    found: list[Method] = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name == "baselines":
            found += BASELINES
        elif name in by_name:
            found.append(by_name[name])
        else:
            raise CliError(f"no method {name!r}; there are baselines, {', '.join(by_name)}")
    return list({method.name: method for method in found}.values())
