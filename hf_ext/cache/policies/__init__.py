"""Policies, one file a method."""
