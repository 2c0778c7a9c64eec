"""One Llama block: attention and SwiGLU, each with an RMSNorm and a residual."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from transfusion.config import ModelConfig
from transfusion.model.attention import Attend, Attention
from transfusion_kernels import IntervalMask


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.ffn_width, bias=False)
        self.up = nn.Linear(config.hidden_size, config.ffn_width, bias=False)
        self.down = nn.Linear(config.ffn_width, config.hidden_size, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x_BSD)) * self.up(x_BSD))


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
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_epsilon)
        self.attention = Attention(config, attend)
        self.feed_forward_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_epsilon)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        x_BSD: Tensor,
        cosine_B1SE: Tensor,
        sine_B1SE: Tensor,
        mask: IntervalMask,
        attend: Attend | None = None,
    ) -> Tensor:
        def attention(x_BSD: Tensor) -> Tensor:
            x_BSD = self.attention_norm(x_BSD) if self.norms_before else x_BSD
            out_BSD = self.attention(x_BSD, cosine_B1SE, sine_B1SE, mask, attend)
            return out_BSD if self.norms_before else self.attention_norm(out_BSD)

        if self.recomputes_attention and torch.is_grad_enabled():
            attended_BSD = checkpoint(attention, x_BSD, use_reentrant=False, preserve_rng_state=False)
        else:
            attended_BSD = attention(x_BSD)
        x_BSD = x_BSD + attended_BSD
        if not self.norms_before:
            return x_BSD + self.feed_forward_norm(self.feed_forward(x_BSD))
        return x_BSD + self.feed_forward(self.feed_forward_norm(x_BSD))
