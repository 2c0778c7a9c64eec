"""Text head, patches, positions, initial weights and counts, each alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from transfusion.config import CodecConfig, ModelConfig
from transfusion.families.build import count_parameters
from transfusion.model import Transfusion, heads
from transfusion.model.embedding import rotary_angles, rotate, rotation
from transfusion.model.heads import TextHead
from transfusion.model.initialise import initial_value, initialise
from transfusion.model.patches import patchify, unpatchify


@pytest.mark.parametrize("chunk", [1, 3, 7, 20, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_chunked_head_is_plain_cross_entropy(chunk: int, dtype: torch.dtype) -> None:
    head = TextHead(16, 50, chunk)
    nn.init.normal_(head.weight)
    head.to(dtype)
    hidden = torch.randn(20, 16, dtype=dtype, requires_grad=True)
    target = torch.randint(0, 50, (20,))
    total = head(hidden, target)
    (3.0 * total).backward()
    plain_hidden = hidden.detach().float().requires_grad_()
    plain_weight = head.weight.detach().float().requires_grad_()
    plain = nn.functional.cross_entropy(plain_hidden @ plain_weight.T, target, reduction="sum")
    (3.0 * plain).backward()
    assert total.dtype == torch.float32 and head.weight.grad is not None and hidden.grad is not None
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    for mine, theirs in (
        (total, plain),
        (hidden.grad, plain_hidden.grad),
        (head.weight.grad, plain_weight.grad),
    ):
        assert (mine.float() - theirs).norm() <= tolerance * theirs.norm()


def test_the_gradient_of_the_weight_is_summed_by_tensor_cores_on_nvidia(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Products of 16-bit operands with fp32 sums, in place: what a CPU computes from fp32 copies."""
    asked = {}

    def addmm(total: Tensor, left: Tensor, right: Tensor, *, out_dtype: torch.dtype, out: Tensor) -> None:
        asked.update(total=total, left=left.dtype, out_dtype=out_dtype, out=out)

    with FakeTensorMode():
        total = torch.zeros(6, 4, device="cuda")
        left, right = (torch.zeros(size, dtype=torch.bfloat16, device="cuda") for size in ((6, 5), (5, 4)))
        monkeypatch.setattr(heads.torch, "addmm", addmm)
        heads._add_product(total, left, right)
    assert asked["out"] is total is asked["total"]
    assert asked["left"] == torch.bfloat16 and asked["out_dtype"] == torch.float32


def test_the_head_takes_no_targets_and_partial_gradients() -> None:
    head = TextHead(4, 10, 8)
    nn.init.normal_(head.weight)
    hidden = torch.zeros(0, 4, requires_grad=True)
    head(hidden, torch.zeros(0, dtype=torch.int64)).backward()
    assert head.weight.grad is not None and head.weight.grad.abs().max() == 0
    head.weight.grad = None
    head(torch.randn(3, 4), torch.tensor([0, 1, 2])).backward()
    assert head.weight.grad.abs().max() > 0
    head.requires_grad_(False)
    hidden = torch.randn(3, 4, requires_grad=True)
    head(hidden, torch.tensor([0, 1, 2])).backward()
    assert hidden.grad is not None and hidden.grad.abs().max() > 0
    with torch.no_grad():
        assert head(hidden, torch.tensor([0, 1, 2])).isfinite() and head(hidden).shape == (3, 10)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(("channels", "height", "width"), [(1, 8, 8), (3, 8, 4)])
def test_patches_are_cut_in_reading_order_and_put_back(
    size: int, channels: int, height: int, width: int
) -> None:
    latent = torch.randn(2, channels, height, width)
    patches = patchify(latent, size)
    assert patches.shape == (2, height * width // size**2, channels * size**2)
    # unfold orders a patch by channel, row, column, and patches left to right, top to bottom.
    assert torch.equal(patches, nn.functional.unfold(latent, size, stride=size).transpose(1, 2))
    assert torch.equal(unpatchify(patches, channels, height, width, size), latent)


def test_attention_scores_depend_on_distances_only() -> None:
    query, key = torch.randn(2, 1, 1, 1, 64)
    scores = []
    for shift in (0, 1000):
        position = torch.tensor([[[shift + 5], [shift + 2]]])
        turned = rotate(torch.cat((query, key), dim=2), *rotation(position, 64, 10_000.0))
        scores.append((turned[0, 0, 0] * turned[0, 0, 1]).sum())
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=2e-3)


def test_three_axes_share_the_frequencies_out() -> None:
    text = rotary_angles(torch.tensor([[[7, 7, 7]]]), 16, 10_000.0)
    assert torch.equal(text, rotary_angles(torch.tensor([[[7]]]), 16, 10_000.0))
    base = rotary_angles(torch.tensor([[[7, 7, 7]]]), 16, 10_000.0)
    for axis in range(3):
        position = torch.tensor([[[7, 7, 7]]])
        position[..., axis] += 1
        moved = (rotary_angles(position, 16, 10_000.0) != base).flatten()
        assert moved.nonzero().flatten().tolist() == list(range(axis, 8, 3))


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    small = ModelConfig(vocabulary=40, layers=3, hidden_size=16, heads=2, qk_norm=True)
    model = Transfusion(small, CodecConfig(channels=1, image_size=8))
    initialise(model, seed=7, layers=3)
    whole = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for name in reversed(list(whole)):
        torch.manual_seed(len(name))
        assert torch.equal(initial_value(name, whole[name], seed=7, layers=3), whole[name])
    other = initial_value("embedding.weight", whole["embedding.weight"], seed=8, layers=3)
    assert not torch.equal(other, whole["embedding.weight"])
    assert not torch.equal(
        whole["blocks.0.feed_forward.gate.weight"], whole["blocks.1.feed_forward.gate.weight"]
    )


def test_initial_weights_have_the_sizes_they_should() -> None:
    config = ModelConfig(
        vocabulary=500, layers=8, hidden_size=256, heads=4, qk_norm=True, patch_position="learned"
    )
    model = Transfusion(config, CodecConfig(channels=3, image_size=64))
    initialise(model, seed=0, layers=8)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
        elif name.endswith("bias") or name.startswith("patch_decoder.projection"):
            assert (parameter == 0).all(), name
        elif name == "patch_position.gain":
            assert (parameter == 0.1).all(), name
        else:
            expected = 0.5 if name.startswith("patch_position") else 0.02
            if name.endswith(("attention.out.weight", "feed_forward.down.weight")):
                expected /= 4
            if name == "patch_encoder.projection.weight":
                expected /= 12**0.5
            # A normal cut at three deviations keeps 98.7 % of its own.
            assert abs(parameter.std() / (0.987 * expected) - 1) < 0.05, name
            assert parameter.abs().max() <= 3 * expected, name


# Width, layers, heads and totals of the paper's table 2, with an untied vocabulary of 32,000, in millions.
PAPER = [
    (768, 16, 12, 162.4),
    (1024, 24, 16, 373.8),
    (1536, 24, 24, 777.8),
    (2048, 24, 16, 1364),
    (4096, 32, 32, 6738),
]


@pytest.mark.parametrize(("width", "layers", "heads", "millions"), PAPER)
def test_counts_are_those_of_the_paper(width: int, layers: int, heads: int, millions: float) -> None:
    config = ModelConfig(
        vocabulary=32_000,
        layers=layers,
        hidden_size=width,
        heads=heads,
        ffn_size=-(-width * 8 // 3 // 256) * 256,
    )
    parts = count_parameters(config, CodecConfig(channels=3, image_size=256))
    patches = parts["patch_encoder"] + parts["patch_decoder"]
    assert parts["total"] == sum(count for name, count in parts.items() if name != "total")
    assert abs((parts["total"] - patches) / 1e6 / millions - 1) < 1e-3
    # Table 7: the linear encoder and decoder are 0.5, 0.4, 0.4, 0.4 and 0.3 % of the network.
    share = {768: 0.5, 1024: 0.4, 1536: 0.4, 2048: 0.4, 4096: 0.3}[width]
    assert abs(100 * patches / parts["total"] - share) < 0.06
