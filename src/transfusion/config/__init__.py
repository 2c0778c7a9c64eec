"""Every setting, what must fit together, and the one door in: `load_config`."""

from transfusion.config.config import Config
from transfusion.config.load import load_config
from transfusion.config.sections import (
    CacheConfig,
    CodecConfig,
    DataConfig,
    DiffusionConfig,
    ModalityConfig,
    ModelConfig,
    OptimizerConfig,
    RopeScalingConfig,
    RunConfig,
    SampleGridConfig,
    Section,
    SourceConfig,
    UNetConfig,
    ZeroConfig,
)

__all__ = [
    "CacheConfig",
    "CodecConfig",
    "Config",
    "DataConfig",
    "DiffusionConfig",
    "ModalityConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RopeScalingConfig",
    "RunConfig",
    "SampleGridConfig",
    "Section",
    "SourceConfig",
    "UNetConfig",
    "ZeroConfig",
    "load_config",
]
