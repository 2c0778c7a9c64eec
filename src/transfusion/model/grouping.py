"""Positions of text and of images, each through weights of its own (Mixture-of-Transformers, Liang et al., 2024).

B rows, S positions, N positions of all rows (B * S), D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from transfusion.schema import Batch, Modality


@dataclass(frozen=True, slots=True)
class Grouping:
    """Which positions are of text and which of images, with their numbers known on the host: nothing waits for a GPU.

    Padding counts as text. Every rank calls both modules, one of them perhaps for no positions, so that all gather
    the same weights. Only where all positions of all ranks are of one kind is its module called alone.

    Attributes:
        texts: Positions of text. Without an order, whether there are any.
        images: Patches. Without an order, whether there are any.
        order_N: int64, flat positions, those of text before those of images. None: all are of one kind.
        place_N: int64, where in that order each position is.
    """

    texts: int
    images: int
    order_N: Tensor | None = None
    place_N: Tensor | None = None

    @classmethod
    def of(cls, is_image_BS: Tensor, images: int) -> Self:
        """From which positions hold a patch, bool [B, S], and how many do."""
        is_image_N = is_image_BS.flatten()
        texts = len(is_image_N) - images
        order_N = torch.cat(
            [
                torch.nonzero_static(which_N, size=size).squeeze(1)
                for which_N, size in ((~is_image_N, texts), (is_image_N, images))
            ]
        )
        place_N = torch.empty_like(order_N)
        place_N[order_N] = torch.arange(len(order_N), device=order_N.device)
        return cls(texts, images, order_N, place_N)

    @classmethod
    def of_batch(cls, batch: Batch) -> Self:
        """Of a batch, whose host knows how many patches it holds."""
        return cls.of(batch.modality_BS == Modality.IMAGE, batch.patches)

    def ordered(self, x_BSD: Tensor) -> Tensor:
        """Rows in the order of the grouping: [N, D], or as they are where all positions are of one kind."""
        return x_BSD if self.order_N is None else x_BSD.flatten(0, 1).index_select(0, self.order_N)

    def in_rows(self, x_ND: Tensor, rows: int) -> Tensor:
        """What `ordered` gave, as [B, S, ...] again."""
        return x_ND if self.place_N is None else x_ND.index_select(0, self.place_N).unflatten(0, (rows, -1))

    def apply(
        self, x: Tensor, text: Callable[[Tensor], Tensor], image: Callable[[Tensor], Tensor] | None
    ) -> Tensor:
        """Each position through the module of its kind. `image` None: all through `text`."""
        if image is None:
            return text(x)
        if self.order_N is None:
            return image(x) if self.images else text(x)
        of_text, of_images = x.split((self.texts, self.images))
        return torch.cat((text(of_text), image(of_images)))


# Of rows of which all positions are of one kind.
ALL_TEXT = Grouping(texts=1, images=0)
ALL_IMAGES = Grouping(texts=0, images=1)
