"""YAML that says one thing and means another is a mistake, told with its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from transfusion.config import Config, load_config
from transfusion.config.yaml_files import dump, override, parse, read
from transfusion.errors import UserError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2.5E+3", 2500.0),
        (".5", 0.5),
        ("-7", -7),
        ("1_000", 1000),
        ("0", 0),
        ("on", "on"),
        ("no", "no"),
        ("2026-01-31", "2026-01-31"),
        ("'010'", "010"),
        ('"2:30"', "2:30"),
        ("10.0.0.1:29500", "10.0.0.1:29500"),
        ("~", None),
        ("", None),
        ("true", True),
        ("x: &a {k: 1, l: 2}\ny: {<<: *a, k: 3}", {"x": {"k": 1, "l": 2}, "y": {"k": 3, "l": 2}}),
    ],
)
def test_plain_values_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    found = parse(text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text", ["010", "-007", "0o17", "0b11", "2:30", "1:30:15.5", "00"])
def test_a_number_that_versions_of_yaml_read_differently_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"line 2: {text} is read as different numbers"):
        parse(f"a: 1\nb: {text}\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "train: {steps: 3}\nrun:\n  seed: 1\ntrain: {precision: fp32}\n",
            "line 4: train stands here a second time",
        ),
        ("train:\n  steps: 3\n  steps: 4\n", "line 3: steps stands here a second time, first in line 2"),
        ("train: {steps: 3, steps: 4}\n", "line 1: steps stands here a second time"),
        ("data:\n  sources:\n  - {name: a, shards: x.tar, name: b}\n", "line 3: name stands here"),
        ("train:\n steps: [\n", "line"),
        ("a: " + "[" * 5000, "nested too deeply"),
    ],
)
def test_a_file_with_a_mistake_is_told_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message) as refused:
        load_config(file)
    assert str(file) in str(refused.value) and "\n" not in str(refused.value)


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbftrain: {steps: 3}\n")
    assert load_config(tmp_path / "a.yaml").train.steps == 3


@pytest.mark.parametrize("text", ["run.dir=runs/a #1", "run.dir=#1", "data.sources=[] # none"])
def test_an_override_that_would_lose_its_end_is_refused(text: str) -> None:
    (problem,) = override({}, [text])
    assert "what follows # is a comment; write the value in quotes" in problem


def test_a_hash_in_a_word_or_in_quotes_is_a_hash() -> None:
    values: dict[str, Any] = {}
    assert not override(values, ["run.dir=runs/a#1", "run.name='a #1'"])
    assert values == {"run": {"dir": "runs/a#1", "name": "a #1"}}


@pytest.mark.parametrize("text", ["true", "True", "false"])
@pytest.mark.parametrize(
    "key", ["data.workers", "train.steps", "run.seed", "optimizer.learning_rate", "data.sources.0.weight"]
)
def test_true_is_no_number(key: str, text: str) -> None:
    sources = "data.sources=[{name: a, shards: x.tar}]"
    with pytest.raises(UserError, match="must be a number, got"):
        load_config(None, [sources, f"{key}={text}"])


def test_true_is_no_number_among_others_either() -> None:
    with pytest.raises(UserError, match="must be a number"):
        load_config(None, ["model.unet={widths: [true, 64]}"])


@pytest.mark.parametrize("text", ["on", "yes", "true", "off", "no", "false"])
def test_the_words_for_true_and_false_stay(text: str) -> None:
    assert load_config(None, [f"model.qk_norm={text}"]).model.qk_norm is (text in ("on", "yes", "true"))


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    for name in ("1e5", "010", "2:30", "on", "2026-01-31", "~x", "a #1", "0x1f", "null", "1_0"):
        config = Config.model_validate({"run": {"name": name}, "optimizer": {"epsilon": 1e-5}})
        dump(config, tmp_path / "config.yaml")
        assert Config.model_validate(read(tmp_path / "config.yaml")) == config


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base.yaml").write_text("train: {steps: 3}\n")
    file = tmp_path / "deep.yaml"
    file.write_text("base: ~/base.yaml\nrun: {dir: ~/runs/x}\n")
    config = load_config(
        file,
        [
            "data.tokenizer=~/t.model",
            "data.index=~/index",
            "data.cache.folder=~/cache",
            "data.sources=[{name: a, shards: ~/a/*.tar}, {name: b, shards: [~/b.tar, c.tar]}]",
            "train.init_from=~/llama",
        ],
    )
    assert config.train.steps == 3
    assert config.run.folder == f"{tmp_path}/runs/x"
    assert config.data.tokenizer == f"{tmp_path}/t.model"
    assert config.data.index == f"{tmp_path}/index"
    assert config.data.cache.folder == f"{tmp_path}/cache"
    assert config.train.init_from == f"{tmp_path}/llama"
    assert [source.shards for source in config.data.sources] == [
        f"{tmp_path}/a/*.tar",
        [f"{tmp_path}/b.tar", "c.tar"],
    ]


@pytest.mark.parametrize(
    "text", ["base: 5", "base: 0", "base: false", "base: [9]", "base: [a, ~]", "base: {a: b}"]
)
def test_a_base_that_is_no_file_name_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match="base must name a file or a list of files, got"):
        load_config(tmp_path / "a.yaml")


def test_an_empty_base_is_none(tmp_path: Path) -> None:
    for text in ("base:", "base: ~", "base: []"):
        (tmp_path / "a.yaml").write_text(f"{text}\ntrain: {{steps: 3}}\n")
        assert load_config(tmp_path / "a.yaml").train.steps == 3


@pytest.mark.parametrize("text", ["{1: 2, 0x1: 3}", "{true: 1, True: 2}", "{+1: 7, 1: 2}"])
def test_one_key_in_two_spellings_is_given_twice(text: str) -> None:
    with pytest.raises(ValueError, match="stands here a second time"):
        parse(text)


@pytest.mark.parametrize(
    "text",
    ["a." * 2000 + "b=1", "train.steps=0x" + "f" * 9000, "train.steps=" + "9" * 9000, "run.name=a\x85b"],
)
def test_what_is_beyond_all_measure_is_refused_in_one_short_line(text: str) -> None:
    with pytest.raises(UserError) as refused:
        load_config(None, [text])
    assert len(str(refused.value)) < 1000 and "\n" not in str(refused.value)
