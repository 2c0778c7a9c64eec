"""Holds the house's order: who may import whom, which package has which one importer, and how code is written.

Reads the source with ast and runs none of it. Each rule is also shown to fail on a made-up tree.
"""

from __future__ import annotations

import ast
import fnmatch
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1]

# Parts of the package by layer; a part may import those of lower layers. Layer 0 is transfusion_kernels.
LAYERS: dict[str, int] = {
    "__init__": 1,
    "errors": 1,
    "urls": 1,
    "files": 1,
    "schema": 1,
    "tokens": 1,
    "config": 1,
    "sequence": 1,
    "model": 2,
    "diffusion": 2,
    "data": 2,
    "optim": 2,
    "codec": 2,
    "losses": 3,
    "inference": 3,
    "families": 3,
    "parallel": 3,
    "checkpoint": 3,
    "observe": 3,
    "generate": 4,
    "evaluate": 4,
    "codec_train": 4,
    "plan": 4,
    "training": 4,
    "scaling": 4,
    "serve": 5,
    "cli": 5,
    "__main__": 5,
}
# Parts of layer 2 never import each other. In these layers a part imports only what stands before it.
SIBLINGS_APART = 2
ORDER = {
    3: ("losses", "inference", "families", "parallel", "checkpoint", "observe"),
    4: ("generate", "evaluate", "codec_train", "plan", "training", "scaling"),
}

# Most may be missing, so each has its few importers: files, or folders that end with a slash.
IMPORTERS: dict[str, tuple[str, ...]] = {
    "deepspeed": ("src/transfusion/parallel/deepspeed_patches.py",),
    "triton": ("kernels/transfusion_kernels/",),
    "cudnn": ("kernels/transfusion_kernels/rivals/cudnn.py",),
    "wandb": ("src/transfusion/observe/sinks.py",),
    "cv2": ("src/transfusion/data/images/decode.py",),
    "soundfile": ("src/transfusion/data/sounds/files.py",),
    "soxr": ("src/transfusion/data/sounds/files.py",),
    "webdataset": ("src/transfusion/data/shards/webdataset.py",),
    "fsspec": ("src/transfusion/data/shards/webdataset.py",),
    "sentencepiece": ("src/transfusion/sequence/tokenizer.py",),
    "tokenizers": ("src/transfusion/sequence/published_tokenizer.py",),
    "sklearn": ("src/transfusion/data/prepare/prepare.py", "src/transfusion/evaluate/"),
    "matplotlib": ("src/transfusion/evaluate/report/",),
    "lm_eval": ("src/transfusion/evaluate/harness.py",),
    "lmms_eval": ("src/transfusion/evaluate/image_harness.py",),
    "jinja2": ("src/transfusion/evaluate/report/page.py",),
    "diffusers": ("src/transfusion/codec/",),
    "transformers": ("src/transfusion/evaluate/features/published.py",),
    "huggingface_hub": ("src/transfusion/urls.py",),
    "fastapi": ("src/transfusion/serve/",),
    "starlette": ("src/transfusion/serve/",),
    "uvicorn": ("src/transfusion/serve/connection.py",),
    "prometheus_client": ("src/transfusion/serve/metrics.py",),
    # Not optional, but one digest for all. The kernels stand alone and have their own.
    "hashlib": ("src/transfusion/files.py", "kernels/transfusion_kernels/probe/records.py"),
}
KERNELS_MAY_IMPORT = {"torch", "triton", "transfusion_kernels"}
ENVIRONMENT_READERS = ("src/transfusion/parallel/environment.py", "kernels/transfusion_kernels/dispatch.py")
# Python files that stand in one folder, and at the root of the package.
MAX_FILES, MAX_FILES_AT_ROOT = 16, 8
UNFINISHED = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b")


def violations(house: Path) -> list[str]:
    """Every breach of the rules in a checkout, as `file:line: what`."""
    found: list[str] = []
    for path in sorted([*house.glob("src/**/*.py"), *house.glob("kernels/**/*.py")]):
        file = path.relative_to(house).as_posix()
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        breaches = [
            *_import_breaches(file, tree),
            *_environment_breaches(file, tree),
            *_annotation_breaches(tree.body),
            *_name_breaches(file),
            *_unfinished(text),
        ]
        found += [f"{file}:{line}: {breach}" for line, breach in breaches]
    found += [f"{circle[0]}:1: imports itself through {circle[1:]}" for circle in _circles(house)]
    return found + list(_crowded(house))


def _crowded(house: Path) -> Iterator[str]:
    """Folders with too many files to be taken in at once."""
    counts = Counter(path.parent.relative_to(house).as_posix() for path in house.glob("src/**/*.py"))
    for folder, count in counts.items():
        most = MAX_FILES_AT_ROOT if folder == "src/transfusion" else MAX_FILES
        if count > most:
            yield f"{folder}: {count} files, at most {most}"


def _circles(house: Path) -> list[list[str]]:
    """Files that import each other, each circle once. An import inside of a function counts too."""
    files = {
        path.relative_to(house).as_posix(): path
        for path in sorted([*house.glob("src/**/*.py"), *house.glob("kernels/**/*.py")])
    }
    named = {_module_of(file): file for file in files}
    imported = {
        file: sorted(
            {
                named[found]
                for _, module in _imports(file, ast.parse(path.read_text(encoding="utf-8")))
                if (found := _nearest(module, named)) and named[found] != file
            }
        )
        for file, path in files.items()
    }
    circles: list[list[str]] = []
    done: set[str] = set()

    def follow(file: str, way: list[str]) -> None:
        if file in way:
            circles.append(way[way.index(file) :])
        elif file not in done:
            for other in imported[file]:
                follow(other, [*way, file])
            done.add(file)

    for file in files:
        follow(file, [])
    return circles


def _module_of(file: str) -> str:
    name = ".".join([*_package_of(file), file.split("/")[-1].removesuffix(".py")])
    return name.removesuffix(".__init__")


def _nearest(module: str, named: dict[str, str]) -> str | None:
    """The file that an imported name stands in: the module itself, or the one that holds the name."""
    return module if module in named else (base if (base := module.rpartition(".")[0]) in named else None)


def _import_breaches(file: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    part = _part_of_file(file)
    if part is not None and part not in LAYERS:
        yield 1, f"{part} stands in no layer"
        return
    for line, module in _imports(file, tree):
        package = module.partition(".")[0]
        allowed = IMPORTERS.get(package)
        if allowed and not any(
            file == place or (place.endswith("/") and file.startswith(place)) for place in allowed
        ):
            yield line, f"imports {package}, which only {' and '.join(allowed)} may"
        if part is None:
            if package not in KERNELS_MAY_IMPORT and package not in sys.stdlib_module_names:
                yield line, f"the kernels import {package}"
        elif package == "transfusion":
            imported = _part_of_module(module)
            if imported in LAYERS and not _may_import(part, imported):
                yield line, f"{part} (layer {LAYERS[part]}) imports {imported} (layer {LAYERS[imported]})"


def _may_import(part: str, imported: str) -> bool:
    if part == imported:
        return True
    if part == "__init__":
        return False
    layer, other = LAYERS[part], LAYERS[imported]
    if layer != other:
        return other < layer
    if layer in ORDER:
        return ORDER[layer].index(imported) < ORDER[layer].index(part)
    return layer != SIBLINGS_APART


def _imports(file: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every module imported anywhere in the file, under its full name.

    The package's own names are imported when they are first asked for, and named before that for type checkers alone.
    """
    seen_by_checkers = {
        child
        for node in tree.body
        if file == "src/transfusion/__init__.py" and isinstance(node, ast.If)
        if ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in seen_by_checkers:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                folders = _package_of(file)[: -(node.level - 1) or None]
                base = ".".join([*folders, *([base] if base else [])])
            # `from transfusion import config` names a module after the import, not before it.
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def _package_of(file: str) -> list[str]:
    folders = file.split("/")[:-1]
    return folders[1:] if folders[0] == "src" else ["transfusion_kernels", *folders[1:]]


def _part_of_file(file: str) -> str | None:
    """The part of the package that a file belongs to; None in the kernels."""
    folders = file.split("/")
    return folders[2].removesuffix(".py") if folders[0] == "src" else None


def _part_of_module(module: str) -> str:
    names = module.split(".")
    return names[1] if len(names) > 1 and names[1] in LAYERS else "__init__"


def _environment_breaches(file: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    if file in ENVIRONMENT_READERS:
        return
    names = {"environ", "environb", "getenv", "putenv", "unsetenv"}
    for node in ast.walk(tree):
        used = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os"
        imported = isinstance(node, ast.ImportFrom) and node.module == "os"
        if (used and node.attr in names) or (imported and names & {alias.name for alias in node.names}):
            yield node.lineno, "touches environment variables"


def _annotation_breaches(body: list[ast.stmt]) -> Iterator[tuple[int, str]]:
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from _annotation_breaches(node.body)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            taken = node.args
            named = [*taken.posonlyargs, *taken.args, *taken.kwonlyargs, taken.vararg, taken.kwarg]
            bare = [arg.arg for arg in named if arg and not arg.annotation and arg.arg not in ("self", "cls")]
            # A Triton kernel's arguments are of no Python type.
            decorators = [ast.unparse(decorator).partition("(")[0] for decorator in node.decorator_list]
            jitted = any(decorator.endswith("jit") for decorator in decorators)
            if (bare or node.returns is None) and not jitted:
                yield node.lineno, f"{node.name} is not annotated: {', '.join(bare) or 'its result'}"


def _name_breaches(file: str) -> Iterator[tuple[int, str]]:
    for name in (part.removesuffix(".py") for part in file.split("/")[1:]):
        if name in sys.stdlib_module_names and not name.startswith("__"):
            yield 1, f"{name} is also the name of a module of the standard library"
        if name == "utils":
            yield 1, "utils says nothing about what is in it"


def _unfinished(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if UNFINISHED.search(line):
            yield number, "unfinished work is an issue, not a comment"


def test_the_house_keeps_its_rules() -> None:
    assert violations(HOUSE) == []


def test_every_folder_of_tests_is_collected(pytestconfig: pytest.Config) -> None:
    """Pytest's defaults leave out a folder called dist without a word."""
    folders = [path for path in Path(__file__).parent.rglob("*") if path.is_dir()]
    left_out = pytestconfig.getini("norecursedirs")
    passed_over = {
        folder.name for folder in folders for pattern in left_out if fnmatch.fnmatch(folder.name, pattern)
    }
    assert passed_over <= {"__pycache__"} and "dist" in {folder.name for folder in folders}


def test_the_house_was_really_read() -> None:
    files = [*HOUSE.glob("src/transfusion/**/*.py"), *HOUSE.glob("kernels/**/*.py")]
    assert len(files) > 40
    config = HOUSE / "src/transfusion/config/sections.py"
    assert any(
        module.startswith("pydantic")
        for _, module in _imports("src/transfusion/config/sections.py", _tree(config))
    )


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


LAWFUL = {
    "kernels/transfusion_kernels/__init__.py": "import math\nimport torch\nfrom transfusion_kernels import x\n",
    "kernels/transfusion_kernels/dispatch.py": "import os\nA = os.environ\n",
    "kernels/transfusion_kernels/attention/forward.py": "import triton\n@triton.jit\ndef kernel(q, D: int): ...\n",
    "src/transfusion/__init__.py": "if TYPE_CHECKING:\n    from transfusion.config import load\n__version__ = '1'\n",
    "src/transfusion/config/load.py": "from transfusion.sequence import sizes\nimport yaml\n",
    "src/transfusion/schema.py": "from transfusion_kernels import IntervalMask\n",
    "src/transfusion/tokens.py": "def f() -> None:\n    import transfusion.schema\n",
    "src/transfusion/model/block.py": "from transfusion.model import x\nfrom . import attention\n",
    "src/transfusion/losses/loss.py": "from transfusion.model.heads import x\nfrom transfusion import codec\n",
    "src/transfusion/parallel/deepspeed_patches.py": "import deepspeed\nfrom transfusion.losses import loss\n",
    "src/transfusion/observe/sinks.py": "def f() -> None:\n    import wandb\n",
    "src/transfusion/evaluate/suites/run.py": "from sklearn.svm import SVC\nfrom transfusion.generate import x\n",
    "src/transfusion/training/trainer.py": "from transfusion.plan import x\nfrom transfusion import __version__\n",
    "src/transfusion/cli/main.py": "from transfusion import training\ndef _private(x): ...\n",
}


def plant(house: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = house / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def test_a_lawful_tree_passes(tmp_path: Path) -> None:
    plant(tmp_path, LAWFUL)
    assert violations(tmp_path) == []


@pytest.mark.parametrize(
    ("file", "text", "breach"),
    [
        (
            "src/transfusion/config/sections.py",
            "import transfusion.model.block",
            "config (layer 1) imports model",
        ),
        (
            "src/transfusion/model/heads.py",
            "from transfusion.data import rows",
            "model (layer 2) imports data",
        ),
        ("src/transfusion/model/heads.py", "from ..data import rows", "model (layer 2) imports data"),
        ("src/transfusion/model/heads.py", "from .. import data", "model (layer 2) imports data"),
        ("src/transfusion/model/heads.py", "from transfusion import diffusion", "imports diffusion"),
        (
            "src/transfusion/model/heads.py",
            "import transfusion.losses.transfusion",
            "imports losses (layer 3)",
        ),
        (
            "src/transfusion/data/loading/rows.py",
            "def f() -> None:\n    import transfusion.cli.main",
            "imports cli",
        ),
        (
            "src/transfusion/parallel/local.py",
            "from transfusion.training.trainer import x",
            "imports training",
        ),
        ("src/transfusion/generate/a.py", "from transfusion.evaluate import b", "imports evaluate"),
        ("src/transfusion/evaluate/a.py", "from transfusion import training", "imports training"),
        (
            "src/transfusion/parallel/local.py",
            "import transfusion.observe.clock",
            "parallel (layer 3) imports observe",
        ),
        (
            "src/transfusion/__init__.py",
            "from transfusion.config import Config",
            "__init__ (layer 1) imports",
        ),
        ("src/transfusion/helpers.py", "", "helpers stands in no layer"),
        (
            "kernels/transfusion_kernels/dispatch.py",
            "import transfusion.schema",
            "the kernels import transfusion",
        ),
        ("kernels/transfusion_kernels/dispatch.py", "import numpy", "the kernels import numpy"),
        ("src/transfusion/parallel/local.py", "import deepspeed.comm", "imports deepspeed"),
        ("src/transfusion/model/attention.py", "from triton import jit", "imports triton"),
        ("src/transfusion/training/trainer.py", "def f() -> None:\n    import wandb", "imports wandb"),
        ("src/transfusion/data/shards/scan.py", "import webdataset", "imports webdataset"),
        ("src/transfusion/data/shards/webdataset.py", "import sentencepiece", "imports sentencepiece"),
        ("src/transfusion/data/shards/webdataset.py", "from sklearn import svm", "imports sklearn"),
        ("src/transfusion/evaluate/suites/run.py", "import matplotlib.pyplot", "imports matplotlib"),
        ("src/transfusion/cli/main.py", "import jinja2", "imports jinja2"),
        ("src/transfusion/data/shards/scan.py", "import hashlib", "imports hashlib"),
        ("src/transfusion/cli/main.py", "import os\nos.environ['A']", "environment variables"),
        ("src/transfusion/cli/main.py", "import os\nos.getenv('A')", "environment variables"),
        ("src/transfusion/cli/main.py", "from os import environ", "environment variables"),
        (
            "kernels/transfusion_kernels/attention/forward.py",
            "import os\nos.environ",
            "environment variables",
        ),
        ("src/transfusion/schema.py", "from transfusion.tokens import x", "imports itself through"),
        ("src/transfusion/data/types.py", "", "types is also the name"),
        ("src/transfusion/data/copy/a.py", "", "copy is also the name"),
        ("kernels/transfusion_kernels/utils.py", "", "utils says nothing"),
        ("src/transfusion/data/loading/rows.py", "def f(a) -> None: ...", "f is not annotated: a"),
        (
            "src/transfusion/data/loading/rows.py",
            "class A:\n    def f(self): ...",
            "f is not annotated: its result",
        ),
        ("src/transfusion/data/loading/rows.py", "def f(*a, b: int) -> None: ...", "f is not annotated: a"),
        ("src/transfusion/data/loading/rows.py", "# TO" + "DO: later", "unfinished"),
    ],
)
def test_each_rule_can_fail(tmp_path: Path, file: str, text: str, breach: str) -> None:
    plant(tmp_path, {**LAWFUL, file: text + "\n"})
    found = violations(tmp_path)
    assert len(found) == 1 and found[0].startswith(f"{file}:") and breach in found[0], found


def test_crowded_folders_are_told(tmp_path: Path) -> None:
    plant(tmp_path, {f"src/transfusion/data/a{number}.py": "" for number in range(MAX_FILES)})
    plant(tmp_path, {f"src/transfusion/{part}.py": "" for part in list(LAYERS)[:MAX_FILES_AT_ROOT]})
    assert violations(tmp_path) == []
    plant(tmp_path, {"src/transfusion/data/b.py": "", "src/transfusion/scaling.py": ""})
    assert sorted(violations(tmp_path)) == [
        "src/transfusion/data: 17 files, at most 16",
        "src/transfusion: 9 files, at most 8",
    ]
