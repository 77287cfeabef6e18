"""Contexts as soft vectors: written by a trained model, and read by it in place of the context."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_ext.lazy import lazy_attributes

if TYPE_CHECKING:
    from hf_ext.cache.soft.autocompressor import AutoCompressor as AutoCompressor
    from hf_ext.cache.soft.autocompressor import AutoCompressorModel as AutoCompressorModel
    from hf_ext.cache.soft.icae import ICAEModel as ICAEModel
    from hf_ext.cache.soft.icae_rows import ICAECollator as ICAECollator
    from hf_ext.cache.soft.segments import SegmentCollator as SegmentCollator
    from hf_ext.cache.soft.slots import Slots as Slots

__getattr__, __all__ = lazy_attributes(
    __name__,
    {
        "AutoCompressor": "autocompressor",
        "AutoCompressorModel": "autocompressor",
        "ICAECollator": "icae_rows",
        "ICAEModel": "icae",
        "SegmentCollator": "segments",
        "Slots": "slots",
    },
)


def __dir__() -> list[str]:
    return sorted(__all__)
