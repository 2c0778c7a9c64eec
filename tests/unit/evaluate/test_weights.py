"""Where published weights are sought, and that nothing is fetched unless it was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from transfusion.errors import UserError
from transfusion.evaluate.features import weights
from transfusion.evaluate.features.weights import PUBLISHED, hub_folder, inception_file
from transfusion.evaluate.suites.run import SUITES, choose
from transfusion.files import sha256


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in the place of the published one; returns torch's copy of it, which is not there yet."""
    file = tmp_path / "served" / "pt_inception.pth"
    file.parent.mkdir()
    file.write_bytes(b"weights")
    monkeypatch.setattr(weights, "INCEPTION_URL", file.as_uri())
    monkeypatch.setattr(weights, "INCEPTION_SHA256", sha256(b"weights")[:8])
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints" / "pt_inception.pth"


def test_the_published_inception_is_fetched_once_and_only_when_asked_for(published: Path) -> None:
    with pytest.raises(
        UserError, match=r"pt_inception.pth is not there; add --download, or copy it from file:"
    ):
        inception_file(PUBLISHED, download=False)
    assert not published.parent.exists()
    assert inception_file(PUBLISHED, download=True) == published
    assert published.read_bytes() == b"weights"
    assert inception_file(PUBLISHED, download=False) == published
    assert inception_file("own.pth", download=True) == Path("own.pth")


@pytest.mark.parametrize("wrong", ["contents", "address"])
def test_a_file_that_is_not_the_published_one_is_not_kept(
    published: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    if wrong == "contents":
        monkeypatch.setattr(weights, "INCEPTION_SHA256", "6726825d")
    else:
        monkeypatch.setattr(weights, "INCEPTION_URL", weights.INCEPTION_URL.replace("served", "nowhere"))
    with pytest.raises(UserError, match=r"cannot be fetched .*; copy it to "):
        inception_file(PUBLISHED, download=True)
    assert not list(published.parent.iterdir())


def test_names_of_the_hub_are_sought_in_its_cache_and_fetched_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asked: list[bool] = []

    def copy(name: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        asked.append(local_files_only)
        assert name == "facebook/dinov2-large" and "*.bin" not in allow_patterns
        if local_files_only:
            raise hub.errors.LocalEntryNotFoundError("not in the cache")
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", copy)
    for name in (str(tmp_path), "a/path/of/three", "nothing"):
        assert hub_folder(name, download=False) == Path(name)
    assert not asked
    with pytest.raises(UserError, match="not in the cache of the hub; name a folder, or add --download"):
        hub_folder("facebook/dinov2-large", download=False)
    assert hub_folder("facebook/dinov2-large", download=True) == tmp_path
    assert asked == [True, False]


def test_download_reaches_every_suite_that_may_fetch_something() -> None:
    may = {name for name, suite in SUITES.items() if "download" in suite.settings.model_fields}
    assert may >= {"text_to_image", "geneval2", "language"}
    chosen = choose(["images", *may], ["text_to_image.count=5"], download=True)
    assert all(vars(chosen[name])["download"] for name in may)
    assert not any(vars(settings).get("download") for settings in choose([*may]).values())
