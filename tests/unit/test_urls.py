"""Addresses: what they are called where others read, and what of them is the shard."""

from __future__ import annotations

import pytest

from transfusion.config import SourceConfig, load_config
from transfusion.errors import UserError
from transfusion.urls import file_name, identity, is_address, redacted, redacted_text

SECRET = "hunter2"
SIGNED = (
    f"https://me:{SECRET}@host:81/a/00001.tar?X-Amz-Signature={SECRET}&part=3&{SECRET}#{SECRET}",
    "https://***@host:81/a/00001.tar?X-Amz-Signature=***&part=***&***",
)


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        SIGNED,
        ("https://host/{00000..00002}.tar", "https://host/{00000..00002}.tar"),
        (f"https://me:a@b/{SECRET}@host/0.tar", f"https://***@b/{SECRET}@host/0.tar"),
        (f"s3://{SECRET}@bucket/0.tar", "s3://***@bucket/0.tar"),
        ("pipe:aws s3 cp s3://bucket/00003.tar -", "pipe:aws ... s3://bucket/00003.tar ..."),
        (f"pipe:TOKEN={SECRET} /bin/curl -u me:{SECRET} {SIGNED[0]}", f"pipe:curl ... {SIGNED[1]} ..."),
        (f"pipe:ssh me:{SECRET}@host:/x/0.tar -p {SECRET}", "pipe:ssh ... ***@host:/x/0.tar ..."),
        (f"pipe:cat '{SECRET}", "pipe:..."),
    ],
)
def test_redacted(address: str, shown: str) -> None:
    if address.startswith("https://me:a@b/"):
        # An unescaped slash ends the host: what stands behind it is a path, which is shown.
        assert redacted(address) == shown
        return
    assert redacted(address) == shown
    assert SECRET not in redacted_text(f"data.sources.0.shards={address}")
    assert SECRET not in redacted_text(f"'{address}' is wrong, got ['{address}']")


def test_plain_text_stays() -> None:
    for text in ("data/{00000..00002}.tar", "a pipeline: b", "mail me@host about 3:4"):
        assert redacted_text(text) == text


def test_what_a_shard_is() -> None:
    address = "https://host/a/00001.tar?part=3&X-Amz-Signature=1&X-Amz-Date=2"
    assert identity(address) == identity("https://me:pw@host/a/00001.tar?X-Amz-Signature=9&part=3")
    assert len({identity(f"https://host/get?file={n}.tar") for n in range(9)}) == 9
    assert identity("pipe:cat 1") != identity("pipe:cat 2")
    names = {
        "https://host/a/00001.tar?sig=x": "00001.tar",
        "https://host/get?sig=x&file=a%2F7.jsonl": "a_2F7.jsonl",
        "https://host/a/b.parquet": "b.parquet",
        "pipe:gunzip -c /x/00002.tar.gz": "00002.tar",
        "pipe:make-shard 7": "shard.tar",
        "file:///x/a b.tar": "a_b.tar",
    }
    assert {address: file_name(address) for address in names} == names


def test_is_address() -> None:
    assert all(map(is_address, ("https://h/a.tar", "pipe:cat a.tar", "file:/a.tar", "s3://b/a.tar")))
    assert not any(map(is_address, ("a.tar", "/a/b.tar", "data/*.tar", "C:/a.tar", "a:b.tar")))


def test_what_is_written_down_holds_no_credentials() -> None:
    source = SourceConfig(name="s", shards=[SIGNED[0], "a/*.tar"])
    assert source.shards[0] == SIGNED[0]
    assert source.model_dump(mode="json")["shards"] == [SIGNED[1], "a/*.tar"]
    with pytest.raises(UserError) as error:
        load_config(None, ["data.sources=[{name: a, shards: {x: 'https://me:hunter2@h/a.tar'}}]"])
    assert SECRET not in str(error.value) and "https://***@h/a.tar" in str(error.value)
