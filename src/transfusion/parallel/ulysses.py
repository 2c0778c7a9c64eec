"""Sequence parallelism: ranks that share rows, each with a slice of their positions (Ulysses, arXiv 2309.14509).

Before the attention an all-to-all gives every rank all positions of its share of the heads, after it another gives
back all heads of its slice. Nothing else of a block looks across positions. Images are dealt out whole, since their
noise, and what encodes and decodes them, is of the image: an image's patches travel between the rank that has the
image and the ranks that have its positions.

B rows, S positions, H query heads, K key heads, E head dimension, R ranks of a group, I images, P patches an image,
N patches of this rank's images, M patches at this rank's positions, D width. s: positions of a slice, S / R.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from transfusion.config import Config
from transfusion.errors import UserError
from transfusion.model.attention import Mask, PlainAttention, TwoIntervals
from transfusion.schema import Batch, BatchCounts, MediaGroup, Modality, PatchRoutes

# A custom operator takes no process groups, so it is told their names.
_groups: dict[str, dist.ProcessGroup] = {}


def refuse_unshared(config: Config, world_size: int) -> None:
    """Raise UserError where the ranks that were started cannot share the rows of a batch."""
    degree, rows = config.train.sequence_parallel, config.data.global_batch_size
    problems = []
    if world_size % degree:
        problems.append(f"the number of processes, {world_size}, must be a multiple of it")
    elif degree > 1 and rows % (world_size // degree):
        problems.append(
            f"data.global_batch_size {rows} must be a multiple of the {world_size // degree} groups of ranks"
        )
    if problems:
        raise UserError(
            f"train.sequence_parallel {degree}: {'; '.join(problems)}; start another number, or set it to 1"
        )


class SequenceGroup:
    """The ranks that share this rank's rows. Without any, `share` changes nothing and no collective is made.

    rank: among those that share; data_rank of data_world_size: which rows the group reads.
    """

    def __init__(self, degree: int = 1, *, rank: int = 0, world_size: int = 1) -> None:
        """Called by all ranks together; neighbours share. degree: how many ranks share a row."""
        self.degree = degree
        self.data_rank, self.rank = divmod(rank, degree)
        self.data_world_size = world_size // degree
        self.name = ""
        if degree == 1:
            return
        for first in range(0, world_size, degree):
            ranks = list(range(first, first + degree))
            group = dist.new_group(ranks)
            if rank in ranks:
                self.name = f"sequence {first}"
                _groups[self.name] = group

    def share(self, batch: Batch) -> Batch:
        """This rank's slice of rows that all of the group have read, and the images that it encodes and decodes.

        The batch lies on the host. Its mask stays whole, in positions of the whole row. Raises RuntimeError where the
        ranks have read different rows.
        """
        if self.degree == 1:
            return batch
        self._refuse_other_rows(batch)
        positions = batch.token_ids_BS.shape[1]
        width = positions // self.degree
        part = slice(self.rank * width, (self.rank + 1) * width)
        names = ("token_ids_BS", "modality_BS", "position_BSA", "target_ids_BS", "text_weight_BS")
        sliced = {name: getattr(batch, name)[:, part].contiguous() for name in names}
        images, routes = self._images(batch.media, positions)
        real = int((sliced["modality_BS"] != Modality.PADDING).sum())
        counts = BatchCounts(
            tokens=real,
            text_targets=int(sliced["text_weight_BS"].sum()),
            images=sum(int(group.learned_I.sum()) for group in images),
            image_elements=sum(int(group.learned_I.sum()) * group.values[0].numel() for group in images),
            padding=sliced["modality_BS"].numel() - real,
            faults=batch.counts.faults if self.rank == 0 else 0,
        )
        return replace(batch, **sliced, media=images, routes=routes, counts=counts)

    def attention(self, backend: str) -> UlyssesAttention:
        """See `Sharing.attention`."""
        return UlyssesAttention(self, PlainAttention(backend))

    def exchange(self, x_ND: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Send the first sent[0] rows to the first rank, and so on; returns what the ranks sent here, in order."""
        return _all_to_all(x_ND, list(sent), list(received), self.name)

    def swap(self, x_R: Tensor) -> Tensor:
        """Part r to rank r, for all r; returns the part of this rank from every rank."""
        ones = [1] * self.degree
        return _all_to_all(x_R, ones, ones, self.name)

    def _images(
        self, groups: Sequence[MediaGroup], positions: int
    ) -> tuple[tuple[MediaGroup, ...], PatchRoutes]:
        """Deal the images out in turn, so that all ranks have as many; a rank without any gets one of weight 0."""
        width = positions // self.degree
        owners, slots = [], []
        mine: list[MediaGroup] = []
        dealt = 0
        for group in groups:
            real = group.image_weight_I > 0
            owner_I = (torch.arange(int(real.sum())) + dealt) % self.degree
            dealt += len(owner_I)
            owners.append(owner_I.repeat_interleave(group.patch_slot_IP.shape[1]))
            slots.append(group.patch_slot_IP[real].flatten())
            chosen = torch.nonzero(real).flatten()[owner_I == self.rank]
            if len(chosen):
                mine.append(_choose(group, chosen))
        if not mine:
            nothing = _choose(groups[0], torch.zeros(1, dtype=torch.int64))
            weightless = torch.zeros_like(nothing.image_weight_I)
            mine.append(replace(nothing, image_weight_I=weightless))
        owner, slot = torch.cat(owners), torch.cat(slots)
        place = slot % positions // width
        local = slot // positions * width + slot % width
        # What the weightless images add, which is zero, goes to the first position of their own rank.
        idle = torch.arange(min(dealt, self.degree), self.degree)
        idle = idle.repeat_interleave(groups[0].patch_slot_IP.shape[1])
        owner, place = torch.cat([owner, idle]), torch.cat([place, idle])
        local = torch.cat([local, torch.zeros_like(idle)])
        held = int((place[: len(slot)] == self.rank).sum())
        return tuple(mine), self._routes(owner, place, local, held)

    def _routes(self, owner: Tensor, place: Tensor, local: Tensor, held: int) -> PatchRoutes:
        """Of all patches, in the order of the images: the ranks that encode and hold them, and their slots there."""
        going, coming = place[owner == self.rank], place == self.rank
        origin = owner[coming]
        return PatchRoutes(
            order_N=going.argsort(stable=True),
            sent=tuple(going.bincount(minlength=self.degree).tolist()),
            slot_M=local[coming][origin.argsort(stable=True)],
            received=tuple(origin.bincount(minlength=self.degree).tolist()),
            held=held,
        )

    def _refuse_other_rows(self, batch: Batch) -> None:
        """Ranks with different rows would wait for each other in vain, or learn nonsense."""
        digest = 0
        for tensor in (batch.token_ids_BS, *(group.noise_key_I for group in batch.media)):
            digest = zlib.crc32(tensor.numpy().tobytes(), digest)
        digests: list[Any] = [None] * self.degree
        dist.all_gather_object(digests, (batch.token_ids_BS.shape[0], digest), group=_groups[self.name])
        if len(set(digests)) > 1:
            raise RuntimeError(
                "ranks that share rows have read different ones: a shard was readable for some of them only"
            )


def _choose(group: MediaGroup, chosen_I: Tensor) -> MediaGroup:
    names = ("image_weight_I", "patch_slot_IP", "timestep_I", "noise_key_I", "is_context_I")
    chosen = {name: value[chosen_I] for name in names if (value := getattr(group, name)) is not None}
    value_I = chosen_I if group.value_I is None else group.value_I[chosen_I]
    return replace(group, values=group.values[value_I], value_I=None, **chosen)


@torch.library.custom_op("transfusion::all_to_all", mutates_args=())
def _all_to_all(x: Tensor, sent: list[int], received: list[int], group: str) -> Tensor:
    out = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=_groups[group])
    return out


@_all_to_all.register_fake
def _(x: Tensor, sent: list[int], received: list[int], group: str) -> Tensor:
    return x.new_empty(sum(received), *x.shape[1:])


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.sent, ctx.received, ctx.group = inputs


def _send_back(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return _all_to_all(gradient, ctx.received, ctx.sent, ctx.group), None, None, None


_all_to_all.register_autograd(_send_back, setup_context=_save_for_backward)


@dataclass(frozen=True, slots=True)
class UlyssesAttention:
    """Each rank has a slice of the positions of a row before and after, and a share of the heads in between."""

    group: SequenceGroup
    plain: PlainAttention

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
        """See `Attend`: of a slice query [B, H, s, E], key and value [B, K, s, E] to [B, H, s, E].

        In evaluation a rank has whole rows, and with them as many queries as the mask.
        """
        whole_mask = mask.mask if isinstance(mask, TwoIntervals) else mask
        if whole_mask.num_queries == query.shape[2]:
            return self.plain(query, key, value, mask)
        R, heads = self.group.degree, query.shape[1] // self.group.degree
        key_heads = key.shape[1] // R
        parts = [x.unflatten(1, (R, -1)) for x in (query, key, value)]
        mine = self.group.swap(torch.cat(parts, dim=2).transpose(0, 1))
        whole = mine.permute(1, 2, 0, 3, 4).flatten(2, 3)  # all positions of a share of the heads
        query, key, value = whole.split([heads, key_heads, key_heads], dim=1)
        attended = self.plain(query, key, value, mask)
        back = self.group.swap(attended.unflatten(2, (R, -1)).permute(2, 0, 1, 3, 4))
        return back.transpose(0, 1).flatten(1, 2)
