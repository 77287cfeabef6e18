"""`push` uploads in one commit, or leaves the repository as it was and says so in one line."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from hf_ext import hub as hub_package
from hf_ext.hub import ExportError, HubError
from hf_ext.testing.local_hub import Fault, LocalHub

WEIGHTS = bytes(range(256)) * 64


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder to upload, with a file that goes to the large file storage."""
    folder = tmp_path / "folder"
    (folder / "code").mkdir(parents=True)
    (folder / "README.md").write_text("---\ntags: [a]\n---\n# A\n")
    (folder / "code" / "a.py").write_text("a = 1\n")
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "a.pyc").write_bytes(b"x")
    return folder


def push(hub: LocalHub, what: str | Path, repo_id: str = "user/demo", **options):
    return hub_package.push(what, repo_id, **{"token": hub.token, "endpoint": hub.endpoint, "check": False} | options)


def message_of(error: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(error.value)
    assert "\n" not in message, message
    assert error.value.__cause__ is not None or "no token" in message or "cannot upload" in message
    return message


def test_a_strategy_is_uploaded_in_one_commit(hub: LocalHub):
    url = push(hub, "contrastive-search", "user/contrastive-search")
    repo = hub.repository("user/contrastive-search")
    history = repo.history("main")
    assert [commit.title for commit in history] == ["Upload contrastive-search", "initial commit"]
    assert url == f"{hub.endpoint}/user/contrastive-search/commit/{history[0].oid}"
    files = hub.files("user/contrastive-search")
    assert {"README.md", "custom_generate/generate.py", "custom_generate/requirements.txt"} <= set(files)
    assert b'custom_generate="user/contrastive-search"' in files["README.md"]
    push(hub, "contrastive-search", "user/contrastive-search")  # nothing has changed
    assert repo.history("main") == history


def test_a_folder_is_uploaded_without_what_python_and_git_left_in_it(hub: LocalHub, folder: Path):
    push(hub, folder, "demo", private=True, commit_message="mine")  # the namespace is the token's
    assert sorted(hub.files("user/demo")) == [".gitattributes", "README.md", "code/a.py", "model.safetensors"]
    assert hub.files("user/demo")["model.safetensors"] == WEIGHTS
    assert hub.repository("user/demo").private
    assert hub.repository("user/demo").resolve("main").title == "mine"


def test_branches_and_pull_requests_leave_the_main_branch_alone(hub: LocalHub, folder: Path):
    push(hub, folder, revision="v2")
    url = push(hub, folder, create_pr=True)
    assert sorted(hub.files("user/demo")) == [".gitattributes"]
    assert "code/a.py" in hub.files("user/demo", "v2")
    assert url == f"{hub.endpoint}/user/demo/discussions/1"
    assert "code/a.py" in hub.files("user/demo", "refs/pr/1")


def test_without_a_token_or_with_a_wrong_one_the_message_says_which_and_how_to_get_one(
    hub: LocalHub, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(HubError, match=r"no token .* run `hf auth login`, set HF_TOKEN or pass token="):
        push(hub, folder, token=None)
    assert hub.log == []
    with pytest.raises(HubError) as error:
        push(hub, folder, token="hf_wrong")
    message = message_of(error)
    assert "does not accept the token passed as token=... (401)" in message
    assert "`hf auth login`" in message
    assert "hf_wrong" not in message
    assert message.endswith("nothing was committed")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match=r"does not accept the token in HF_TOKEN \(401\)"):
        push(hub, folder, "demo", token=None)
    with pytest.raises(KeyError):
        hub.repository("user/demo")


def test_somebody_elses_namespace_is_refused_with_the_reason(hub: LocalHub, folder: Path):
    with pytest.raises(HubError, match=r"token passed as token=\.\.\. has no right to write there \(403\)"):
        push(hub, folder, "somebody/demo")


@pytest.mark.parametrize("name", ["a/b/c", "user/ demo", "user/-demo", "user/demo.git", ""])
def test_a_name_that_no_repository_can_have_is_refused_before_anything_is_sent(hub: LocalHub, folder: Path, name: str):
    with pytest.raises(HubError, match="cannot be the name of a repository; expected user/name"):
        push(hub, folder, name)
    assert hub.log == []


@pytest.mark.parametrize(
    "where", ["/api/repos/create", "/preupload/", r"\.git/info/lfs", "/lfs/[0-9a-f]{64}", "/commit/"]
)
def test_a_connection_that_breaks_off_leaves_the_repository_as_it_was(
    hub: LocalHub, folder: Path, monkeypatch: pytest.MonkeyPatch, where: str
):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client waits between its retries
    (folder / "old.txt").write_text("old")
    push(hub, folder)
    before = hub.repository("user/demo").resolve("main")
    (folder / "model.safetensors").write_bytes(WEIGHTS[::-1])
    hub.faults = [Fault(where, after=50)]
    with pytest.raises(HubError, match="failed or broke off") as error:
        push(hub, folder)
    assert message_of(error).endswith("; nothing was committed")
    assert hub.endpoint in str(error.value)
    assert hub.repository("user/demo").resolve("main") is before
    hub.faults = []
    push(hub, folder)
    assert hub.files("user/demo")["model.safetensors"] == WEIGHTS[::-1]


def test_a_lost_answer_is_not_reported_as_a_failed_commit(hub: LocalHub, folder: Path, monkeypatch: pytest.MonkeyPatch):
    api = hub._api
    commit = api._commit

    def commit_and_fail(request, **where):
        commit(request, **where)
        hub.faults = silent
        raise ConnectionResetError  # after the commit, before the answer

    api._routes = [(m, p, commit_and_fail if f == commit else f) for m, p, f in api._routes]
    silent: list[Fault] = []
    with pytest.raises(HubError, match=r"yet the repository has a new commit, [0-9a-f]{40}"):
        push(hub, folder)
    (folder / "b.txt").write_text("b")
    silent = [Fault("", after=0)]
    with pytest.raises(HubError, match="it is unknown whether the commit was made"):
        push(hub, folder)


def test_a_hub_that_fails_or_is_not_there_is_named(hub: LocalHub, folder: Path, monkeypatch: pytest.MonkeyPatch):
    hub.faults = [Fault("/commit/", status=503)]
    with pytest.raises(HubError, match=r"the Hub failed with 503; try again later; nothing was committed"):
        push(hub, folder)
    with pytest.raises(HubError, match=r"the connection to http://127\.0\.0\.1:9 failed .*nothing was committed"):
        push(hub, folder, endpoint="http://127.0.0.1:9")


def test_what_cannot_be_uploaded_is_refused_before_anything_is_sent(hub: LocalHub, tmp_path: Path):
    with pytest.raises(HubError, match="it is no folder"):
        push(hub, tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(HubError, match="it holds no files"):
        push(hub, f"{tmp_path}/empty")
    with pytest.raises(ExportError, match=r"trainer\.push_to_hub"):
        push(hub, "meap")
    assert hub.log == []


def test_a_card_with_broken_metadata_is_refused_by_the_hub_and_nothing_is_committed(hub: LocalHub, folder: Path):
    (folder / "README.md").write_text("---\ntags: [\n---\n")
    with pytest.raises(HubError, match=r"Invalid metadata in README\.md") as error:
        push(hub, folder)
    assert message_of(error).endswith("nothing was committed")
    assert sorted(hub.files("user/demo")) == [".gitattributes"]
