"""From a plugin to a Hub repository: `export` writes it to a folder, `push` uploads it.

Example:
    >>> from hf_ext.hub import export
    >>> path = export("contrastive-search", "my-contrastive-search", check=False)
    >>> sorted(file.name for file in path.iterdir())
    ['README.md', 'custom_generate']
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_ext.lazy import lazy_attributes

if TYPE_CHECKING:
    from hf_ext.hub.errors import ExportError as ExportError
    from hf_ext.hub.errors import HubError as HubError
    from hf_ext.hub.exporting import export as export
    from hf_ext.hub.pushing import push as push

__getattr__, __all__ = lazy_attributes(
    __name__, {"ExportError": "errors", "HubError": "errors", "export": "exporting", "push": "pushing"}
)


def __dir__() -> list[Any]:
    return sorted(__all__)
