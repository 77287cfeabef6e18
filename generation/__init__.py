"""Decoding strategies for `model.generate(..., custom_generate=Strategy(...))`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_ext.lazy import lazy_attributes

if TYPE_CHECKING:
    from hf_ext.generation.cautious import CautiousDecoding as CautiousDecoding
    from hf_ext.generation.contrastive_search import ContrastiveSearch as ContrastiveSearch
    from hf_ext.generation.report import DecodeReport as DecodeReport
    from hf_ext.generation.strategy import DecodingStrategy as DecodingStrategy

__getattr__, __all__ = lazy_attributes(
    __name__,
    {
        "CautiousDecoding": "cautious",
        "ContrastiveSearch": "contrastive_search",
        "DecodeReport": "report",
        "DecodingStrategy": "strategy",
    },
)


def __dir__() -> list[Any]:
    return sorted(__all__)
