"""A request to a local Hub and its answer, apart from HTTP."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from hf_ext.testing.local_hub_store import Refused


@dataclass(frozen=True)
class Request:
    """A request; `path` is still quoted, `authorization` is the header."""

    method: str
    path: str
    query: Mapping[str, str]
    body: bytes = b""
    authorization: str | None = None

    @cached_property
    def json(self) -> Any:
        """The body as JSON."""
        try:
            return json.loads(self.body)
        except ValueError as error:
            raise Refused(400, f"the body is not JSON: {error}") from error


@dataclass(frozen=True)
class Answer:
    """A response: `payload` is sent as it is when it is bytes, else as JSON."""

    status: int
    payload: Any
    headers: Mapping[str, Any] = field(default_factory=dict)

    @property
    def body(self) -> bytes:
        """The bytes to send."""
        return self.payload if isinstance(self.payload, bytes) else json.dumps(self.payload).encode()

    @property
    def content_type(self) -> str:
        """The value of `Content-Type`."""
        return "application/octet-stream" if isinstance(self.payload, bytes) else "application/json"
