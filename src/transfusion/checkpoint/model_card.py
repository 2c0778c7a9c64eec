"""README.md of an exported folder: what the model is, what it was trained on, and how to use it. Without any path."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transfusion.checkpoint.layout import Manifest
from transfusion.config import Config
from transfusion.config.objectives import COMPARED, PREDICTED
from transfusion.parallel.parameter_shards import AVERAGE

_BEFORE_LOSS, _AFTER_LOSS = "validation_", "_loss"

_PAGE = """\
---
library_name: transfusion
pipeline_tag: any-to-any
tags:
- transfusion
- multimodal
- text-to-image
- image-to-text
---

# {name}

One transformer that reads and writes text and images. It was trained as
[Transfusion](https://arxiv.org/abs/2408.11039) describes: next-token prediction on text, and {objective} on images.

**Licence: not stated.** Before you publish this model, add `license:` to the head of this page and say here what others
may do with it.

## Use

MODEL is the folder of this page. The package is `transfusion-mm`. `transfusion` on PyPI is another project.

```
transfusion sample MODEL --prompt "a caption" -n 4 --out images
transfusion caption MODEL images/0000.png
```

```python
from transfusion import Pipeline

pipeline = Pipeline.from_export("MODEL")
samples = pipeline.sample(["a caption"], per_prompt=4, seed=0)
print(pipeline.caption([sample.pixels for sample in samples]))
```

## Architecture

{architecture}

## Training

{training}

Data, each source with its share of the tokens relative to the others:

{sources}

## Validation

{validation}
"""


def model_card(config: Config, manifest: Manifest, run: Path | None) -> str:
    """The page of an exported model.

    Args:
        config: Of the run.
        manifest: Of the checkpoint that is exported.
        run: Its folder, whose metrics.jsonl has the validation losses. None where there is none.

    Returns:
        Markdown, whose head is read by the Hugging Face hub.
    """
    diffuses = config.codec.makes == "latents"
    sources = (f"- `{source.name}`: {_by_step(source.schedule)}" for source in config.data.sources)
    return _PAGE.format(
        name=config.run.name,
        objective="diffusion" if diffuses else "next-token prediction",
        architecture=_table(_architecture(config, manifest)),
        training=_table(_training(config, manifest)),
        sources="\n".join(sources) or "- none is known",
        validation=_validation(config, manifest, _losses(run, manifest.state["step"])),
    )


def _architecture(config: Config, manifest: Manifest) -> Iterator[tuple[str, object]]:
    model, codec = config.model, config.codec
    yield "family", model.family
    yield "parameters", sum(math.prod(record.shape) for record in manifest.parameters.values())
    yield "layers", model.layers
    yield "hidden size, feed-forward size", f"{model.hidden_size:,}, {model.ffn_width:,}"
    yield "query heads, key and value heads", f"{model.heads}, {model.kv_heads}"
    yield "vocabulary", model.vocabulary
    yield "sequence length", config.data.sequence_length
    yield "image sizes, height x width", ", ".join(map(str, codec.sizes))
    yield "channels of an image", codec.channels
    yield "codec", f"{codec.kind}, {codec.fingerprint}" if codec.fingerprint else codec.kind
    if codec.makes == "latents":
        yield "prediction", f"{PREDICTED[config.diffusion.prediction]}, {config.diffusion.steps:,} timesteps"


def _training(config: Config, manifest: Manifest) -> Iterator[tuple[str, object]]:
    data, state = config.data, manifest.state
    yield "steps", f"{state['step']:,} of {config.train.steps:,}"
    yield "tokens and patches, padding included", state["tokens"]
    yield "images", state["images"]
    yield "batch", f"{data.global_batch_size:,} sequences of {data.sequence_length:,}"
    optimizer = {"adamw": "AdamW", "muon": "Muon and AdamW"}[config.optimizer.name]
    yield "optimizer", f"{optimizer}, peak learning rate {config.optimizer.learning_rate:g}"
    yield "precision", config.train.precision
    half_life = config.optimizer.ema_half_life
    average = f"half-life {half_life:g} steps" if half_life else f"decay {config.optimizer.ema_decay:g}"
    yield "moving average", average if AVERAGE in manifest.kinds else "none"
    if config.model.modality_weights != "shared":
        yield "weights of patches", f"their own ({config.model.modality_weights})"
    if config.train.freeze:
        yield "not trained", ", ".join(config.train.freeze)
    if config.diffusion.context == "clean":
        yield "images in the context", "clean"
    if config.train.init_from:
        yield "text tower started from", Path(config.train.init_from).name


def _losses(run: Path | None, step: int) -> dict[str, float]:
    """Validation losses that metrics.jsonl has of this step, by the names of their terms."""
    found: dict[str, float] = {}
    path = run / "metrics.jsonl" if run else None
    for text in path.read_text(encoding="utf-8").splitlines() if path and path.is_file() else ():
        try:
            line = json.loads(text)
        except ValueError:
            # A run that was killed leaves a torn line.
            continue
        if line.get("step") == step:
            found |= {
                name.removeprefix(_BEFORE_LOSS).removesuffix(_AFTER_LOSS): value
                for name, value in line.items()
                if name.startswith(_BEFORE_LOSS) and value is not None
            }
    return found


def _validation(config: Config, manifest: Manifest, losses: Mapping[str, float]) -> str:
    step, data = f"{manifest.state['step']:,}", config.data
    if not losses:
        return f"No validation loss of step {step} is known. `transfusion eval MODEL` measures it."
    units = {"text": ", nats per token", "image": ", nats per token"}
    if config.codec.makes == "latents":
        units["image"] = f", squared error of the predicted {COMPARED[config.diffusion.prediction]}"
    names = ", ".join(f"`{source.name}`" for source in data.validation)
    limit = f", at most {data.validation_limit:,} documents" if data.validation_limit else ""
    weights = "the moving average" if AVERAGE in manifest.kinds else "the weights"
    rows = ((f"{name} loss{units.get(name, '')}", f"{loss:.4g}") for name, loss in losses.items())
    return f"Losses of {weights} at step {step}, on {names}{limit}:\n\n{_table(rows)}"


def _by_step(schedule: tuple[tuple[int, float], ...]) -> str:
    return ", ".join(f"{weight:g}" + (f" from step {step:,}" if step else "") for step, weight in schedule)


def _table(rows: Iterator[tuple[str, Any]]) -> str:
    lines = (
        f"| {name} | {value:,} |" if isinstance(value, int) else f"| {name} | {value} |"
        for name, value in rows
    )
    return "\n".join(["| | |", "|---|---|", *lines])
