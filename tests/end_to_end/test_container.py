"""The images of the server: what they may do, what is in them, and where Docker runs that they build and answer."""

from __future__ import annotations

import shutil
import subprocess
import time
import tomllib
import urllib.request
from pathlib import Path

import pytest
import yaml

from .conftest import ROOT, Workplace

FOLDER = ROOT / "launch" / "container"
IMAGES = ("cpu", "cuda")


def has_docker() -> bool:
    """Whether an engine answers. The client alone builds nothing."""
    return (
        shutil.which("docker") is not None
        and subprocess.run(["docker", "info"], capture_output=True).returncode == 0
    )


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_is_small_and_not_run_as_root(name: str) -> None:
    lines = (FOLDER / f"{name}.Dockerfile").read_text().splitlines()
    stages = [number for number, line in enumerate(lines) if line.startswith("FROM ")]
    assert len(stages) == 2 and all("slim" in lines[number] for number in stages)
    last = lines[stages[-1] :]
    assert "USER 10001" in last and not any(
        line.startswith("USER") for line in last[last.index("USER 10001") + 1 :]
    )
    assert any(line.startswith("HEALTHCHECK") for line in last)
    # What compiles and caches stays in the first stage.
    assert not any("pip install" in line for line in last)


@pytest.mark.parametrize("name", IMAGES)
def test_what_an_image_is_built_from_is_sent_to_it(name: str) -> None:
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied: set[str] = set()
    for line in (FOLDER / f"{name}.Dockerfile").read_text().splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            copied |= set(line.split()[1:-1])
    assert copied == sent and all((ROOT / each).exists() for each in copied)


def test_the_pages_are_in_the_package() -> None:
    globs = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "transfusion"
    ]
    package = ROOT / "src" / "transfusion"
    packed = {path for glob in globs for path in package.glob(glob)}
    there = {
        path
        for folder in ("page", "board")
        for path in (package / "serve" / folder).iterdir()
        if path.is_file()
    }
    assert {path for path in there if path.suffix != ".py"} <= packed


def test_the_composition_serves_the_quickstart_to_this_machine_alone() -> None:
    service = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]["serve"]
    assert service["ports"] == ["127.0.0.1:8000:8000"] and service["read_only"] is True
    assert service["cap_drop"] == ["ALL"] and "/runs/quickstart/export:/model:ro" in service["volumes"][0]
    assert "--token-file" in service["command"]
    assert "/launch/container/token" in (ROOT / ".gitignore").read_text()


@pytest.mark.slow
@pytest.mark.skipif(not has_docker(), reason="no Docker engine; start one, as with `systemctl start docker`")
def test_the_image_for_cpus_answers(workplace: Workplace, trained: str, tmp_path: Path) -> None:
    dockerfile = FOLDER / "cpu.Dockerfile"
    subprocess.run(["docker", "build", "-q", "-f", dockerfile, "-t", "transfusion-cpu", ROOT], check=True)
    token = tmp_path / "token"
    token.write_text("0123456789abcdef0123")
    token.chmod(0o644)
    model = workplace.folder / trained / "export"
    started = subprocess.run(
        ["docker", "run", "-d", "--rm", "--read-only", "-p", "127.0.0.1::8000",
         "-v", f"{model}:/model:ro", "-v", f"{token}:/run/secrets/token:ro", "transfusion-cpu"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    container = started.stdout.strip()
    try:
        where = subprocess.run(
            ["docker", "port", container, "8000"], check=True, capture_output=True, text=True
        )
        _wait_until_ready(f"http://{where.stdout.split()[0]}/readyz")
        identity = subprocess.run(["docker", "exec", container, "id", "-u"], capture_output=True, text=True)
        assert identity.stdout.strip() == "10001"
    finally:
        subprocess.run(["docker", "stop", container], capture_output=True)


def _wait_until_ready(url: str) -> None:
    for _ in range(120):
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError("the server did not answer within a minute")
