"""Structured attention: who may see whom, said once, for every backend."""

from hf_ext.lazy import lazy_attributes

# Registration imports this package while transformers is being imported: nothing may come along.
__getattr__, __all__ = lazy_attributes(
    __name__,
    {
        "NEVER": "structure",
        "AttentionStructure": "structure",
        "Tokens": "structure",
        "CallStatistics": "statistics",
        "Statistics": "statistics",
        "collect": "statistics",
        "kernels": "mode",
        "mask_for": "masks",
        "masks_for": "masks",
        "pack": "packed",
        "register": "registry",
        "register_conversion": "masks",
        "unpack": "packed",
    },
)


def __dir__() -> list[str]:
    return sorted(__all__)
