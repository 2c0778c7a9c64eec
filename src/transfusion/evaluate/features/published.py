"""Networks that transformers knows, from folders on this machine: DINOv2, CLIP, and models that answer questions.

I images, C channels, H/W image height and width, F features, V vocabulary.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transfusion.errors import UserError
from transfusion.evaluate.features.resize import resized
from transfusion.files import DIGEST_BYTES, file_digest, fingerprint
from transfusion.generate.pillow_images import to_image

# Values and side of torch-fidelity's extractor; the former are those of ImageNet.
DINOV2_SIDE = 224
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Read = Callable[[Sequence[Tensor], Sequence[str]], Tensor]
# From an image of PIL, a question and spellings of its answer to their probability.
Ask = Callable[[Any, str, Sequence[str]], float]


def dinov2_features(folder: Path, device: torch.device) -> Read:
    """What gives the features [I, F] of the class token, behind the last norm. Raises UserError as `_opened` does."""
    model = _opened("Dinov2Model", "dinov2", folder).to(device)
    mean_111, deviation_111 = (
        255 * torch.tensor(each, device=device)[:, None, None] for each in (MEAN, DEVIATION)
    )

    def read(images: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
        pixels_ICHW = (resized(images, DINOV2_SIDE, device) - mean_111) / deviation_111
        return model(pixel_values=pixels_ICHW).pooler_output

    return read


def clip_cosines(folder: Path, device: torch.device) -> Read:
    """What gives the cosine [I] of each image and its caption. Raises UserError as `_opened` does.

    The processor of the folder prepares both. A caption is cut where the network's positions end.
    """
    model = _opened("CLIPModel", "clip", folder).to(device)
    processor = _opened("CLIPProcessor", "clip", folder)
    positions = model.config.text_config.max_position_embeddings

    def read(images: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
        batch = processor(
            text=list(captions),
            images=[to_image(image).convert("RGB") for image in images],
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=positions,
        )
        found = model(**batch.to(device))
        return (found.image_embeds * found.text_embeds).sum(-1)

    return read


def open_questions(folder: Path, device: torch.device) -> Ask:
    """What asks a model of images and text, in the precision of its weights. Raises UserError as `_opened` does.

    The probability of an answer is that of the first tokens of its spellings, as the first one of the model's reply.
    """
    model = _opened("AutoModelForImageTextToText", "", folder, dtype="auto").to(device)
    processor = _opened("AutoProcessor", "", folder)
    if not getattr(processor, "chat_template", None):
        raise UserError(
            f"{folder} has no chat template, by which it is asked; name a model that was taught to answer"
        )

    @torch.no_grad()
    def ask(image: Any, question: str, spellings: Sequence[str]) -> float:
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        batch = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        ).to(device)
        probability_V = model(**batch).logits[0, -1].float().softmax(-1)
        firsts = {processor.tokenizer.encode(each, add_special_tokens=False)[0] for each in spellings}
        found = sum(probability_V[first].item() for first in firsts)
        if not math.isfinite(found):
            raise UserError(f"{folder} gives numbers that are not finite; copy its weights again")
        return found

    return ask


def folder_digest(folder: Path) -> str:
    """Of weights, settings and vocabulary. Raises UserError for a folder without a network."""
    _refuse_without_config(folder, "a network")
    files = [
        path
        for path in sorted(folder.iterdir())
        if path.suffix in (".safetensors", ".json", ".jinja", ".model", ".txt")
    ]
    return fingerprint({path.name: file_digest(path) for path in files}, DIGEST_BYTES)


def _refuse_without_config(folder: Path, name: str) -> None:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no config.json; name a folder that transformers wrote for {name}")


def _opened(name: str, kind: str, folder: Path, *, dtype: Any = torch.float32) -> Any:
    """A class of transformers from a folder: a network, or a processor. kind: its model_type; empty: any.

    Raises UserError without transformers, and for a folder that is missing, of another network, or lacks weights.
    """
    try:
        import transformers
    except ImportError:
        raise UserError(
            f"{folder} needs transformers, which is not installed; `pip install transformers`"
        ) from None
    _refuse_without_config(folder, name)
    network = not name.endswith("Processor")
    options: dict[str, Any] = {"local_files_only": True}
    if network:
        options |= {"use_safetensors": True, "dtype": dtype, "output_loading_info": True}
    try:
        found = transformers.AutoConfig.from_pretrained(folder, local_files_only=True).model_type
        if kind and found != kind:
            raise ValueError(f"it is a {found}")
        with _quiet():
            opened = getattr(transformers, name).from_pretrained(folder, **options)
        if not network:
            return opened
        model, told = opened
        if lacking := [*told["missing_keys"], *told["mismatched_keys"]]:
            raise ValueError(f"{len(lacking)} weights are missing or of other shapes, as {lacking[0]}")
    except ImportError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder} needs a package that is not installed ({reason}); install it") from None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder} is no {name} ({reason}); name a folder that transformers wrote for {name}"
        ) from None
    return model.requires_grad_(False).eval()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No report of what did not fit, since that is told as an error, and no bars."""
    loggers = logging.getLogger("transformers")
    before = loggers.level
    loggers.setLevel(logging.ERROR)
    try:
        yield
    finally:
        loggers.setLevel(before)
