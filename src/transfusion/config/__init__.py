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
    SampleConfig,
    Section,
    ShareFrom,
    SourceConfig,
    TrainConfig,
    UNetConfig,
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
    "SampleConfig",
    "Section",
    "ShareFrom",
    "SourceConfig",
    "TrainConfig",
    "UNetConfig",
    "ZeroConfig",
    "load_config",
]
