"""One Llama block: attention and SwiGLU, each behind an RMSNorm and a residual."""

from __future__ import annotations

from torch import Tensor, nn
from transfusion_kernels import IntervalMask

from transfusion.config import ModelConfig
from transfusion.model.attention import Attention, LayerCache


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.ffn_width, bias=False)
        self.up = nn.Linear(config.width, config.ffn_width, bias=False)
        self.down = nn.Linear(config.ffn_width, config.width, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x_BSD)) * self.up(x_BSD))


class Block(nn.Module):
    """The unit that ZeRO-3 gathers, that is compiled, and that is recomputed under checkpointing."""

    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=config.norm_epsilon)
        self.attention = Attention(config, backend)
        self.feed_forward_norm = nn.RMSNorm(config.width, eps=config.norm_epsilon)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        x_BSD: Tensor,
        cosine_BSF: Tensor,
        sine_BSF: Tensor,
        mask: IntervalMask,
        cache: LayerCache | None = None,
    ) -> Tensor:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), cosine_BSF, sine_BSF, mask, cache)
        return x_BSD + self.feed_forward(self.feed_forward_norm(x_BSD))
