"""Where weights of published networks are: at a path, or under a name, fetched where the user has asked for it."""

from __future__ import annotations

import os
import re
import urllib.error
from pathlib import Path

import torch

from transfusion.errors import UserError
from transfusion.parallel.environment import set_hub_access
from transfusion.urls import hub_copy

# In place of a path, the file that pytorch-fid publishes. torch.hub keeps it, where that package looks for it too.
PUBLISHED = "published"
INCEPTION_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
# The beginning of its SHA-256, as in its name.
INCEPTION_SHA256 = "6726825d"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# No pickles, which run code.
_HUB_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors")


def inception_file(name: str, *, download: bool) -> Path:
    """A path as it is, or the copy of the published file. Raises UserError where there is none."""
    if name != PUBLISHED:
        return Path(name)
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_URL.rpartition("/")[2]
    if path.is_file():
        return path
    if not download:
        raise UserError(f"{path} is not there; add --download, or copy it from {INCEPTION_URL}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(INCEPTION_URL, str(path), INCEPTION_SHA256, progress=False)
    except (OSError, RuntimeError, urllib.error.URLError) as error:
        raise UserError(f"{INCEPTION_URL} cannot be fetched ({error}); copy it to {path}") from None
    return path


def hub_folder(name: str, *, download: bool) -> Path:
    """A folder as it is, or the copy of a repository of the hub. Raises UserError where it is neither.

    download: fetch what is not in the hub's cache.
    """
    if os.path.isdir(name) or not _HUB_NAME.fullmatch(name):
        return Path(name)
    set_hub_access(download=download)
    try:
        return hub_copy(name, _HUB_FILES, download=download)
    except ImportError:
        raise UserError(
            f"{name} needs transformers, which is not installed; `pip install transformers`"
        ) from None
    except UserError as error:
        if download:
            raise
        raise UserError(
            f"{name} is no folder and not in the cache of the hub; name a folder, or add --download to fetch it"
        ) from error
