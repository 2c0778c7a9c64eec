"""Operations: all that torch counts, to the last one, and for attention the pairs that the dense mask shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from transfusion.config import Config
from transfusion.families.build import build_model
from transfusion.losses.transfusion import TransfusionLoss
from transfusion.observe.flops import FlopModel, Operations, Work, Workload
from transfusion.observe.utilization import OperationMeter
from transfusion.schema import Batch, ImageSegment, TextSegment


def small(model: dict[str, Any] | None = None, **train: Any) -> Config:
    shape = {"vocabulary": 96, "layers": 2, "hidden_size": 64, "heads": 4, "num_kv_heads": 2}
    return Config.model_validate(
        {
            "model": {**shape, **(model or {})},
            "codec": {"channels": 1, "image_size": 8},
            "data": {"sequence_length": 64, "global_batch_size": 2},
            "train": {"attention": "cpu", "precision": "fp32", "loss_chunk_size": 7, **train},
        }
    )


@pytest.fixture
def batch(pack: Callable[..., Batch], make_image: Any) -> Batch:
    """Two rows of 64 with an image each, a document border and padding."""
    image = [ImageSegment(make_image(seed, 8), 16) for seed in range(2)]
    text = TextSegment(tuple(range(10, 30)))
    return pack(small(), [[[text, image[0]], [TextSegment((10, 11, 12))]], [[image[1], text]]])


def counted(config: Config, batch: Batch) -> int:
    """What torch counts of a real forward and backward pass; attention is an operator that it does not know."""

    def addmm_(_: Any, a: Sequence[int], b: Sequence[int], **__: Any) -> int:
        return 2 * a[0] * a[1] * b[1]

    torch.manual_seed(0)
    model = build_model(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    loss = TransfusionLoss(config.diffusion)
    # What a U-Net attends to is counted by torch where it is made of products.
    products = sdpa_kernel(SDPBackend.MATH)
    with products, FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_}) as counter:
        terms = loss.terms(model, batch)
        loss.combine(terms, terms.counts).backward()
    return int(counter.get_total_flops())


UNET = {"patch_embed": "unet", "unet": {"widths": (32, 64), "layers": 1, "head_dim": 16}}
NETWORKS = [{}, UNET, {"modality_weights": "ffn"}, {"modality_weights": "all"}]


@pytest.mark.parametrize("recomputes", ["none", "block", "attention"])
@pytest.mark.parametrize("model", NETWORKS, ids=["linear", "unet", "own feed-forward", "own weights"])
def test_products_are_those_that_torch_counts(recomputes: str, model: dict[str, Any], batch: Batch) -> None:
    config = small(model, activation_checkpointing=recomputes)
    assert FlopModel(config).of([batch]).hardware.products == counted(config, batch)


@pytest.mark.parametrize("recomputes", ["none", "block"])
@pytest.mark.parametrize("weights", ["ffn", "all"])
def test_frozen_weights_have_no_products_of_their_own(recomputes: str, weights: str, batch: Batch) -> None:
    config = small({"modality_weights": weights}, freeze=["text"], activation_checkpointing=recomputes)
    found = FlopModel(config).of([batch])
    assert found.hardware.products == counted(config, batch)
    assert found.exact.products < FlopModel(small({"modality_weights": weights})).of([batch]).exact.products


@pytest.mark.parametrize("weights", ["ffn", "all"])
def test_weights_of_their_own_are_no_more_work(weights: str, batch: Batch) -> None:
    """Each position passes through as many as before."""
    shared, own = (FlopModel(small(model)) for model in ({}, {"modality_weights": weights}))
    assert own.of([batch]) == shared.of([batch])


def test_attention_is_that_of_the_pairs_in_the_dense_mask(batch: Batch) -> None:
    config = small()
    work = FlopModel(config).of([batch])
    pairs = int(batch.mask.dense().sum())
    assert work.exact.attention == 12 * 64 * 2 * pairs and work.hardware.attention == 14 * 64 * 2 * pairs
    again = FlopModel(small(activation_checkpointing="attention")).of([batch])
    assert again.hardware.attention == 18 * 64 * 2 * pairs and again.exact == work.exact


def test_padding_is_no_work_but_is_done(batch: Batch) -> None:
    config = small()
    work = FlopModel(config).of([batch])
    assert batch.counts.padding > 0
    blocks = 6 * 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192)
    assert work.hardware.products - work.exact.products == blocks * batch.counts.padding
    assert work.palm.attention == 12 * 64 * 2 * 64 * 128


def test_a_batch_on_the_host_tells_its_latents_before_they_are_made(batch: Batch) -> None:
    config = small()
    load = Workload.of(batch, config)
    assert load.images[0].shape == (1, 8, 8) and load.images[0].real == 2
    assert load.positions == 128 and load.tokens < 128


def test_shares_are_of_all_ranks_and_what_nobody_publishes_is_not_told(batch: Batch) -> None:
    config = small()
    meter = OperationMeter(config, torch.device("cpu"))
    meter.note([batch, batch])
    operations = meter.take()
    work = FlopModel(config).of([batch, batch])
    assert operations == [work.exact.total, work.hardware.total, work.palm.total]
    assert meter.take() == [0.0, 0.0, 0.0]
    one = meter.utilization(operations, 2.0, ranks=1)
    two = meter.utilization([2 * each for each in operations], 1.0, ranks=4)
    assert one == two and one.mfu is None and one.gemm_share is not None and one.gemm_share > 0


def test_work_adds_up() -> None:
    part = Work(exact=Operations(1, 2), hardware=Operations(3, 4), palm=Operations(5, 6))
    assert (part + part) == part.scaled(2)
    assert part.hardware.total == 7
