"""Repositories of a local Hub: blobs, commits and references, in memory.

A commit is a complete, immutable listing of files; a branch names a commit. Committing builds the
new listing first and moves the branch last, so a commit happens whole or not at all.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any


class NotFound(Exception):
    """A repository, revision or entry does not exist; `code` is what the Hub puts into `X-Error-Code`."""

    def __init__(self, code: str, message: str, commit: str | None = None, status: int = 404) -> None:
        super().__init__(message)
        self.code = code
        self.commit = commit
        self.status = status


class Refused(Exception):
    """A request that the Hub answers with `status`."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Blob:
    """The content of one file.

    Args:
        data: its bytes.
        lfs: whether it was uploaded to the large file storage.
    """

    data: bytes
    lfs: bool = False

    @property
    def git_oid(self) -> str:
        """The hash git gives to what it stores: the content, or for a large file the pointer to it.

        Example:
            >>> Blob(b"").git_oid
            'e69de29bb2d1d6434b8b29ae775ad8c2e48c5391'
        """
        content = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def sha256(self) -> str:
        """The hash under which the large file storage keeps the content."""
        return hashlib.sha256(self.data).hexdigest()

    @property
    def etag(self) -> str:
        """What the Hub sends as `ETag`: `sha256` of a large file, the git hash of another."""
        return self.sha256 if self.lfs else self.git_oid

    @property
    def pointer(self) -> bytes:
        """The text that stands in git for a large file."""
        lines = ("version https://git-lfs.github.com/spec/v1", f"oid sha256:{self.sha256}", f"size {len(self.data)}")
        return "".join(f"{line}\n" for line in lines).encode()

    def entry(self, path: str) -> dict[str, Any]:
        """Describe the file as the Hub's listings do."""
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(self.data), "oid": self.git_oid}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.data), "pointerSize": len(self.pointer)}
        return entry


@dataclass(frozen=True)
class Commit:
    """One state of a repository."""

    oid: str
    parent: str | None
    title: str
    description: str
    author: str
    date: str
    files: Mapping[str, Blob]


@dataclass(frozen=True)
class Change:
    """What one line of a commit request does: add `blob` at `path`, or delete what is there."""

    path: str
    blob: Blob | None = None


@dataclass
class Repository:
    """A repository: its commits and the branches that name them.

    Example:
        >>> repo = Repository("user/demo", owner="user")
        >>> _ = repo.commit("main", [Change("a.txt", Blob(b"one"))], title="add", author="user")
        >>> sorted(repo.resolve("main").files), len(repo.history("main"))
        (['.gitattributes', 'a.txt'], 2)
    """

    id: str
    owner: str
    kind: str = "models"
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        first = {".gitattributes": Blob(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")}
        self._append("main", None, first, "initial commit", "", self.owner)

    def resolve(self, revision: str) -> Commit:
        """Return the commit that a branch name, a full reference or a commit id stands for.

        Raises:
            NotFound: there is none.
        """
        oid = self.refs.get(revision.removeprefix("refs/heads/"), revision)
        if oid not in self.commits:
            raise NotFound("RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[oid]

    def history(self, revision: str) -> list[Commit]:
        """Return the commits behind `revision`, the newest first."""
        commit = self.resolve(revision)
        found = [commit]
        while commit.parent is not None:
            commit = self.commits[commit.parent]
            found.append(commit)
        return found

    def branch(self, name: str, start: str = "main") -> None:
        """Create branch `name` at `start`.

        Raises:
            Refused: the branch exists.
        """
        with self._lock:
            if name in self.refs:
                raise Refused(409, f"Reference already exists: {name}")
            self.refs[name] = self.resolve(start).oid

    def commit(
        self,
        revision: str,
        changes: Iterable[Change],
        *,
        title: str,
        author: str,
        description: str = "",
        parent: str | None = None,
        pull_request: bool = False,
    ) -> tuple[Commit, str]:
        """Apply `changes` to `revision` as one commit.

        Args:
            revision: the branch to move.
            changes: in order; deleting a folder deletes everything below it.
            title: first line of the message.
            author: who commits.
            description: the rest of the message.
            parent: the commit that must be at the tip for the change to be applied.
            pull_request: leave `revision` alone and put the commit on a new `refs/pr/N`.

        Returns:
            The commit and the reference that now names it.

        Raises:
            NotFound: no such revision, or a deletion of what is not there.
            Refused: the tip is not `parent`.
        """
        with self._lock:
            tip = self.resolve(revision)
            if parent is not None and parent != tip.oid:
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
            files = dict(tip.files)
            for change in changes:
                if change.blob is not None:
                    files[change.path] = change.blob
                    continue
                gone = [p for p in files if p == change.path or PurePosixPath(change.path) in PurePosixPath(p).parents]
                if not gone:
                    raise NotFound("EntryNotFound", f"A file with this name doesn't exist: {change.path}", tip.oid)
                for path in gone:
                    del files[path]
            ref = f"refs/pr/{next(self._numbers)}" if pull_request else revision.removeprefix("refs/heads/")
            return self._append(ref, tip.oid, files, title, description, author), ref

    def _append(
        self, ref: str, parent: str | None, files: Mapping[str, Blob], title: str, description: str, author: str
    ) -> Commit:
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        listing = "\n".join(f"{path} {blob.etag}" for path, blob in sorted(files.items()))
        text = "\n".join((self.kind, self.id, str(len(self.commits)), str(parent), title, date, listing))
        oid = hashlib.sha1(text.encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, title, description, author, date, files)
        self.refs[ref] = oid  # last: from here on the commit is visible
        return self.commits[oid]
