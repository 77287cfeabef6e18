"""Register installed architectures with transformers' Auto classes, and `"hf_ext"` attention, no sooner than needed.

The registries live in `transformers.models.auto` and, for attention, in `transformers.modeling_utils`.
Registering needs the classes, hence torch, and `hf-ext list` must import neither; so registration
waits for the registries themselves.
A finder on `sys.meta_path` notices their import, lets the normal machinery load them, and
registers right after. Nothing of transformers is replaced.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from hf_ext import plugins

CONFIG_REGISTRY = "transformers.models.auto.configuration_auto"
MODEL_REGISTRY = "transformers.models.auto.modeling_auto"
ATTENTION_REGISTRY = "transformers.modeling_utils"
REGISTRIES = (CONFIG_REGISTRY, MODEL_REGISTRY, ATTENTION_REGISTRY)


def register_when_ready() -> None:
    """Register now what transformers has already loaded, and the rest when it loads it.

    Calling it again does nothing new.
    """
    waiting = [name for name in REGISTRIES if name not in sys.modules]
    if waiting and not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(waiting))
    for name in REGISTRIES:
        if name not in waiting:
            _register(name)


def _register(registry: str) -> None:
    """Register what belongs into the module `registry`: the attention, or every plugin's classes.

    Configurations are imported, modeling code is not: transformers may be half imported here.
    """
    if registry == ATTENTION_REGISTRY:
        from hf_ext.attention import backend
        from hf_ext.attention.registry import register

        backend.prepare()
        register("hf_ext", backend.attention, backend.mask)
        return
    from hf_ext.adapter import register_model_lazily

    module = sys.modules[registry]
    for plugin in plugins.all():
        if not plugin.auto:
            continue
        try:
            config = plugins.resolve(plugin.auto["AutoConfig"], plugin.name)
        except plugins.PluginError as error:
            warnings.warn(f"{error}; its architecture is not registered", stacklevel=2)
            continue
        for auto_name, target in plugin.auto.items():
            if auto_name == "AutoConfig" and registry == CONFIG_REGISTRY:
                module.AutoConfig.register(config.model_type, config, exist_ok=True)
            elif auto_name != "AutoConfig" and registry == MODEL_REGISTRY:
                register_model_lazily(getattr(module, auto_name), config, target)


class _AfterImport(MetaPathFinder):
    """Calls `_register` once after each awaited module has been executed."""

    def __init__(self, waiting: Sequence[str]) -> None:
        self.waiting = set(waiting)

    def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in self.waiting:
            return None
        self.waiting.discard(name)  # before asking the other finders, which come back through here
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        if not self.waiting:
            sys.meta_path.remove(self)
        return spec


class _Loader(Loader):
    """The normal loader of a module, followed by `_register`."""

    def __init__(self, inner: Loader) -> None:
        self.inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module keeps its own loader, so that inspect and pickling see nothing unusual.
        module.__loader__ = self.inner
        if module.__spec__ is not None:
            module.__spec__.loader = self.inner
        self.inner.exec_module(module)
        _register(module.__name__)
