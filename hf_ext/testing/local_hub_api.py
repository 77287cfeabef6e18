"""What a local Hub answers: the routes of the Hub's HTTP protocol over `local_hub_store`."""

from __future__ import annotations

import base64
import binascii
import json
import re
import secrets
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qs, unquote

import yaml

from hf_ext.testing.local_hub_messages import Answer, Request
from hf_ext.testing.local_hub_store import Blob, Change, Commit, NotFound, Refused, Repository

#: Files that go to the large file storage whatever their size, as in the Hub's first `.gitattributes`.
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".onnx", ".parquet", ".npz", ".zip", ".gz")
#: Files above this size go there whatever their name.
LFS_SIZE = 10 * 2**20


_REPO = r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)"
_FILES = r"/(?:(?P<kind>datasets)/)?(?P<id>[^/]+/[^/]+)"


class HubApi:
    """The Hub's state and what it answers to each request.

    Args:
        tokens: user name of each valid token.
    """

    def __init__(self, tokens: Mapping[str, str]) -> None:
        self.tokens = tokens
        self.endpoint = ""
        self.repositories: dict[tuple[str, str], Repository] = {}
        self._objects: dict[str, bytes] = {}
        self._signature = secrets.token_hex(8)
        self._routes: list[tuple[str, re.Pattern[str], Callable[..., Answer]]] = [
            (method, re.compile(pattern), function)
            for method, pattern, function in (
                ("GET", r"/api/whoami-v2", self._whoami),
                ("POST", r"/api/repos/create", self._create),
                ("DELETE", r"/api/repos/delete", self._delete),
                ("POST", r"/api/validate-yaml", self._validate_yaml),
                ("GET", _REPO + r"(?:/revision/(?P<revision>[^/]+))?", self._info),
                ("GET", _REPO + r"/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", self._tree),
                ("POST", _REPO + r"/paths-info/(?P<revision>[^/]+)", self._paths_info),
                ("GET", _REPO + r"/refs", self._refs),
                ("GET", _REPO + r"/commits/(?P<revision>[^/]+)", self._commits),
                ("POST", _REPO + r"/branch/(?P<name>[^/]+)", self._branch),
                ("POST", _REPO + r"/preupload/(?P<revision>[^/]+)", self._preupload),
                ("POST", _REPO + r"/commit/(?P<revision>[^/]+)", self._commit),
                ("POST", _FILES + r"\.git/info/lfs/objects/batch", self._lfs_batch),
                ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", self._lfs_put),
                ("POST", r"/lfs/verify", self._lfs_verify),
                ("GET|HEAD", _FILES + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)", self._resolve),
            )
        ]

    def answer(self, request: Request) -> Answer:
        """Answer a request.

        Raises:
            NotFound: the repository, revision or file does not exist.
            Refused: anything else that is wrong with the request.
        """
        for method, pattern, function in self._routes:
            if request.method in method.split("|") and (match := pattern.fullmatch(request.path)):
                groups = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                if "kind" in match.groupdict():
                    groups.setdefault("kind", "models")
                return function(request, **groups)
        raise Refused(404, f"the local hub does not serve {request.method} {request.path}")

    # Who asks, and what for

    def _user(self, request: Request) -> str | None:
        if request.authorization is None:
            return None
        user = self.tokens.get(request.authorization.removeprefix("Bearer "))
        if user is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        return user

    def _writer(self, request: Request, owner: str) -> str:
        user = self._user(request)
        if user is None:
            raise Refused(401, "Invalid username or password.")
        if user != owner:
            raise Refused(403, f"You don't have the rights to write under the namespace {owner}")
        return user

    def _repository(self, request: Request, kind: str, id: str, write: bool = False) -> Repository:
        user = self._user(request)
        repo = self.repositories.get((kind, id))
        if repo is None or (repo.private and repo.owner != user):
            # The Hub does not tell strangers what exists. It sends them no error code, but the client then reads
            # 401 as "not found" for https addresses only, which this Hub has not.
            raise NotFound("RepoNotFound", "Repository not found", status=401 if user is None else 404)
        if write:
            self._writer(request, repo.owner)
        return repo

    def _whoami(self, request: Request) -> Answer:
        user = self._user(request)
        if user is None:
            raise Refused(401, "Invalid username or password.")
        return Answer(200, {"type": "user", "name": user, "orgs": [], "auth": {"type": "access_token"}})

    # Repositories

    def _create(self, request: Request) -> Answer:
        asked = request.json
        owner = asked.get("organization") or self._user(request) or ""
        user = self._writer(request, owner)
        kind = f"{asked.get('type') or 'model'}s"
        id = f"{owner}/{asked['name']}"
        body = {"url": f"{self.endpoint}/{'datasets/' if kind == 'datasets' else ''}{id}", "name": id}
        if (kind, id) in self.repositories:
            return Answer(409, body | {"error": f"You already created this repo: {id}"})
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.repositories[kind, id] = Repository(id, owner=user, kind=kind, private=private)
        return Answer(200, body)

    def _delete(self, request: Request) -> Answer:
        asked = request.json
        owner = asked.get("organization") or self._user(request) or ""
        key = (f"{asked.get('type') or 'model'}s", f"{owner}/{asked['name']}")
        self._repository(request, *key, write=True)
        del self.repositories[key]
        return Answer(200, {})

    def _validate_yaml(self, request: Request) -> Answer:
        try:
            _metadata(request.json["content"])
        except (yaml.YAMLError, ValueError) as error:
            message = f"Invalid metadata: {error}"
            return Answer(400, {"errors": [{"message": message}], "warnings": [], "error": message.replace("\n", " ")})
        return Answer(200, {"errors": [], "warnings": []})

    def _info(self, request: Request, kind: str, id: str, revision: str = "main") -> Answer:
        repo = self._repository(request, kind, id)
        commit = repo.resolve(revision)
        card = _metadata(commit.files["README.md"].data.decode()) if "README.md" in commit.files else {}
        return Answer(
            200,
            {
                "id": id,
                "modelId": id,
                "author": repo.owner,
                "sha": commit.oid,
                "lastModified": commit.date,
                "private": repo.private,
                "tags": card.get("tags", []),
                "cardData": card,
                "siblings": [{"rfilename": path} for path in sorted(commit.files)],
            },
        )

    def _tree(self, request: Request, kind: str, id: str, revision: str, path: str = "") -> Answer:
        commit = self._repository(request, kind, id).resolve(revision)
        root = f"{path}/" if path else ""
        recursive = request.query.get("recursive", "").lower() == "true"
        entries: dict[str, dict[str, Any]] = {}
        for name, blob in sorted(commit.files.items()):
            if not name.startswith(root):
                continue
            parents = name[len(root) :].split("/")[:-1]
            for depth in range(len(parents) if recursive else min(1, len(parents))):
                folder = root + "/".join(parents[: depth + 1])
                entries.setdefault(folder, {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0})
            if recursive or not parents:
                entries[name] = blob.entry(name)
        if root and not entries:
            raise NotFound("EntryNotFound", f"{path} does not exist on {revision}", commit.oid)
        return Answer(200, list(entries.values()))

    def _paths_info(self, request: Request, kind: str, id: str, revision: str) -> Answer:
        files = self._repository(request, kind, id).resolve(revision).files
        asked = parse_qs(request.body.decode()).get("paths", [])
        return Answer(200, [files[path].entry(path) for path in asked if path in files])

    def _refs(self, request: Request, kind: str, id: str) -> Answer:
        refs = self._repository(request, kind, id).refs
        found: dict[str, list[dict[str, str]]] = {"branches": [], "pullRequests": [], "tags": [], "converts": []}
        for name, oid in refs.items():
            where, full = ("pullRequests", name) if name.startswith("refs/pr/") else ("branches", f"refs/heads/{name}")
            found[where].append({"name": name, "ref": full, "targetCommit": oid})
        return Answer(200, found)

    def _commits(self, request: Request, kind: str, id: str, revision: str) -> Answer:
        history = self._repository(request, kind, id).history(revision)
        return Answer(
            200,
            [
                {
                    "id": c.oid,
                    "title": c.title,
                    "message": c.description,
                    "date": c.date,
                    "authors": [{"user": c.author}],
                }
                for c in history
            ],
        )

    def _branch(self, request: Request, kind: str, id: str, name: str) -> Answer:
        start = request.json.get("startingPoint", "main")
        self._repository(request, kind, id, write=True).branch(name, start)
        return Answer(200, {})

    # Files going up

    def _preupload(self, request: Request, kind: str, id: str, revision: str) -> Answer:
        write = "create_pr" not in request.query  # anybody may open a pull request
        files = self._repository(request, kind, id, write=write).resolve(revision).files
        answers = []
        for file in request.json["files"]:
            path, size = file["path"], file["size"]
            binary = b"\0" in base64.b64decode(file["sample"])
            large = path.endswith(LFS_SUFFIXES) or size > LFS_SIZE or (binary and size > 2**20)
            answer = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if path in files:
                answer["oid"] = files[path].etag
            answers.append(answer)
        return Answer(200, {"files": answers})

    def _commit(self, request: Request, kind: str, id: str, revision: str) -> Answer:
        pull_request = "create_pr" in request.query
        repo = self._repository(request, kind, id, write=not pull_request)
        author = self._user(request)
        if author is None:
            raise Refused(401, "Invalid username or password.")
        try:
            lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
            header = next(line["value"] for line in lines if line["key"] == "header")
            changes = [self._change(line["key"], line["value"]) for line in lines if line["key"] != "header"]
        except (ValueError, KeyError, StopIteration, binascii.Error) as error:
            raise Refused(400, f"malformed commit: {type(error).__name__}: {error}") from error
        commit, ref = repo.commit(
            revision,
            changes,
            title=header["summary"],
            description=header.get("description", ""),
            author=author,
            parent=header.get("parentCommit"),
            pull_request=pull_request,
        )
        url = f"{self.endpoint}/{'datasets/' if kind == 'datasets' else ''}{id}"
        body = {"success": True, "commitOid": commit.oid, "commitUrl": f"{url}/commit/{commit.oid}", "hookOutput": ""}
        if pull_request:
            body["pullRequestUrl"] = f"{url}/discussions/{ref.rpartition('/')[2]}"
        return Answer(200, body)

    def _change(self, key: str, value: Mapping[str, Any]) -> Change:
        path = value["path"]
        if path.startswith("/") or {"", ".", ".."} & set(path.rstrip("/").split("/")):
            raise Refused(400, f"invalid path: {path!r}")
        if key == "file":
            return Change(path, Blob(base64.b64decode(value["content"])))
        if key == "lfsFile":
            if value["oid"] not in self._objects:
                raise Refused(400, f"LFS pointer of {path} points to an object that was not uploaded")
            return Change(path, Blob(self._objects[value["oid"]], lfs=True))
        if key in ("deletedFile", "deletedFolder"):
            return Change(path.rstrip("/"))
        raise Refused(400, f"unknown operation {key!r}")

    def _lfs_batch(self, request: Request, kind: str, id: str) -> Answer:
        self._repository(request, kind, id)
        if self._user(request) is None:
            raise Refused(401, "Invalid username or password.")
        objects = []
        for item in request.json["objects"]:
            answer: dict[str, Any] = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self._objects:  # else nothing is left to do
                answer["actions"] = {
                    "upload": {"href": f"{self.endpoint}/lfs/{item['oid']}?signature={self._signature}"},
                    "verify": {"href": f"{self.endpoint}/lfs/verify"},
                }
            objects.append(answer)
        return Answer(200, {"transfer": "basic", "objects": objects})

    def _lfs_put(self, request: Request, oid: str) -> Answer:
        if request.query.get("signature") != self._signature:  # the storage knows signed URLs, not tokens
            raise Refused(403, "SignatureDoesNotMatch")
        if Blob(request.body).sha256 != oid:
            raise Refused(400, "BadDigest")
        self._objects[oid] = request.body
        return Answer(200, b"")

    def _lfs_verify(self, request: Request) -> Answer:
        asked = request.json
        if len(self._objects.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(404, "the object was not uploaded")
        return Answer(200, {})

    # Files going down

    def _resolve(self, request: Request, kind: str, id: str, revision: str, path: str) -> Answer:
        commit: Commit = self._repository(request, kind, id).resolve(revision)
        if path not in commit.files:
            raise NotFound("EntryNotFound", "Entry not found", commit.oid)
        blob = commit.files[path]
        headers: dict[str, Any] = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": len(blob.data)}
        return Answer(200, blob.data, headers)


def _metadata(card: str) -> dict[str, Any]:
    """Return the YAML block at the head of a card."""
    match = re.match(r"\s*---\r?\n(.*?)\r?\n---\s*(?:\n|$)", card, flags=re.DOTALL)
    data = yaml.safe_load(match[1]) if match else {}
    if data is not None and not isinstance(data, dict):
        raise ValueError(f"the head of the card is a {type(data).__name__}, not a mapping")
    return data or {}
