"""Find the ids of the special tokens that an objective marks texts with."""

from __future__ import annotations

from typing import Any


def token_id(value: str | int, tokenizer: Any, config: Any, *, purpose: str) -> int:
    """Find a special token.

    Args:
        value: its text, or its id.
        tokenizer: where a text is looked up; may be None if `value` is an id.
        config: the model's, whose vocabulary must hold the id; may be None.
        purpose: what the token is for, in an error message.

    Returns:
        The id.

    Raises:
        ValueError: the tokenizer has no such token, or the model cannot embed it.

    Example:
        >>> token_id(3, None, None, purpose="prefix")
        3
        >>> token_id("<PRE>", None, None, purpose="prefix")
        Traceback (most recent call last):
        ...
        ValueError: '<PRE>' (prefix) is a text, but there is no tokenizer to look it up in: pass processing_class=...
    """
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError(f"the token for {purpose} must be a text or an id, got {value!r}")
    if isinstance(value, str):
        if tokenizer is None:
            raise ValueError(
                f"{value!r} ({purpose}) is a text, but there is no tokenizer to look it up in: pass "
                "processing_class=tokenizer to the Trainer, tokenizer to map or collator, or the token's id"
            )
        found = tokenizer.convert_tokens_to_ids(value)
        if found is None or (found == tokenizer.unk_token_id and value != tokenizer.unk_token):
            raise ValueError(
                f"the tokenizer has no token {value!r} ({purpose}). Either tokenizer.add_special_tokens("
                f"{{'additional_special_tokens': [{value!r}]}}) and model.resize_token_embeddings(len(tokenizer)), "
                "or name a token that it has"
            )
        value = int(found)
    size = getattr(config.get_text_config(), "vocab_size", None) if config is not None else None
    if value < 0 or (size is not None and value >= size):
        raise ValueError(
            f"token {value} ({purpose}) lies outside the model's vocabulary of {size}: call "
            "model.resize_token_embeddings(len(tokenizer)) after adding the token"
        )
    return value
