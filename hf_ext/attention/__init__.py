"""Structured attention: who may see whom, said once, for every backend."""

from hf_ext.attention.masks import masks_for
from hf_ext.attention.structure import NEVER, AttentionStructure, Tokens

__all__ = ["NEVER", "AttentionStructure", "Tokens", "masks_for"]
