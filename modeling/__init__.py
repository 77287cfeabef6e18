"""Architectures, one a folder; their files are their Hub repositories."""
