"""Downloads, from a hub on this machine."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from hi_diffusers.weights import hub as hub_module
from hi_diffusers.weights.hub import Download, download, find, watched
from tests.hub_server import COMMIT, Hub, etag, served_here

REPO = "somebody/model"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one repository, and an empty cache."""
    folder = tmp_path / "repo"
    (folder / "part").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "part" / "weights.safetensors").write_bytes(bytes(range(256)) * 4000)
    (folder / "part" / "pickle.bin").write_bytes(b"never")
    with served_here(monkeypatch, tmp_path / "cache") as server:
        server.repos[REPO] = folder
        yield server


def test_a_download_says_what_and_where_before_it_begins(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(hub_module, "say", lambda line: said.append((line, list(hub.asked))))
    assert find(REPO) is None
    folder = download(REPO)
    assert folder == find(REPO)
    assert etag(folder / "part" / "weights.safetensors") == etag(hub.repos[REPO] / "part" / "weights.safetensors")
    ((line, asked_before),) = said
    assert not [one for one in asked_before if one.startswith("GET") and "/resolve/" in one]
    assert line.startswith(f"downloading {REPO}, 0.0 GB, to {constants.HF_HUB_CACHE} (") and line.endswith("GB free)")


def test_a_watcher_sees_a_download_begin_and_grow(hub: Hub) -> None:
    seen: list[tuple[Download, int]] = []
    weights = hub.repos[REPO] / "part" / "weights.safetensors"
    with watched(lambda one: seen.append((one, one.done()))):
        download(REPO)
        download(REPO)
    ((begun, before),) = seen
    assert (begun.repo, before, begun.size) == (REPO, 0, weights.stat().st_size + 2)
    assert begun.done() == begun.size
    (begun.folder / "blobs" / "more.incomplete").write_bytes(bytes(5000))
    assert begun.done() == begun.size, "never more than all"
    download(REPO)  # nobody watches any more
    assert len(seen) == 1


def test_pickles_are_not_downloaded(hub: Hub) -> None:
    folder = download(REPO)
    assert not list(folder.rglob("*.bin")) and not [line for line in hub.asked if "pickle" in line]


def test_what_is_there_needs_no_network(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    folder = download(REPO)
    capsys.readouterr()
    hub.asked.clear()
    assert find(REPO) == folder and hub.asked == []
    assert download(REPO) == folder
    assert not any(line.startswith("GET") and "/resolve/" in line for line in hub.asked)
    assert "downloading" not in capsys.readouterr().err


def test_of_a_broken_download_the_finished_files_are_kept(hub: Hub) -> None:
    hub.breaks_after = 300_000
    with pytest.raises(ValueError, match="cannot be downloaded"):
        download(REPO)
    assert find(REPO) is None
    hub.breaks_after = None
    hub.asked.clear()
    folder = download(REPO)
    assert not [line for line in hub.asked if line.startswith("GET") and "model_index" in line], "it was there"
    assert etag(folder / "part" / "weights.safetensors") == etag(hub.repos[REPO] / "part" / "weights.safetensors")


def test_a_file_that_was_deleted_is_downloaded_again(hub: Hub) -> None:
    folder = download(REPO)
    (folder / "part" / "weights.safetensors").unlink()
    assert find(REPO) is None
    assert (download(REPO) / "part" / "weights.safetensors").is_file()


def test_a_commit_can_be_pinned(hub: Hub) -> None:
    assert download(REPO, COMMIT) == find(REPO, COMMIT)


def sentence(*args: str) -> str:
    with pytest.raises(ValueError) as refused:
        download(*args)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_every_failure_has_its_own_sentence(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sentence("somebody/other") == (
        f"{hub.address} has no repository somebody/other, or it is private: check the name, or run hf auth login"
    )
    assert sentence(REPO, "v9") == f"{REPO} has no revision 'v9'"
    hub.gated.add(REPO)
    with pytest.raises(ValueError, match=f"{REPO} is gated: ask for access at .*; or take that one"):
        download(REPO, gated_hint="; or take that one")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be downloaded from http://127.0.0.1:9" in sentence(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert sentence(REPO) == f"{REPO} is not on this disk, and HF_HUB_OFFLINE is set: unset it, or give a local folder"


def test_a_disk_that_is_too_small_is_told_before(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(hub_module.shutil, "disk_usage", lambda _: usage)
    assert "needs 0.0 GB" in sentence(REPO)
    assert not [line for line in hub.asked if line.startswith("GET") and "/resolve/" in line]


def test_what_is_no_repository_s_name_is_refused() -> None:
    with pytest.raises(ValueError, match="is neither a folder nor a repository's owner/name"):
        find("a/b/c")
