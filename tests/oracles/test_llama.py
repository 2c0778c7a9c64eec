"""The text path equals transformers' LlamaForCausalLM with the same weights, under every mask of ours."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from transfusion.config import CodecConfig, ModelConfig
from transfusion.model import Transfusion
from transfusion.model.initialise import initialise
from transfusion.schema import ImageSegment, TextSegment
from transfusion.sequence.layout import Layout, lay_out
from transfusion_kernels import IntervalMask

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: oracles)")

VOCABULARY, THETA = 97, 10_000.0
PARTS = {
    "attention_norm": "input_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}


@pytest.fixture(params=[4, 2, 1], ids=lambda key_heads: f"{key_heads} key heads")
def models(request: pytest.FixtureRequest) -> tuple[Transfusion, Any]:
    """Ours, and a Llama with the same weights."""
    config = ModelConfig(vocabulary=VOCABULARY, layers=3, hidden_size=64, heads=4, num_kv_heads=request.param)
    ours = Transfusion(config, CodecConfig(channels=1, image_size=8))
    initialise(ours, seed=0, layers=3)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in ours.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=config.ffn_width,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=request.param,
            rms_norm_eps=config.norm_epsilon,
            tie_word_embeddings=False,
            max_position_embeddings=256,
            rope_parameters={"rope_type": "default", "rope_theta": THETA},
            attn_implementation="eager",
        )
    ).eval()
    weights = {
        "model.embed_tokens.weight": ours.embedding.weight,
        "model.norm.weight": ours.norm.weight,
        "lm_head.weight": ours.lm_head.weight,
    }
    for layer, block in enumerate(ours.blocks):
        for mine, its in PARTS.items():
            weights[f"model.layers.{layer}.{its}.weight"] = block.get_submodule(mine).weight
    theirs.load_state_dict(weights)
    return ours, theirs


@torch.no_grad()
def ours_logits(
    model: Transfusion, ids_BS: Tensor, layout: Layout, start_S: np.ndarray | None = None
) -> Tensor:
    rows = len(ids_BS)
    first_S = (
        torch.zeros(len(layout), dtype=torch.int32) if start_S is None else torch.from_numpy(start_S).int()
    )
    mask = IntervalMask(first_S.expand(rows, -1), torch.from_numpy(layout.end_key_S).int().expand(rows, -1))
    position_BSA = torch.from_numpy(layout.position_SA).expand(rows, -1, -1)
    hidden_BSD = model.run_blocks(model.embedding(ids_BS), position_BSA, mask)
    return model.lm_head(model.norm(hidden_BSD))


@torch.no_grad()
def their_logits(model: Any, ids_BS: Tensor, layout: Layout, start_S: np.ndarray | None = None) -> Tensor:
    """Llama given our mask as its own 4-D additive mask."""
    first_S = np.zeros(len(layout), np.int64) if start_S is None else start_S
    key_S = np.arange(len(layout))
    visible_SS = (key_S >= first_S[:, None]) & (key_S < layout.end_key_S[:, None])
    hidden_SS = torch.from_numpy(~visible_SS)
    bias_SS = torch.zeros(hidden_SS.shape).masked_fill(hidden_SS, torch.finfo(torch.float32).min)
    bias_B1SS = bias_SS.expand(len(ids_BS), 1, -1, -1)
    position_BS = torch.from_numpy(layout.position_SA[:, 0]).expand(len(ids_BS), -1)
    return model(input_ids=ids_BS, attention_mask=bias_B1SS, position_ids=position_BS).logits


def text_ids(count: int, rows: int = 2) -> Tensor:
    return torch.randint(7, VOCABULARY, (rows, count), generator=torch.Generator().manual_seed(1))


def assert_logits_equal(mine: Tensor, theirs: Tensor) -> None:
    assert (mine - theirs).abs().max() <= 2e-6


def test_logits_of_text(models: tuple[Transfusion, Any]) -> None:
    ours, theirs = models
    layout = lay_out([TextSegment((9,) * 38)])
    ids = text_ids(40)
    with torch.no_grad():
        plain = theirs(input_ids=ids).logits
    assert_logits_equal(ours_logits(ours, ids, layout), plain)


def test_loss_of_text(models: tuple[Transfusion, Any]) -> None:
    ours, theirs = models
    ids = text_ids(40)
    layout = lay_out([TextSegment((9,) * 38)])
    position_BSA = torch.from_numpy(layout.position_SA).expand(2, -1, -1)
    end_BS = torch.from_numpy(layout.end_key_S).int().expand(2, -1)
    with torch.no_grad():
        hidden = ours.run_blocks(
            ours.embedding(ids), position_BSA, IntervalMask(torch.zeros_like(end_BS), end_BS)
        )
        total = ours.lm_head(ours.norm(hidden)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        expected = theirs(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(total / 78, expected, rtol=2e-6, atol=0)


def test_logits_under_the_mask_of_images(models: tuple[Transfusion, Any]) -> None:
    """The tokens at patch positions are embedded as text here; the mask is what is compared."""
    ours, theirs = models
    segments = [TextSegment((9,) * 5), ImageSegment(None, 16), TextSegment((9,) * 3), ImageSegment(None, 4)]
    layout = lay_out(segments)
    ids = text_ids(len(layout))
    expected = their_logits(theirs, ids, layout)
    assert_logits_equal(ours_logits(ours, ids, layout), expected)
    causal = lay_out([TextSegment((9,) * (len(layout) - 2))])
    assert (expected - their_logits(theirs, ids, causal)).abs().max() > 1e-3


def test_logits_of_packed_documents(models: tuple[Transfusion, Any]) -> None:
    ours, theirs = models
    documents = [
        lay_out([TextSegment((9,) * 6)]),
        lay_out([TextSegment((9,) * 2), ImageSegment(None, 9)]),
        lay_out([ImageSegment(None, 4), TextSegment((9,) * 7)]),
    ]
    lengths = [len(document) for document in documents]
    start_C = np.cumsum([0, *lengths[:-1]])
    start_S = np.repeat(start_C, lengths)
    parts = list(zip(documents, start_C, strict=True))
    packed = Layout(
        token_ids_S=np.concatenate([d.token_ids_S for d in documents]),
        modality_S=np.concatenate([d.modality_S for d in documents]),
        position_SA=np.concatenate([d.position_SA for d in documents]),
        target_ids_S=np.concatenate([d.target_ids_S for d in documents]),
        text_weight_S=np.concatenate([d.text_weight_S for d in documents]),
        first_key_S=np.concatenate([d.first_key_S + start for d, start in parts]).astype(np.int32),
        end_key_S=np.concatenate([d.end_key_S + start for d, start in parts]).astype(np.int32),
        images=(),
        twins=(),
    )
    ids = text_ids(len(packed))
    mine = ours_logits(ours, ids, packed, start_S)
    assert_logits_equal(mine, their_logits(theirs, ids, packed, start_S))
    for document, start in zip(documents, start_C, strict=True):
        here = slice(start, start + len(document))
        assert_logits_equal(mine[:, here], their_logits(theirs, ids[:, here], document))
