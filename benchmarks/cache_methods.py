"""The caches that are compared: every policy there is as a plugin, those of transformers, and kvpress's presses."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Cache, DynamicCache, QuantizedCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from hf_ext import plugins
from hf_ext.benchmarks.cache_tasks import training_batch
from hf_ext.cache import CachePolicy, CompressedCache

FULL, SLIDING, QUANTISED = "full cache", "DynamicSlidingWindow", "QuantizedCache"
#: Options for texts of a few hundred tokens, where the defaults of the papers would leave a method no choice.
OPTIONS: dict[str, dict[str, Any]] = {
    "snapkv": {"window": 8}, "pyramidkv": {"window": 8}, "adakv": {"policy": ("snapkv", {"window": 8})},
    "kivi": {"residual": 8, "group": 16}, "expected-attention": {"horizon": 64},
    # kvpress's form, averages without a recent half, so that the same method is compared; see VARIANTS for the other
    "h2o": {"average": True, "recent": 0.0},
}  # fmt: skip
#: A policy in another form, beside the one above: its plugin, and options.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {"h2o, as published": ("h2o", {"average": False, "recent": 0.5})}
#: Policies that are also shown with what they keep in 4 bits: one that looks at queries, one that looks at keys.
CODED = ("snapkv", "keydiff")
#: kvpress's name of the same method, its options, and whether it needs the matrices of eager attention.
PRESSES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "knorm": ("KnormPress", {}, False),
    "keydiff": ("KeyDiffPress", {}, False),
    "streaming-llm": ("StreamingLLMPress", {"n_sink": 4}, False),
    "tova": ("TOVAPress", {}, False),
    "snapkv": ("SnapKVPress", {"window_size": 8}, False),
    "pyramidkv": ("PyramidKVPress", {"window_size": 8}, False),
    "h2o": ("ObservedAttentionPress", {}, True),
    "adakv": ("AdaKVPress", {"press": ["SnapKVPress", {"window_size": 8}]}, False),
    "expected-attention": ("ExpectedAttentionPress", {"n_future_positions": 64}, False),
    "lagkv": ("LagKVPress", {"lag_size": 16}, False),
}


@dataclass(frozen=True)
class Method:
    """A way to keep a cache.

    Args:
        name: in tables.
        kind: "hf_ext" or "transformers".
        plugin: name of a policy.
        options: of it.
        quantise: bits in which what a policy keeps is stored, None for full precision.
        budgeted: whether it takes a budget.
        problem: why it cannot be run; empty if it can.
    """

    name: str
    kind: str
    plugin: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    quantise: int | None = None
    budgeted: bool = True
    problem: str = ""

    @property
    def implementation(self) -> str:
        """The attention implementation it is run under."""
        return "hf_ext" if self.kind == "hf_ext" else "sdpa"

    def policy(self, model: Any, budget: int | float, when: str | None = None) -> CachePolicy:
        """Return the policy with a budget, for a model."""
        more = {"budget": budget} if self.budgeted else {}
        if self.quantise is not None:
            when = "prefill"  # what is packed is never dropped
        return make_policy(model, self.plugin, {**self.options, **more}, when)

    def cache(self, model: Any, budget: int | float | list[int], tokens: int, when: str | None = None) -> Cache:
        """Return an empty cache.

        Args:
            model: that will use it.
            budget: tokens when an int, a share when a float; a list for policies, with the tokens of each layer.
            tokens: of the text, for caches that take tokens only.
            when: option of that name of policies; None for their defaults.
        """
        layers, budget = (budget, max(budget)) if isinstance(budget, list) else (None, budget)
        if self.name == FULL:
            return DynamicCache(config=model.config)
        if self.name == SLIDING:
            window = budget if isinstance(budget, int) else max(int(budget * tokens), 1)
            # These layers hold one token less than their window.
            return Cache(layers=[DynamicSlidingWindowLayer(window + 1) for _ in range(model.config.num_hidden_layers)])
        if self.plugin == QUANTISED:
            return QuantizedCache(config=model.config, **self.options)
        more = {} if self.quantise is None else {"quantise": quantisation(self.quantise)}
        return CompressedCache(model.config, self.policy(model, budget, when), layer_budgets=layers, **more)


def make_policy(model: Any, name: str, options: dict[str, Any], when: str | None = None) -> CachePolicy:
    """Make a policy for a model; an option that is a pair of a plugin's name and options is made likewise."""
    kind = plugins.get(name).load()
    given = dict(options)
    if when is not None and "bits" not in {f.name for f in dataclasses.fields(kind)}:  # a code is for good
        given["when"] = when
    for key, value in given.items():
        if isinstance(value, tuple):
            inner = {"budget": given["budget"]} if "budget" in given else {}
            given[key] = make_policy(model, value[0], {**value[1], **inner}, when)
    if hasattr(kind, "fit"):
        given["filters"] = fitted(model, kind)
    # What depends on the model, such as how it turns queries, a policy finds out by itself.
    return kind.of(model, **given) if hasattr(kind, "of") else kind(**given)


#: What was fitted last, with the model it was fitted to: methods take turns on one model.
_fitted: list[tuple[Any, type, Any]] = []


def fitted(model: Any, kind: Any) -> Any:
    """Return what a policy fits to a model, from texts of the kind that the small models are trained on."""
    for known, own, found in _fitted:
        if known is model and own is kind:
            return found
    ids, _ = training_batch(random.Random(0), 32, 96, 32)
    implementation = model.config._attn_implementation
    found = kind.fit(model, list(ids))
    model.set_attn_implementation(implementation)
    _fitted[:] = [entry for entry in _fitted if entry[0] is model]
    _fitted.append((model, kind, found))
    return found


def quantisation(bits: int) -> Any:
    """Return how what a policy keeps is packed."""
    from hf_ext.cache.quantisation import Quantisation

    return Quantisation(bits=bits, group=16, residual=8, guard=False)


def methods(short: bool = True) -> list[Method]:
    """Return all methods, with those that cannot be run.

    Args:
        short: whether texts are of a few hundred tokens only; otherwise policies have their defaults.
    """
    stock = [Method(FULL, "transformers", budgeted=False), Method(SLIDING, "transformers"), *quantised()]
    return [*stock, *policies(OPTIONS if short else {})]


def quantised() -> Iterator[Method]:
    """Yield transformers' quantised caches."""
    modules = {"quanto": "optimum.quanto", "hqq": "hqq"}
    for backend, module in modules.items():
        found = installed(module)
        for bits in (2, 4):
            yield Method(
                f"{QUANTISED} {backend} {bits} bits", "transformers", QUANTISED,
                {"backend": backend, "nbits": bits, "q_group_size": 32, "residual_length": 32}, budgeted=False,
                problem="" if found else "not installed",
            )  # fmt: skip
    known = "fp8" in (inspect.getdoc(QuantizedCache) or "")
    yield Method(
        f"{QUANTISED} fp8", "transformers", QUANTISED, {"backend": "fp8"}, budgeted=False,
        problem="" if known else "not in this release of transformers",
    )  # fmt: skip


def installed(module: str) -> bool:
    """Tell whether a module can be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its package is missing
        return False


def policies(given: dict[str, dict[str, Any]]) -> Iterator[Method]:
    """Yield the policies that are installed as plugins, with options for some of them."""
    for plugin in plugins.all(kind="cache"):
        kind = plugin.load()
        if not (isinstance(kind, type) and issubclass(kind, CachePolicy)):
            continue  # a context made into slots is no policy: it is trained
        if kind.only_for:
            yield Method(plugin.name, "hf_ext", plugin.name, problem=f"needs a model trained for it, a {kind.only_for}")
            continue
        needed = [
            f.name for f in dataclasses.fields(kind)
            if f.init and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]  # fmt: skip
        options = given.get(plugin.name, {})
        names = {f.name for f in dataclasses.fields(kind)}
        if needed and not (hasattr(kind, "of") or hasattr(kind, "fit")):
            yield Method(plugin.name, "hf_ext", plugin.name, problem=f"needs {', '.join(needed)}")
        elif "bits" in names:
            for bits in (2, 4, 8):
                yield Method(
                    f"{plugin.name} {bits} bits", "hf_ext", plugin.name, {**options, "bits": bits, "guard": False},
                    budgeted=False,
                )  # fmt: skip
        else:
            yield Method(plugin.name, "hf_ext", plugin.name, options)
            for name, (base, form) in VARIANTS.items() if given else ():
                if base == plugin.name:
                    yield Method(name, "hf_ext", plugin.name, form)
            if plugin.name in CODED and installed("hf_ext.cache.quantisation"):
                yield Method(f"{plugin.name} + 4 bits", "hf_ext", plugin.name, options, quantise=4)


#: Begins the problem of a method that did not refuse, but broke.
FAILED = "failed: "


def reason(error: Exception) -> str:
    """Return in one line why a method has no figures.

    Example:
        >>> reason(ValueError("budget must be less")), reason(IndexError("7"))
        ('ValueError: budget must be less', 'failed: IndexError: 7')
    """
    line = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return line if isinstance(error, ValueError | ImportError) else FAILED + line


def bytes_of(cache: Cache) -> int:
    """Return the bytes of all tensors that a cache of any kind holds, each storage once."""
    if isinstance(cache, CompressedCache):
        return cache.resident_bytes()
    storages: dict[int, int] = {}
    for layer in cache.layers:
        for value in vars(layer).values():
            for tensor in _tensors(value):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the plain tensors in a value: in lists and dictionaries, and those that a quantised tensor is made of."""
    if isinstance(value, torch.Tensor):
        flatten = getattr(value, "__tensor_flatten__", None)
        if flatten is None:
            yield value
        else:
            for name in flatten()[0]:
                yield from _tensors(getattr(value, name))
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
