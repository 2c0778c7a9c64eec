"""Precomputed latents and tokens: NumPy files, never a pickle, and whose they are.

Latents are float16 or float32 [C, h, w], tokens uint16 or int32 [h, w]. NNNNN_latents.json beside NNNNN.tar tells which
codec made those in it. C channels, h/w height, width.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from transfusion.config import CodecConfig
from transfusion.data.shards.sample import SampleError
from transfusion.errors import UserError, shown
from transfusion.sequence.sizes import Size

# A header longer than this is none of ours; only so much is parsed.
HEADER_BYTES = 4096
_TYPES, _TOKEN_TYPES = ("float16", "float32"), ("uint16", "int32")
# By version of the format. The third differs from the second in names of fields alone, which no array here has.
_READERS = {
    (1, 0): npy.read_array_header_1_0,
    (2, 0): npy.read_array_header_2_0,
    (3, 0): npy.read_array_header_2_0,
}
# What the index knows tokens by: channels of a latent that is a number.
TOKEN_CHANNELS = 1
# Extensions of what a codec writes beside an image.
LATENTS, TOKENS = "latent.npy", "tokens.npy"


class LatentRecord(NamedTuple):
    """Of one shard: the codec's fingerprint, the size of the images, how many have latents, which do not and why.

    digest: of the shard with the latents. source: name and facts of the shard that the images came from. image_size:
    side of square images; 0: they have other sizes, `image_sizes`.
    """

    codec: str
    kind: str
    image_size: int
    encoded: int
    left_out: dict[str, int]
    digest: str
    source: dict[str, str | int]
    image_sizes: tuple[str, ...] = ()
    resize: str = "crop"

    @property
    def sizes(self) -> frozenset[Size]:
        """Sizes of the images."""
        return frozenset(map(Size.parse, self.image_sizes)) or frozenset(
            [Size(self.image_size, self.image_size)]
        )


def record_sizes(codec: CodecConfig) -> tuple[int, tuple[str, ...]]:
    """image_size and image_sizes of the record of latents that this codec has made."""
    (height, width, _), *others = codec.sizes
    if height == width and not others:
        return height, ()
    return 0, tuple(map(str, codec.sizes))


def record_path(shard: Path) -> Path:
    return shard.with_name(f"{shard.stem}_latents.json")


def read_record(shard: Path) -> LatentRecord | None:
    """What is told of a shard's latents; None: nothing, or nothing that can be read."""
    try:
        values = json.loads(record_path(shard).read_text(encoding="utf-8"))
        return LatentRecord(**{**values, "image_sizes": tuple(values.get("image_sizes", ()))})
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def refuse_other_latents(shard: Path, digest: str, codec: CodecConfig, source: str) -> None:
    """Raise UserError where the latents of a shard are of another codec or image size than the configuration's.

    Under codec.kind=pixels latents of unknown origin are taken as they are; with an autoencoder they are refused.
    """
    record = read_record(shard)
    if record is None and codec.kind == "pixels":
        return
    if record is None:
        problem = f"come from an unknown codec ({shown(record_path(shard).name)} is missing)"
    elif record.codec != codec.fingerprint:
        problem = f"were made by codec {record.codec}, not by {codec.fingerprint or 'codec.kind=pixels'}"
    elif record.digest != digest:
        problem = f"are not those that {shown(record_path(shard).name)} tells of"
    elif record.sizes != set(codec.sizes):
        made = ", ".join(sorted(map(str, record.sizes)))
        problem = (
            f"are of images of {made} pixels, and the configuration has {', '.join(map(str, codec.sizes))}"
        )
    elif record.resize != codec.resize:
        problem = (
            f"are of images brought to size by {record.resize}, and the configuration has {codec.resize}"
        )
    else:
        return
    raise UserError(
        f"source {source}: the latents in {shown(shard)} {problem}; name the shards of the images, or encode them again"
        " with `transfusion codec encode`"
    )


def latent_shape(head: bytes, size: int) -> tuple[int, int, int]:
    """[C, h, w] of a file of `size` bytes that begins with `head` (at least HEADER_BYTES, or all of it).

    Raises SampleError.
    """
    channels, height, width = _shape(head, size, types=_TYPES, dimensions=3)
    return channels, height, width


def token_shape(head: bytes, size: int) -> tuple[int, int, int]:
    """[TOKEN_CHANNELS, h, w] of a file of tokens; otherwise as `latent_shape`."""
    height, width = _shape(head, size, types=_TOKEN_TYPES, dimensions=2)
    return TOKEN_CHANNELS, height, width


def read_latent(data: bytes) -> NDArray[np.float32]:
    """The latents as float32 [C, h, w]. Raises SampleError, also where a value is not finite."""
    latent_shape(data[:HEADER_BYTES], len(data))
    values = npy.read_array(io.BytesIO(data)).astype(np.float32, order="C")
    if not np.isfinite(values).all():
        raise SampleError("latent_not_finite")
    return values


def read_tokens(data: bytes, codebook_size: int) -> NDArray[np.int32]:
    """The tokens as int32 [h, w]. Raises SampleError, also where one is no entry of a codebook of that size."""
    token_shape(data[:HEADER_BYTES], len(data))
    tokens = npy.read_array(io.BytesIO(data)).astype(np.int32, order="C")
    if tokens.min() < 0 or tokens.max() >= codebook_size:
        raise SampleError("token_range")
    return tokens


def _shape(head: bytes, size: int, *, types: Sequence[str], dimensions: int) -> tuple[int, ...]:
    """Raises SampleError unless the array has one of these types, so many dimensions, and fills the file."""
    stream = io.BytesIO(head)
    try:
        read = _READERS[npy.read_magic(stream)]
        shape, _, kind = read(stream, max_header_size=HEADER_BYTES)
    except Exception:
        # The parser of NumPy's own format raises whatever a malformed literal makes it raise.
        raise SampleError("latent_corrupt") from None
    if kind.name not in types:
        raise SampleError("latent_dtype")
    if len(shape) != dimensions or min(shape) < 1:
        raise SampleError("latent_shape")
    if size - stream.tell() != math.prod(shape) * kind.itemsize:
        raise SampleError("latent_corrupt")
    return shape
