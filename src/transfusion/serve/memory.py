"""How much memory the keys and values of a server take."""

from __future__ import annotations

from pathlib import Path

import torch

from transfusion.errors import UserError
from transfusion.generate import Pipeline
from transfusion.inference.cache import PAGE_SLOTS, pages_for

# Of the memory that is free once the model is there. The rest is for activations, images, and the system.
_SHARE_OF_GPU, _SHARE_OF_RAM = 0.7, 0.25


def cache_pages(pipeline: Pipeline, most_requests: int, gigabytes: float | None = None) -> int:
    """How many pages the cache of a server has: what so many requests take at most, as far as memory allows.

    Args:
        pipeline: The model.
        most_requests: Under way at a time.
        gigabytes: Of memory at most. None: a share of what is free.

    Raises:
        UserError: Where not even one full sequence fits.
    """
    # An answer under guidance has a second row.
    full = 2 * pages_for(pipeline.config.data.sequence_length)
    page_bytes = _page_bytes(pipeline)
    room = _free_bytes(pipeline.runner.device) if gigabytes is None else gigabytes * 1e9
    pages = min(most_requests * full, int(room / page_bytes))
    if pages < full:
        needed = full * page_bytes / 1e9
        raise UserError(
            f"one sequence of {pipeline.config.data.sequence_length} positions needs {needed:.2g} GB for its keys and"
            f" values, and {room / 1e9:.2g} GB are there for them; free some memory, use --dtype, or set --cache-gb"
        )
    return pages


def _page_bytes(pipeline: Pipeline) -> int:
    """Bytes of a page in all layers."""
    model = pipeline.config.model
    element = next(
        each for each in pipeline.runner.model.parameters() if each.is_floating_point()
    ).element_size()
    return model.layers * 2 * model.kv_heads * model.head_width * PAGE_SLOTS * element


def _free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return _SHARE_OF_GPU * torch.cuda.mem_get_info(device)[0]
    # In KiB. What the system keeps of files counts as free.
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return (
        _SHARE_OF_RAM * 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    )
