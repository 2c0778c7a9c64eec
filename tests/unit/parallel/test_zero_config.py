"""The ds_config, value by value: a change of any must be seen in a review."""

from __future__ import annotations

import pytest
from handmade import small_config

from transfusion.model.block import TransformerBlock
from transfusion.model.unet import UNetDecoder, UNetEncoder
from transfusion.parallel.zero_config import LEAF_MODULES, deepspeed_config

GOLDEN = {
    "train_batch_size": 4,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 1,
    "managed_gradient_accumulation": False,
    "gradient_clipping": 1.0,
    "prescale_gradients": False,
    "gradient_predivide_factor": 1.0,
    "communication_data_type": "fp32",
    "data_types": {"grad_accum_dtype": "fp32"},
    "fp16": {"enabled": False},
    "bf16": {
        "enabled": False,
        "check_grad_overflow": True,
        "immediate_grad_update": False,
        "bf16_master_weights_and_grads": False,
        "bf16_optimizer_states": False,
    },
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "zero_optimization": {
        "stage": 3,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 50_000_000,
        "allgather_partitions": True,
        "allgather_bucket_size": 50_000_000,
        "overlap_comm": False,
        "compute_grad_norm": True,
        "round_robin_gradients": False,
        "ignore_unused_parameters": True,
        "load_from_fp32_weights": True,
        "elastic_checkpoint": False,
        "sub_group_size": 1_000_000_000,
        "stage3_prefetch_bucket_size": 50_000_000,
        "stage3_param_persistence_threshold": 100_000,
        "stage3_max_live_parameters": 1_000_000_000,
        "stage3_max_reuse_distance": 1_000_000_000,
        "stage3_module_granularity_threshold": 0,
        "stage3_use_all_reduce_for_fetch_params": False,
        "stage3_gather_16bit_weights_on_model_save": False,
        "zero_hpz_partition_size": 1,
        "zero_quantized_weights": False,
        "zero_quantized_nontrainable_weights": False,
        "zero_quantized_gradients": False,
        "memory_efficient_linear": False,
        "log_trace_cache_warnings": False,
        "leaf_module": {
            "classes": [
                "transfusion.model.block.TransformerBlock",
                "transfusion.model.unet.UNetEncoder",
                "transfusion.model.unet.UNetDecoder",
            ]
        },
    },
    "timers": {"throughput": {"enabled": False, "synchronized": False}},
    "steps_per_print": None,
    "wall_clock_breakdown": False,
    "memory_breakdown": False,
    "dump_state": False,
}


def test_golden() -> None:
    assert deepspeed_config(small_config(), world_size=2, cuda=False) == GOLDEN


def test_settings_reach_deepspeed() -> None:
    config = small_config(
        train__precision="bf16",
        optimizer__gradient_clip=0.5,
        data__micro_batch_size=3,
        train__zero={
            "stage": 2,
            "prefetch_bucket_size": 1,
            "persistence_threshold": 2,
            "max_live_parameters": 3,
            "max_reuse_distance": 4,
            "reduce_bucket_size": 5,
        },
    )
    made = deepspeed_config(config, world_size=8, cuda=True)
    zero = made["zero_optimization"]
    assert made["bf16"]["enabled"] is True
    assert made["gradient_clipping"] == 0.5
    assert (made["train_micro_batch_size_per_gpu"], made["train_batch_size"]) == (3, 24)
    assert zero["stage"] == 2
    assert zero["overlap_comm"] is True
    names = (
        "prefetch_bucket_size",
        "param_persistence_threshold",
        "max_live_parameters",
        "max_reuse_distance",
    )
    assert [zero[f"stage3_{name}"] for name in names] == [1, 2, 3, 4]
    assert zero["reduce_bucket_size"] == 5


def test_offload_and_secondary_copies_reach_deepspeed() -> None:
    places = {"offload_optimizer": "cpu", "offload_parameters": "nvme", "nvme_path": "/fast"}
    config = small_config(train__zero={"hpz_partition_size": 2, **places})
    zero = deepspeed_config(config, world_size=4, cuda=True)["zero_optimization"]
    assert zero["zero_hpz_partition_size"] == 2
    assert zero["offload_optimizer"] == {
        "device": "cpu",
        "nvme_path": "/fast",
        "pin_memory": True,
        "buffer_count": 4,
        "pipeline_read": False,
        "pipeline_write": False,
        "fast_init": False,
        "ratio": 1.0,
    }
    assert zero["offload_param"] == {
        "device": "nvme",
        "nvme_path": "/fast",
        "pin_memory": True,
        "buffer_count": 5,
        "buffer_size": 100_000_000,
        "max_in_cpu": 1_000_000_000,
    }


def test_the_leaf_modules_exist() -> None:
    modules = (TransformerBlock, UNetEncoder, UNetDecoder)
    assert [f"{module.__module__}.{module.__qualname__}" for module in modules] == LEAF_MODULES


def test_deepspeed_knows_every_key() -> None:
    """DeepSpeed ignores unknown keys at the top level; those of ZeRO it checks itself."""
    constants = pytest.importorskip("deepspeed.runtime.constants")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    known = {value for value in vars(constants).values() if isinstance(value, str)}
    made = deepspeed_config(small_config(), world_size=2, cuda=False)
    elsewhere = {"bf16", "fp16", "timers", "zero_optimization"}
    assert set(made) - known - elsewhere == set()
    DeepSpeedZeroConfig(**made["zero_optimization"])
