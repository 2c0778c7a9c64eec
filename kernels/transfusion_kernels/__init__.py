"""Attention for rows that are causal over text and bidirectional inside images, with packed documents.

Every query sees one contiguous range of keys, so the whole mask is two integers a token::

    mask = IntervalMask.from_spans(document_start, image_end)
    out = interval_attention(q, k, v, mask)

Generation writes to a cache (`append_to_kvcache`) and attends to it (`interval_attention_with_kvcache`).
`CachedAttention` does both in all layers of one forward, `TableAttention` so that a CUDA graph can hold them.
`explain(q, k, v, mask)` tells which implementation runs and why. Importing this package needs torch only;
Triton is imported when its kernels are first asked for.
"""

from transfusion_kernels.attention import interval_attention
from transfusion_kernels.attention.cached import CachedAttention, TableAttention
from transfusion_kernels.attention.kvcache import append_to_kvcache, interval_attention_with_kvcache
from transfusion_kernels.attention.layout import IntervalMask
from transfusion_kernels.dispatch import explain

__all__ = [
    "CachedAttention",
    "IntervalMask",
    "TableAttention",
    "append_to_kvcache",
    "explain",
    "interval_attention",
    "interval_attention_with_kvcache",
]
