"""An answer on a terminal, and as JSON."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from transfusion.errors import UserError
from transfusion.generate import Pipeline, Score
from transfusion.generate.image_files import SampleFolder
from transfusion.generate.pillow_images import to_image
from transfusion.generate.terminal import chat, describe_score, read_lines, read_parts, shown, tell

Build = Callable[..., Pipeline]
SETTINGS: dict[str, Any] = {"max_tokens": 6, "max_images": 1, "steps": 2, "seed": 4}


def told(pipeline: Pipeline, out: Path, *, as_json: bool) -> str:
    screen = io.StringIO()
    tell(
        pipeline.stream("one", **SETTINGS), "one", SampleFolder(out), screen, pipeline.config, as_json=as_json
    )
    return screen.getvalue()


def test_text_and_images_on_a_terminal(build_pipeline: Build, tmp_path: Path) -> None:
    pipeline = build_pipeline(image=50.0)
    text = told(pipeline, tmp_path / "out", as_json=False)
    (answer,) = pipeline.generate([["one"]], **SETTINGS)
    written = "".join(
        part if isinstance(part, str) else f"\n[{tmp_path}/out/0000.png]\n" for part in answer[1:]
    )
    assert text == written + "\n"
    drawn = next(part for part in answer if isinstance(part, Tensor))
    assert Image.open(tmp_path / "out" / "0000.png").tobytes() == to_image(drawn).tobytes()
    assert json.loads((tmp_path / "out" / "index.jsonl").read_text())["seed"] == 4


def test_json_has_one_event_a_line(build_pipeline: Build, tmp_path: Path) -> None:
    events = [
        json.loads(line) for line in told(build_pipeline(image=50.0), tmp_path, as_json=True).splitlines()
    ]
    assert [event["event"] for event in events[:2]] == ["image_start", "image"]
    assert events[0] == {"event": "image_start", "index": 0, "size": [8, 8], "steps": 2}
    assert events[1] == {"event": "image", "index": 0, "file": f"{tmp_path}/0000.png", "seed": 4}
    usage = {"prompt": 4, "tokens": 6, "images": 1}
    assert events[-1]["reason"] == "tokens" and events[-1]["usage"].keys() == usage.keys()
    assert all(event.keys() == {"event", "text"} for event in events[2:-1])


def test_the_end_that_is_a_limit_is_told(
    build_pipeline: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told(build_pipeline(), tmp_path, as_json=False)
    assert capsys.readouterr().err == "the answer ends at --max-tokens\n"
    told(build_pipeline(end=50.0), tmp_path, as_json=False)
    assert capsys.readouterr().err == ""


def test_prompts_of_a_command_line(
    build_pipeline: Build, make_image: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = build_pipeline().config
    image = torch.from_numpy(make_image(1))
    to_image(image).save(tmp_path / "a.png")
    parts = read_parts(["one", f"@{tmp_path}/a.png", "-", "@@home"], config, io.StringIO("from\nstdin"))
    assert [part for part in parts if isinstance(part, str)] == ["one", "from\nstdin", "@home"]
    assert torch.equal(parts[1], image)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"gone.png names no file; @@ begins a text that begins with @"):
        read_parts([f"@{tmp_path}/gone.png"], config, io.StringIO())
    # Longer than the name of a file may be.
    with pytest.raises(UserError, match="names no file"):
        read_parts(["@" + "long " * 2000], config, io.StringIO())
    assert read_parts(["\u00e9" * 5000], config, None) == ["\u00e9" * 5000]
    broken = io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8")
    with pytest.raises(UserError, match="standard input is not UTF-8"):
        read_parts(["-"], config, broken)
    with pytest.raises(UserError, match="standard input is closed; give a text in place of -"):
        read_parts(["-"], config, None)
    read_parts([f"{tmp_path}/a.png"], config, None)
    assert f"a.png is read as a text; @{tmp_path}/a.png is the file" in capsys.readouterr().err


def test_lines_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\n\n  \ntwo three\n", encoding="utf-8")
    assert read_lines(str(tmp_path / "prompts.txt"), io.StringIO()) == ["one", "two three"]
    assert read_lines("-", io.StringIO("a\nb")) == ["a", "b"]
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\n")
    with pytest.raises(UserError, match=r"bad.txt is not UTF-8 text"):
        read_lines(str(tmp_path / "bad.txt"), io.StringIO())
    with pytest.raises(UserError, match=r"cannot read .*gone.txt: No such file"):
        read_lines(str(tmp_path / "gone.txt"), io.StringIO())


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_images_are_shown_where_the_terminal_has_all_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "truecolor")
    pixels = torch.tensor([[[1, 2], [3, 4], [5, 6], [7, 8]]], dtype=torch.uint8)
    lines = shown(pixels, Terminal()).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("\x1b[38;2;1;1;1m\x1b[48;2;3;3;3m▀\x1b[38;2;2;2;2m\x1b[48;2;4;4;4m▀")
    assert len(shown(torch.zeros(3, 512, 256, dtype=torch.uint8), Terminal()).splitlines()) == 64
    assert shown(pixels, io.StringIO()) == ""
    monkeypatch.setenv("COLORTERM", "")
    assert shown(pixels, Terminal()) == ""
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown(pixels, Terminal()) == ""


def talk(pipeline: Pipeline, out: Path, text: str, **settings: Any) -> str:
    screen = io.StringIO()
    answers: Any = {"max_tokens": 4, "max_images": 1, "steps": 2, **settings}
    chat(pipeline, SampleFolder(out), io.StringIO(text), screen, seed=4, settings=answers)
    return screen.getvalue()


@pytest.mark.parametrize("image", [-100.0, 2.0])
def test_a_chat_goes_on_from_what_was_said(
    build_pipeline: Build, make_image: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: float
) -> None:
    """Each line begins a new one, behind the answer before. No text follows another."""
    pipeline = build_pipeline(image=image, end=1.0)
    to_image(torch.from_numpy(make_image(1))).save(tmp_path / "a.png")
    stream, asked = pipeline.stream, list[tuple[list[Any], int]]()

    def noted(prompt: Any, **settings: Any) -> Any:
        asked.append((list(prompt), settings["seed"]))
        return stream(prompt, **settings)

    monkeypatch.setattr(pipeline, "stream", noted)
    lines = f"one two @{tmp_path}/a.png @@three\n\nseven\n/new\none\n/quit\nnever\n"
    told_all = talk(pipeline, tmp_path / "out", lines, temperature=1.0)
    # The first one checks the settings.
    assert [seed for _, seed in asked] == [4, 4, 5, 6]
    (_, _), (first, _), (second, _), (third, _) = asked
    assert [part for part in first if isinstance(part, str)] == ["one two", "@three"] and third == ["one"]
    answer = pipeline.generate([first], seed=4, max_tokens=4, max_images=1, steps=2, temperature=1.0)[0][
        len(first) :
    ]
    texts = [part for part in answer if isinstance(part, str)]
    assert all(text in told_all for text in texts)
    assert sum(isinstance(part, Tensor) for part in second) == 1 + len(answer) - len(texts)
    assert not any(isinstance(a, str) and isinstance(b, str) for a, b in pairwise(second))
    said = "".join(part for part in second if isinstance(part, str))
    ends_in_text = isinstance(answer[-1] if answer else first[-1], str)
    assert said == "".join(["one two", "@three", *texts, "\nseven" if ends_in_text else "seven"])


def test_settings_of_a_chat_are_checked_before_it_begins(build_pipeline: Build, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"top_p 7.0 must lie in"):
        talk(build_pipeline(), tmp_path, "", top_p=7.0)
    with pytest.raises(UserError, match="standard input is closed; run chat on a terminal, or give it lines"):
        chat(build_pipeline(), SampleFolder(tmp_path), None, io.StringIO(), settings={})


def test_a_chat_survives_what_cannot_be_answered(
    build_pipeline: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = build_pipeline(sequence_length=32)
    text = talk(pipeline, tmp_path, f"@{tmp_path}/gone.png\n{'one ' * 40}\none\n")
    errors = capsys.readouterr().err
    assert "gone.png names no file; @@ begins a text that begins with @\n" in errors
    assert "leaves no room in a sequence of 32 (data.sequence_length); shorten it; /new begins anew" in errors
    assert len(text.strip()) > 0


def test_scores_are_told() -> None:
    assert describe_score(Score(-12.0, 0.0, 4)) == "log-likelihood -12 nats, 4 tokens, -3 each"
    assert describe_score(Score(0.0, 0.0, 0)) == "log-likelihood 0 nats, 0 tokens, nothing to score"
    told = describe_score(Score(-1234.5, 6.78, 64))
    assert told == "log-likelihood at least -1234.5 ± 6.8 nats, 64 values, -19.29 each"


def test_a_chat_survives_what_is_no_text(
    build_pipeline: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = io.TextIOWrapper(io.BytesIO(b"a\xff\none\n"), encoding="utf-8")
    screen = io.StringIO()
    chat(build_pipeline(), SampleFolder(tmp_path), said, screen, settings={"max_tokens": 4})
    assert "a prompt is not Unicode text: 'a\\udcff'; give it as UTF-8\n" in capsys.readouterr().err
    assert len(screen.getvalue().strip()) > 0
