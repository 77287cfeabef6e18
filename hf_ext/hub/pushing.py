"""`push`: a plugin, or a folder, to a repository on the Hub in one commit."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_ext.hub.errors import HubError
from hf_ext.hub.exporting import export

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Parts of a path that are never uploaded.
IGNORED = {".git", ".cache", "__pycache__", ".DS_Store"}
#: The class that HTTP errors of all kinds derive from: httpx's or httpx2's, whichever huggingface_hub uses.
HTTPError = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")


def push(
    name_or_dir: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    model: PreTrainedModel | str | Path | None = None,
    check: bool = True,
    endpoint: str | None = None,
) -> str:
    """Upload a plugin, or a folder, to the Hub in one commit.

    Everything is uploaded before the commit is made, and the commit is made whole or not at all:
    a failure leaves the repository as it was (a repository that did not exist may stay, empty).

    Args:
        name_or_dir: a plugin of the kind strategy or model, which is exported first; or a folder,
            written with a slash (`"./exported"`).
        repo_id: `"user/name"`; without `user/` the token's owner. Created where it does not exist.
        private: whether a new repository is private; by default as its owner has set.
        token: by default that of HF_TOKEN or of `hf auth login`.
        revision: the branch to commit to, created where it does not exist; by default the main one.
        create_pr: open a pull request instead.
        commit_message: by default one that names what is uploaded.
        model: for an architecture, the model or a folder with its checkpoint, as in `export`.
        check: load the export in a fresh process before uploading it, as in `export`.
        endpoint: URL of the Hub; by default HF_ENDPOINT or huggingface.co.

    Returns:
        URL of the commit, or of the pull request.

    Raises:
        HubError: one line on what failed, whether anything was committed, and what to do.
        hf_ext.plugins.PluginError: no such plugin.
    """
    api = HfApi(endpoint=endpoint, token=token, library_name="hf_ext")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(f"{repo_id!r} cannot be the name of a repository; expected user/name. {error}") from error
    if token is False or (token in (None, True) and get_token() is None):
        raise HubError(f"no token for {api.endpoint}: run `hf auth login`, set HF_TOKEN or pass token=...; {NOTHING}")
    if "/" not in repo_id:
        with _explained(api, repo_id, token):
            repo_id = f"{api.whoami()['name']}/{repo_id}"

    if isinstance(name_or_dir, Path) or any(mark in name_or_dir for mark in ("/", os.sep)):
        message = commit_message or f"Upload {Path(name_or_dir).resolve().name}"
        return _upload(api, Path(name_or_dir), repo_id, private, token, revision, create_pr, message)
    with tempfile.TemporaryDirectory(prefix="hf-ext-push-") as scratch:
        folder = export(name_or_dir, Path(scratch) / repo_id.split("/")[1], model=model, check=check, repo_id=repo_id)
        message = commit_message or f"Upload {name_or_dir}"
        return _upload(api, folder, repo_id, private, token, revision, create_pr, message)


NOTHING = "nothing was committed"


def _upload(
    api: HfApi,
    folder: Path,
    repo_id: str,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    create_pr: bool,
    message: str,
) -> str:
    """Upload the files of `folder` as one commit and return its URL."""
    if not folder.is_dir():
        raise HubError(f"cannot upload {folder}: it is no folder; {NOTHING}")
    # upload_folder may split a folder over several commits; naming the operations keeps it one.
    operations = [CommitOperationAdd(path, folder / path) for path in _files(folder)]
    if not operations:
        raise HubError(f"cannot upload {folder}: it holds no files; {NOTHING}")
    explained = _explained(api, repo_id, token)
    with explained:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr and not revision.startswith("refs/pr/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        before = api.repo_info(repo_id, revision=revision).sha
        api.preupload_lfs_files(repo_id, operations, revision=revision, create_pr=create_pr, free_memory=False)
        explained.committing(revision, before)
        commit = api.create_commit(repo_id, operations, commit_message=message, revision=revision, create_pr=create_pr)
    return str(commit.pr_url or commit.commit_url)


def _files(folder: Path) -> Iterator[str]:
    """Yield the paths to upload, relative to `folder`."""
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and not IGNORED & set(relative.parts):
            yield relative.as_posix()


class _explained:
    """Turns the client's errors into a `HubError` of one line."""

    def __init__(self, api: HfApi, repo_id: str, token: str | bool | None) -> None:
        self.api, self.repo_id, self.token = api, repo_id, token
        self.tip: tuple[str | None, str | None] | None = None

    def committing(self, revision: str | None, before: str | None) -> None:
        """Note that the commit is about to be sent, on top of `before`."""
        self.tip = (revision, before)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (OSError, ValueError, RuntimeError, HTTPError)):
            raise HubError(f"cannot push to {self.repo_id}: {self._reason(error)}; {self._state()}") from error

    def _reason(self, error: BaseException) -> str:
        causes = list(_chain(error))
        for cause in causes:
            if isinstance(cause, HfHubHTTPError):
                return self._answer(cause) or _line(error)
        for cause in causes:
            if isinstance(cause, (HTTPError, ConnectionError)):
                where = str(getattr(error, "filename", "") or self.api.endpoint)
                return f"the connection to {where} failed or broke off ({_line(cause)})"
        return _line(error)

    def _answer(self, error: HfHubHTTPError) -> str:
        """Say what an answer of the Hub means; nothing where the client's own message says it."""
        status = error.response.status_code
        if status == 401:
            advice = "run `hf auth login` for a new one, or pass token=..."
            return f"the Hub does not accept {_token_source(self.token)} (401); {advice}"
        if status == 403:
            return f"{_token_source(self.token)} has no right to write there (403); use one with write access"
        if status == 404:
            return f"no such repository or branch (404): {_line(error)}"
        if status >= 500:
            return f"the Hub failed with {status}; try again later"
        return ""

    def _state(self) -> str:
        """Say whether the commit was made."""
        if self.tip is None:
            return NOTHING
        revision, before = self.tip
        try:
            now = self.api.repo_info(self.repo_id, revision=revision).sha
        except (OSError, HTTPError):
            url = f"{self.api.endpoint}/{self.repo_id}"
            return f"it is unknown whether the commit was made (whole or not at all): see {url} before you try again"
        return NOTHING if now == before else f"yet the repository has a new commit, {now}: look before you try again"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _line(error: BaseException) -> str:
    """Return an error as one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _token_source(token: str | bool | None) -> str:
    """Say where the token came from; never the token itself."""
    if isinstance(token, str):
        return "the token passed as token=..."
    if os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN"):
        return "the token in HF_TOKEN"
    return "the token stored by `hf auth login`"
