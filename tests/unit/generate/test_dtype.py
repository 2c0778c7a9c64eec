"""An exported model in each precision, and how far int8 is from fp32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from transfusion.checkpoint import export
from transfusion.config import Config
from transfusion.errors import UserError
from transfusion.generate import Pipeline
from transfusion.generate.load import Dtype
from transfusion.inference import int8
from transfusion.inference.int8 import Int8Linear, Int8TextHead, Int8Weight, keep_int8, quantise
from transfusion.model import Transfusion
from transfusion.model.heads import TextHead
from transfusion.schema import Batch, ImageSegment, TextSegment
from transfusion.sequence.tokenizer import Tokenizer

from ..conftest import MARKED, write_export

# Of logits and of latents, as a share of their size. The weights of these models are large and random.
BOUND = 0.05
WEIGHTS = export.WEIGHT_FILES["weight"]


@pytest.fixture
def folder(
    tmp_path: Path, build_model: Callable[..., tuple[Config, Transfusion]], tokenizer: Tokenizer
) -> Path:
    """An export of a random model, with raw weights alone."""
    config, model = build_model(hidden_size=64, qk_norm=True, norm_placement="pre")
    write_export(tmp_path, config.as_dict(), tokenizer, model)
    return tmp_path


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata=MARKED)


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def test_int8_is_near_fp32(folder: Path, tokenizer: Tokenizer, pack: Callable[..., Batch]) -> None:
    found = []
    text = TextSegment(tuple(tokenizer.encode("a handwritten three")))
    generator = torch.Generator().manual_seed(0)
    latent_ICHW = torch.randn(1, 1, 8, 8, generator=generator)
    for dtype in ("float32", "int8"):
        pipeline = Pipeline.from_export(folder, device="cpu", dtype=dtype)
        model = pipeline.runner.model
        assert isinstance(model, Transfusion)
        layout = pipeline.runner.lay_out([text, pipeline.runner.image(pipeline.runner.sizes.first)])
        batch = pack(pipeline.config, [[[text, ImageSegment(torch.zeros(1, 8, 8).byte().numpy(), 16)]]])
        with torch.no_grad():
            out = model(batch, [latent_ICHW])
            cache = pipeline.runner.cache(8)
            rows = cache.view([cache.row(32)])
            state_RD = pipeline.runner.read(rows, pipeline.runner.prompt_block([(layout, 0, 6)]))
            logit_RV = pipeline.runner.logits(state_RD)
        drawn = pipeline.sample(["a handwritten three"], steps=3, guidance=2.0)[0].pixels
        found.append((out.text_sum, out.prediction_NE, logit_RV, drawn))
    exact, rounded = found
    for ours, theirs in zip(rounded[:3], exact[:3], strict=True):
        assert 0 < relative_error(ours, theirs) < BOUND
    assert (rounded[3].int() - exact[3].int()).abs().float().mean() < 255 * BOUND


def test_int8_holds_the_matrices_alone(folder: Path) -> None:
    pipeline = Pipeline.from_export(folder, device="cpu", dtype="int8")
    model = pipeline.runner.model
    state = model.state_dict()
    stored = load_file(folder / WEIGHTS)
    for name, exact in stored.items():
        is_matrix = exact.dim() == 2 and not name.startswith("patch_")
        assert state[name].dtype == (torch.int8 if is_matrix else torch.float32)
        if is_matrix:
            scale_O1 = state[f"{name.removesuffix('.weight')}.scale"][:, None]
            assert ((state[name] * scale_O1 - exact).abs() <= 0.501 * scale_O1).all()
        else:
            assert torch.equal(state[name], exact)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert pipeline.origin.dtype == "int8"
    assert "blocks.0.feed_forward.down.scale" in state and "lm_head.scale" in state


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16)],
)
def test_a_model_is_of_one_precision(folder: Path, dtype: Dtype, expected: torch.dtype) -> None:
    pipeline = Pipeline.from_export(folder, device="cpu", dtype=dtype)
    assert {parameter.dtype for parameter in pipeline.runner.model.parameters()} == {expected}
    exact = Pipeline.from_export(folder, device="cpu").sample(["a handwritten three"], steps=2)[0].pixels
    drawn = pipeline.sample(["a handwritten three"], steps=2)[0].pixels
    assert torch.equal(drawn, exact) or expected == torch.bfloat16
    assert (drawn.int() - exact.int()).abs().float().mean() < 255 * 2 * BOUND


def test_half_precision_files_open_as_int8(folder: Path) -> None:
    def halve(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})

    rewrite(folder, halve)
    model = Pipeline.from_export(folder, device="cpu", dtype="int8").runner.model
    assert model.norm.weight.dtype == torch.float32
    assert model.embedding(torch.tensor([5])).dtype == torch.float32


def test_what_cannot_be_opened_is_told_in_one_line(folder: Path) -> None:
    with pytest.raises(
        UserError, match="dtype 'int4' does not exist; choose auto, float32, bfloat16 or int8"
    ):
        Pipeline.from_export(folder, device="cpu", dtype="int4")  # type: ignore[arg-type]
    rewrite(folder, lambda tensors: tensors["lm_head.weight"][3, 4].fill_(torch.inf))
    with pytest.raises(
        UserError, match=r"as int8: lm_head\.weight: .* not finite; export an earlier"
    ) as told:
        Pipeline.from_export(folder, device="cpu", dtype="int8")
    assert "\n" not in str(told.value)
    rewrite(
        folder, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].to(torch.int8)})
    )
    with pytest.raises(UserError, match=r"stored as I8, .*take the weights that are not quantised"):
        Pipeline.from_export(folder, device="cpu", dtype="int8")


def test_layers_of_other_classes_stay(build_model: Callable[..., tuple[Config, Transfusion]]) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    _, model = build_model()
    model.blocks[0].attention.out = Doubled(32, 32, bias=False)
    kept = keep_int8(model)
    assert "blocks.0.attention.out.weight" not in kept and "blocks.1.attention.out.weight" in kept
    assert type(model.blocks[0].attention.out) is Doubled
    assert isinstance(model.blocks[1].attention.out, Int8Linear)


def test_rounding_in_pieces_and_rows_of_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_OD = torch.randn(7, 16, generator=torch.Generator().manual_seed(0))
    weight_OD[2] = 0
    layer = nn.Linear(16, 7)
    rounded = Int8Linear(layer)
    quantise(weight_OD, rounded.weight, rounded.scale)
    assert not rounded.weight[2].any() and rounded.weight.abs().amax(1).sum() == 6 * 127
    x_ND = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    at_once = rounded(x_ND)
    restored_OD = rounded.weight * rounded.scale[:, None]
    torch.testing.assert_close(at_once, F.linear(x_ND, restored_OD, layer.bias))
    monkeypatch.setattr(int8, "PIECE", 48)
    pieces = Int8Weight(7, 16)
    quantise(weight_OD, pieces.weight, pieces.scale)
    assert torch.equal(pieces.weight, rounded.weight) and torch.equal(pieces.scale, rounded.scale)
    torch.testing.assert_close(rounded(x_ND), at_once)
    assert rounded(x_ND.bfloat16()).dtype == torch.float32  # the bias is fp32
    assert pieces.multiply(x_ND.bfloat16()).dtype == torch.bfloat16


def test_the_text_head_gives_the_losses_of_its_logits() -> None:
    head = TextHead(16, 9, chunk=4)
    rounded = Int8TextHead(head)
    quantise(torch.randn(9, 16, generator=torch.Generator().manual_seed(0)), rounded.weight, rounded.scale)
    head.weight.data = rounded.weight * rounded.scale[:, None]
    for count in (0, 10):
        hidden_ND, target_N = torch.randn(count, 16), torch.arange(count) % 9
        exact, ours = (each(hidden_ND, target_N, each=True) for each in (head, rounded))
        torch.testing.assert_close(ours, exact)
        assert torch.equal(rounded(hidden_ND, target_N), ours[0])
    torch.testing.assert_close(rounded(hidden_ND), head(hidden_ND))
