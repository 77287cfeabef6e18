"""Contexts as soft vectors: written by a trained model, and read by it in place of the context."""

from hf_ext.lazy import lazy_attributes

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
