"""A Hugging Face Hub on this machine, for tests that drive the real client without network.

`LocalHub` serves the part of the Hub's HTTP protocol that `huggingface_hub` and transformers use
to create, fill, list and download repositories: regular and LFS files, branches, pull requests,
tokens. It can also fail on demand. It keeps everything in memory and knows no Xet storage, which
`environment()` switches off in the clients.

Example:
    >>> from huggingface_hub import HfApi
    >>> with LocalHub() as hub:
    ...     api = HfApi(endpoint=hub.endpoint, token=hub.token)
    ...     _ = api.create_repo("user/demo")
    ...     info = api.upload_file(path_or_fileobj=b"hello", path_in_repo="a.txt", repo_id="user/demo")
    ...     hub.files("user/demo")["a.txt"]
    b'hello'
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import struct
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hf_ext.testing.local_hub_api import HubApi
from hf_ext.testing.local_hub_messages import Answer, Request
from hf_ext.testing.local_hub_store import NotFound, Refused, Repository


@dataclass
class Fault:
    """A failure to inject.

    Args:
        path: regular expression that is searched in the path of a request.
        method: fail only requests of this method.
        status: answer with this status.
        after: break the connection instead, once so many bytes of the request's body (for GET: of
            the answer) have passed.
        times: how often; `None` for ever.

    Example:
        >>> Fault("/commit/", after=100).applies("POST", "/api/models/user/demo/commit/main")
        True
    """

    path: str
    method: str | None = None
    status: int | None = None
    after: int | None = None
    times: int | None = None

    def __post_init__(self) -> None:
        if (self.status is None) == (self.after is None):
            raise ValueError("a fault needs either status= (an answer) or after= (a broken connection)")

    def applies(self, method: str, path: str) -> bool:
        """Tell whether a request is to fail."""
        return self.times != 0 and self.method in (None, method) and re.search(self.path, path) is not None


class LocalHub:
    """A Hub that lives as long as a `with` block.

    Args:
        tokens: user name of each valid token; without it one user, `"user"`, with a random token.
            Users write to their own namespace only. Reading a public repository needs no token.

    Attributes:
        token: the first token.
        faults: the failures in force; change the list at any time.
        log: `"METHOD path status"` of every request, the status 0 where the connection was broken.
    """

    def __init__(self, tokens: Mapping[str, str] | None = None) -> None:
        self.tokens = dict(tokens or {f"hf_{secrets.token_hex(8)}": "user"})
        self.token = next(iter(self.tokens))
        self.faults: list[Fault] = []
        self.log: list[str] = []
        self._api = HubApi(self.tokens)
        self._home = tempfile.TemporaryDirectory(prefix="local-hub-")
        self._server: ThreadingHTTPServer | None = None

    def __enter__(self) -> LocalHub:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._api.endpoint = self.endpoint
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()
        self._home.cleanup()

    @property
    def endpoint(self) -> str:
        """The URL to use as `HF_ENDPOINT`."""
        if self._server is None:
            raise RuntimeError("the hub is not running: use it as `with LocalHub() as hub:`")
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, token: str | None = "") -> dict[str, str]:
        """Return the environment for a process whose client is to talk to this Hub only.

        Args:
            token: sent by the client; by default `self.token`, none with `None`.

        Returns:
            A copy of `os.environ` with the client's settings. `HF_HOME` is a folder of this Hub's
            own, so that nothing cached or stored by the user leaks in or out.
        """
        cleared = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HUB_CACHE", "HF_MODULES_CACHE")
        env = {name: value for name, value in os.environ.items() if name not in cleared}
        env |= {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": self._home.name,
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }
        if token is not None:
            env["HF_TOKEN"] = token or self.token
        return env

    def repository(self, repo_id: str, kind: str = "models") -> Repository:
        """Return a repository.

        Raises:
            KeyError: there is none.
        """
        return self._api.repositories[kind, repo_id]

    def files(self, repo_id: str, revision: str = "main", kind: str = "models") -> dict[str, bytes]:
        """Return the files of a repository and their content."""
        commit = self.repository(repo_id, kind).resolve(revision)
        return {path: blob.data for path, blob in commit.files.items()}


class _Broken(Exception):
    """The connection is to be cut."""


class _Handler(BaseHTTPRequestHandler):
    """Turns HTTP into calls of `HubApi` and applies faults."""

    protocol_version = "HTTP/1.1"
    hub: LocalHub

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        fault = next((fault for fault in self.hub.faults if fault.applies(self.command, path)), None)
        limit = None
        if fault is not None:
            fault.times = None if fault.times is None else fault.times - 1
            limit = fault.after
        status = 0
        try:
            body = self._body(None if self.command == "GET" else limit)
            if fault is not None and fault.status is not None:
                answer = Answer(fault.status, {"error": f"injected {fault.status}"})
            else:
                answer = self._answer(path, body)
            self._send(answer, limit)
            status = answer.status
        except _Broken:
            self._cut()
        finally:
            self.hub.log.append(f"{self.command} {path} {status}")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _answer(self, path: str, body: bytes) -> Answer:
        query = {name: values[-1] for name, values in parse_qs(urlsplit(self.path).query).items()}
        # Quoted slashes belong to a branch name, so that routes are matched before unquoting.
        request = Request(self.command, urlsplit(self.path).path, query, body, self.headers.get("Authorization"))
        try:
            return self.hub._api.answer(request)
        except NotFound as error:
            headers = {"X-Error-Code": error.code} | ({"X-Repo-Commit": error.commit} if error.commit else {})
            return Answer(error.status, {"error": str(error)}, headers)
        except Refused as error:
            return Answer(error.status, {"error": str(error)})

    def _body(self, limit: int | None) -> bytes:
        """Read the request's body; break off after `limit` bytes."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
                if limit is not None:
                    raise _Broken
            self.rfile.readline()
            body = b"".join(parts)
        else:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length if limit is None else min(limit, length))
        if limit is not None:
            raise _Broken
        return body

    def _send(self, answer: Answer, limit: int | None) -> None:
        data = answer.body
        start = 0
        headers: dict[str, Any] = {"Content-Type": answer.content_type, **answer.headers}
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if asked and answer.status == 200:
            start = int(asked[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.send_response(206 if start else answer.status)
        message = str(answer.payload.get("error", "")) if isinstance(answer.payload, dict) else ""
        if message:
            headers["X-Error-Message"] = message
        for name, value in {**headers, "Content-Length": len(data) - start}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[start : None if limit is None else start + limit])
            if limit is not None:
                raise _Broken

    def _cut(self) -> None:
        """Close the connection so that the client sees a reset, not a polite end."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def log_message(self, format: str, *args: object) -> None:
        """Stay quiet: `LocalHub.log` has it all."""
