"""From our configuration to DeepSpeed's, with every value that matters written out.

DeepSpeed's defaults move between releases (gradient_clipping became 1.0 in one), so none is relied on.
"""

from __future__ import annotations

from typing import Any

from transfusion.config import Config, ZeroConfig

# The units that ZeRO-3 gathers at once and whose missing gradients it fills with zeros. Inside of them ranks may do
# different things: a U-Net calls its layers once for each group of images that the batch holds.
LEAF_MODULES = [
    "transfusion.model.block.TransformerBlock",
    "transfusion.model.unet.UNetEncoder",
    "transfusion.model.unet.UNetDecoder",
]


def deepspeed_config(config: Config, *, world_size: int, cuda: bool) -> dict[str, Any]:
    """The ds_config of a run on `world_size` ranks."""
    zero, bf16 = config.train.zero, config.train.precision == "bf16"
    # DeepSpeed only prints these sizes: our trainer feeds it, and its losses are divided by our own counts.
    micro_batch_size = config.data.micro_batch_size or max(
        1, config.data.global_batch_size * config.train.sequence_parallel // world_size
    )
    return {
        "train_batch_size": micro_batch_size * world_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,
        # False: `step` ends an accumulation, however many backward passes came before it.
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.optimizer.gradient_clip,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "fp16": {"enabled": False},
        "bf16": {
            "enabled": bf16,
            "check_grad_overflow": True,
            "immediate_grad_update": False,
            "bf16_master_weights_and_grads": False,
            "bf16_optimizer_states": False,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": zero.stage,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "reduce_bucket_size": zero.reduce_bucket_size,
            "allgather_partitions": True,
            "allgather_bucket_size": zero.reduce_bucket_size,
            # There are no streams to overlap on a CPU.
            "overlap_comm": zero.overlap_communication and cuda,
            "compute_grad_norm": True,
            "round_robin_gradients": False,
            "ignore_unused_parameters": True,
            "load_from_fp32_weights": True,
            "elastic_checkpoint": False,
            "sub_group_size": 1_000_000_000,
            "stage3_prefetch_bucket_size": zero.prefetch_bucket_size,
            "stage3_param_persistence_threshold": zero.persistence_threshold,
            "stage3_max_live_parameters": zero.max_live_parameters,
            "stage3_max_reuse_distance": zero.max_reuse_distance,
            "stage3_module_granularity_threshold": 0,
            "stage3_use_all_reduce_for_fetch_params": False,
            "stage3_gather_16bit_weights_on_model_save": False,
            "zero_hpz_partition_size": zero.hpz_partition_size,
            "zero_quantized_weights": False,
            "zero_quantized_nontrainable_weights": False,
            "zero_quantized_gradients": False,
            "memory_efficient_linear": False,
            "log_trace_cache_warnings": False,
            "leaf_module": {"classes": LEAF_MODULES},
            **_offload(zero, cuda=cuda),
        },
        # It would wait for the device twice a step.
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
        "dump_state": False,
    }


def _offload(zero: ZeroConfig, *, cuda: bool) -> dict[str, Any]:
    """Where DeepSpeed puts what is not to lie on the device; an absent key leaves it there."""
    shared = {"nvme_path": zero.nvme_path or None, "pin_memory": cuda}
    made: dict[str, Any] = {}
    if zero.offload_optimizer != "none":
        made["offload_optimizer"] = {
            "device": zero.offload_optimizer,
            **shared,
            "buffer_count": 4,
            "pipeline_read": False,
            "pipeline_write": False,
            "fast_init": False,
            "ratio": 1.0,
        }
    if zero.offload_parameters != "none":
        made["offload_param"] = {
            "device": zero.offload_parameters,
            **shared,
            "buffer_count": 5,
            "buffer_size": 100_000_000,
            "max_in_cpu": 1_000_000_000,
        }
    return made
