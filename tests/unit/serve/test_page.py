"""The page in a real browser, as people use it: typing, watching, stopping, replaying, copying, by mouse or keys."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from transfusion.cli import main
from transfusion.generate import Media, Pipeline, TextDelta
from transfusion.generate.image_files import read_pixels
from transfusion.generate.media_files import as_file, read_media
from transfusion.sequence.tokenizer import Tokenizer

from ..conftest import write_export
from .conftest import SPEECH, TRACE, Live, file_of, file_url, pixels_of, slow_down, squares, wav

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright; pip install playwright")
pytestmark = pytest.mark.slow
Page = Any


@pytest.fixture
def talker(serve: Callable[..., Live], build_pipeline: Callable[..., Pipeline]) -> Live:
    """Says some letters, begins images by itself, and ends by itself."""
    return serve(build_pipeline(image=2.0, end=-1.0))


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Page]]:
    """open_page(url, ...) -> the page. At the end nothing may stand in its console.

    refused: but for what the browser itself says of answers with this status.
    """
    said: list[str] = []

    def start(url: str, *, refused: int = 0, **settings: Any) -> Page:
        context = browser.new_context(
            permissions=["clipboard-read", "clipboard-write"],
            viewport={"width": 1280, "height": 860},
            **settings,
        )
        page = context.new_page()
        page.set_default_timeout(20_000)
        expected = f"Failed to load resource: the server responded with a status of {refused} "

        def listen(message: Any) -> None:
            if message.type == "error" and not message.text.startswith(expected):
                said.append(message.text)

        page.on("console", listen)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(url)
        return page

    yield start
    assert said == []


def ask(page: Page, text: str, mode: str = "both", **settings: Any) -> Any:
    """Send a prompt. Returns its turn. mode: what the answer holds, "draws NAME" for another modality."""
    count = page.locator("article").count()
    for name, value in settings.items():
        page.locator(f"#setting-{name}").fill(str(value))
    page.locator(f"input[name=mode][value='{mode}']").check(force=True)
    page.locator("#prompt").fill(text)
    page.locator("#prompt").press("Enter")
    return page.locator("article").nth(count)


def wait_until_complete(turn: Any) -> None:
    playwright.expect(turn).to_have_attribute("aria-busy", "false", timeout=20_000)


def parts_of(turn: Any) -> list[Any]:
    """Texts, and images as tensors, as they are shown."""
    found: list[Any] = []
    for part in turn.locator(".answer > *").all():
        if part.evaluate("each => each.tagName") == "FIGURE":
            found.append(pixels_of(part.locator("img").get_attribute("src")))
        else:
            found.append(part.text_content())
    return found


def test_text_and_images_arrive_one_is_stopped_and_one_replayed(
    talker: Live, open_page: Callable[..., Page]
) -> None:
    page = open_page(talker.url)
    playwright.expect(page.locator("#model")).to_have_text("small")
    settings: dict[str, Any] = {"temperature": 1.0, "steps": 12, "max_tokens": 24, "max_images": 2}
    answers = ((seed, talker.pipeline.generate(["one"], seed=seed, **settings)[0]) for seed in range(50))
    seed, parts = next(each for each in answers if sum(isinstance(part, str) for part in each[1]) > 2)
    slow_down(talker, 0.03)
    page.get_by_label("A new one each time").uncheck()
    turn = ask(page, "one", temperature=1, steps=12, max_tokens=24, max_images=2, seed=seed)
    # It sharpens while it is made.
    playwright.expect(turn.locator("figcaption").first).to_have_text(re.compile(r"step [1-9]\d? of 12"))
    first = turn.locator("img").first.get_attribute("src")
    wait_until_complete(turn)
    body = _last_request(page)
    shown = parts_of(turn)
    images = [part for part in parts[1:] if not isinstance(part, str)]
    assert images and first != turn.locator("img").first.get_attribute("src")
    assert [part for part in shown if isinstance(part, str)] == [
        part for part in parts[1:] if isinstance(part, str)
    ]
    for image, expected in zip([part for part in shown if not isinstance(part, str)], images, strict=True):
        assert torch.equal(image, expected)
    assert f"seed {body['seed']}" in turn.locator(".under").text_content()

    stopped = ask(page, "two", mode="text", max_tokens=240)
    playwright.expect(stopped.locator(".answer")).not_to_be_empty()
    stopped.locator("text=Stop").click()
    wait_until_complete(stopped)
    playwright.expect(stopped.locator(".under")).to_contain_text("stopped")
    playwright.expect(page.locator("#said")).to_have_text("Stopped.")
    assert len(stopped.locator(".answer").text_content()) < 240

    turn.locator("text=Replay").click()
    again = page.locator("article").nth(2)
    wait_until_complete(again)
    playwright.expect(again.locator(".under")).to_contain_text("made again, the same")

    page.reload()
    # What was stopped has no recipe.
    entries = page.locator("#past button")
    playwright.expect(entries).to_have_count(2)
    entries.first.click()
    assert page.locator("#prompt").input_value() == "one"
    assert page.locator("#setting-seed").input_value() == str(body["seed"])
    assert page.locator("#setting-steps").input_value() == "12"


def _last_request(page: Page) -> dict[str, Any]:
    entries = json.loads(page.evaluate("localStorage.getItem('transfusion-history')"))
    found: dict[str, Any] = entries[0]["body"]
    return found


def test_controls_are_those_that_the_server_takes(
    serve: Callable[..., Live], open_page: Callable[..., Page]
) -> None:
    live = serve()
    fields = live.http.get("/v1/schema").json()["bodies"]["GenerateBody"]["properties"]
    page = open_page(live.url)
    page.wait_for_selector("#controls input")
    names = {
        each.removeprefix("setting-")
        for each in page.locator("#controls [id^=setting-]").evaluate_all(
            "all => all.filter(each => ['INPUT', 'SELECT'].includes(each.tagName)).map(each => each.id)"
        )
    }
    assert names - {"guidance_interval-1"} == set(fields) - {"prompt", "draws", "preview_every"}
    for name in ("steps", "max_tokens", "max_images"):
        slider = page.locator(f"#setting-{name}")
        assert int(slider.get_attribute("max")) <= fields[name]["maximum"]
        assert int(slider.get_attribute("min")) == fields[name]["minimum"]
    options = page.locator("#setting-sampler option").all_text_contents()
    assert options == fields["sampler"]["enum"]


def test_an_image_is_captioned_edited_and_used_again(live: Live, open_page: Callable[..., Page]) -> None:
    (image,) = squares(1)
    page = open_page(live.url)
    page.wait_for_selector("#controls input")
    page.set_input_files(
        "#file", files=[{"name": "a.png", "mimeType": "image/png", "buffer": file_of(image)}]
    )
    playwright.expect(page.locator("#attached img")).to_have_count(1)
    caption = ask(page, "", mode="text", max_tokens=6)
    wait_until_complete(caption)
    assert parts_of(caption) == live.pipeline.caption([image], max_tokens=6)

    # Dropped from elsewhere, as a file that the server cannot read and the browser can.
    page.evaluate(
        """() => {
            const canvas = Object.assign(document.createElement("canvas"), { width: 8, height: 8 });
            const context = canvas.getContext("2d");
            context.fillStyle = "white";
            context.fillRect(0, 0, 8, 8);
            context.fillStyle = "black";
            context.fillRect(0, 0, 8, 4);
            return new Promise((done) => canvas.toBlob((blob) => {
                const transfer = new DataTransfer();
                transfer.items.add(new File([blob], "b.bmp", { type: "image/bmp" }));
                document.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, cancelable: true }));
                done();
            }));
        }"""
    )
    playwright.expect(page.locator("#attached img")).to_have_count(1)
    edited = ask(page, "one", mode="image", steps=4)
    wait_until_complete(edited)
    (drawn,) = parts_of(edited)
    given = pixels_of(edited.locator(".asked img").get_attribute("src"))
    (expected,) = live.pipeline.edit([given], ["one"], seed=_last_request(page)["seed"], steps=4)
    assert torch.equal(drawn, expected.pixels)
    edited.locator("text=Use in a prompt").click()
    assert torch.equal(pixels_of(page.locator("#attached img").get_attribute("src")), drawn)
    page.locator("#attached button").click()
    playwright.expect(page.locator("#attached li")).to_have_count(0)


def add_file(page: Page, name: str, kind: str, data: bytes) -> None:
    page.set_input_files("#file", files=[{"name": name, "mimeType": kind, "buffer": data}])


def test_sounds_are_heard_drawn_and_used_again(sounding: Live, open_page: Callable[..., Page]) -> None:
    page = open_page(sounding.url)
    page.wait_for_selector("#controls input")
    assert page.locator("#controls [role=group] input[type=checkbox]").count() == 3
    add_file(page, "a.wav", "audio/wav", wav())
    playwright.expect(page.locator("#attached canvas")).to_have_count(1)
    turn = ask(page, "one", mode="draws speech", steps=2)
    wait_until_complete(turn)
    body = _last_request(page)
    assert body["draws"] and body["modalities"] == ["speech"]
    assert body["prompt"] == [{"media": file_url(wav()), "modality": "speech"}, "one"]
    player = turn.locator(".answer audio")
    playwright.expect(player).to_have_attribute("aria-label", "Speech 1 of the answer to: one")
    drawn = player.get_attribute("src")
    given = read_media(wav(), sounding.pipeline.config, "a.wav")
    settings: dict[str, Any] = {"seed": body["seed"], "steps": 2}
    (expected,) = sounding.pipeline.sample_media("speech", [[given, "one"]], **settings)
    assert drawn == file_url(as_file(expected, sounding.pipeline.config).data)
    # The browser plays it, and its spectrogram has a column for each 256 samples.
    page.wait_for_function("document.querySelector('.answer audio').readyState > 0")
    assert player.evaluate("each => [each.error, each.duration]") == [None, 4096 / 16_000]
    playwright.expect(turn.locator(".answer canvas")).to_have_attribute("width", "16")
    playwright.expect(turn.locator("figcaption")).to_contain_text("speech, 0.3 s")
    playwright.expect(page.locator("#said")).to_contain_text("1 of speech")
    turn.locator("text=Replay").click()
    again = page.locator("article").nth(1)
    wait_until_complete(again)
    playwright.expect(again.locator(".under")).to_contain_text("made again, the same")

    turn.locator("text=Use in a prompt").click()
    heard = ask(page, "", mode="text", max_tokens=4)
    wait_until_complete(heard)
    said = sounding.pipeline.caption([read_url(drawn, sounding)], max_tokens=4)
    assert parts_of(heard) == said
    heard.locator("text=As the model sees it").click()
    playwright.expect(page.locator("#sequence-facts")).to_contain_text("4 patches of 0 images, 1 of speech")


def read_url(url: str, live: Live) -> Media:
    """The sound of a data URL, as the network reads it."""
    read = read_media(base64.b64decode(url.partition(",")[2]), live.pipeline.config, "a.wav")
    assert isinstance(read, Media)
    return read


def test_an_answer_holds_what_is_checked(sounding: Live, open_page: Callable[..., Page]) -> None:
    page = open_page(sounding.url)
    page.wait_for_selector("#controls input")
    page.get_by_label("Image", exact=True).last.uncheck()
    page.get_by_label("Speech", exact=True).last.uncheck()
    # One is left.
    page.get_by_label("Trace", exact=True).last.click()
    settings: dict[str, Any] = {"temperature": 1.0, "steps": 2, "max_images": 2}
    answers = (
        (seed, sounding.pipeline.generate(["one"], seed=seed, modalities=["trace"], **settings)[0])
        for seed in range(50)
    )
    seed = next(seed for seed, parts in answers if any(isinstance(part, Media) for part in parts))
    page.get_by_label("A new one each time").uncheck()
    turn = ask(page, "one", temperature=1, steps=2, max_images=2, seed=seed)
    wait_until_complete(turn)
    assert _last_request(page)["modalities"] == ["trace"]
    link = turn.locator("figcaption a").first
    assert link.get_attribute("href").startswith("data:application/octet-stream;base64,")
    assert re.fullmatch(r"transfusion-\d+\.trace\.npy", link.get_attribute("download"))
    playwright.expect(turn.locator("figcaption").first).to_contain_text("trace, 160 bytes")
    page.reload()
    page.locator("#past button").first.click()
    assert page.locator("#controls [role=group] input:checked").count() == 1


def test_files_that_only_a_browser_reads_are_converted(
    sounding: Live, open_page: Callable[..., Page]
) -> None:
    soundfile = pytest.importorskip("soundfile")
    stream = io.BytesIO()
    soundfile.write(stream, np.zeros((4410, 2), np.float32), 44_100, format="OGG")
    page = open_page(sounding.url)
    page.wait_for_selector("#controls input")
    add_file(page, "a.ogg", "audio/ogg", stream.getvalue())
    playwright.expect(page.locator("#attached canvas")).to_have_count(1)
    add_file(page, "b.mp3", "audio/mpeg", b"no sound")
    playwright.expect(page.locator("#unread")).to_have_text(
        "Neither this browser nor this model reads b.mp3."
    )
    wait_until_complete(ask(page, "one", mode="text", max_tokens=2))
    playwright.expect(page.locator("#unread")).to_be_hidden()
    sent = _last_request(page)["prompt"][0]["media"]
    assert sent.startswith("data:audio/wav;base64,")
    # 0.1 s at 16 kHz.
    assert abs(len(base64.b64decode(sent.partition(",")[2])) - 44 - 2 * 1600) < 200


def test_what_is_copied_of_sounds_makes_the_same(
    serve: Callable[..., Live],
    open_page: Callable[..., Page],
    build_model: Callable[..., Any],
    tokenizer: Tokenizer,
    tmp_path: Path,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("soxr")
    config, model = build_model(modalities=[SPEECH, TRACE])
    write_export(tmp_path, config.as_dict(), tokenizer, model)
    (here / "sound1.wav").write_bytes(wav())
    live = serve(Pipeline.from_export(tmp_path))
    page = open_page(live.url)
    page.wait_for_selector("#controls input")
    turn = ask(page, "one", mode="draws speech", steps=3)
    wait_until_complete(turn)
    drawn = base64.b64decode(turn.locator(".answer audio").get_attribute("src").partition(",")[2])
    copied = {name: _copy(page, turn, name) for name in ("Command line", "curl", "Python")}
    assert "sample MODEL --modality speech --out speech" in copied["Command line"]
    _run_command(copied["Command line"], tmp_path, monkeypatch)
    assert (here / "speech" / "0000.wav").read_bytes() == drawn
    exec(copied["Python"].replace("MODEL", str(tmp_path)), {})
    assert (here / "drawn.wav").read_bytes() == drawn
    told = subprocess.run(["bash", "-c", copied["curl"]], capture_output=True, text=True, check=True).stdout
    assert base64.b64decode(re.findall(r'"data": "([^"]+)"', told)[0]) == drawn

    add_file(page, "a.wav", "audio/wav", wav())
    turn = ask(page, "two", max_tokens=3)
    wait_until_complete(turn)
    said = "".join(part for part in parts_of(turn) if isinstance(part, str))
    command = _copy(page, turn, "Command line")
    assert "--modality image --modality speech --modality trace" in command and "@sound1.wav 'two'" in command
    python = (
        _copy(page, turn, "Python")
        .replace("MODEL", str(tmp_path))
        .replace("print(event)", "told.append(event)")
    )
    events: list[Any] = []
    exec(python, {"told": events})
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == said
    told = subprocess.run(
        ["bash", "-c", _copy(page, turn, "curl")], capture_output=True, text=True, check=True
    ).stdout
    assert "".join(json.loads(text)["text"] for text in re.findall(r"event: text\ndata: (.*)", told)) == said


def _run_command(copied: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was copied as a command line, in this process."""
    command = ["bash", "-c", f"printf '%s\\n' {copied.replace('MODEL', str(folder))}"]
    words = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert not ended.value.code


def test_a_thread_goes_on(live: Live, open_page: Callable[..., Page]) -> None:
    page = open_page(live.url)
    page.wait_for_selector("#controls input")
    first = ask(page, "one", mode="text", max_tokens=5)
    wait_until_complete(first)
    (said,) = parts_of(first)
    page.locator("#whole-thread").check()
    second = ask(page, "two", mode="text")
    wait_until_complete(second)
    (expected,) = live.pipeline.generate([f"one{said}\ntwo"], max_tokens=5, max_images=0)
    assert parts_of(second) == expected[1:]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which what was copied runs."""
    made = tmp_path / "here"
    made.mkdir()
    monkeypatch.chdir(made)
    return made


def test_what_is_copied_makes_the_same(
    serve: Callable[..., Live],
    open_page: Callable[..., Page],
    folder: Path,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The command line and Python on the same export, and curl on the same server."""
    live = serve(Pipeline.from_export(folder))
    page = open_page(live.url)
    page.wait_for_selector("#controls input")
    turn = ask(page, "one $HOME `two` it's \\n", mode="image", steps=3, guidance=2, negative_prompt="three's")
    wait_until_complete(turn)
    (drawn,) = parts_of(turn)
    copied = {name: _copy(page, turn, name) for name in ("Command line", "curl", "Python")}

    _run_command(copied["Command line"], folder, monkeypatch)
    assert torch.equal(read_pixels(here / "images" / "0000.png"), drawn)

    python = copied["Python"].replace("MODEL", str(folder))
    exec(python, {})
    assert torch.equal(read_pixels(here / "drawn.png"), drawn)

    told = subprocess.run(["bash", "-c", copied["curl"]], capture_output=True, text=True, check=True).stdout
    (png,) = re.findall(r'^data: .*"png": "([^"]+)".*"recipe"', told, re.MULTILINE)
    assert torch.equal(pixels_of(png), drawn)


def test_what_is_copied_of_an_answer_with_an_image(
    serve: Callable[..., Live],
    open_page: Callable[..., Page],
    folder: Path,
    here: Path,
) -> None:
    (image,) = squares(1)
    (here / "image1.png").write_bytes(file_of(image))
    live = serve(Pipeline.from_export(folder))
    page = open_page(live.url)
    page.wait_for_selector("#controls input")
    page.set_input_files(
        "#file", files=[{"name": "a.png", "mimeType": "image/png", "buffer": file_of(image)}]
    )
    turn = ask(page, "@one", mode="text", max_tokens=4, temperature=1)
    wait_until_complete(turn)
    said = "".join(parts_of(turn))
    told = subprocess.run(
        ["bash", "-c", _copy(page, turn, "curl")], capture_output=True, text=True, check=True
    )
    assert (
        "".join(json.loads(text)["text"] for text in re.findall(r"event: text\ndata: (.*)", told.stdout))
        == said
    )
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {_copy(page, turn, 'Command line').replace('MODEL', str(folder))}"],
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    told = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, check=True)
    assert told.stdout.rstrip("\n") == said.rstrip("\n")


def _copy(page: Page, turn: Any, name: str) -> str:
    turn.locator("text=/^Cop(y|ied) as/").click()
    turn.locator(".menu li button", has_text=name).click()
    playwright.expect(turn.locator(".menu > button")).to_have_text(f"Copied as {name}")
    text: str = page.evaluate("navigator.clipboard.readText()")
    return text


def test_the_sequence_is_shown_as_the_model_sees_it(live: Live, open_page: Callable[..., Page]) -> None:
    page = open_page(live.url)
    page.wait_for_selector("#controls input")
    turn = ask(page, "one", mode="image", steps=2)
    wait_until_complete(turn)
    turn.locator("text=As the model sees it").click()
    options = page.locator("#tokens [role=option]")
    letters = live.pipeline.tokenizer.encode("one")
    # <BOS>, the text, <BOI>, the image, <EOI>.
    playwright.expect(options).to_have_count(len(letters) + 4)
    playwright.expect(page.locator("#sequence-facts")).to_contain_text("16 patches of 1 image")
    options.first.focus()
    for _ in range(len(letters) + 2):
        page.keyboard.press("ArrowRight")
    playwright.expect(page.locator("#position")).to_contain_text("15 patches of its image after it")
    page.keyboard.press("End")
    playwright.expect(page.locator("#position")).to_contain_text("EOI")
    assert page.locator("#mask").evaluate("each => [each.width, each.height]") == [len(letters) + 19] * 2
    page.keyboard.press("Escape")
    playwright.expect(page.locator("#sequence")).to_be_hidden()


def test_a_refused_request_says_why(live: Live, open_page: Callable[..., Page]) -> None:
    page = open_page(live.url, refused=400)
    page.wait_for_selector("#controls input")
    turn = ask(page, "one two three " * 30, mode="text")
    wait_until_complete(turn)
    playwright.expect(turn.locator("[role=alert]")).to_contain_text("leaves no room")


def test_the_token_is_asked_for_until_it_is_right(
    serve: Callable[..., Live], open_page: Callable[..., Page]
) -> None:
    live = serve(token="correct-horse-battery-staple")
    page = open_page(live.url, refused=401)
    for word in ("wrong", "correct-horse-battery-staple"):
        playwright.expect(page.locator("#token-dialog")).to_be_visible()
        page.locator("#token").fill(word)
        page.locator("#token").press("Enter")
    playwright.expect(page.locator("#model")).to_have_text("small")
    wait_until_complete(ask(page, "one", mode="text", max_tokens=2))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize(("model", "mode"), [("live", "image"), ("sounding", "draws speech")])
def test_no_serious_fault_for_those_who_cannot_see_it(
    request: pytest.FixtureRequest,
    open_page: Callable[..., Page],
    scheme: str,
    width: int,
    model: str,
    mode: str,
) -> None:
    live: Live = request.getfixturevalue(model)
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python"
    )
    page = open_page(live.url, color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    page.wait_for_selector("#controls input", state="attached")

    def check() -> None:
        found = axe.Axe().run(page).response["violations"]
        serious = [each for each in found if each["impact"] in ("serious", "critical")]
        assert [(each["id"], [node["html"][:90] for node in each["nodes"]]) for each in serious] == []
        # Nothing is wider than the page.
        assert page.evaluate("document.documentElement.scrollWidth") <= width

    check()
    turn = ask(page, "one", mode=mode)
    wait_until_complete(turn)
    check()
    turn.locator("text=Copy as").click()
    check()
    page.keyboard.press("Escape")
    if width < 1000:
        page.locator("#show-settings").click()
        check()
        page.keyboard.press("Escape")
    turn.locator("text=As the model sees it").click()
    playwright.expect(page.locator("#sequence")).to_be_visible()
    check()


def test_all_of_it_works_by_keys(live: Live, open_page: Callable[..., Page]) -> None:
    page = open_page(live.url)
    page.wait_for_selector("#controls input")
    playwright.expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.value") == "image"
    for _ in range(10):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "send":
            break
    page.keyboard.press("Enter")
    turn = page.locator("article").first
    wait_until_complete(turn)
    assert len(parts_of(turn)) == 1
    # A long answer is stopped by Escape.
    slow_down(live, 0.03)
    long = ask(page, "two", mode="text")
    playwright.expect(long.locator(".answer")).not_to_be_empty()
    page.keyboard.press("Escape")
    wait_until_complete(long)
    playwright.expect(long.locator(".under")).to_contain_text("stopped")
