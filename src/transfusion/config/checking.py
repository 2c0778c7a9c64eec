"""From plain values to a configuration, with every mistake told at once."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from transfusion.config import codec_folder
from transfusion.config.config import Config
from transfusion.config.sections import PROBLEM_SEPARATOR, WEIGHT_FORMS
from transfusion.config.yaml_files import override
from transfusion.errors import UserError, shown
from transfusion.urls import redacted_text

# Keys that had another name before version 0.1.0, those of codec training too, with what their last part is now.
RENAMED = {
    "checkpoint.keep_every": "archive_interval",
    "codec.codes": "codebook_size",
    "data.caption_drop": "caption_dropout",
    "data.held_out": "validation",
    "data.max_faults": "max_bad_fraction",
    "data.micro_rows": "micro_batch_size",
    "data.open_rows": "packing_buffer",
    "data.row_length": "sequence_length",
    "data.rows": "global_batch_size",
    "data.sources.0.share": "weight",
    "data.sources.0.weight.0.share": "weight",
    "data.sources.0.window_shards": "shuffle_window",
    "data.validation.0.share": "weight",
    "data.validation.0.weight.0.share": "weight",
    "data.validation.0.window_shards": "shuffle_window",
    "diffusion.objective": "prediction, and its values are epsilon (was noise), v (was velocity) and flow",
    "diffusion.timestep_law": "timestep_sampling",
    "diffusion.understanding_timestep_limit": "max_timestep_before_caption",
    "images.held_out": "validation",
    "model.feed_forward": "ffn_size",
    "model.key_heads": "num_kv_heads",
    "model.norm_order": "norm_placement, and its values are pre (was before) and post (was after)",
    "model.patcher": "patch_embed",
    "model.width": "hidden_size",
    "network.codes": "codebook_size",
    "pictures": "images",
    "sample": "sample_grid",
    "train.head_chunk": "loss_chunk_size",
    "train.roll_back_after": "rollback_after_skipped",
    "train.stall_exit_seconds": "lost_rank_timeout",
}

Checked = TypeVar("Checked", bound=BaseModel)


def load_values(
    values: dict[str, Any], overrides: Sequence[str], *, where: str, reads_codec: bool = True
) -> Config:
    """Apply overrides to plain values, which change, and check everything; see `load_config`."""
    problems = override(values, overrides)
    if reads_codec and isinstance(values.get("codec"), dict):
        values["codec"] = codec_folder.completed(values["codec"], problems)
    return check_as(Config, values, problems=problems, where=where)


def check_as(
    kind: type[Checked], values: dict[str, Any], *, problems: Sequence[str] = (), where: str
) -> Checked:
    """Validate plain values into a configuration of this kind; raises UserError that lists every problem."""
    found = list(problems)
    values = copy.deepcopy(values)
    while True:
        try:
            config = kind.model_validate(values)
            break
        except ValidationError as error:
            mistakes = [
                # Where it stands in the words of the file.
                mistake | {"loc": tuple(part for part in mistake["loc"] if part not in WEIGHT_FORMS)}
                for mistake in error.errors()
            ]
        found += [problem for mistake in mistakes for problem in _explain(mistake, kind)]
        # Parts are compared only once each of them is well: take out what is wrong, to hear of the rest.
        if not all(_take_out(values, mistake) for mistake in mistakes):
            break
    if len(found) == 1:
        raise UserError(redacted_text(f"{where}: {found[0]}"))
    if found:
        raise UserError(
            f"{len(found)} problems in {where}:"
            + "".join(f"\n  - {redacted_text(problem)}" for problem in found)
        )
    return config


def _take_out(values: dict[str, Any], mistake: Any) -> bool:
    """Remove the value that a mistake is about; False when it is about a whole section."""
    place = mistake["loc"]
    if len(place) < 2 or mistake["type"] == "value_error":
        return False
    target: Any = values
    for key in place[:-1]:
        target = target[key] if isinstance(target, list) or key in target else {}
    if not isinstance(target, dict) or place[-1] not in target:
        return False
    del target[place[-1]]
    return True


def _explain(error: Any, kind: type[BaseModel]) -> list[str]:
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        general = ".".join("0" if isinstance(part, int) else str(part) for part in error["loc"])
        if general in RENAMED:
            return [f"{path} is now {path.removesuffix(str(error['loc'][-1]))}{RENAMED[general]}"]
        near = difflib.get_close_matches(general, list(_known_keys(kind)), n=1, cutoff=0.5)
        remedy = f"; did you mean {near[0]}?" if near else "; `transfusion config` lists every key"
        return [f"{shown(path)} is not a known key{remedy}"]
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return message.split(PROBLEM_SEPARATOR)
    return [f"{shown(path)}: {message[0].lower()}{message[1:]}, got {shown(repr(error['input']))}"]


def _known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        # Sections, and the entries of lists such as data.sources.
        for kind, inner in ((field.annotation, ""), *((kind, "0.") for kind in get_args(field.annotation))):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _known_keys(kind, f"{prefix}{name}.{inner}")
