"""The board: what it tells of made-up run folders, what it keeps to itself, and the page in a browser."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from PIL import Image

from transfusion.cli import main
from transfusion.observe.runfolder import RunFolder
from transfusion.serve.board.app import build_app
from transfusion.serve.board.curves import POINTS
from transfusion.serve.board.folders import Runs
from transfusion.serve.connection import PlainServer, bind
from transfusion.serve.guard import Guard

from .conftest import PATIENCE, wait_for

TOKEN = "correct-horse-battery-staple"
LONG_AGO = 1_700_000_000


def line(step: int, attempt: int = 1, **values: Any) -> str:
    told = {"step": step, "loss": 10.0 / step, "tokens": step * 100, "tokens_per_second": 50.0}
    return json.dumps({**told, "time": LONG_AGO + step, "attempt": attempt, **values}) + "\n"


def make_run(folder: Path, steps: int = 4, *, rate: float = 0.1, grids: tuple[int, ...] = ()) -> Path:
    """A run that ended long ago."""
    (folder / "samples").mkdir(parents=True)
    config = {"train": {"steps": 10}, "optimizer": {"rate": rate}, "sample_grid": {"prompts": ["one", "two"]}}
    (folder / "config.yaml").write_text(yaml.safe_dump({"run": {"name": folder.name}, **config}))
    (folder / "metrics.jsonl").write_text("".join(line(step) for step in range(1, steps + 1)))
    (folder / "log.txt").write_text("2026-11-30 13:31:48,706 INFO begun\n")
    for step in grids:
        Image.new("L", (8, 8), step % 256).save(folder / "samples" / f"step_{step:07d}.png")
    for name in ("config.yaml", "metrics.jsonl"):
        os.utime(folder / name, (LONG_AGO, LONG_AGO))
    return folder


def append(folder: Path, text: str, name: str = "metrics.jsonl") -> None:
    with (folder / name).open("a") as file:
        file.write(text)


class Board:
    """A board that runs in a thread."""

    def __init__(self, root: Path, token: str | None = None) -> None:
        self._listener = bind("127.0.0.1", 0)
        self._server = PlainServer(Guard(build_app(Runs(root)), token), 1)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._server.run, args=([self._listener],), daemon=True)
        self._thread.start()
        wait_for(lambda: self._server.started)
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE)

    def get(self, path: str, **query: Any) -> Any:
        answer = self.http.get(f"/api/{path}", params=query)
        assert answer.is_success, answer.text
        return answer.json()

    def series(self, run: str, *names: str, cursor: str = "") -> Any:
        return self.get("series", run=run, name=list(names), cursor=cursor)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(PATIENCE)
        self._listener.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Board]]:
    """start(token=) -> a board of the runs in tmp_path / "runs"."""
    (tmp_path / "runs").mkdir()
    with contextlib.ExitStack() as stack:

        def begin(root: Path = tmp_path / "runs", token: str | None = None) -> Board:
            board = Board(root, token)
            stack.callback(board.stop)
            return board

        yield begin


@pytest.fixture
def runs(tmp_path: Path, start: object) -> Path:
    return tmp_path / "runs"


def test_what_suites_of_a_training_found_is_no_loss(runs: Path, start: Callable[..., Board]) -> None:
    make_run(runs / "one")
    with open(runs / "one" / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 4, "eval_pairs_image_loss": 0.5, "time": 0.0, "attempt": 1}) + "\n")
    [listed] = start().get("runs")["runs"]
    assert listed["losses"] == {"loss": 2.5}


def test_runs_are_found_also_in_grids(runs: Path, start: Callable[..., Board]) -> None:
    make_run(runs / "one")
    make_run(runs / "grid" / "cell")
    make_run(runs / "study" / "grid" / "cell", grids=(0,))
    make_run(runs / ".hidden")
    make_run(runs / "a" / "b" / "c" / "too-deep")
    (runs / "one" / "export").mkdir()
    (runs / "one" / "export" / "config.yaml").write_text("x: 1")
    board = start()
    listed = {run["name"]: run for run in board.get("runs")["runs"]}
    assert list(listed) == ["grid/cell", "one", "study/grid/cell"]
    assert board.get("samples", run="study/grid/cell")["grids"][0]["step"] == 0
    one = listed["one"]
    assert (one["state"], one["step"], one["steps"]) == ("ended", 4, 10)
    assert one["losses"] == {"loss": 2.5} and one["tokens_per_second"] == 50.0 and one["tokens"] == 400
    assert one["written"] == LONG_AGO and one["notes"] == [] and one["seconds_left"] is None
    assert [run["name"] for run in start(runs / "one").get("runs")["runs"]] == ["one"]


def test_a_run_is_under_way_while_it_writes_or_holds_its_lock(
    runs: Path, start: Callable[..., Board]
) -> None:
    one, other = make_run(runs / "one"), make_run(runs / "other")
    board = start()

    def states() -> list[str]:
        return [run["state"] for run in board.get("runs")["runs"]]

    assert states() == ["ended", "ended"]
    append(other, line(5))
    assert states() == ["ended", "running"] and board.get("runs")["runs"][1]["seconds_left"] == 5
    with RunFolder(one).lock():
        expected = "running" if Path("/proc/locks").exists() else "ended"
        assert states() == [expected, "running"]
        # To look at the list took no lock.
    with RunFolder(one).lock():
        pass
    assert states() == ["ended", "running"]


def test_colours_stay_with_their_runs(runs: Path, start: Callable[..., Board]) -> None:
    make_run(runs / "b")
    make_run(runs / "c")
    board = start()

    def slots() -> dict[str, int]:
        return {run["name"]: run["slot"] for run in board.get("runs")["runs"]}

    assert slots() == {"b": 0, "c": 1}
    make_run(runs / "a")
    assert slots() == {"a": 2, "b": 0, "c": 1}
    shutil.rmtree(runs / "b")
    assert slots() == {"a": 2, "c": 1}


def test_only_what_is_asked_for_and_what_is_new(runs: Path, start: Callable[..., Board]) -> None:
    folder = make_run(runs / "one")
    append(folder, line(5, image_loss_by_timestep=[0.5, None, 0.25], validation_text_loss=3))
    board = start()
    first = board.series("one", "loss", "image_loss_by_timestep")
    assert first["points"] == {
        "loss": [[1, 10], [2, 5], [3, 3.333333], [4, 2.5], [5, 2]],
        "image_loss_by_timestep.0": [[5, 0.5]],
        "image_loss_by_timestep.2": [[5, 0.25]],
    }
    assert first["width"] == 1 and first["lines"] == 5 and first["broken"] == 0
    assert {"loss", "image_loss_by_timestep", "validation_text_loss", "elapsed"} <= set(first["names"])
    assert board.series("one", "elapsed")["points"]["elapsed"] == [[step + 1, step] for step in range(5)]
    append(folder, line(6) + line(7)[:-10])
    second = board.series("one", "loss", cursor=first["cursor"])
    # The newest step is told once more, since its line can be followed by another.
    assert second["first"] == 5 and second["points"]["loss"] == [[5, 2], [6, 1.666667]]
    append(folder, line(7)[-10:])
    third = board.series("one", "loss", cursor=second["cursor"])
    assert third["points"]["loss"] == [[6, 1.666667], [7, 1.428571]]
    for cursor in ("nonsense", "1.2.3.4", first["cursor"] + "0" * 30, "...", first["cursor"] + "x"):
        assert board.series("one", "loss", cursor=cursor)["first"] == 0


def test_a_resumed_run_has_one_past(runs: Path, start: Callable[..., Board]) -> None:
    folder = make_run(runs / "one", 6)
    append(folder, '{"step": 6, "validation_text_loss": 4, "time": 1700000009, "attempt": 1}\n')
    board = start()
    before = board.series("one", "loss", "elapsed")
    assert before["points"]["elapsed"][-1] == [6, 8]
    # What is measured again after step 4 belongs to the second start, as does the loss from step 5 on.
    append(folder, '{"step": 4, "validation_text_loss": 2, "time": 1700000100, "attempt": 2}\n')
    append(folder, line(5, 2, loss=7.0, time=LONG_AGO + 103))
    after = board.series("one", "loss", "validation_text_loss", "elapsed", cursor=before["cursor"])
    assert after["first"] == 0
    assert after["points"]["loss"] == [[1, 10], [2, 5], [3, 3.333333], [4, 2.5], [5, 7]]
    assert after["points"]["validation_text_loss"] == [[4, 2]]
    # The time between the starts does not count.
    assert after["points"]["elapsed"][-1] == [5, 11]


def test_long_runs_are_thinned_and_keep_their_extremes(runs: Path, start: Callable[..., Board]) -> None:
    folder = make_run(runs / "one")
    steps = 5000
    (folder / "metrics.jsonl").write_text(
        "".join(line(step, loss=99.0 if step == 777 else 1.0) for step in range(1, steps + 1))
    )
    board = start()
    told = board.series("one", "loss")
    points = told["points"]["loss"]
    assert POINTS / 2 < len(points) <= POINTS + 1 and told["width"] == 8
    assert max(point[3] for point in points if len(point) > 2) == 99.0
    assert max(point[1] for point in points) == pytest.approx((99 + 7) / 8)
    append(folder, line(steps + 1))
    more = board.series("one", "loss", cursor=told["cursor"])
    assert more["first"] == 5000 and len(more["points"]["loss"]) == 1
    # Dots of validation stay at their steps.
    append(folder, json.dumps({"step": 5001, "validation_text_loss": 2.0}) + "\n")
    assert board.series("one", "validation_text_loss")["points"]["validation_text_loss"] == [[5001, 2]]


def test_lines_that_cannot_be_read_are_counted(runs: Path, start: Callable[..., Board]) -> None:
    folder = make_run(runs / "one", 1)
    huge = "9" * 400
    odd = [
        "not json",
        "[1]",
        '{"step": "2"}',
        '{"step": true}',
        '{"step": -1}',
        f'{{"step": {huge}}}',
        "[" * 5000,
    ]
    append(folder, "\n".join(odd) + "\n\n")
    append(folder, '{"step": 2, "loss": NaN, "text_loss": Infinity, "name": "x", "deep": {"a": 1}}\n')
    append(folder, f'{{"step": 3, "loss": null, "text_loss": {huge}}}\n{{"step": 4, "lo')
    (folder / "metrics.jsonl").write_bytes((folder / "metrics.jsonl").read_bytes() + b"\xff\xfe\n")
    board = start()
    told = board.series("one", "loss", "text_loss", "name", "deep")
    assert told["points"] == {"loss": [[1, 10]]}
    assert (told["broken"], told["not_finite"]) == (len(odd) + 1, 2)
    assert board.get("runs")["runs"][0]["step"] == 3


def test_what_is_missing_is_told_in_words(runs: Path, start: Callable[..., Board]) -> None:
    folder = make_run(runs / "one")
    make_run(runs / "other")
    for name in ("metrics.jsonl", "log.txt"):
        (folder / name).unlink()
    shutil.rmtree(folder / "samples")
    board = start()
    for config in (
        "",
        "[1]",
        "a: [",
        "train: 3",
        "train: {steps: many}",
        "a: &a [*a]",
        "a: &a {b: *a}",
        "\x00",
    ):
        (folder / "config.yaml").write_text(config)
        listed = board.get("runs")["runs"][0]
        assert listed["step"] is None and listed["steps"] is None and "no step" in listed["notes"][0]
        assert board.series("one", "loss")["points"] == {}
        assert board.get("samples", run="one") == {"grids": [], "prompts": []}
        assert "no log.txt" in board.get("log", run="one")["note"]
        told = board.get("differences", run=["one", "other"])
        assert told["unreadable"] == ["one"] or told["rows"]


def test_samples(runs: Path, start: Callable[..., Board]) -> None:
    folder = make_run(runs / "one", grids=(0, 400))
    (folder / "samples" / "step_x.png").write_bytes(b"")
    board = start()
    told = board.get("samples", run="one")
    assert [grid["step"] for grid in told["grids"]] == [0, 400] and told["prompts"] == ["one", "two"]
    image = board.http.get("/api/samples/400", params={"run": "one"})
    assert image.headers["content-type"] == "image/png" and Image.open(io.BytesIO(image.content)).size == (
        8,
        8,
    )
    for step in ("1", "-1", "x", "9" * 5000, "0x190", "4e2"):
        assert board.http.get(f"/api/samples/{step}", params={"run": "one"}).status_code == 404
    Image.new("L", (9, 9)).save(folder / "samples" / "step_0000400.png")
    assert board.get("samples", run="one")["grids"][1]["version"] != told["grids"][1]["version"]


def test_the_log_is_read_on(runs: Path, start: Callable[..., Board]) -> None:
    folder = make_run(runs / "one")
    board = start()
    told = board.get("log", run="one")
    assert told["whole"] and told["lines"] == ["2026-11-30 13:31:48,706 INFO begun"]
    append(folder, "second\nhalf a l", "log.txt")
    told = board.get("log", run="one", cursor=told["cursor"])
    assert not told["whole"] and told["lines"] == ["second"]
    append(folder, "ine\n", "log.txt")
    assert board.get("log", run="one", cursor=told["cursor"])["lines"] == ["half a line"]
    (folder / "log.txt").write_text("".join(f"line {number}\n" for number in range(20_000)))
    long = board.get("log", run="one", cursor=told["cursor"])
    assert long["whole"] and long["lines"][-1] == "line 19999" and 1000 < len(long["lines"]) < 10_000
    assert re.fullmatch(r"line \d+", long["lines"][0])
    (folder / "log.txt").write_bytes(b"\xff\n")
    assert board.get("log", run="one", cursor=long["cursor"])["lines"] == ["\ufffd"]


def test_differences(runs: Path, start: Callable[..., Board]) -> None:
    make_run(runs / "one", rate=0.1)
    other = make_run(runs / "other", rate=0.2)
    append(other, "extra: {a: [1, 2]}\n", "config.yaml")
    board = start()
    told = board.get("differences", run=["one", "other"])
    assert told["runs"] == ["one", "other"] and told["unreadable"] == []
    rows = {row["name"]: row["values"] for row in told["rows"]}
    assert rows == {"optimizer.rate": ["0.1", "0.2"], "extra.a": [None, "[1, 2]"]}
    assert board.get("differences", run=["one", "one"])["rows"] == []


def test_a_name_from_outside_never_becomes_a_path(
    tmp_path: Path, runs: Path, start: Callable[..., Board]
) -> None:
    make_run(runs / "one", grids=(0,))
    make_run(tmp_path / "secret", grids=(0,))
    (runs / "link").symlink_to(tmp_path / "secret")
    board = start()
    assert "left out" in board.get("runs")["notes"][0]
    ways = (
        "",
        ".",
        "..",
        "../secret",
        "one/../../secret",
        "/etc",
        "one/",
        "./one",
        "one\0",
        "%2e%2e",
        "link",
        "one/x",
    )
    for name in ways:
        for path in ("series", "samples", "samples/0", "log", "differences"):
            refused = board.http.get(f"/api/{path}", params={"run": name})
            assert refused.status_code == 404 and refused.json()["error"]["code"] == "run_not_found"
    for path in ("../app.py", "%2e%2e/app.py", "app.py", "board.html%00", "..%2fapp.py", "", "/etc/passwd"):
        assert board.http.get(f"/page/{path}").status_code == 404


def test_no_link_leads_out_of_the_runs(tmp_path: Path, runs: Path, start: Callable[..., Board]) -> None:
    secret = make_run(tmp_path / "secret", grids=(0,))
    folder = make_run(runs / "one", grids=(4,))
    board = start()
    for name in ("metrics.jsonl", "log.txt", "config.yaml"):
        (folder / name).unlink()
        (folder / name).symlink_to(secret / name)
    shutil.rmtree(folder / "samples")
    (folder / "samples").symlink_to(secret / "samples")
    assert board.get("runs")["runs"][0]["step"] is None
    assert board.series("one", "loss")["points"] == {} and board.get("log", run="one")["lines"] == []
    assert board.get("samples", run="one") == {"grids": [], "prompts": []}
    assert board.http.get("/api/samples/0", params={"run": "one"}).status_code == 404
    # A folder that was found, and then replaced by a link.
    shutil.rmtree(folder)
    folder.symlink_to(secret)
    assert board.http.get("/api/log", params={"run": "one"}).json().get("lines", []) == []


def test_a_folder_may_go_away(tmp_path: Path, runs: Path, start: Callable[..., Board]) -> None:
    make_run(runs / "one")
    make_run(runs / "other")
    board = start()
    known = board.series("one", "loss")
    shutil.rmtree(runs / "one")
    gone = board.http.get("/api/series", params={"run": "one", "cursor": known["cursor"]})
    assert gone.status_code == 404 and "no run one" in gone.json()["error"]["message"]
    assert [run["name"] for run in board.get("runs")["runs"]] == ["other"]
    # A longer file takes the place of one that was read.
    (runs / "other" / "metrics.jsonl").write_text("".join(line(step, loss=7.0) for step in range(1, 9)))
    again = board.series("other", "loss", cursor=board.series("other", "loss")["cursor"])
    assert again["points"]["loss"] == [[8, 7]]
    (runs / "other" / "metrics.jsonl").write_text("".join(line(step, loss=8.0) for step in range(5, 20)))
    again = board.series("other", "loss", cursor=again["cursor"])
    assert again["first"] == 0 and again["points"]["loss"] == [[step, 8] for step in range(5, 20)]
    # Another run takes its name, and shares nothing with it.
    make_run(runs / "one", 2)
    assert len(board.series("one", "loss", cursor=known["cursor"])["points"]["loss"]) == 2
    shutil.rmtree(runs)
    listed = board.get("runs")
    assert listed["runs"] == [] and "no longer there" in listed["notes"][0]
    assert board.http.get("/api/log", params={"run": "other"}).status_code == 404


def test_names_may_have_any_bytes(runs: Path, start: Callable[..., Board]) -> None:
    make_run(Path(os.fsdecode(os.fsencode(runs) + b"/odd\xff \xc3\xa4 <b>&amp;")))
    board = start()
    name = board.get("runs")["runs"][0]["name"]
    assert name == "odd\\xff ä <b>&amp;" and len(board.series(name, "loss")["points"]["loss"]) == 4


def test_who_may_look(runs: Path, start: Callable[..., Board]) -> None:
    make_run(runs / "one")
    board = start()
    assert board.http.get("/api/runs", headers={"Host": "evil.example"}).status_code == 403
    assert board.http.get("/api/runs", headers={"Origin": "http://evil.example"}).status_code == 403
    assert board.http.post("/api/runs").status_code == 405
    assert "the page is at /" in board.http.get("/none").json()["error"]["message"]
    guarded = start(token=TOKEN)
    assert guarded.http.get("/").is_success and guarded.http.get("/page/board.js").is_success
    for path in ("/api/runs", "/api/log?run=one", "/api/samples/0?run=one"):
        assert guarded.http.get(path).status_code == 401
    assert guarded.http.get("/api/runs", headers={"Authorization": f"Bearer {TOKEN}"}).is_success


def test_the_page_keeps_to_its_policy(start: Callable[..., Board]) -> None:
    board = start()
    page = board.http.get("/")
    assert "script-src 'self'; style-src 'self'" in page.headers["content-security-policy"]
    assert page.headers["content-type"].startswith("text/html")
    # No style or script within the page, and nothing from elsewhere.
    assert not re.search(r"<style|style=|<script>|\son\w+=|https?://", page.text)
    named = re.findall(r'(?:src|href)="(/page/[^"]+)"', page.text)
    assert len(named) == 2 and all(board.http.get(name).is_success for name in named)


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["transfusion", "board", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main.main()
        assert ended.value.code == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        return message

    assert "transfusion train configs/train/quickstart.yaml" in refused(tmp_path / "none")
    assert "--token-file" in refused(tmp_path, "--host", "0.0.0.0")
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        assert "choose another --port" in refused(tmp_path, "--port", taken.getsockname()[1])


def test_the_board_needs_no_torch() -> None:
    code = "import sys, transfusion.cli.main, transfusion.serve.board.app; print('torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout == "False\n"


@pytest.mark.slow
def test_the_page_in_a_browser(runs: Path, start: Callable[..., Board], browser: Any) -> None:
    make_run(runs / "one", grids=(0, 400, 800), rate=0.1)
    under_way = make_run(runs / "other", 6, grids=(0, 400), rate=0.2)
    append(under_way, line(7))
    board = start()
    page = browser.new_page()
    page.set_default_timeout(PATIENCE * 1000)
    complaints: list[str] = []
    page.on(
        "console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(board.url)
    panel = page.get_by_role("img", name="Total loss")
    panel.wait_for()
    wait_for(lambda: "other ends at" in (panel.get_attribute("aria-label") or ""))
    assert page.locator("#live").inner_text() == "Live, one run under way"
    assert page.locator("#differences tbody tr").all_inner_texts() == ["optimizer.rate\t0.1\t0.2"]

    page.get_by_role("checkbox", name="one").uncheck()
    wait_for(lambda: "one ends at" not in (panel.get_attribute("aria-label") or ""))
    assert page.url.endswith("#run=other")
    page.get_by_role("checkbox", name="one").check()

    captions = page.locator("#samples small")
    wait_for(lambda: captions.all_inner_texts() == ["step 800", "step 400"])
    page.locator("#step").press("ArrowLeft")
    page.locator("#step").press("ArrowLeft")
    wait_for(lambda: captions.all_inner_texts() == ["step 0", "step 0"])
    wait_for(lambda: page.locator("#samples img").first.evaluate("image => image.naturalWidth") == 8)

    panel.press("End")
    panel.press("ArrowLeft")
    assert "step " in page.locator("#spoken").inner_text()
    append(under_way, line(8, loss=123.0))
    append(under_way, "2026-11-30 13:31:49,706 WARNING a new line\n", "log.txt")
    begin = time.monotonic()
    wait_for(lambda: "8 of 10" in page.locator("#facts").inner_text())
    wait_for(
        lambda: "123" in (panel.get_attribute("aria-label") or "") or "up to 123" in panel.text_content()
    )
    wait_for(lambda: "warning: a new line" in page.locator("#log").inner_text())
    assert time.monotonic() - begin < PATIENCE and complaints == []
