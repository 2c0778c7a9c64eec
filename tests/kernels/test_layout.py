"""The mask as data: against the definition, against FlexAttention's, and its refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask
from torch.utils import _pytree as pytree

from transfusion_kernels import IntervalMask
from transfusion_kernels.attention.layout import TILE_ROWS
from transfusion_kernels.verification.testing import mask_families, mask_of, random_layout

SIZE = 300
FAMILIES = mask_families(SIZE)


@pytest.mark.parametrize("seed", range(5))
def test_equals_the_mask_of_flex_attention(seed: int) -> None:
    start, end, document, image = random_layout(3, 200, seed)

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same_image = (image[b, q] == image[b, k]) & (image[b, q] >= 0)
        return (document[b, q] == document[b, k]) & ((q >= k) | same_image)

    expected = create_mask(visible, 3, 1, 200, 200, device="cpu")[:, 0]
    mask = IntervalMask.from_spans(start, end)
    mask.validate()
    assert torch.equal(mask.dense(), expected)
    assert mask.visible_pairs() == int(expected.sum())


@pytest.mark.parametrize("name", FAMILIES)
def test_columns_say_the_same_as_rows(name: str) -> None:
    mask = FAMILIES[name]
    mask.validate()
    query = torch.arange(mask.num_queries)[:, None]
    by_columns = (query >= mask.first_query[:, None]) & (query < mask.end_query[:, None])
    assert torch.equal(by_columns, mask.dense())
    assert mask.first_query.dtype == mask.end_query.dtype == torch.int32


def test_orders_hold_every_tile_once_and_the_widest_first() -> None:
    mask = FAMILIES["uneven_documents"]
    tiles = -(-SIZE // TILE_ROWS)
    for order, first, end in (
        (mask.query_order, mask.first_key, mask.end_key),
        (mask.key_order, mask.first_query, mask.end_query),
    ):
        assert order.sort().values.tolist() == list(range(2 * tiles))
        widths = []
        for entry in order.tolist():
            row, tile = divmod(entry, tiles)
            last = min((tile + 1) * TILE_ROWS, SIZE) - 1
            widths.append(int(end[row, last] - first[row, tile * TILE_ROWS]))
        assert widths == sorted(widths, reverse=True)


def test_padding_sees_nothing_and_is_seen_by_nothing() -> None:
    mask = mask_of(64, [(0, 30), (30, 64)], [(32, 48)], length=50)
    dense = mask.dense()[0]
    assert not dense[50:].any()
    assert not dense[:, 50:].any()
    assert dense[49].sum() == 20


def test_flops_count_visible_pairs() -> None:
    mask = mask_of(4, [(0, 4)])
    assert mask.visible_pairs() == 10
    assert mask.flops(heads=3, head_dim=8) == 2 * 2 * 3 * 8 * 10
    assert mask.flops(heads=3, head_dim=8, backward=True) == 2 * 5 * 3 * 8 * 10


def test_columns_are_kept_until_a_bound_changes_in_place() -> None:
    mask = mask_of(64, [(0, 64)])
    kept = mask.first_query
    assert mask.first_query is kept
    mask.first_key[:, 32:] = 32
    assert mask.end_query[0, 0] == 32


def test_columns_made_in_inference_mode_can_be_saved_for_a_backward() -> None:
    mask = mask_of(64, [(0, 64)])
    with torch.inference_mode():
        columns = mask.first_query
    assert not columns.is_inference()


def test_is_a_tree_of_its_two_bounds() -> None:
    mask = FAMILIES["block_against_cache"]
    leaves, form = pytree.tree_flatten({"mask": mask})
    assert len(leaves) == 2
    again = pytree.tree_unflatten(leaves, form)["mask"]
    assert torch.equal(again.dense(), mask.dense())
    assert again.to("cpu").num_keys == mask.num_keys


def bounds(first: list[int], end: list[int]) -> tuple[Tensor, Tensor]:
    return torch.tensor([first], dtype=torch.int32), torch.tensor([end], dtype=torch.int32)


@pytest.mark.parametrize(
    ("first", "end", "num_keys", "message"),
    [
        ([0, 2, 1], [1, 3, 3], 3, "first_key: got 2 then 1 at queries 1 and 2 of row 0"),
        ([0, 0, 0], [1, 3, 2], 3, "end_key: got 3 then 2"),
        ([-1, 0, 0], [1, 2, 3], 3, "first_key: got -1"),
        ([0, 0, 0], [1, 2, 4], 3, "end_key: got 4, takes keys from 0 to num_keys, 3"),
        ([0, 2, 2], [1, 1, 3], 3, "end_key: got 1 at query 1 of row 0, takes first_key, 2, or more"),
    ],
)
def test_validate_names_what_is_wrong(first: list[int], end: list[int], num_keys: int, message: str) -> None:
    mask = IntervalMask(*bounds(first, end), num_keys=num_keys)
    with pytest.raises(ValueError, match=message):
        mask.validate()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_validate_finds_what_is_not_finite_in_keys_and_values(value: float) -> None:
    mask = mask_of(64, [(0, 30), (30, 64)], length=50)
    k, v = torch.randn(2, 3, 2, 64, 32).unbind()
    mask.validate(k, v)
    k[1, 1, 55, 7] = value
    with pytest.raises(ValueError, match=f"k: got {value} in row 1, key head 1, position 55, which no query"):
        mask.validate(k, v)
    mask.validate(v=v)
    v[2, 0, 49, 31] = value
    with pytest.raises(
        ValueError, match=f"v: got {value} in row 2, key head 0, position 49, which queries see"
    ):
        mask.validate(v=v)
    batch = IntervalMask(mask.first_key.expand(3, -1).clone(), mask.end_key.expand(3, -1).clone())
    batch.first_key[2], batch.end_key[2] = 0, 0
    with pytest.raises(ValueError, match="row 2, key head 0, position 49, which no query sees"):
        batch.validate(v=v)


def test_validate_refuses_keys_of_another_shape() -> None:
    mask = mask_of(64, [(0, 64)])
    with pytest.raises(
        ValueError, match=r"k: got shape \(2, 1, 63, 32\), takes \[batch, key heads, 64, head_dim\]"
    ):
        mask.validate(torch.randn(2, 1, 63, 32))
    with pytest.raises(ValueError, match=r"v: got shape \(64, 32\)"):
        mask.validate(v=torch.randn(64, 32))


def test_constructor_names_what_is_wrong() -> None:
    first, end = bounds([0, 0], [1, 2])
    with pytest.raises(ValueError, match=r"first_key: got torch.int64, takes torch.int32"):
        IntervalMask(first.long(), end)
    with pytest.raises(ValueError, match=r"end_key: got shape \(1, 1\), takes first_key's"):
        IntervalMask(first, end[:, :1])
    with pytest.raises(ValueError, match=r"first_key: got shape \(2,\)"):
        IntervalMask(first[0], end)
    with pytest.raises(ValueError, match=r"end_key: got device meta"):
        IntervalMask(first, end.to("meta"))
    with pytest.raises(ValueError, match=r"num_keys: got -1"):
        IntervalMask(first, end, num_keys=-1)
    with pytest.raises(ValueError, match=r"image_end: got shape"):
        IntervalMask.from_spans(first, end[:, :1])
    with pytest.raises(ValueError, match=r"length: got shape"):
        IntervalMask.from_spans(first, end, length=torch.tensor([1, 2]))


@pytest.mark.parametrize("number", [2.5, torch.tensor(2), "3", True])
def test_num_keys_is_a_whole_number(number: Any) -> None:
    first, end = bounds([0, 0], [1, 2])
    with pytest.raises(ValueError, match=r"num_keys: got .*, takes a number of keys, 0 or more"):
        IntervalMask(first, end, num_keys=number)


@pytest.mark.parametrize("name", ["document_start", "image_end", "length"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.tolist(), "got list, takes a tensor"),
        (lambda x: x.float(), "got torch.float32, takes integers"),
        (lambda x: x.bool(), "got torch.bool, takes integers"),
        (lambda x: x.to("meta"), "got device meta, takes document_start's, cpu"),
    ],
)
def test_from_spans_names_what_is_wrong(name: str, change: Callable[[Tensor], Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "document_start": torch.zeros(2, 3, dtype=torch.int64),
        "image_end": torch.zeros(2, 3, dtype=torch.int64),
        "length": torch.tensor([3, 2]),
    }
    IntervalMask.from_spans(**arguments)
    arguments[name] = change(arguments[name])
    if name == "document_start" and "device" in message:
        name, message = "image_end", "got device cpu, takes document_start's, meta"
    with pytest.raises(ValueError, match=f"^{name}: {message}"):
        IntervalMask.from_spans(**arguments)


def test_lists_are_no_tensors() -> None:
    first, end = bounds([0, 0], [1, 2])
    with pytest.raises(ValueError, match="first_key: got list, takes a tensor"):
        IntervalMask([[0, 0]], end)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="end_key: got list, takes a tensor"):
        IntervalMask(first, [[1, 2]])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="k: got list, takes a tensor"):
        IntervalMask(first, end).validate([1.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="v: got device meta, takes the mask's, cpu"):
        IntervalMask(first, end).validate(v=torch.zeros(2, 1, 2, 32, device="meta"))


def test_a_mask_that_leaves_the_host_knows_whether_it_is_narrow() -> None:
    size = 4096
    documents = [(start, start + 256) for start in range(0, size, 256)]
    for mask, narrow in ((mask_of(size, documents), True), (mask_of(size, [(0, size)]), False)):
        assert not mask.narrow
        moved = mask.to("meta")
        assert moved.narrow == narrow
        assert moved.to("meta").narrow == narrow
        leaves, tree = pytree.tree_flatten(moved)
        assert pytree.tree_unflatten(leaves, tree).narrow == narrow
    assert mask_of(100, [(0, 100)]).narrow
