"""Prompts with structure: sets, parallel windows, bidirectional spans."""
