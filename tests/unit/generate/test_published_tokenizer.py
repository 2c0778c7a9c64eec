"""An answer in the pieces of a published tokenizer: spaces stay behind other text, and none comes before its first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from transfusion.config import Config
from transfusion.generate import Pipeline, TextDelta
from transfusion.model import Transfusion
from transfusion.sequence.tokenizer import Tokenizer

tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed (extra: tokenizers)")


def as_llama_2(path: Path) -> Tokenizer:
    """Words with a mark before each, and a decoder that drops the space where a text begins."""
    words = [f"▁{word}" for word in ("a", "handwritten", "three", "one")]
    letters = sorted({letter for word in words for letter in word})
    vocabulary = {
        piece: number
        for number, piece in enumerate(["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters])
    }
    merges = []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append((word[: end - 1], word[end - 1]))
    library = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    normal, decode = tokenizers.normalizers, tokenizers.decoders
    library.normalizer = normal.Sequence([normal.Prepend("▁"), normal.Replace(" ", "▁")])
    library.decoder = decode.Sequence(
        [decode.Replace("▁", " "), decode.ByteFallback(), decode.Fuse(), decode.Strip(" ", 1, 0)]
    )
    library.save(str(path))
    return Tokenizer(path)


@pytest.mark.parametrize("behind_text", [True, False])
def test_spaces_come_as_they_are(
    tmp_path: Path,
    build_model: Callable[..., tuple[Config, Transfusion]],
    make_image: Callable[[int], Any],
    behind_text: bool,
) -> None:
    tokenizer = as_llama_2(tmp_path / "tokenizer.json")
    config, model = build_model(vocabulary=tokenizer.vocabulary)
    pipeline = Pipeline(model, tokenizer, config, "cpu")
    said = "a handwritten three 🎈 a"
    ids = tokenizer.encode(said)
    place = iter(ids)

    def next_id(hidden_ND: Tensor) -> Tensor:
        logit_NV = torch.zeros(len(hidden_ND), pipeline.config.model.vocabulary)
        logit_NV[:, next(place)] = 1.0
        return logit_NV

    pipeline.runner.model.lm_head.forward = next_id  # type: ignore[method-assign]
    prompt: Any = "one" if behind_text else [torch.from_numpy(make_image(0))]
    deltas = [
        event.text
        for event in pipeline.stream(prompt, max_tokens=len(ids), max_images=0)
        if isinstance(event, TextDelta)
    ]
    assert "".join(deltas) == (f" {said}" if behind_text else said)
    assert len(deltas) == 6
