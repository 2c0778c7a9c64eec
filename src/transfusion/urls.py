"""Addresses of shards that stand elsewhere, and how they are named where others read: without credentials.

An address is what webdataset opens: `https://...`, `gs://...`, `file:...`, or `pipe:` and a command.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from transfusion.errors import UserError
from transfusion.files import digest

_PIPE = "pipe:"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_URL = re.compile(_SCHEME.pattern + r"[^\s'\"]+")
# Up to the last @ before the first slash; a password may hold what should have been escaped.
_USER = re.compile(rf"({_SCHEME.pattern})[^/\s]*@")
_QUERY = re.compile(r"\?(.*)$", re.DOTALL)
_SHARD_NAME = re.compile(r"[\w.+~%-]*\w\.(?:tar|jsonl)(?![\w-])", re.IGNORECASE)
# What signs a URL is no part of what it names: signed anew tomorrow it is the same shard.
_SIGNATURES = re.compile(
    r"(?i)^(?:x-(?:amz|goog|ms)-.*|sig|signature|token|access_token|key|key-pair-id|policy|expires"
    r"|awsaccesskeyid|googleaccessid|s[eprtv]|spr|sks?[a-z]*)$"
)
_HIDDEN = "***"
_PIPE_IN_TEXT = re.compile(r"(?<![\w/])pipe:")


def is_address(spec: str) -> bool:
    """Whether the words name something elsewhere, not a file of this machine."""
    return spec.startswith((_PIPE, "file:")) or bool(_SCHEME.match(spec))


def scheme(address: str) -> str:
    """`https`, `pipe` and so on."""
    return address.partition(":")[0].lower()


def redacted(address: str) -> str:
    """The address without user, password, values of a query and, of a command, all but its program and shards."""
    if address.startswith(_PIPE):
        return _PIPE + _without_arguments(address.removeprefix(_PIPE))
    return _without_secrets(address)


def redacted_text(text: str) -> str:
    """Free text in which every address is redacted; what follows `pipe:` is taken for a command up to its end."""
    before, *commands = _PIPE_IN_TEXT.split(text, maxsplit=1)
    shown = _URL.sub(lambda found: _without_secrets(found[0]), before)
    return shown + "".join(redacted(_PIPE + command) for command in commands)


def redacted_plain(value: str | Sequence[str]) -> str | list[str]:
    """The shards of a source as they may be written down: addresses redacted, names of files as they are."""
    if isinstance(value, str):
        return redacted(value) if is_address(value) else value
    return [redacted(spec) if is_address(spec) else spec for spec in value]


def identity(address: str) -> str:
    """Sixteen hex digits that stay while only credentials change."""
    bare = _URL.sub(lambda found: _unsigned(found[0]), address)
    return digest(bare.encode("utf-8", "surrogatepass"), 8)


def file_name(address: str) -> str:
    """Name of the shard, safe as a file name: of the path, else of the query, else of the command."""
    name = unquote(PurePosixPath(urlsplit(_unsigned(address)).path).name) if scheme(address) != "pipe" else ""
    if not PurePosixPath(name).suffix:
        names = _SHARD_NAME.findall(_unsigned(redacted(address) if name == "" else address))
        # A command may give a shard whatever it is called; what it is shows when it is read.
        name = names[-1] if names else name or "shard.tar"
    return re.sub(r"[^\w.+-]", "_", name)[-120:]


def _without_secrets(url: str) -> str:
    url = _USER.sub(rf"\g<1>{_HIDDEN}@", url).partition("#")[0]
    return _QUERY.sub(lambda found: "?" + "&".join(_hidden_values(found[1])), url)


def _hidden_values(query: str) -> Iterator[str]:
    for part in query.split("&"):
        key, equals, _ = part.partition("=")
        yield f"{key}={_HIDDEN}" if equals else _HIDDEN


def _unsigned(url: str) -> str:
    url = _USER.sub(r"\1", url)
    before, mark, query = url.partition("?")
    kept = [part for part in query.split("&") if part and not _SIGNATURES.match(part.partition("=")[0])]
    return before + (mark + "&".join(kept) if kept else "")


def _without_arguments(command: str) -> str:
    try:
        words = shlex.split(command)
    except ValueError:
        words = []
    words = [word for word in words if not re.match(r"\w+=", word)]
    if not words:
        return "..."
    shards = [
        re.sub(r"^[^/]*@", f"{_HIDDEN}@", _without_secrets(word))
        for word in words[1:]
        if _SHARD_NAME.search(word) and not word.startswith("-")
    ]
    return " ... ".join([PurePosixPath(words[0]).name, *shards, ""]).rstrip()


def hub_copy(name: str, files: Sequence[str], *, download: bool = True) -> Path:
    """The folder of a repository's files in the cache of the Hugging Face hub, fetched unless they may not be.

    files: patterns of their paths. Raises UserError where they cannot be had.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(files), local_files_only=not download))
    except Exception as error:
        # The hub's client and what is below it have errors of their own.
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{name} cannot be fetched: {reason}; check the name and the network, and"
            " for a closed model run `hf auth login`"
        ) from None
