"""What our network says of texts, to hold beside transformers' models."""

from __future__ import annotations

import torch
from torch import Tensor

from transfusion.parallel.local import LocalEngine
from transfusion_kernels import IntervalMask


@torch.no_grad()
def logits(engine: LocalEngine, ids_BS: Tensor) -> Tensor:
    model, (rows, length) = engine.model, ids_BS.shape
    end = torch.arange(1, length + 1, dtype=torch.int32).expand(rows, -1)
    position = torch.arange(length).expand(rows, -1)[..., None]
    hidden = model.run_blocks(model.embedding(ids_BS), position, IntervalMask(torch.zeros_like(end), end))
    return model.lm_head(model.norm(hidden))
