"""The plan's memory against torch's MemTracker, on a small model; benchmarks/plan.py does the same for large ones."""

from __future__ import annotations

import pytest

import plan
import step
from transfusion.families.build import compute_dtype
from transfusion.observe.flops import Workload
from transfusion.parallel import environment
from transfusion.parallel.build import build_engine
from transfusion.plan.memory import local_memory
from transfusion.plan.network import Network
from transfusion.plan.tracing import trace_step

SMALL = (
    "model.layers=4",
    "model.hidden_size=128",
    "model.heads=4",
    "data.sequence_length=256",
    "data.global_batch_size=8",
)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("data.micro_batch_size=2",),
        ("train.activation_checkpointing=block",),
        ("train.activation_checkpointing=attention",),
        ("train.precision=bf16", "optimizer.ema_decay=0.99"),
        ("model.patch_embed=unet", "model.unet={widths: [64, 64], layers: 1, head_dim: 32}"),
    ],
    ids=lambda overrides: " ".join(overrides) or "plain",
)
def test_peak_bytes_are_those_that_torch_tracks(overrides: tuple[str, ...]) -> None:
    config = step.config_of([*SMALL, *overrides], environment.start(1).device)
    batches = step.synthetic_steps(config, 1)[0]
    engine = build_engine(config, environment.start(1))
    tracked = plan.tracked_peak(engine, batches, config)
    trace = trace_step(
        config,
        Workload.of(batches[-1], config),
        dtype=compute_dtype(config),
        accumulates=len(batches) > 1,
        whole=True,
        on_gpu=False,
    )
    predicted = local_memory(config, Network.of(config), trace)
    assert predicted.total == pytest.approx(tracked, rel=plan.MEMORY_BAR)
    assert min(predicted.parameters, predicted.optimizer, predicted.activations) > 0
