"""Architectures, one a folder, each shaped exactly as its Hub repository."""
