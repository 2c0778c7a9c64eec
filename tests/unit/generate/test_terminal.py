"""An answer on a terminal, and as JSON."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from transfusion.errors import UserError
from transfusion.generate import Pipeline
from transfusion.generate.image_files import SampleFolder, to_image
from transfusion.generate.terminal import read_parts, tell

Build = Callable[..., Pipeline]
SETTINGS: dict[str, Any] = {"max_tokens": 6, "max_images": 1, "steps": 2, "seed": 4}


def told(pipeline: Pipeline, out: Path, *, as_json: bool) -> str:
    screen = io.StringIO()
    tell(pipeline.stream("one", **SETTINGS), "one", SampleFolder(out), screen, as_json=as_json)
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


def test_prompts_of_a_command_line(build_pipeline: Build, make_image: Any, tmp_path: Path) -> None:
    config = build_pipeline().config
    image = torch.from_numpy(make_image(1))
    to_image(image).save(tmp_path / "a.png")
    parts = read_parts(["one", f"@{tmp_path}/a.png", "-", "@@home"], config, io.StringIO("from\nstdin"))
    assert [part for part in parts if isinstance(part, str)] == ["one", "from\nstdin", "@home"]
    assert torch.equal(parts[1], image)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"cannot read .*gone.png"):
        read_parts([f"@{tmp_path}/gone.png"], config, io.StringIO())
    broken = io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8")
    with pytest.raises(UserError, match="standard input is not UTF-8"):
        read_parts(["-"], config, broken)
