"""Makes odd inputs of several kinds at random: each is read rightly or refused in one line.

    .venv/bin/python campaigns/odd_inputs.py [--times 6000] [--seed 0] [--only KIND] [--out FILE]

The kinds have equal shares: weights, configurations, images and long texts, here, and in `odd_shards` shards and
folders of which much is lost, and names and texts that are hard to write again. What an input means is decided there
and here, apart from the functions that read it. Seed, kind and number give the same input each time. Wrong is what was
read as if nothing were odd, what was lost and not counted, an error that is not meant for users, and a hang. Exits
with 3 when something went wrong.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import math
import random
import re
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from PIL import Image, ImageCms
from safetensors.torch import save_file
from torch import Tensor

from odd_base import SILENT, Outcome, judge, kl_folder, stored, tokenizer
from odd_shards import lost, narrow
from transfusion.checkpoint.published_weights import start_from_published
from transfusion.codec.networks import load_network
from transfusion.config import Config, load_config
from transfusion.config.codec_folder import STEM as KL_STEM
from transfusion.config.yaml_files import dump, parse
from transfusion.data.images.decode import decode
from transfusion.data.images.probe import probe
from transfusion.data.shards.sample import SampleError, caption, document
from transfusion.data.shards.webdataset import expand
from transfusion.errors import UserError
from transfusion.observe.environment import describe_environment
from transfusion.parallel.environment import Environment
from transfusion.parallel.local import LocalEngine

ROOT = Path(__file__).resolve().parents[1]
KEPT = ("time", "python", "platform", "cpu", "cpu_count", "packages", "git", "transfusion")
TELL_SECONDS = 10.0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "odd-inputs.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.perf_counter()
    counts, wrong = run([arguments.only] if arguments.only else list(KINDS), arguments.times, arguments.seed)
    environment = describe_environment()
    record = {
        "command": "python campaigns/odd_inputs.py",
        "environment": {name: environment[name] for name in KEPT},
        "times": arguments.times,
        "seed": arguments.seed,
        "found": dict(sorted(counts.items())),
        "seconds": round(time.perf_counter() - begin, 1),
        "wrong": wrong,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print("\n".join([*wrong[:20], f"{arguments.times} inputs, {len(wrong)} wrong: {record['found']}"]))
    return 3 if wrong else 0


def run(kinds: Sequence[str], times: int, seed: int) -> tuple[collections.Counter[str], list[str]]:
    """The kinds in turn; returns how many were read and refused, and what went wrong."""
    counts: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    told = time.monotonic()
    for number in range(times):
        kind = kinds[number % len(kinds)]
        with tempfile.TemporaryDirectory(prefix="odd-inputs-") as folder:
            outcome = KINDS[kind](random.Random(f"{kind} {seed} {number}"), Path(folder))
        counts[f"{kind}, {outcome.verdict}"] += 1
        if outcome.wrong:
            wrong.append(f"{kind} {number}: {outcome.what} {outcome.wrong}")
        if time.monotonic() - told > TELL_SECONDS:
            told = time.monotonic()
            print(f"{number + 1} of {times}, {len(wrong)} wrong", file=sys.stderr, flush=True)
    return counts, wrong


# ---- weights -------------------------------------------------------------------------------------------

SHAPE = {"layers": 1, "hidden_size": 16, "heads": 2, "num_kv_heads": 1, "ffn_size": 24, "vocabulary": 24}
ALONE = Environment(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"), threads=1)
# A Llama's parts, and what they are called here.
PARTS = {
    "input_layernorm": "attention_norm", "post_attention_layernorm": "feed_forward_norm",
    "self_attn.q_proj": "attention.query", "self_attn.k_proj": "attention.key", "self_attn.v_proj": "attention.value",
    "self_attn.o_proj": "attention.out", "mlp.gate_proj": "feed_forward.gate", "mlp.up_proj": "feed_forward.up",
    "mlp.down_proj": "feed_forward.down",
}  # fmt: skip
LLAMA_NAMES = {f"model.layers.0.{part}.weight": f"blocks.0.{ours}.weight" for part, ours in PARTS.items()} | {
    "model.embed_tokens.weight": "embedding.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "lm_head.weight",
}
LLAMA_SETTINGS = {
    "model_type": "llama", "vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "hidden_act": "silu",
    "attention_bias": False, "max_position_embeddings": 64,
}  # fmt: skip
NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OTHERS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32, torch.bool)
ADDED = (
    "{}_scale", "{}.SCB", "{}.lora_A.weight", "{}.absmax", "model.norm.bias", "encoder.norm.weight", "lm_head.bias",
    "model.layers.0.self_attn.q_norm.weight", "model.layers.1.input_layernorm.weight", "quant_conv.lora_B.weight",
)  # fmt: skip
# Settings that make other numbers of the same weights, or another network.
CHANGING: dict[str, Any] = {
    "quantization_config": {"quant_method": "fp8"}, "logits_scaling": 8.0, "embedding_multiplier": 12.0,
    "latent_multiplier": 2.0, "layer_types": ["sliding_attention"], "unknown_factor": 0.5,
}  # fmt: skip
LLAMA_CHANGING: dict[str, Any] = {
    "partial_rotary_factor": 0.5, "model_type": "mistral", "attention_bias": True, "hidden_act": "gelu", "head_dim": 4,
    "rms_norm_eps": 1e-6, "rope_theta": 5e5, "num_hidden_layers": 2, "sliding_window": 4, "mlp_bias": True,
}  # fmt: skip
KL_CHANGING = {"_class_name": "AutoencoderTiny", "block_out_channels": [16], "latent_channels": 4}
HARMLESS = {"_name_or_path": "somewhere", "_attn_implementation_autoset": True}
ODD: tuple[Any, ...] = (None, "x", "1e-5", [], {}, [[1]], {"a": 1}, True, -1, 0, 1.5, 1e300)
LAYOUTS = (
    "parts", "parts and single", "a stray part", "index of a missing part", "index with places exchanged",
    "index without a tensor", "weights cut", "config cut", "index cut", "weights pointer", "config pointer",
)  # fmt: skip


@dataclass
class Folder:
    """A folder of weights to be written. certain: its settings mean one network, None where only a crash is wrong."""

    stem: str
    settings: dict[str, Any]
    tensors: dict[str, Tensor]
    layout: str = "single"
    certain: bool | None = True


@functools.cache
def kl_base() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors of a tiny autoencoder."""
    settings = json.loads((kl_folder() / "config.json").read_text())
    return settings, dict(load_network(kl_folder()).state_dict())


@functools.cache
def llama_base() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors of a tiny Llama."""
    torch.manual_seed(0)
    masters = LocalEngine(llama_config(), ALONE).masters
    return LLAMA_SETTINGS, {name: torch.randn(masters[ours].shape) for name, ours in LLAMA_NAMES.items()}


def llama_config() -> Config:
    return Config.model_validate(
        {"model": SHAPE, "codec": {"channels": 1, "image_size": 8}, "train": {"precision": "fp32"}}
    )


def weights(rng: random.Random, folder: Path) -> Outcome:
    """A folder of weights with up to two changes."""
    stem = rng.choice((KL_STEM, "model"))
    settings, tensors = kl_base() if stem == KL_STEM else llama_base()
    made = Folder(stem, dict(settings), dict(tensors))
    changes = rng.sample((change_tensor, change_tensor, change_settings, change_layout), rng.randint(0, 2))
    what = f"{stem}: " + (", ".join(change(rng, made) for change in changes) or "unchanged")
    write_weights(rng, made, folder)
    same = made.tensors.keys() == tensors.keys() and all(
        made.tensors[name].shape == tensor.shape and made.tensors[name].dtype in NUMBERS
        for name, tensor in tensors.items()
    )
    means_one = made.layout in ("single", "parts") and made.certain is not False and same

    def check() -> str:
        found = read_kl(folder) if stem == KL_STEM else read_llama(folder)
        if not means_one:
            return SILENT
        for name, tensor in made.tensors.items():
            if found[name].dtype != torch.float32 or not torch.equal(found[name], tensor.float()):
                return f"is read with other numbers in {name}, or of {found[name].dtype}"
        return ""

    return judge(what, check, sure=means_one and made.certain is True)


def read_kl(folder: Path) -> dict[str, Tensor]:
    return dict(load_network(folder).state_dict())


def read_llama(folder: Path) -> dict[str, Tensor]:
    engine = LocalEngine(llama_config(), ALONE)
    tokenizer: Any = SimpleNamespace(piece_bytes=list)
    start_from_published(folder, engine, tokenizer)
    return {name: engine.masters[ours].detach() for name, ours in LLAMA_NAMES.items()}


def change_tensor(rng: random.Random, made: Folder) -> str:
    """Casts, removes, adds or reshapes one tensor."""
    name = rng.choice(sorted(made.tensors))
    tensor, change = made.tensors[name], rng.choice(("number", "number", "other", "lose", "add", "shape"))
    if change in ("number", "other"):
        dtype = rng.choice(NUMBERS if change == "number" else OTHERS)
        # A third of a number has digits that each of the types rounds.
        made.tensors[name] = tensor.double().div(3).to(dtype)
        return f"{name} as {dtype}"
    if change == "add":
        added = rng.choice(ADDED).format(name)
        made.tensors[added] = torch.ones(rng.choice(((1,), (16,), (2, 16))))
        return f"{added} added"
    del made.tensors[name]
    if change == "lose":
        return f"{name} missing"
    rows, *others = tensor.shape
    shapes = [(rows + 1, *others), (rows - 1, *others), (rows, *others, 1), (tensor.numel(), 1, 1)]
    shapes += [(rows, 2 * others[0], *others[1:]), (rows, others[0] // 2, *others[1:])] if others else []
    made.tensors[name] = torch.randn(rng.choice([shape for shape in shapes if shape != tensor.shape]))
    return f"{name} of shape {tuple(made.tensors[name].shape)}"


def change_settings(rng: random.Random, made: Folder) -> str:
    """One setting that changes the numbers, one that does not, one of another type, or a rotary embedding."""
    of_llama = made.stem != KL_STEM
    change = rng.choice(("changing", "changing", "harmless", "odd", *(("rope",) * 2 if of_llama else ())))
    if change == "rope":
        return change_rope(rng, made)
    if change == "odd":
        key, value = rng.choice(sorted(made.settings)), rng.choice(ODD)
        made.certain = None
    else:
        own = CHANGING | (LLAMA_CHANGING if of_llama else KL_CHANGING)
        key, value = rng.choice(list((own if change == "changing" else HARMLESS).items()))
        made.certain = change == "harmless"
    made.settings[key] = value
    return f"{key}={value!r}"


def change_rope(rng: random.Random, made: Folder) -> str:
    """A rotary embedding in one of the forms of transformers, under its former name, its present one, or both."""
    kind = rng.choice(("default", "default", "linear", "dynamic", "yarn", "llama3", "longrope"))
    form: Any = {rng.choice(("type", "rope_type")): kind}
    form |= rng.choice(({}, {"factor": 2.0}, {"partial_rotary_factor": 0.5}, {"rope_theta": 1e4}))
    made.certain = kind == "default" and form.keys() <= {"type", "rope_type", "rope_theta"}
    if rng.random() < 0.2:
        form, made.certain = rng.choice(("linear", 2.0, ["linear"], {"factor": 2.0})), False
    keys = rng.choice((("rope_scaling",), ("rope_parameters",), ("rope_parameters", "rope_scaling")))
    made.settings |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}} if keys[1:] else {}
    made.settings[keys[-1]] = form
    return f"{' and '.join(keys)}={form}"


def change_layout(rng: random.Random, made: Folder) -> str:
    made.layout = rng.choice(LAYOUTS)
    return made.layout


def write_weights(rng: random.Random, made: Folder, folder: Path) -> None:
    """The files of a folder, and what is wrong with them."""
    single, index = f"{made.stem}.safetensors", f"{made.stem}.safetensors.index.json"
    parts = [f"{made.stem}-{number:05d}-of-00002.safetensors" for number in (1, 2, 3)]
    (folder / "config.json").write_text(json.dumps(made.settings))
    damaged, _, fault = made.layout.rpartition(" ")
    in_parts = made.layout.startswith(("parts", "index", "a stray"))
    if not in_parts or made.layout == "parts and single":
        save_file(made.tensors, folder / single)
    if in_parts:
        names = sorted(made.tensors)
        places = {name: parts[place % 2] for place, name in enumerate(names)}
        for part in parts[:2]:
            save_file({name: made.tensors[name] for name in names if places[name] == part}, folder / part)
        if made.layout == "a stray part":
            save_file({"stray": torch.ones(1)}, folder / parts[2])
        elif made.layout == "index of a missing part":
            places[rng.choice(names)] = parts[2]
        elif made.layout == "index with places exchanged":
            places |= {names[0]: places[names[1]], names[1]: places[names[0]]}
        elif made.layout == "index without a tensor":
            del places[rng.choice(names)]
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    if fault in ("cut", "pointer"):
        path = folder / {"weights": single, "config": "config.json", "index": index}[damaged]
        content = path.read_bytes()
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
        path.write_bytes(pointer if fault == "pointer" else content[: rng.randrange(len(content))])


# ---- configuration -------------------------------------------------------------------------------------

# Path: text in which ~ is the home folder.
KEYS: dict[str, type] = {
    "train.steps": int, "model.ffn_size": int, "optimizer.learning_rate": float, "model.rope_theta": float,
    "model.qk_norm": bool, "train.zero.overlap_communication": bool, "run.name": str, "log.project": str,
    "run.dir": Path, "data.tokenizer": Path,
}  # fmt: skip
# 9: any digit.
SCALARS = (
    "9", "99", "099", "0o9", "0b1", "9:99", "9:99:99.9", "9_999", "9_9.9", "9e-9", "1e9", ".9", "9.", "+9", "-9",
    "0x9f", "9.9E+9", "0.009", "on", "off", "yes", "no", "true", "True", "FALSE", "y", "~", "null", "Null", "", "text",
    "2024-01-09", "2024-01-09T09:09:09Z", ".inf", "-.INF", ".nan", "inf", "nan", "=", "<<", "a#9", "~/9", "a~", "9e9_9",
    "9__9", "0x", "e9", "1e999", "None", "9,9", "9/9", "½", "٣",
)  # fmt: skip
INSERTED = "019_.e+-:xob"
NULLS = ("", "~", "null", "Null", "NULL")
# What nobody could take for anything else.
PLAIN: dict[type, str] = {
    int: r"[1-9][0-9]{0,5}", float: r"[1-9](\.[0-9]+)?(e-1)?", bool: "true|false", str: "text", Path: "text|~/9",
}  # fmt: skip
TRUTHS = {word: True for word in ("true", "yes", "on", "y", "t")}
TRUTHS |= {word: False for word in ("false", "no", "off", "n", "f")}
NOTHING = object()
LETTERS = [*range(32, 127), *range(161, 400), *range(0x4E00, 0x4E40), *range(0x1F600, 0x1F640)]
ODD_LETTERS = "\n\t\r\0\x07\x1b\x7f\x85\xa0\u200b\u2028\u2029\ufeff\ufffd #:-'\"\\{}[],&*!|>%@`~?="


def configuration(rng: random.Random, folder: Path) -> Outcome:
    """A scalar, a key given twice, a text written and read again, or the name of a base."""
    return rng.choice((scalar, scalar, twice, any_text, base_file))(rng, folder)


def scalar(rng: random.Random, folder: Path) -> Outcome:
    """An odd scalar for a key of each type, in an override or a file, with or without a comment."""
    key, kind = rng.choice(list(KEYS.items()))
    text, quote, comment = scalar_text(rng), rng.choice(("", "", "", "'", '"')), rng.choice(("", "", " # 7"))
    place = rng.choice(("override", "block", "flow"))
    *sections, last = key.split(".")
    block = "".join(f"{'  ' * depth}{section}:\n" for depth, section in enumerate(sections)) + "  " * len(
        sections
    )
    written = f"{quote}{text}{quote}"
    form = {
        "override": f"{key}={written}{comment}",
        "block": f"{block}{last}: {written}{comment}\n",
        "flow": "".join(f"{{{section}: " for section in sections)
        + f"{{{last}: {written}}}{'}' * len(sections)}{comment}",
    }[place]
    path = folder / "config.yaml"
    path.write_text(form, encoding="utf-8")
    wanted = meaning(text, kind, bool(quote))
    sure = not quote and not comment and re.fullmatch(PLAIN[kind], text) is not None

    def check() -> str:
        found: Any = load_config(None, [form]) if place == "override" else load_config(path)
        for part in key.split("."):
            found = getattr(found, part)
        if comment and place == "override":
            return f"{SILENT}, as {found!r}"
        good = type(found) is type(wanted) and found == wanted
        return "" if good else f"is read as {found!r}" + ("" if wanted is NOTHING else f", not {wanted!r}")

    return judge(repr(form), check, sure=sure)


def scalar_text(rng: random.Random) -> str:
    text = re.sub("9", lambda _: rng.choice("0123456789"), rng.choice(SCALARS))
    place = rng.randint(0, len(text))
    return text[:place] + rng.choice(INSERTED) + text[place:] if rng.random() < 0.3 else text


def meaning(text: str, kind: type, quoted: bool) -> Any:
    """What a scalar says to a key of this type; NOTHING where it must be refused."""
    if kind is str:
        return text
    if kind is Path:
        return str(Path.home()) + text[1:] if text == "~" or text.startswith("~/") else text
    number = number_of(text, quoted)
    if kind is bool:
        return TRUTHS.get(text.lower(), bool(number) if number in (0, 1) else NOTHING)
    if number is None:
        return NOTHING
    if kind is float:
        return float(number)
    return int(number) if math.isfinite(number) and number == int(number) else NOTHING


def number_of(text: str, quoted: bool) -> float | None:
    """As Python reads plain decimal digits, and hexadecimal ones. None: versions of YAML differ, or no number."""
    digits = text.replace("_", "")
    if not quoted and re.fullmatch(r"[-+]?0[0-9]+", digits):
        return None
    if re.fullmatch(r"0x[0-9a-fA-F]+", text):
        return int(text, 16)
    if re.fullmatch(r"[-+]?\.(inf|nan)", text.lower()):
        return float(text.replace(".", ""))
    for kind in (int, float):
        try:
            return kind(digits)
        except ValueError:
            continue
    return None


def twice(rng: random.Random, folder: Path) -> Outcome:
    """Mappings in mappings, in half of them a key given twice, spelt in the same way or in another."""
    wanted = random_mapping(rng, depth=4)
    text = yaml.dump(wanted, default_flow_style=rng.choice((False, None, True)), sort_keys=False, width=1000)
    doubled = rng.random() < 0.5
    if doubled:
        place = rng.choice(list(re.finditer(r"(?m)(?:^( *)|[{ ])(\w):", text)))
        indent, key = place.groups()
        spelt = ["0x{}", "+{}"] if key.isdigit() else ['"{}"', "'{}'"]
        entry = rng.choice(("{}", "{}", *spelt)).format(key) + ": 7"
        entry += ", " if indent is None else f"\n{indent}"
        text = text[: place.start(2)] + entry + text[place.start(2) :]

    def check() -> str:
        found = parse(text)
        return SILENT if doubled else "" if found == wanted else f"is read as {found!r}"

    return judge(repr(text), check, sure=not doubled, refusals=(ValueError,))


def random_mapping(rng: random.Random, depth: int) -> dict[str | int, Any]:
    keys: list[str | int] = ["a", "b", "c", "d", 1, 2, 3]
    return {
        key: random_mapping(rng, depth - 1) if depth and rng.random() < 0.5 else rng.randint(0, 9)
        for key in rng.sample(keys, rng.randint(1, 3))
    }


def any_text(rng: random.Random, folder: Path) -> Outcome:
    """Any text as the name of a run: written and read again, or in an override, in the quotes of JSON."""
    letters = (
        LETTERS if rng.random() < 0.7 else list(map(ord, ODD_LETTERS)) for _ in range(rng.choice((1, 5, 50)))
    )
    name = "".join(chr(rng.choice(some)) for some in letters)
    path, is_file = folder / "config.yaml", rng.random() < 0.5
    override = f"run.name={json.dumps(name, ensure_ascii=False)}"

    def check() -> str:
        if is_file:
            dump(Config.model_validate({"run": {"name": name}}), path)
        found = (load_config(path) if is_file else load_config(None, [override])).run.name
        return "" if found == name else f"is read as {found!r}"

    sure = is_file or (name.isascii() and name.isprintable())
    return judge(f"{'a file with ' if is_file else ''}{override!r}", check, sure=sure)


def base_file(rng: random.Random, folder: Path) -> Outcome:
    """An odd scalar as the name of a base, which is there."""
    text, path = (
        rng.choice((*(scalar_text(rng) for _ in range(9)), "[9]", "[a, ~]", "[]")),
        folder / "config.yaml",
    )
    path.write_text(f"base: {text}\nlog:\n  project: mine\n", encoding="utf-8")
    if text not in ("", ".", "..") and "/" not in text:
        (folder / text).write_text("run:\n  name: found\nlog:\n  project: other\n", encoding="utf-8")
    wanted = ("run", "mine") if text in (*NULLS, "[]") else ("found", "mine")

    def check() -> str:
        config = load_config(path)
        found = (config.run.name, config.log.project)
        return "" if found == wanted else f"is read as {found}"

    return judge(f"base: {text!r}", check, sure=text == "text")


# ---- images --------------------------------------------------------------------------------------------

SIDE = 16
# Kinds of pixels of a PNG with their samples and bits: grey, colours, palette, grey and colours with alpha.
PNG_KINDS = [(0, 1, bits) for bits in (1, 2, 4, 8, 16)] + [(2, 3, 8), (2, 3, 16)]
PNG_KINDS += [(3, 1, bits) for bits in (1, 2, 4, 8)] + [(4, 2, 8), (4, 2, 16), (6, 4, 8), (6, 4, 16)]
GREYS, PALETTE, ALPHAS = (0, 4), 3, (4, 6)
# Of 255. PNG: one for the lower half of 16 bits and one for blending. JPEG from quality 75 on: half a step of
# brightness and, weighed by 1.8, of colour. WebP from 90 on: the same of 219 levels, and of single pixels.
TOLERANCES = {"PNG": 2, "JPEG": 3, "WEBP": 6}
# Beside that a profile rounds once more in either direction.
OF_PROFILE = 2
TEXTS = (b"Comment", b"Raw profile type exif", b"XML:com.adobe.xmp", b"Raw profile type icc", b"")
SEGMENTS = (
    b"",
    b"Exif\0\0",
    b"Exif\0\0II*\0",
    b"JFIF\0",
    b"JFXX\0",
    b"MPF\0",
    b"Photoshop 3.0\0",
    b"ICC_PROFILE\0",
)


class Picture(NamedTuple):
    """An image of one colour. colour: of 255, before its profile. alpha: 1 opaque. kind: for eyes."""

    data: bytes
    kind: str
    colour: Sequence[float]
    alpha: float
    is_grey: bool


@functools.cache
def profiles() -> dict[str, bytes]:
    """sRGB, and one of it in which red and green are exchanged."""
    plain = bytes(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    other = plain.replace(b"rXYZ", b"????", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"????", b"gXYZ", 1)
    return {"sRGB": plain, "exchanging": other}


def images(rng: random.Random, folder: Path) -> Outcome:
    """An image of one colour, which the index and the loader must both take for that colour."""
    size = rng.randint(10, 20), rng.randint(10, 20)
    name = rng.choice(("none", "none", "sRGB", "exchanging", "exchanging", "random", "torn"))
    profile = profiles().get(name, b"")
    if name in ("random", "torn"):
        profile = rng.randbytes(rng.randint(1, 300)) if name == "random" else profiles()["exchanging"][:300]
    file, junk = rng.choice(("PNG", "PNG", "JPEG", "WEBP")), rng.random() < 0.5
    picture = {"PNG": png, "JPEG": jpeg, "WEBP": webp}[file](rng, size, profile, junk)
    channels = rng.choice((1, 3))
    red, green, blue = (255 - (255 - value) * picture.alpha for value in picture.colour)
    if name == "exchanging" and not picture.is_grey:
        red, green = green, red
    wanted = [red, green, blue] if channels == 3 else [0.299 * red + 0.587 * green + 0.114 * blue]
    tolerance = TOLERANCES[file] + OF_PROFILE * (name == "exchanging")

    def check() -> str:
        facts = probe(picture.data)
        try:
            values = decode(picture.data, channels=channels, image_size=SIDE)
        except SampleError as error:
            return f"is taken by the index, and the loader says {error}"
        if facts != (*size, False):
            return f"has {facts} in the index"
        furthest = np.abs(values - np.array(wanted)[:, None, None]).max()
        found = values.mean(axis=(1, 2)).round(1).tolist()
        return "" if furthest <= tolerance else f"is read as {found}, not {np.round(wanted, 1).tolist()}"

    what = f"{picture.kind}, {size}, profile {name}, {channels} channels,"
    return judge(what, check, sure=not junk)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(rng: random.Random, size: tuple[int, int], profile: bytes, junk: bool) -> Picture:
    """Any kind of pixels and transparency, written by hand: Pillow would write half of them only."""
    kind, samples, bits = rng.choice(PNG_KINDS)
    highest = (1 << bits) - 1
    levels = [rng.randint(0, highest) for _ in range(samples)]
    shown, tables, said = levels[:3] if kind in (2, 6) else levels[:1] * 3, b"", ""
    alpha = levels[-1] / highest if kind in ALPHAS else 1.0
    if kind == PALETTE:
        palette = [rng.randbytes(3) for _ in range(rng.randint(1, highest + 1))]
        levels = [rng.randrange(len(palette))]
        opacity = rng.randbytes(rng.randint(0, len(palette)))
        tables = chunk(b"PLTE", b"".join(palette)) + (chunk(b"tRNS", opacity) if opacity else b"")
        shown, alpha = list(palette[levels[0]]), [*opacity, *[255] * 256][levels[0]] / 255
        highest, said = 255, f" of {len(palette)}, alpha of {len(opacity)}"
    elif kind not in ALPHAS and rng.random() < 0.6:
        clear = list(levels)
        clear[0] ^= rng.choice((0, 0, 1, 1 << bits - 1))
        # Bits beyond those of a pixel say nothing.
        beyond = rng.choice((0, 0, 1)) << bits & 0xFFFF
        tables = chunk(b"tRNS", struct.pack(f">{samples}H", *(value | beyond for value in clear)))
        alpha, said = float(clear != levels), f", transparent {clear} with {beyond}"
    line = "".join(format(level, f"0{bits}b") for level in levels) * size[0]
    line += "0" * (-len(line) % 8)
    raw = (b"\0" + int(line, 2).to_bytes(len(line) // 8)) * size[1]
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, kind, 0, 0, 0))
    icc = chunk(b"iCCP", b"icc\0\0" + zlib.compress(profile)) if profile else b""
    exif = chunk(b"eXIf", turned(rng)[6:])
    first, second, third = (odd_chunk(rng) if junk else b"" for _ in range(3))
    body = head + icc + first + exif + tables + second + chunk(b"IDAT", zlib.compress(raw)) + third
    name = f"PNG kind {kind}, {bits} bits, {levels}{said}, {first + second + third!r}"
    data = b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")
    return Picture(data, name, [value * 255 / highest for value in shown], alpha, kind in GREYS)


def turned(rng: random.Random) -> bytes:
    """EXIF with an orientation, two of which do not exist."""
    exif = Image.Exif()
    exif[0x0112] = rng.randint(0, 9)
    return exif.tobytes()


def odd_chunk(rng: random.Random) -> bytes:
    """Text, EXIF or a chunk that nobody knows, with content that is none."""
    kind = rng.choice((b"", b"eXIf", b"tEXt", b"zTXt", b"iTXt", b"pHYs", b"tIME", b"juNk"))
    noise = rng.randbytes(rng.randint(0, 40))
    if not kind.endswith(b"Xt"):
        return chunk(kind, rng.choice((b"", b"MM\0*", b"II*\0")) + noise) if kind else b""
    packed = rng.choice((noise, zlib.compress(noise), zlib.compress(noise)[:-3]))
    between = rng.choice((b"", b"\0", b"\0\0", b"\0\1", b"\0\1\0en\0\0"))
    return chunk(kind, rng.choice(TEXTS) + between + packed)


def jpeg(rng: random.Random, size: tuple[int, int], profile: bytes, junk: bool) -> Picture:
    """Grey or colours, with odd segments, and what is none, between the first and the next."""
    mode, colour = rng.choice(("L", "RGB")), rng.randbytes(3)
    image = Image.new(mode, size, tuple(colour) if mode == "RGB" else colour[0])
    options: dict[str, Any] = {"quality": rng.randint(75, 100), "progressive": rng.random() < 0.3}
    data = stored(image, "JPEG", profile, exif=turned(rng), subsampling=rng.randint(0, 2), **options)
    odd = b""
    for _ in range(rng.randint(1, 3) if junk else 0):
        # A second profile that is torn may cost the first.
        content = rng.choice(SEGMENTS[:-1] if profile else SEGMENTS) + rng.randbytes(rng.randint(0, 40))
        # Not the fourteenth, which tells what the colours are.
        odd += bytes((0xFF, rng.choice((*range(0xE0, 0xEE), 0xEF, 0xFE)))) + struct.pack(
            ">H", 2 + len(content)
        )
        noise = rng.randbytes(9).replace(b"\xff", b"")
        odd += content + rng.choice((b"", b"\0\0", b"\xff\0\xff\0", b"\xff" * 9, noise))
    first = 4 + int.from_bytes(data[4:6])
    shown = colour if mode == "RGB" else colour[:1] * 3
    name = f"JPEG {mode} {list(shown)}, {odd!r}"
    return Picture(data[:first] + odd + data[first:], name, shown, 1.0, mode == "L")


def webp(rng: random.Random, size: tuple[int, int], profile: bytes, junk: bool) -> Picture:
    """With and without loss and alpha, with odd EXIF and XMP and a chunk that nobody knows."""
    mode, colour, lossless = rng.choice(("RGB", "RGBA")), rng.randbytes(4), rng.random() < 0.5
    exif, xmp = (rng.randbytes(rng.randint(0, 40)) if junk else each for each in (turned(rng), b""))
    image = Image.new(mode, size, tuple(colour[: len(mode)]))
    options: dict[str, Any] = {
        "lossless": lossless,
        "quality": rng.randint(90, 100),
        "exif": exif,
        "xmp": xmp,
    }
    data = stored(image, "WEBP", profile, **options)
    if junk:
        data += b"juNk" + struct.pack("<I", 6) + rng.randbytes(6)
        data = data[:4] + struct.pack("<I", len(data) - 8) + data[8:]
    name = f"WEBP {mode} {list(colour)}, lossless {lossless}, EXIF {exif!r}, XMP {xmp!r}"
    return Picture(data, name, colour[:3], colour[3] / 255 if mode == "RGBA" else 1.0, False)


# ---- long ----------------------------------------------------------------------------------------------

PIECES = (
    "a", "b", "Z", "é", "中", "😀", "\u2581", " ", " ", "\n", "\r\n", "\t", "\u0301", "\u0308", "{", "}", "[", "]", ",",
    "{a,b}", "{1..9}", "*", "?", "0", "7", "_", ".", "/", "-", ":", "#", "'", '"', "&", "<", "=", "~", "\x01", "\x85",
)  # fmt: skip
# Of the shorter text, in characters: so many that the square of them takes longer than the allowance.
CHARACTERS = {
    "encode": 12_000, "document": 60_000, "caption": 5_000, "parse": 5_000, "expand": 3_000, "value": 5_000,
    "key": 4_000,
}  # fmt: skip
TIMES_LONGER, TIMES_SLOWER, ALLOWANCE_SECONDS = 4, 8.0, 0.3


def long(rng: random.Random, folder: Path) -> Outcome:
    """A repeated unit, then four times as much of it."""
    unit = "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 5)))
    reader = rng.choice(list(CHARACTERS))
    pieces = tokenizer()
    readers: dict[str, Callable[[str], object]] = {
        "encode": lambda text: pieces.decode(pieces.encode(text)),
        "document": lambda text: document(text, []),
        "caption": lambda text: caption(text, []),
        "parse": parse,
        "expand": lambda text: expand(f"{folder}/{text}"),
        "value": lambda text: load_config(None, [f"run.name={text}"]),
        "key": lambda text: load_config(None, [f"{text}=1"]),
    }
    refusals = (UserError, SampleError, *((ValueError,) if reader == "parse" else ()))
    text = unit * (CHARACTERS[reader] // len(unit))
    outcomes, seconds = [], []
    for longer in (text, text * TIMES_LONGER):

        def check(text: str = longer) -> str:
            found = readers[reader](text)
            return "does not come back" if reader == "encode" and found != text else ""

        begin = time.process_time()
        outcomes.append(judge(f"{reader} of {unit!r}, {len(longer)} characters,", check, refusals=refusals))
        seconds.append(time.process_time() - begin)
        if outcomes[-1].wrong:
            return outcomes[-1]
    if seconds[1] > TIMES_SLOWER * seconds[0] + ALLOWANCE_SECONDS:
        slow = f"takes {seconds[1]:.1f} s, and a quarter of it {seconds[0]:.2f} s"
        return outcomes[-1]._replace(verdict="failed", wrong=slow)
    return outcomes[-1]


KINDS: dict[str, Callable[[random.Random, Path], Outcome]]
KINDS = {
    "weights": weights, "configuration": configuration, "images": images, "long": long, "lost": lost, "narrow": narrow,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
