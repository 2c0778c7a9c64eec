"""How a document becomes a row of tokens: the one place, for training and for generation alike.

    text            <BOS> text <EOS>
    caption first   <BOS> caption <BOI> patches <EOI> <EOS>
    image first     <BOS> <BOI> patches <EOI> caption <EOS>
    caption dropped <BOS> <BOI> patches <EOI> <EOS>

Any order of texts and images works the same way. Where images have several sizes, <BOI> is another token for each.
With `diffusion.context=clean` the noised copies of images that something follows stand behind <EOS>, see `with_twins`.
Shape suffixes: S positions of the document, A position axes.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from transfusion.schema import ImageSegment, Modality, Segment, SpecialToken
from transfusion.sequence.sizes import MediaSizes, Size

# <BOS> and <EOS> of a document; <BOI> and <EOI> of each image in it; all of a document with one image.
TEXT_CONTROL_TOKENS = 2
IMAGE_CONTROL_TOKENS = 2
PAIR_CONTROL_TOKENS = TEXT_CONTROL_TOKENS + IMAGE_CONTROL_TOKENS
# <EOI> and <EOS>.
_AFTER_LAST_IMAGE = 2

Integers = NDArray[np.int64]

# The control tokens as plain arrays: looking them up in the enumeration costs more than all else here.
_PADDING = int(SpecialToken.PADDING)
_BOS, _EOS = np.array([int(SpecialToken.BEGIN_DOCUMENT)]), np.array([int(SpecialToken.END_DOCUMENT)])
_EOI = np.array([int(SpecialToken.END_IMAGE)])
_PATCH = int(SpecialToken.PATCH)
_TEXT = len(SpecialToken)


def _learned(*silent: SpecialToken) -> NDArray[np.float32]:
    """Weight by token id: 0 for the silent ones, else 1; the last entry stands for all text."""
    return np.array([token not in silent for token in range(_TEXT + 1)], dtype=np.float32)


# Nothing is predicted from these, and nothing predicts those: the decoder puts patches and <EOI> itself.
_LEARNED_FROM = _learned(SpecialToken.BEGIN_IMAGE, SpecialToken.PATCH, SpecialToken.END_DOCUMENT)
_LEARNED_AS = _learned(SpecialToken.PATCH, SpecialToken.END_IMAGE, SpecialToken.PADDING)
_MODALITY = np.full(_TEXT + 1, int(Modality.TEXT), np.uint8)
_MODALITY[_PATCH] = int(Modality.IMAGE)


class Twin(NamedTuple):
    """The noised copy of an image that stands clean in its document: it sees itself, and what comes before the other.

    first, patches: its positions. first_key, end_key: the positions that come before the clean one, with its <BOI>.
    """

    first: int
    patches: int
    first_key: int
    end_key: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Documents or pieces of documents, mostly one, as arrays; positions count from the first token of each.

    token_ids_S: PATCH stands at patch positions. target_ids_S: the next token. text_weight_S: 1 where that is
    learned. first_key_S, end_key_S: the first position that s sees, and the first behind that it does not. images:
    (first patch, patches). twins: noised copies. Bounds, images and twins count from the first token of all.
    """

    token_ids_S: Integers
    modality_S: NDArray[np.uint8]
    position_SA: Integers
    target_ids_S: Integers
    text_weight_S: NDArray[np.float32]
    first_key_S: NDArray[np.int32]
    end_key_S: NDArray[np.int32]
    images: tuple[tuple[int, int], ...]
    twins: tuple[Twin, ...]

    def __len__(self) -> int:
        return len(self.token_ids_S)


def position_axes(position: str) -> int:
    """Axes of `model.position`: 1 for "1d", 3 (running position, patch row, patch column) for "2d"."""
    return {"1d": 1, "2d": 3}[position]


def image_segment(sizes: MediaSizes, size: Size, values: Any = None) -> ImageSegment:
    """An image of this size."""
    return ImageSegment(values, sizes.patches(size), sizes.grid(size)[1], sizes.begin_token(size))


def _columns(image: ImageSegment) -> int:
    return image.columns or math.isqrt(image.patches)


class TokenizedDocument(NamedTuple):
    """The tokens of one document, or of a piece of one, before the rules are applied.

    following: the token behind the last. images: (first patch, patches, patches in a row of them).
    learns_text: False where no text is a target. twins: (first patch of a noised copy, number of its image).
    """

    token_ids_S: Integers
    following: int
    images: tuple[tuple[int, int, int], ...]
    learns_text: bool
    twins: tuple[tuple[int, int], ...] = ()

    def is_followed(self, image: int) -> bool:
        """Whether something stands behind an image but its <EOI> and <EOS>. Asked before there are twins."""
        first, patches, _ = self.images[image]
        return first + patches + _AFTER_LAST_IMAGE < len(self.token_ids_S)


def tokenize_document(segments: Sequence[Segment], *, finished: bool = True) -> TokenizedDocument:
    """A document of texts and images between <BOS> and <EOS>; see `lay_out`."""
    parts = [_BOS]
    images, length, learns_text = [], 1, False
    for segment in segments:
        if isinstance(segment, ImageSegment):
            images.append((length + 1, segment.patches, _columns(segment)))
            parts.append(_image_tokens(segment.begin, segment.patches))
            length += segment.patches + IMAGE_CONTROL_TOKENS
        else:
            parts.append(np.array(segment.token_ids, dtype=np.int64))
            length += len(segment.token_ids)
            learns_text = True
    if finished:
        parts.append(_EOS)
    return TokenizedDocument(np.concatenate(parts), _PADDING, tuple(images), learns_text)


def tokenize_pair(
    caption_ids: NDArray[np.integer] | None, image: ImageSegment, *, caption_first: bool
) -> TokenizedDocument:
    """An image with its caption, or without one (None): as `tokenize_document`. Most are such."""
    tokens, shape = _image_tokens(image.begin, image.patches), (image.patches, _columns(image))
    if caption_ids is None:
        return TokenizedDocument(np.concatenate([_BOS, tokens, _EOS]), _PADDING, ((2, *shape),), False)
    parts = [_BOS, caption_ids, tokens, _EOS] if caption_first else [_BOS, tokens, caption_ids, _EOS]
    first_patch = 2 + len(caption_ids) if caption_first else 2
    return TokenizedDocument(np.concatenate(parts), _PADDING, ((first_patch, *shape),), True)


def tokenize_text(token_ids: NDArray[np.integer], first: int, tokens: int) -> TokenizedDocument:
    """`tokens` tokens from `first` of the text document <BOS> token_ids <EOS>.

    A piece that ends inside the document still learns its last token's true successor.
    """
    end = first + tokens
    inside = token_ids[max(first - 1, 0) : end].astype(np.int64)
    before = _BOS if first == 0 else _BOS[:0]
    piece = np.concatenate([before, inside, _EOS, [_PADDING]])[: tokens + 1]
    return TokenizedDocument(piece[:-1], int(piece[-1]), (), True)


def with_twins(tokenized: TokenizedDocument) -> TokenizedDocument:
    """The document, and behind it the patches of each image that something follows, once more.

    An image that nothing follows needs no copy.
    """
    length, twins = len(tokenized.token_ids_S), []
    for number, (_, patches, _) in enumerate(tokenized.images):
        if tokenized.is_followed(number):
            twins.append((length, number))
            length += patches
    patches_T = np.full(length - len(tokenized.token_ids_S), _PATCH)
    token_ids_S = np.concatenate([tokenized.token_ids_S, patches_T])
    return tokenized._replace(token_ids_S=token_ids_S, twins=tuple(twins))


def lay_out(
    segments: Sequence[Segment], *, axes: int = 1, finished: bool = True, causal_images: bool = False
) -> Layout:
    """A document of texts and images between <BOS> and <EOS>.

    finished=False leaves <EOS> out: the prefix of a generation, whose last token has no target. A document
    without text (a dropped caption) has no text loss: it only teaches what an image is.
    """
    return lay_out_all(
        [tokenize_document(segments, finished=finished)], axes=axes, causal_images=causal_images
    )


def lay_out_all(
    tokenized: Sequence[TokenizedDocument], *, axes: int = 1, causal_images: bool = False
) -> Layout:
    """Documents one after another: targets, weights, positions and bounds of all at once.

    causal_images: a patch does not see the later ones of its image.
    """
    lengths = [len(each.token_ids_S) for each in tokenized]
    starts = list(itertools.accumulate(lengths, initial=0))
    token_ids_S = np.concatenate([_BOS[:0], *(each.token_ids_S for each in tokenized)])
    target_ids_S = np.concatenate([token_ids_S[1:], _BOS[: len(tokenized[:1])]])
    target_ids_S[np.array(starts[1:], np.int64) - 1] = [each.following for each in tokenized]
    kind_S = np.minimum(token_ids_S, _TEXT)
    weight_S = _LEARNED_FROM[kind_S] * _LEARNED_AS[np.minimum(target_ids_S, _TEXT)]
    first_key_S = np.repeat(np.array(starts[:-1], np.int32), lengths)
    end_key_S = np.arange(1, starts[-1] + 1, dtype=np.int32)
    images, twins = [], []
    for start, length, each in zip(starts, lengths, tokenized, strict=False):
        if not each.learns_text:
            weight_S[start : start + length] = 0
        for first, patches, columns in each.images:
            if not causal_images:
                end_key_S[start + first : start + first + patches] = start + first + patches
            images.append((start + first, patches, columns))
        for first, number in each.twins:
            (of_image, patches, _), begin = each.images[number], start + first
            first_key_S[begin : begin + patches] = begin
            if not causal_images:
                end_key_S[begin : begin + patches] = begin + patches
            twins.append(Twin(begin, patches, start, start + of_image))
    running_S = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
    position_SA = _positions(running_S, images, axes)
    for twin in twins:
        clean_SA = position_SA[twin.end_key : twin.end_key + twin.patches]
        position_SA[twin.first : twin.first + twin.patches] = clean_SA
    return Layout(
        token_ids_S=token_ids_S,
        modality_S=_MODALITY[kind_S],
        position_SA=position_SA,
        target_ids_S=target_ids_S,
        text_weight_S=weight_S,
        first_key_S=first_key_S,
        end_key_S=end_key_S,
        images=tuple((first, patches) for first, patches, _ in images),
        twins=tuple(twins),
    )


@functools.cache
def _image_tokens(begin: int, patches: int) -> Integers:
    """<BOI>, patches, <EOI>."""
    return np.concatenate([[begin], np.full(patches, _PATCH), _EOI])


def _positions(running_S: Integers, images: Sequence[tuple[int, int, int]], axes: int) -> Integers:
    """Running positions; with three axes a patch has (first, first + row, first + column) of its image.

    After an image the running position goes on as if its patches stood in one line.
    """
    if axes == 1:
        return running_S[:, None]
    position_SA = np.repeat(running_S[:, None], 3, axis=1)
    for first, patches, columns in images:
        row, column = np.divmod(np.arange(patches), columns)
        position_SA[first : first + patches] = running_S[first]
        position_SA[first : first + patches, 1] += row
        position_SA[first : first + patches, 2] += column
    return position_SA
