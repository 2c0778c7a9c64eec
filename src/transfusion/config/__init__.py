"""Every setting, what must fit together, and the one door in: `load_config`."""

from transfusion.config.config import Config
from transfusion.config.load import load_config
from transfusion.config.sections import (
    CacheConfig,
    CheckpointConfig,
    CodecConfig,
    DataConfig,
    DiffusionConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    SampleGridConfig,
    Section,
    SourceConfig,
    TrainConfig,
    UNetConfig,
    WeightFrom,
    ZeroConfig,
)

__all__ = [
    "CacheConfig",
    "CheckpointConfig",
    "CodecConfig",
    "Config",
    "DataConfig",
    "DiffusionConfig",
    "LogConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "SampleGridConfig",
    "Section",
    "SourceConfig",
    "TrainConfig",
    "UNetConfig",
    "WeightFrom",
    "ZeroConfig",
    "load_config",
]
