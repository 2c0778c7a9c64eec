"""What `transfusion eval` runs: named suites, each a few metrics with how they were measured."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import Field, create_model

from transfusion.config import Section, SourceConfig
from transfusion.config.checking import check_as
from transfusion.config.yaml_files import override, read
from transfusion.data.index.source_index import build_indexes
from transfusion.data.shards.webdataset import expand_all
from transfusion.errors import UserError
from transfusion.evaluate.captioned_images import NoCaptionedImagesError
from transfusion.evaluate.metrics.metric import Metric
from transfusion.evaluate.progress_lines import say
from transfusion.evaluate.suites.denoise import denoise
from transfusion.evaluate.suites.digits import digits
from transfusion.evaluate.suites.edit import edit
from transfusion.evaluate.suites.geneval import geneval, geneval2
from transfusion.evaluate.suites.harnesses import language, lmms
from transfusion.evaluate.suites.images_and_captions import captions, guidance, images, samples
from transfusion.evaluate.suites.nearest import nearest
from transfusion.evaluate.suites.perplexity import perplexity
from transfusion.evaluate.suites.settings import (
    CaptionsSuite,
    DenoiseSuite,
    DigitsSuite,
    EditSuite,
    Geneval2Suite,
    GenevalSuite,
    GuidanceSuite,
    ImagesSuite,
    LanguageSuite,
    LmmsSuite,
    NearestSuite,
    PerplexitySuite,
    SamplesSuite,
    SpokenDigitsSuite,
    StepsSuite,
    SuiteConfig,
    TextToImageSuite,
    ValidationSuite,
)
from transfusion.evaluate.suites.spoken_digits import spoken_digits
from transfusion.evaluate.suites.steps import steps
from transfusion.evaluate.suites.text_to_image import text_to_image
from transfusion.evaluate.suites.validation import validation
from transfusion.files import atomic_write_text
from transfusion.generate.budget import TABLE
from transfusion.generate.load import Dtype, Weights
from transfusion.generate.pipeline import Pipeline
from transfusion.parallel.environment import own_device, own_place

METRICS = TABLE


class Suite(NamedTuple):
    """run: from a model, the folder where evidence is left and the settings to named figures."""

    run: Callable[[Pipeline, Path, Any], dict[str, Metric]]
    settings: type[SuiteConfig]


# In the order in which documentation lists them.
SUITES = {
    "validation": Suite(validation, ValidationSuite),
    "samples": Suite(samples, SamplesSuite),
    "denoise": Suite(denoise, DenoiseSuite),
    "digits": Suite(digits, DigitsSuite),
    "spoken_digits": Suite(spoken_digits, SpokenDigitsSuite),
    "images": Suite(images, ImagesSuite),
    "guidance": Suite(guidance, GuidanceSuite),
    "captions": Suite(captions, CaptionsSuite),
    "nearest": Suite(nearest, NearestSuite),
    "edit": Suite(edit, EditSuite),
    "steps": Suite(steps, StepsSuite),
    "text_to_image": Suite(text_to_image, TextToImageSuite),
    "geneval": Suite(geneval, GenevalSuite),
    "geneval2": Suite(geneval2, Geneval2Suite),
    "perplexity": Suite(perplexity, PerplexitySuite),
    "language": Suite(language, LanguageSuite),
    "lmms": Suite(lmms, LmmsSuite),
}
# What the processes of a launcher share. All other suites are the first one's alone.
SHARED = ("text_to_image", "geneval", "geneval2")
# What runs where none is named. Of these, what the data do not allow is left out.
DEFAULT = ("validation", "samples")


def sections() -> type[Section]:
    """What a file of suites may hold: a section for each of SUITES."""
    fields: dict[str, Any] = {
        name: (suite.settings, Field(default_factory=suite.settings)) for name, suite in SUITES.items()
    }
    return create_model("Suites", __base__=Section, **fields)


def choose(
    asked: Sequence[str],
    overrides: Sequence[str] = (),
    *,
    classifier: Path | None = None,
    download: bool = False,
) -> dict[str, SuiteConfig]:
    """The suites that are to run, in their order, with their settings. None asked for are the default ones.

    asked: names of suites, and at most one file of them. Its suites run where no name stands beside it. overrides:
    `SUITE.key=value`. classifier: of all suites that take one. download: of all that may fetch something. Raises
    UserError for what is unknown or set in vain.
    """
    files = [word for word in asked if Path(word).suffix in (".yaml", ".yml")]
    names = [word for word in asked if word not in files]
    if unknown := [name for name in names if name not in SUITES]:
        raise UserError(f"no suite named {unknown[0]!r}; there are {', '.join(SUITES)}, or name a .yaml file")
    if len(files) > 1:
        raise UserError(f"{files[1]} is a second file of suites; name one")
    # `captions:` alone is that suite as it is.
    stored = read(Path(files[0])) if files else {}
    values = {name: {} if section is None else section for name, section in stored.items()}
    before = set(values)
    chosen = names or list(values) or list(DEFAULT)
    where = files[0] if files else "the overrides"
    checked = check_as(sections(), values, problems=override(values, overrides), where=where)
    if vain := [name for name in values if name not in chosen and name not in before]:
        raise UserError(f"{vain[0]} is set and does not run; add --suite {vain[0]}")
    found: dict[str, SuiteConfig] = {name: getattr(checked, name) for name in chosen}
    told: dict[str, Any] = {"classifier": str(classifier)} if classifier is not None else {}
    told |= {"download": True} if download else {}
    for name, settings in found.items():
        mine = {key: value for key, value in told.items() if key in type(settings).model_fields}
        found[name] = settings.model_copy(update=mine)
    return found


def choose_for_training(file: str) -> dict[str, SuiteConfig]:
    """The suites of a file, or the default ones, that run in a training. Raises UserError also for those that cannot.

    There all ranks make the same calls of the model, and suites of SHARED do not.
    """
    chosen = choose([file] if file else [])
    for name in shared(chosen):
        raise UserError(f"eval.suites: {name} is not for a training; leave it to `transfusion watch`")
    return chosen


def run_suites(
    model: Path,
    asked: Sequence[str],
    out: Path,
    *,
    overrides: Sequence[str] = (),
    weights: Weights = "auto",
    device: str = "auto",
    dtype: Dtype = "auto",
    classifier: Path | None = None,
    download: bool = False,
) -> dict[str, Metric]:
    """Run suites on an exported model; writes OUT/metrics.json (added to what is there) and OUT/evaluation/.

    asked, overrides, classifier, download: see `choose`. Of the default suites those run that the data allow. Raises
    UserError as `choose` does, and when the data is not to be found. Under a launcher the processes share the suites of
    SHARED. The first one runs the others too and writes, and the rest return no metrics.
    """
    chosen = choose(asked, overrides, classifier=classifier, download=download)
    if own_place().rank and not shared(chosen):
        return {}
    pipeline = open_model(model, weights=weights, device=device, dtype=dtype)
    return measure_into(out, pipeline, chosen, all_must=bool(asked))


def open_model(
    model: Path, *, weights: Weights = "auto", device: str = "auto", dtype: Dtype = "auto"
) -> Pipeline:
    """An exported model for suites, with the threads that it was trained with. Raises UserError as reading it does."""
    pipeline = Pipeline.from_export(model, weights=weights, device=own_device(device), dtype=dtype)
    if pipeline.config.train.threads:
        torch.set_num_threads(pipeline.config.train.threads)
    return pipeline


def shared(chosen: Mapping[str, SuiteConfig]) -> dict[str, SuiteConfig]:
    """Those of some suites that the processes of a launcher share."""
    return {name: each for name, each in chosen.items() if name in SHARED}


def measure_into(
    out: Path, pipeline: Pipeline, chosen: Mapping[str, SuiteConfig], *, all_must: bool
) -> dict[str, Metric]:
    """Run suites on a model that is open, see `run_suites`. all_must: see `measured`."""
    place = own_place()
    out.mkdir(parents=True, exist_ok=True)
    details = {} if place.rank else _known(out / METRICS)
    metrics: dict[str, Metric] = {}
    for name, found in measured(pipeline, shared(chosen) if place.rank else chosen, out, all_must=all_must):
        metrics |= found
        origin = origin_of(pipeline, name, chosen[name])
        details |= {metric: figure.as_dict() | origin for metric, figure in found.items()}
        # At once, since a later suite may end the command, and this one has left its evidence.
        if not place.rank:
            _write(out / METRICS, details)
    return metrics


def _write(path: Path, details: Mapping[str, Any]) -> None:
    """Names and numbers on top, for whoever compares; how each was measured under `details`."""
    values = {name: detail["value"] for name, detail in details.items()}
    atomic_write_text(path, json.dumps(values | {"details": details}, indent=2) + "\n")


def measured(
    pipeline: Pipeline, chosen: Mapping[str, SuiteConfig], out: Path, *, all_must: bool
) -> Iterator[tuple[str, dict[str, Metric]]]:
    """Each chosen suite with its figures.

    all_must: unless all were asked for by name, what the data do not allow is left out. Raises UserError as the suites
    do, and when data are not to be found, before any is run.
    """
    on = {name: _on(pipeline, name, settings) for name, settings in chosen.items()}
    for each in on.values():
        _refuse_missing_shards(each.config.data.validation)
    for name, each in on.items():
        say(f"suite {name}")
        try:
            yield name, SUITES[name].run(each, out, chosen[name])
        except NoCaptionedImagesError as reason:
            if all_must:
                raise
            say(f"suite {name} is left out: {reason}")


def _on(pipeline: Pipeline, name: str, settings: SuiteConfig) -> Pipeline:
    """The same model, whose data.validation is what the suite measures. Raises UserError for data set in vain."""
    data = settings.data
    if data and not settings.reads_data:
        raise UserError(f"{name}.data is set, and the suite measures other data; leave it out")
    if not data and settings.reads_data:
        return pipeline
    changed = copy.copy(pipeline)
    config = pipeline.config
    changed.config = config.model_copy(update={"data": config.data.model_copy(update={"validation": data})})
    return changed


def origin_of(pipeline: Pipeline, name: str, settings: SuiteConfig) -> dict[str, Any]:
    """What a figure is made of: suite and settings that are no defaults, weights, contents of the data, and codec.

    Raises UserError for data that are not to be found or are set in vain.
    """
    pipeline = _on(pipeline, name, settings)
    config = pipeline.config
    indexes = (
        build_indexes(config, config.data.validation, pipeline.tokenizer) if config.data.validation else []
    )
    return {
        "suite": name,
        "settings": settings.model_dump(mode="json", exclude_defaults=True),
        "weights": " ".join(filter(None, astuple(pipeline.origin))),
        "data": {index.name: index.digest for index in indexes},
        "codec": f"{config.codec.kind} {config.codec.fingerprint}".strip(),
    }


def _refuse_missing_shards(sources: Sequence[SourceConfig]) -> None:
    """Raises UserError that says where shards were sought, since a model may be used in another folder than its run."""
    for source in sources:
        try:
            expand_all(source.shards)
        except UserError as error:
            raise UserError(
                f"{error}; the model names its data as seen from the folder where its training was started, and this"
                f" is {Path.cwd()}: change to that folder"
            ) from None


def _known(path: Path) -> dict[str, Any]:
    """Details of the metrics that stand in `path` already. Raises UserError for a file that is not ours."""
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["details"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged; delete it, or name another folder with --out") from None
