"""A key by its former name is refused with the one that it has now."""

from __future__ import annotations

import pytest
import yaml

from transfusion.config import Config, load_config
from transfusion.config.checking import RENAMED, _known_keys
from transfusion.errors import UserError


def values_of(key: str) -> dict[str, object]:
    """A configuration with that key. Numbers in it stand for entries of lists."""
    found: object = 1
    for part in reversed(key.split(".")):
        found = [found] if part.isdigit() else {part: found}
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("key", RENAMED)
def test_a_former_key_tells_its_present_name(key: str) -> None:
    section, value = next(iter(values_of(key).items()))
    # As a user would give it, in a file or on the command line.
    with pytest.raises(UserError) as caught:
        load_config(None, [f"{section}={yaml.safe_dump(value, default_flow_style=True).strip()}"])
    place = key.rpartition(".")[0]
    assert f"{key} is now {place}{'.' if place else ''}{RENAMED[key]}" in str(caught.value)


def test_present_names_exist_and_former_ones_do_not() -> None:
    known = set(_known_keys(Config))
    assert not known & set(RENAMED)
    for key, told in RENAMED.items():
        place = key.rpartition(".")[0]
        name = f"{place}{'.' if place else ''}{told.split(',')[0]}"
        # A schedule stands in the place of a number, where no key is listed.
        assert name in known or ".weight.0." in name
