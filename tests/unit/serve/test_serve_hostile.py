"""A sample of the campaign of hostile requests, and that it can tell what it looks for."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[3] / "campaigns"))
import serve_hostile
from serve_hostile import EDITS, FIELDS, KINDS, Answer, Attack, Campaign, Kind, Site

REQUESTS, SEED = 150, 1
OF_FORM = {"content-type": "application/json"}
ROW = Kind(lambda rng, site: Attack("", (b"",)), frozenset({400}), "seed")


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    with Campaign(tmp_path_factory.mktemp("hostile"), SEED, body_mb=2) as made:
        yield made


@pytest.fixture
def wrong(campaign: Campaign) -> list[str]:
    """What one test finds."""
    campaign.figures.wrong.clear()
    return campaign.figures.wrong


def test_requests_are_refused_in_one_line(campaign: Campaign, wrong: list[str]) -> None:
    campaign.run(REQUESTS)
    assert wrong == []
    assert {name.partition(":")[0] for name in campaign.figures.counts} == set(KINDS)


def test_every_field_has_wrong_values(campaign: Campaign, wrong: list[str]) -> None:
    campaign.check_fields()
    assert wrong == []
    asked = {(path, name) for path, name, *_ in serve_hostile.field_cases()}
    # In a form any text is one.
    assert asked == {
        (path, name)
        for path, each in FIELDS.items()
        for name, of in each.items()
        if (path, of.kind) != (EDITS, "text")
    }


def test_more_connections_than_files(campaign: Campaign, wrong: list[str]) -> None:
    campaign.flood()
    assert wrong == []


@pytest.mark.slow
def test_schemathesis(campaign: Campaign, wrong: list[str]) -> None:
    campaign.examine(examples=5)
    assert wrong == []
    assert (campaign.figures.schemathesis or 0) > 500


def test_a_seed_and_a_name_make_a_request() -> None:
    site = Site("127.0.0.1:1", 1 << 16, 2, token="t" * 20)
    for name, row in KINDS.items():
        made = [row.make(random.Random(f"{name} {seed}"), site) for seed in (1, 1, 2, 3, 4, 5, 6)]
        assert made[0] == made[1], name
        assert len({each.pieces for each in made}) > 1, name


def error(message: Any = "seed: too small", **changes: Any) -> bytes:
    made = {"message": message, "type": "invalid_request_error", "param": None, "code": None, **changes}
    return json.dumps({"error": made}).encode()


def judged(status: int, body: bytes, *, seconds: float = 0.0, **headers: str) -> list[str]:
    answer = Answer(status, {**OF_FORM, **headers}, body, seconds)
    return serve_hostile.judge(ROW, Attack("", (b"POST / HTTP/1.1",)), answer)


def test_a_right_answer() -> None:
    assert judged(400, error()) == []
    assert judged(400, error(param="seed", code="x")) == []


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (500, error(), "is answered by 500, not 400"),
        (200, b"{}", "is answered by 200, not 400"),
        (307, b"", "is answered by 307, not 400"),
        (400, b"Invalid HTTP request received.", "is not of OpenAI's shape"),
        (400, b'{"detail": "seed"}', "is not of OpenAI's shape"),
        (400, error(param=5), "is not of OpenAI's shape"),
        (400, error(more=1), "is not of OpenAI's shape"),
        (400, error(message=None), "is not of OpenAI's shape"),
        (400, error("a\nseed"), "has no message of one line"),
        (400, error("seed" * 1000), "has no message of one line"),
        (400, error("something is wrong"), "does not say 'seed'"),
        (400, error("seed.list[str].0: too small"), "tells pydantic's"),
        (400, error(param="prompt.str"), "tells pydantic's"),
        (400, error("seed Traceback (most recent call last)"), "tells 'Traceback'"),
        (400, error(f"seed of {serve_hostile.ROOT}/src"), "tells "),
    ],
)
def test_wrong_answers_are_told(status: int, body: bytes, told: str) -> None:
    assert any(each.startswith(told) for each in judged(status, body))


def test_no_answers_are_told() -> None:
    attack = Attack("", (b"POST / HTTP/1.1",))
    hung = serve_hostile.judge(ROW, attack, Answer(problem="timed out"))
    assert hung == ["no answer: timed out"]
    assert serve_hostile.judge(ROW, attack._replace(is_owed=False), Answer(problem="timed out")) == []
    assert judged(400, error(), seconds=11.0) == ["took 11.0 s"]
    assert judged(400, error(), **{"content-type": "text/plain"})[0].startswith("is no JSON")


def test_the_log_is_read(campaign: Campaign, wrong: list[str]) -> None:
    server = campaign.servers[0]
    campaign.judge_log(server)
    with server.log.open("a", encoding="utf-8") as stream:
        stream.write(
            f"POST /v1/generate 200\nTraceback (most recent call last)\nValueError: {serve_hostile.CANARY}\n"
        )
    found = campaign.judge_log(server)
    assert [each.partition(":")[0] for each in found] == ["the log holds a trace", "the log holds a prompt"]
    assert "ValueError" in found[0]
    assert campaign.judge_log(server) == []


def test_failures_of_schemathesis_are_read() -> None:
    said = (
        "____ POST /v1/generate ____\n1. Test Case ID: a\n\n- Server error\n\n    it broke\n\n[500] Internal:\n\n"
        "    `{}`\n\nReproduce with:\n\n    curl -X POST http://localhost/v1/generate\n"
    )
    assert list(serve_hostile._failures(said)) == [
        "schemathesis, POST /v1/generate: Server error | it broke; curl -X POST http://localhost/v1/generate"
    ]


def test_an_end_with_halves_of_requests(campaign: Campaign, wrong: list[str]) -> None:
    """The last, since no server is left."""
    campaign.end()
    assert wrong == []
