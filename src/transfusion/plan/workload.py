"""How a step is shared among GPUs, and what it is expected to hold before any data are read.

Documents of two kinds: texts of one length, and pairs of one image with a caption of one length, until rows are full.
Where images have several sizes, each has as many, and each size of a further modality too.
"""

from __future__ import annotations

from dataclasses import dataclass

from transfusion.config import Config
from transfusion.errors import UserError
from transfusion.observe.flops import ImageLoad, Workload
from transfusion.sequence.layout import PAIR_CONTROL_TOKENS

# Targets of a pair beside the tokens of its caption: <BOI> and <EOS>; see `data.sequence`.
CONTROL_TARGETS = 2
# <BOS> and <BOI>.
_BEFORE_AN_IMAGE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """How the rows of a step are shared. groups: ranks that have other rows than each other.

    micro_batch_size: rows of a micro-batch, of which every rank of a group has a part of the positions.
    """

    gpus: int
    sequence_ranks: int
    micro_batch_size: int
    micro_batches: int

    @property
    def groups(self) -> int:
        return self.gpus // self.sequence_ranks

    @classmethod
    def of(cls, config: Config, gpus: int) -> Division:
        """Raises UserError, with what would do, where the rows cannot be shared among so many."""
        sequence_ranks = config.train.sequence_parallel
        groups, rest = divmod(gpus, sequence_ranks)
        if rest or config.data.global_batch_size % max(1, groups):
            raise UserError(_uneven(config, gpus, sequence_ranks))
        rows = config.data.global_batch_size // groups
        micro_batch_size = min(config.data.micro_batch_size or rows, rows)
        return cls(
            gpus=gpus,
            sequence_ranks=sequence_ranks,
            micro_batch_size=micro_batch_size,
            micro_batches=-(-rows // micro_batch_size),
        )


def _uneven(config: Config, gpus: int, sequence_ranks: int) -> str:
    rows = config.data.global_batch_size
    remedies = [f"data.global_batch_size={-(-rows // gpus) * gpus}"]
    if fewer := [
        count
        for count in range(1, gpus)
        if count % sequence_ranks == 0 and rows % (count // sequence_ranks) == 0
    ]:
        remedies.append(f"--gpus {fewer[-1]}")
    return (
        f"{rows} rows a step (data.global_batch_size) cannot be shared by {gpus} GPUs"
        + (f" in groups of {sequence_ranks}" if sequence_ranks > 1 else "")
        + f": {' or '.join(remedies)}"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentMix:
    """The documents assumed. pair_share: of the tokens, in pairs with an image (the paper: half).

    text_tokens, caption_tokens: of a text with its two control tokens, and of a caption without them.
    """

    pair_share: float = 0.5
    text_tokens: int = 1024
    caption_tokens: int = 32

    def workload(self, config: Config, rows: int) -> Workload:
        """Of `rows` rows without padding; at least one image, as in every batch."""
        positions, sizes = rows * config.data.sequence_length, config.media_sizes
        around = PAIR_CONTROL_TOKENS + self.caption_tokens
        # Of the pairs, the share with a noised copy: of those in which the image stands before its caption.
        copied = (1 - config.data.caption_dropout) * (1 - config.data.caption_first)
        copied *= config.diffusion.context == "clean"
        every = sum(sizes.patches(size) * (1 + copied) + around for size in sizes.all)
        images = round(positions * self.pair_share * len(sizes.all) / every)
        text = min(self.text_tokens, config.data.sequence_length)
        loads, in_pairs, visible = list[ImageLoad](), 0, 0
        sees_ahead = config.model.image_attention == "bidirectional"
        modalities = {modality.name: modality for modality in config.modalities}
        for turn, size in enumerate(sizes.all):
            # As evenly as can be, the first ones once more.
            count = (images + len(sizes.all) - 1 - turn) // len(sizes.all)
            patches = sizes.patches(size)
            pair, copies = patches + around, round(count * copied)
            in_pairs += count * pair + copies * patches
            # Half of the square of an image that sees itself both ways is counted with the pair.
            itself = sees_ahead * patches * (patches - 1) // 2
            visible += count * (pair * (pair + 1) // 2 + itself)
            # A copy sees itself, and the <BOS> and <BOI> before the image.
            visible += copies * (patches * (patches + 1) // 2 + itself + _BEFORE_AN_IMAGE * patches)
            # Every batch carries one of each modality.
            if count or size == sizes.first_of(size.modality):
                other = modalities.get(size.modality)
                shape = other.latent_shape(size) if other else config.codec.latent_shape(*size.sides)
                loads.append(ImageLoad(shape, count + copies, max(1, count + copies), size.modality))
        texts = max(0.0, (positions - in_pairs) / text)
        return Workload(
            positions=positions,
            tokens=positions,
            text_targets=round(texts * (text - 1) + images * (self.caption_tokens + CONTROL_TARGETS)),
            pairs=round(texts * text * (text + 1) / 2 + visible),
            images=tuple(loads),
        )
