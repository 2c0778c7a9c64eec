"""CLIP's cosines and DINOv2's features are those of transformers called directly, from a small network in a folder."""

from __future__ import annotations

import json
import shutil
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from transfusion.errors import UserError
from transfusion.evaluate.features.published import folder_digest, open_questions
from transfusion.evaluate.features.readers import Reader, open_readers
from transfusion.generate.pillow_images import to_image

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: oracles)")

CPU = torch.device("cpu")
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
CAPTIONS = ["a cat on a mat", "two dogs", "a caption with more letters than the network has positions"]


@pytest.fixture(scope="module")
def images() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 64, 80), (3, 40, 40), (1, 90, 64))
    return [torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8) for shape in shapes]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of random weights that reads letters."""
    folder = tmp_path_factory.mktemp("models") / "clip"
    folder.mkdir()
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocabulary = {word: number for number, word in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    text = {
        **SMALL,
        "intermediate_size": 64,
        "vocab_size": len(vocabulary),
        "max_position_embeddings": 24,
        "bos_token_id": vocabulary["<|startoftext|>"],
        "eos_token_id": vocabulary["<|endoftext|>"],
    }
    vision = {**SMALL, "intermediate_size": 64, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    transformers.CLIPModel(config).save_pretrained(folder)
    size = {"shortest_edge": 32}
    processor = transformers.CLIPImageProcessor(size=size, crop_size={"height": 32, "width": 32})
    words = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    transformers.CLIPProcessor(processor, words).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of random weights for 28 x 28 pixels, whose positions are stretched to 224 x 224."""
    folder = tmp_path_factory.mktemp("models") / "dinov2"
    torch.manual_seed(0)
    config = transformers.Dinov2Config(**SMALL, image_size=28, patch_size=14)
    transformers.Dinov2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def answering(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of random weights that reads an image and letters, and writes a letter."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("models") / "answering"
    letters = {letter: number for number, letter in enumerate(["<unk>", *string.printable])}
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE(letters, [], unk_token="<unk>")),
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(**SMALL, intermediate_size=64, image_size=32, patch_size=16)
    text = transformers.LlamaConfig(**SMALL, intermediate_size=64, vocab_size=len(words))
    image_token = words.convert_tokens_to_ids("<image>")
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_token)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    crop = {"height": 32, "width": 32}
    transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=crop),
        words,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="{% for part in messages[0].content %}{{ part.text or '<image>' }}{% endfor %} A: ",
    ).save_pretrained(folder)
    return folder


def reader_of(**folders: Path) -> Reader:
    return open_readers(CPU, **{name: str(folder) for name, folder in folders.items()})[-1]


@torch.no_grad()
def test_cosines_are_those_behind_the_logits_of_clip(clip: Path, images: list[torch.Tensor]) -> None:
    model = transformers.CLIPModel.from_pretrained(clip)
    processor = transformers.CLIPProcessor.from_pretrained(clip)
    ours = reader_of(clip=clip)(images, CAPTIONS)
    for number, (image, caption) in enumerate(zip(images, CAPTIONS, strict=True)):
        batch = processor(
            text=[caption],
            images=[to_image(image).convert("RGB")],
            return_tensors="pt",
            truncation=True,
            max_length=24,
        )
        logit = model(**batch).logits_per_image
        assert ours[number] == pytest.approx((logit / model.logit_scale.exp()).item(), abs=1e-6)


@torch.no_grad()
def test_answers_are_as_probable_as_when_the_model_writes_them(
    answering: Path, images: list[torch.Tensor]
) -> None:
    """As the script of GenEval 2 asks: a token is generated, and the scores of the first tokens are summed up."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(answering, dtype="auto").eval()
    processor = transformers.AutoProcessor.from_pretrained(answering)
    ask, found = open_questions(answering, CPU), []
    for image in images:
        picture = to_image(image).convert("RGB")
        parts = [{"type": "image", "image": picture}, {"type": "text", "text": "Is it red?"}]
        batch = processor.apply_chat_template(
            [{"role": "user", "content": parts}],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        written = model.generate(
            **batch, max_new_tokens=1, do_sample=False, output_scores=True, return_dict_in_generate=True
        )
        probabilities = written.scores[0].softmax(-1)[0]
        firsts = [processor.tokenizer.encode(each)[0] for each in ("Yes", "yes")]
        found.append(ask(picture, "Is it red?", ["Yes", "yes"]))
        assert found[-1] == pytest.approx(sum(probabilities[first].item() for first in firsts), rel=1e-5)
    assert len(set(found)) == 3, "the image counts"
    assert ask(picture, "Is it red?", ["y", "yes", "yep"]) == ask(picture, "Is it red?", ["y"]), (
        "each token once"
    )


def test_a_model_that_cannot_be_asked_is_told_before_anything_is_drawn(
    answering: Path, tmp_path: Path
) -> None:
    changed = shutil.copytree(answering, tmp_path / "changed")
    digest = folder_digest(changed)
    (template,) = changed.glob("chat_template.jinja")
    template.write_text(template.read_text() + " ")
    assert folder_digest(changed) != digest
    template.unlink()
    with pytest.raises(UserError, match="has no chat template"):
        open_questions(changed, CPU)


@torch.no_grad()
def test_features_are_the_class_token_of_dinov2(dinov2: Path, images: list[torch.Tensor]) -> None:
    """Of an image of 224 x 224 pixels, which needs no resize, with the values of ImageNet."""
    model = transformers.Dinov2Model.from_pretrained(dinov2)
    image = torch.randint(0, 256, (3, 224, 224), dtype=torch.uint8)
    mean, deviation = (
        np.array(each)[:, None, None] for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    pixels = torch.from_numpy((image.numpy() / 255 - mean) / deviation).float()[None]
    theirs = model(pixel_values=pixels).last_hidden_state[:, 0].numpy()
    assert reader_of(dinov2=dinov2)([image], [""]) == pytest.approx(theirs, abs=1e-5)
    assert reader_of(dinov2=dinov2)(images, CAPTIONS).shape == (3, 32)


def test_a_folder_of_another_network_or_without_all_weights_is_refused(
    clip: Path, dinov2: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        UserError, match=r"clip is no Dinov2Model \(it is a clip\); name a folder that transformers"
    ):
        reader_of(dinov2=clip)
    changed = shutil.copytree(dinov2, tmp_path / "changed")
    weights: dict[str, Any] = load_file(changed / "model.safetensors")
    del weights["layernorm.bias"]
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"changed is no Dinov2Model \(1 weights are missing .* layernorm.bias\)"
    ):
        reader_of(dinov2=changed)
    save_file(
        {**weights, "layernorm.bias": torch.zeros(3)},
        changed / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(UserError, match="changed is no Dinov2Model"):
        reader_of(dinov2=changed)
    (changed / "model.safetensors").unlink()
    with pytest.raises(UserError, match="changed is no Dinov2Model"):
        reader_of(dinov2=changed)
    assert reader_of(dinov2=dinov2).digest != reader_of(clip=clip).digest
