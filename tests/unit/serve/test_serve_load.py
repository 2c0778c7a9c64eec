"""A short run of the campaign over a server under load, and that it can tell what it looks for."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[3] / "campaigns"))
import serve_load
from serve_load import Ask, Clients, Figures, Kind, Load, Reading, Scale, Server


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check(folder: Path, scale: Scale) -> Figures:
    """Run it. Times are left out, since other tests may keep the machine busy."""
    figures = serve_load.run(folder, scale, seed=1)
    missed = {bar.name for bar in serve_load.bars(figures, scale) if bar.is_missed}
    assert missed - set(serve_load.TIMED) == set(), figures.examples
    return figures


@pytest.mark.slow
def test_half_a_minute_of_load(tmp_path: Path) -> None:
    figures = check(tmp_path, Scale(seconds=30, compared=30))
    assert figures.counts["complete"] > 50 and figures.growth_percent is not None
    assert set(figures.ended) >= {"end", "tokens", "image", "cancelled"}


def ask(kind: Kind) -> Ask:
    """A short text of seed 3."""
    return serve_load._short(random.Random(0), kind, 3)


def event(name: str, values: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(values)}\n\n".encode()


DONE = event("done", {"reason": "tokens", "usage": {}})


def test_an_answer_is_whole_with_its_end_alone() -> None:
    reading = Reading(ask("native"))
    text = event("text", {"text": "a"})
    reading.feed(text[:9])
    reading.feed(text[9:] + b":\n\n")
    assert not reading.is_complete and reading.texts == ["a"]
    reading.feed(DONE)
    assert reading.is_complete and reading.reasons == ["limit"] and not reading.malformed
    reading.feed(text)
    assert reading.malformed


def test_foreign_and_broken_answers_are_told() -> None:
    chunk = {"index": 0, "delta": {"content": "a"}, "finish_reason": None}
    reading = Reading(ask("chat"))
    reading.feed(f"data: {json.dumps({'seed': 3, 'choices': [chunk]})}\n\n".encode())
    assert not reading.foreign
    reading.feed(f"data: {json.dumps({'seed': 4, 'choices': [chunk]})}\n\n".encode())
    assert reading.foreign and not reading.malformed
    reading.feed(b"data: {}\n\n")
    assert reading.malformed
    cut_off = Reading(ask("native"))
    cut_off.feed(DONE[:-1])
    assert not cut_off.is_complete


def test_an_image_must_be_of_its_prompt_and_its_recipe() -> None:
    asked = ask("native")
    pixels = torch.arange(64, dtype=torch.uint8).view(1, 8, 8)
    recipe = {
        "prompt": asked.prompt,
        "image": {"seed": 3},
        "index": 0,
        "pixels": serve_load.pixel_digest(pixels),
    }
    png = serve_load.base64.b64encode(serve_load._png(pixels)).decode()

    def read(**changes: Any) -> Reading:
        reading = Reading(asked)
        reading.feed(event("image", {"index": 0, "seed": 3, "png": png, "recipe": {**recipe, **changes}}))
        return reading

    fine = read()
    assert not fine.foreign and not fine.malformed and torch.equal(fine.images[0][0], pixels)
    assert read(prompt=["another"]).foreign and read(image={"seed": 4}).foreign
    assert read(pixels="another").malformed and read(index=1).malformed


def test_answers_that_nobody_saw_are_told() -> None:
    clients = Clients.__new__(Clients)
    clients.seen = Counter({"end": 2, "limit": 3})
    clients.surely_taken, clients.perhaps_taken = 1, 1
    fine = {"end": 2, "tokens": 2, "length": 1, "cancelled": 1}
    assert serve_load.disagreed(fine, clients) == 0
    assert serve_load.disagreed({**fine, "cancelled": 2}, clients) == 0
    assert serve_load.disagreed({**fine, "cancelled": 3}, clients) == 1
    assert serve_load.disagreed({**fine, "cancelled": 0}, clients) == 1
    assert serve_load.disagreed({**fine, "end": 1, "cancelled": 2}, clients) == 1


def test_memory_that_grows_is_told() -> None:
    flat = [50.0] * 12 + [100.0] * 48
    assert serve_load.growth_percent(flat, 60) == 0
    assert serve_load.growth_percent([*flat[:-1], 106.0], 60) == 6
    assert serve_load.growth_percent(flat[:10], 10) is None


def test_no_prompt_comes_twice() -> None:
    draw, load = random.Random(0), Load(0, 2.0, "load")
    asked = [load.next(draw) for _ in range(300)]
    texts = ["".join(part for part in each.prompt if isinstance(part, str)) for each in asked]
    assert len(set(texts)) == len(texts)
    assert {each.kind for each in asked} == {"chat", "native", "image", "edit"}
    assert any(each.pause for each in asked) and any(each.leaves is not None for each in asked)


@pytest.mark.slow
def test_a_server_that_does_not_start_is_told(tmp_path: Path) -> None:
    server = Server(tmp_path / "nothing", tmp_path / "log", grace=1)
    with pytest.raises(RuntimeError, match="not a model folder"):
        server.wait_until_ready()
