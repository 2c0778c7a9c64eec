"""A document as the model sees it: its tokens and patches, what each of them sees, and how well each was foreseen.

S positions, N positions of one piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from transfusion.generate.request import Part, media, segments
from transfusion.inference.cache import pages_for
from transfusion.inference.runner import ModelRunner
from transfusion.schema import SpecialToken
from transfusion.sequence.layout import Layout
from transfusion.sequence.sizes import IMAGE, MediaSizes
from transfusion.sequence.tokenizer import Tokenizer
from transfusion.tokens import CONTROL_PIECES

# Logits of so many positions are there at a time.
_PIECE = 256
# The decoder of images puts them itself.
_UNPREDICTED = (SpecialToken.PATCH, SpecialToken.END_IMAGE)


@dataclass(frozen=True, slots=True)
class Inspection:
    """What `Pipeline.inspect` finds.

    Attributes:
        layout: Tokens, positions and bounds of the document, without an end.
        texts: Of each position, its piece of text, the name of its control token, or "" for a patch. What begins an
            array is named for its modality.
        nats: Of each position, minus the log-probability of its token behind those before. None for what is not
            predicted as text: the beginning, patches, and the end of an image.
    """

    layout: Layout
    texts: list[str]
    nats: list[float | None]


def inspect(parts: Sequence[Part], runner: ModelRunner, tokenizer: Tokenizer) -> Inspection:
    """Read a document in one call of the model. Its parts are checked."""
    layout = runner.lay_out(segments(parts, runner, tokenizer), finished=False)
    count = len(layout)
    cache = runner.cache(pages_for(count))
    block = runner.prompt_block([(layout, 0, count)], media(parts))
    (state_SD,) = runner.states(cache.view([cache.row(count)]), block)
    token_S = torch.from_numpy(layout.token_ids_S).to(state_SD.device)
    found = []
    for first in range(0, count - 1, _PIECE):
        state_ND = state_SD[first : min(first + _PIECE, count - 1)]
        target_N1 = token_S[first + 1 : first + 1 + len(state_ND), None]
        found += (-runner.logits(state_ND).log_softmax(-1).gather(1, target_N1))[:, 0].tolist()
    ids = layout.token_ids_S.tolist()
    nats = [
        None,
        *(None if token in _UNPREDICTED else nat for token, nat in zip(ids[1:], found, strict=True)),
    ]
    return Inspection(layout, _texts(ids, runner.sizes, tokenizer), nats)


def _texts(ids: Sequence[int], sizes: MediaSizes, tokenizer: Tokenizer) -> list[str]:
    pieces = tokenizer.pieces([min(token, tokenizer.vocabulary - 1) for token in ids])
    named = {int(token): name for token, name in CONTROL_PIECES.items()} | {int(SpecialToken.PATCH): ""}
    # Ids beyond the vocabulary begin images of further sizes, and arrays of other modalities.
    for token, size in sizes.size_by_begin_token.items():
        begin = CONTROL_PIECES[SpecialToken.BEGIN_IMAGE]
        named[token] = begin if size.modality == IMAGE else f"<{size.modality}>"
    return [named.get(token, piece) for token, piece in zip(ids, pieces, strict=True)]
