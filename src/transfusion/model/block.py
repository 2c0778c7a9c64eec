"""One Llama block: attention and SwiGLU, each with an RMSNorm and a residual.

With `model.modality_weights` patches have a feed-forward of their own, or all weights (Liang et al., 2024). Their names
begin with `image_`. Those of text are named as in a block that both share.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from transfusion.config import ModelConfig
from transfusion.model.attention import Attend, Attention, Mask
from transfusion.model.grouping import ALL_TEXT, Grouping


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.ffn_width, bias=False)
        self.up = nn.Linear(config.hidden_size, config.ffn_width, bias=False)
        self.down = nn.Linear(config.ffn_width, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class TransformerBlock(nn.Module):
    """The unit that ZeRO-3 gathers, that is compiled, and that is recomputed under checkpointing."""

    def __init__(
        self,
        config: ModelConfig,
        attend: Attend,
        *,
        recomputes_attention: bool = False,
    ) -> None:
        """recomputes_attention: its activations are not kept for the backward pass but computed again."""
        super().__init__()
        self.recomputes_attention = recomputes_attention
        self.norms_before = config.norm_placement == "pre"

        def norm() -> nn.RMSNorm:
            return nn.RMSNorm(config.hidden_size, eps=config.norm_epsilon)

        self.attention_norm, self.attention = norm(), Attention(config, attend)
        self.feed_forward_norm, self.feed_forward = norm(), FeedForward(config)
        self.image_attention_norm = self.image_attention = None
        self.image_feed_forward_norm = self.image_feed_forward = None
        if config.modality_weights == "all":
            self.image_attention_norm, self.image_attention = norm(), Attention(config, attend)
        if config.modality_weights != "shared":
            self.image_feed_forward_norm, self.image_feed_forward = norm(), FeedForward(config)

    def forward(
        self,
        x: Tensor,
        cosine_B1SE: Tensor,
        sine_B1SE: Tensor,
        mask: Mask,
        attend: Attend | None = None,
        grouping: Grouping = ALL_TEXT,
    ) -> Tensor:
        """States [B, S, D], or as the grouping orders them, to new ones. The rest: see `Attention.forward`."""

        def attention(x: Tensor) -> Tensor:
            norms = (self.attention_norm, self.image_attention_norm)
            x = grouping.apply(x, *norms) if self.norms_before else x
            out = self.attention(x, cosine_B1SE, sine_B1SE, mask, attend, grouping, self.image_attention)
            return out if self.norms_before else grouping.apply(out, *norms)

        if self.recomputes_attention and torch.is_grad_enabled():
            attended = checkpoint(attention, x, use_reentrant=False, preserve_rng_state=False)
        else:
            attended = attention(x)
        x = x + attended
        norms = (self.feed_forward_norm, self.image_feed_forward_norm)
        modules = (self.feed_forward, self.image_feed_forward)
        if not self.norms_before:
            return x + grouping.apply(grouping.apply(x, *modules), *norms)
        return x + grouping.apply(grouping.apply(x, *norms), *modules)
