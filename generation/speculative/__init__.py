"""Speculative decoding: draft a tree of tokens cheaply, verify it in one call of the target, keep the law exact."""
