"""A key by its former name is refused with the one that it has now."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from transfusion.codec_train.settings import CodecTrainConfig
from transfusion.config import Config
from transfusion.config.checking import RENAMED, _known_keys
from transfusion.config.load import load_as
from transfusion.errors import UserError

KEYS = {kind: set(_known_keys(kind)) for kind in (Config, CodecTrainConfig)}


def present(key: str) -> str:
    """The whole of a key as it is now."""
    place, name = key.rpartition(".")[0], RENAMED[key].split(",")[0]
    return f"{place}.{name}" if place else name


def kind_of(key: str) -> type[Config] | type[CodecTrainConfig]:
    """Which configuration has the key."""
    # In a schedule of weights no key is listed.
    return next(kind for kind, known in KEYS.items() if present(key).replace(".weight.0.", ".") in known)


def values_of(key: str) -> dict[str, object]:
    """A configuration with that key. Numbers in it stand for entries of lists."""
    found: object = 1
    for part in reversed(key.split(".")):
        found = [found] if part.isdigit() else {part: found}
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("key", RENAMED)
def test_a_former_key_tells_its_present_name(key: str, tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(values_of(key)))
    with pytest.raises(UserError) as caught:
        load_as(kind_of(key), tmp_path / "old.yaml")
    place = key.rpartition(".")[0]
    assert f"{key} is now {place}{'.' if place else ''}{RENAMED[key]}" in str(caught.value)


def test_former_keys_do_not_exist() -> None:
    assert not [key for known in KEYS.values() for key in RENAMED if key in known]
