"""The local Hub answers the real client as the real Hub does."""

from __future__ import annotations

import time
import urllib.request
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError, RepositoryNotFoundError

from hf_ext.testing.local_hub import Fault, LocalHub


@pytest.fixture
def api(hub: LocalHub) -> HfApi:
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    api.create_repo("user/demo")
    return api


def add(path: str, data: bytes) -> CommitOperationAdd:
    return CommitOperationAdd(path_in_repo=path, path_or_fileobj=data)


FILES = {
    "README.md": b"---\ntags: [a]\n---\n# Demo\n",
    "code/x.py": b"x = 1\n",
    "model.safetensors": bytes(range(256)) * 99,
}


def test_regular_and_lfs_files_come_back_bit_equal_by_download_and_by_snapshot(
    hub: LocalHub, api: HfApi, tmp_path: Path
):
    info = api.create_commit("user/demo", [add(*item) for item in FILES.items()], commit_message="all")
    assert {path: blob.lfs for path, blob in hub.repository("user/demo").resolve("main").files.items()} == {
        ".gitattributes": False,
        "README.md": False,
        "code/x.py": False,
        "model.safetensors": True,
    }
    folder = Path(snapshot_download("user/demo", endpoint=hub.endpoint, cache_dir=tmp_path / "a"))
    assert folder.name == info.oid
    for path, data in FILES.items():
        assert (folder / path).read_bytes() == data
        single = hf_hub_download("user/demo", path, endpoint=hub.endpoint, cache_dir=tmp_path / "b")
        assert Path(single).read_bytes() == data
    assert sorted(api.list_repo_files("user/demo")) == sorted([".gitattributes", *FILES])
    assert api.model_info("user/demo").tags == ["a"]
    assert [commit.title for commit in api.list_repo_commits("user/demo")] == ["all", "initial commit"]


def test_files_that_did_not_change_are_not_committed_again(hub: LocalHub, api: HfApi):
    first = api.create_commit("user/demo", [add(*item) for item in FILES.items()], commit_message="all")
    again = api.create_commit("user/demo", [add(*item) for item in FILES.items()], commit_message="again")
    assert again.oid == first.oid
    assert sum("PUT /lfs/" in line for line in hub.log) == 1


def test_folders_are_deleted_with_all_below_them(hub: LocalHub, api: HfApi):
    api.create_commit("user/demo", [add("a/b.txt", b"1"), add("ab.txt", b"2")], commit_message="add")
    api.create_commit("user/demo", [CommitOperationDelete("a/")], commit_message="delete")
    assert sorted(hub.files("user/demo")) == [".gitattributes", "ab.txt"]


def test_branches_and_pull_requests_leave_main_alone(hub: LocalHub, api: HfApi):
    api.create_branch("user/demo", branch="feature/x")
    api.create_commit("user/demo", [add("b.txt", b"1")], commit_message="b", revision="feature/x")
    pull = api.create_commit("user/demo", [add("c.txt", b"1")], commit_message="c", create_pr=True)
    assert sorted(hub.files("user/demo")) == [".gitattributes"]
    assert sorted(hub.files("user/demo", "feature/x")) == [".gitattributes", "b.txt"]
    assert pull.pr_revision == "refs/pr/1"
    assert sorted(hub.files("user/demo", "refs/pr/1")) == [".gitattributes", "c.txt"]
    assert {ref.name for ref in api.list_repo_refs("user/demo").branches} == {"main", "feature/x"}


def test_a_private_repository_is_hidden_from_strangers_and_foreign_namespaces_are_closed(hub: LocalHub, api: HfApi):
    api.create_repo("user/secret", private=True)
    stranger = HfApi(endpoint=hub.endpoint, token=False)
    with pytest.raises(RepositoryNotFoundError):
        stranger.model_info("user/secret")
    assert api.model_info("user/secret").private
    with pytest.raises(HfHubHTTPError) as wrong:
        HfApi(endpoint=hub.endpoint, token="hf_wrong").whoami()
    assert wrong.value.response.status_code == 401
    with pytest.raises(HfHubHTTPError) as foreign:
        api.create_repo("somebody/else")
    assert foreign.value.response.status_code == 403
    assert api.whoami()["name"] == "user"


def test_what_is_missing_is_named_as_the_hub_names_it(hub: LocalHub, api: HfApi, tmp_path: Path):
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download("user/demo", "no.txt", endpoint=hub.endpoint, cache_dir=tmp_path)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("user/none")
    with pytest.raises(HfHubHTTPError, match="does not serve"):
        api.list_repo_likers("user/demo").__next__()


def test_metadata_that_is_no_yaml_is_refused_before_anything_is_uploaded(hub: LocalHub, api: HfApi):
    with pytest.raises(ValueError, match="Invalid metadata"):
        api.create_commit("user/demo", [add("README.md", b"---\na: [\n---\n")], commit_message="bad")
    assert sorted(hub.files("user/demo")) == [".gitattributes"]


@pytest.mark.parametrize("where", ["/commit/", "/lfs/[0-9a-f]{64}"])
def test_an_upload_that_breaks_off_leaves_the_repository_as_it_was(
    hub: LocalHub, api: HfApi, monkeypatch: pytest.MonkeyPatch, where: str
):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client waits between its retries
    before = hub.repository("user/demo").resolve("main")
    hub.faults = [Fault(where, after=100)]
    with pytest.raises(Exception, match=r"(?i)reset|disconnect|closed|broken|upload"):
        api.create_commit("user/demo", [add(*item) for item in FILES.items()], commit_message="all")
    assert hub.repository("user/demo").resolve("main") is before
    assert any(line.endswith(" 0") for line in hub.log)
    hub.faults = []
    api.create_commit("user/demo", [add(*item) for item in FILES.items()], commit_message="all")
    assert {path: hub.files("user/demo")[path] for path in FILES} == FILES


def test_a_fault_strikes_as_often_as_it_was_told(hub: LocalHub, api: HfApi, monkeypatch: pytest.MonkeyPatch):
    hub.faults = [Fault("/api/whoami", status=503, times=1)]
    with pytest.raises(HfHubHTTPError) as failed:
        api.whoami()
    assert failed.value.response.status_code == 503
    assert api.whoami()["name"] == "user"
    with pytest.raises(ValueError, match="either status="):
        Fault("/")


def test_ranges_resume_a_download(hub: LocalHub, api: HfApi):
    api.create_commit("user/demo", [add("a.txt", b"0123456789")], commit_message="a")
    request = urllib.request.Request(f"{hub.endpoint}/user/demo/resolve/main/a.txt", headers={"Range": "bytes=4-"})
    with urllib.request.urlopen(request) as answer:
        assert (answer.status, answer.read()) == (206, b"456789")
