"""Claim checks, one file a plugin; `hf-ext verify` runs them."""
