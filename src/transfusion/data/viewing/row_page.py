"""Rows as they enter a batch, drawn: tokens, images and other media, borders of documents, and the mask.

`page` gives one HTML file that needs no other, `overview` the same at a glance as an image.
"""

from __future__ import annotations

import base64
import html
import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from transfusion.config import Config
from transfusion.data.loading.rows import Row, RowImage
from transfusion.data.sounds.files import as_wav
from transfusion.schema import Modality, SpecialToken
from transfusion.sequence.sizes import IMAGE
from transfusion.sequence.tokenizer import Tokenizer

# Of each further modality: an array [C, H, W] as a grey image, uint8 [1, rows, columns].
Pictures = Mapping[str, Callable[[Tensor], Tensor]]

# Of a text, so many tokens of its beginning and end are written out.
_FIRST_TOKENS, _LAST_TOKENS = 120, 24
_MASK_PIXELS = 320
_LINE_END, _SHOWN_LINE_END = "\n", "\u21b5\n"
# Text, image, padding; and in the mask what is seen backwards and what an image sees ahead of itself.
_COLOURS = {Modality.TEXT: "#4f7cac", Modality.IMAGE: "#e08e45", Modality.PADDING: "#d9d9d9"}
_SEEN, _SEEN_AHEAD, _BORDER = "#9db8d2", "#e08e45", "#1d2733"
# Of media that are no images.
_OTHER = "#4f9d69"
# Of a row, so many sounds have a player: a page is to open at once.
_HEARD = 12
_NAMES = {
    SpecialToken.PADDING: "PAD",
    SpecialToken.BEGIN_DOCUMENT: "BOS",
    SpecialToken.END_DOCUMENT: "EOS",
    SpecialToken.UNKNOWN: "UNK",
    SpecialToken.BEGIN_IMAGE: "BOI",
    SpecialToken.END_IMAGE: "EOI",
}


@dataclass(frozen=True, slots=True)
class DrawnRow:
    """A row, and of each of its pieces the source and key."""

    row: Row
    origins: Sequence[str]


@dataclass(frozen=True, slots=True)
class _Span:
    """A piece of the row: positions [first, end)."""

    first: int
    end: int
    origin: str


@dataclass(frozen=True, slots=True)
class Look:
    """What is needed to draw rows of a configuration. Its vocabulary must be known."""

    config: Config
    tokenizer: Tokenizer
    pictures: Pictures


def page(rows: Sequence[DrawnRow], look: Look, title: str) -> str:
    """HTML of the rows, images, sounds and all inside it."""
    sections = "".join(_section(number, drawn, look) for number, drawn in enumerate(rows))
    others = ", ".join(modality.name for modality in look.config.modalities)
    legend = "".join(
        f'<span class="key"><i style="background:{colour}"></i>{html.escape(name)}</span>'
        for name, colour in (
            ("text", _COLOURS[Modality.TEXT]),
            ("image", _COLOURS[Modality.IMAGE]),
            *([(others, _OTHER)] if others else []),
            ("padding", _COLOURS[Modality.PADDING]),
            ("mask: seen, at or before", _SEEN),
            ("mask: seen ahead, inside an image", _SEEN_AHEAD),
        )
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>"
        f'<p class="legend">{legend}</p>{sections}</body></html>\n'
    )


def _section(number: int, drawn: DrawnRow, look: Look) -> str:
    row, spans = drawn.row, list(_spans(drawn))
    used = spans[-1].end if spans else 0
    length = len(row.token_ids_S)
    facts = (
        f"{len(spans)} documents or parts, {_media(row)}, {used:,} of {length:,} positions,"
        f" padding {1 - used / length:.2%}, {int(row.text_weight_S.sum()):,} text targets"
    )
    faults = "".join(f'<p class="fault">{html.escape(f"{f.key}: {f.reason}")}</p>' for f in row.faults)
    documents = "".join(_document(span, row, look) for span in spans)
    mask = _png(Image.fromarray(_mask_pixels(row)))
    return (
        f"<section><h2>Row {number} <small>{facts}</small></h2>{_band(row, spans)}{faults}"
        f'<div class="columns"><div class="documents">{documents}</div>'
        f'<figure><img class="mask" src="{mask}" alt="mask"><figcaption>who (down) sees whom (across)</figcaption>'
        "</figure></div></section>"
    )


def _media(row: Row) -> str:
    """How many there are of each."""
    counts = Counter(image.modality for image in row.images)
    images = counts.pop(IMAGE, 0)
    return ", ".join([f"{images} images", *(f"{count} of {name}" for name, count in counts.items())])


def _spans(drawn: DrawnRow) -> Iterator[_Span]:
    """The pieces of a row, told by where their first keys change."""
    first_key_S = drawn.row.first_key_S.copy()
    for twin in drawn.row.twins:
        first_key_S[twin.first : twin.first + twin.patches] = twin.first_key
    used = int((drawn.row.end_key_S > np.arange(len(first_key_S))).sum())
    borders = [*np.flatnonzero(np.diff(first_key_S[:used], prepend=-1)).tolist(), used]
    for origin, first, end in zip(drawn.origins, borders, borders[1:], strict=False):
        yield _Span(first, end, origin)


def _runs(row: Row, span: _Span) -> Iterator[tuple[int, int, Modality]]:
    """Stretches of one modality inside a piece."""
    modality = row.modality_S[span.first : span.end]
    starts = np.flatnonzero(np.diff(modality.astype(np.int8), prepend=-1)).tolist()
    for start, end in zip(starts, [*starts[1:], len(modality)], strict=True):
        yield span.first + start, span.first + end, Modality(int(modality[start]))


def _stretches(row: Row, spans: Sequence[_Span]) -> Iterator[tuple[int, int, str]]:
    """From where to where the band of a row has which colour; padding is what the others leave of it."""
    yield 0, len(row.token_ids_S), _COLOURS[Modality.PADDING]
    for span in spans:
        yield from ((first, end, _COLOURS[modality]) for first, end, modality in _runs(row, span))
    for image in row.images:
        if image.modality != IMAGE:
            yield image.first_patch, image.first_patch + image.patches, _OTHER


def _band(row: Row, spans: Sequence[_Span]) -> str:
    """The whole row as one line of coloured stretches, with a mark at each border of documents."""
    length = len(row.token_ids_S)
    parts = [
        f'<rect x="{first}" width="{end - first}" height="10" fill="{colour}"/>'
        for first, end, colour in _stretches(row, spans)
    ]
    parts += [
        f'<rect x="{span.first}" width="{length / 1200:.2f}" height="10" fill="{_BORDER}"/>' for span in spans
    ]
    return f'<svg class="band" viewBox="0 0 {length} 10" preserveAspectRatio="none">{"".join(parts)}</svg>'


def _document(span: _Span, row: Row, look: Look) -> str:
    images = {image.first_patch: image for image in row.images}
    heard = {image.first_patch for image in row.images[:_HEARD]}
    parts = []
    for first, end, modality in _runs(row, span):
        if modality == Modality.IMAGE:
            # Noised copies stand side by side.
            parts += [
                _figure(images[place], look, is_heard=place in heard)
                for place in range(first, end)
                if place in images
            ]
        else:
            parts += _chips(row.token_ids_S[first:end], row.text_weight_S[first:end], look)
    head = f"{html.escape(span.origin)} <small>positions {span.first:,} to {span.end:,}</small>"
    return f'<article><h3>{head}</h3><p class="tokens">{"".join(parts)}</p></article>'


def _chips(token_ids: NDArray[np.int64], weights: NDArray[np.float32], look: Look) -> Iterator[str]:
    """Tokens in boxes; those from which nothing is learned are paler."""
    ids, tokenizer, sizes = token_ids.tolist(), look.tokenizer, look.config.media_sizes
    left_out = range(_FIRST_TOKENS, len(ids) - _LAST_TOKENS)
    pieces = tokenizer.pieces([min(token, tokenizer.vocabulary - 1) for token in ids])
    for place, (token, piece) in enumerate(zip(ids, pieces, strict=True)):
        if left_out and place == left_out[0]:
            yield f'<b class="gap">{len(left_out):,} more tokens</b>'
        if place in left_out:
            continue
        silent = "" if weights[place] else " silent"
        if token < len(SpecialToken):
            yield f'<b class="control{silent}">{_NAMES[SpecialToken(token)]}</b>'
        elif token >= tokenizer.vocabulary:
            # Begins an image of another size than the first, or other media.
            begun = _NAMES[SpecialToken.BEGIN_IMAGE]
            begun = begun if sizes.is_image(token) else str(sizes.size_by_begin_token[token])
            yield f'<b class="control{silent}">{begun}</b>'
        else:
            yield f'<span class="token{silent}">{html.escape(piece.replace(_LINE_END, _SHOWN_LINE_END))}</span>'


def _figure(image: RowImage, look: Look, *, is_heard: bool) -> str:
    """An image, or what can be seen and heard of other media, with its name below."""
    height, width = image.values_CHW.shape[1:]
    level = "clean, to be read" if image.is_context else f"noise level {image.timestep}"
    noise = f"{image.modality}, {height} x {width}, {image.patches} patches, {level}"
    shown = f'<img class="image" src="{_png(_as_image(image, look.pictures))}" title="{noise}" alt="{noise}">'
    if image.modality == IMAGE:
        return shown
    is_sound = any(each.name == image.modality and each.kind == "mel" for each in look.config.modalities)
    player = _player(image) if is_sound and is_heard else ""
    name = f"{image.modality}, {image.patches} patches, {level}"
    return f'<span class="media">{shown}<small>{name}</small>{player}</span>'


def _player(image: RowImage) -> str:
    data = base64.b64encode(as_wav(image.values_CHW.astype(np.float32).flatten())).decode()
    return f'<audio controls src="data:audio/wav;base64,{data}"></audio>'


def _as_image(image: RowImage, pictures: Pictures) -> Image.Image:
    """The image; of latents or tokens, their first three channels, spread over the whole range."""
    values = np.asarray(image.values_CHW)
    if image.modality in pictures:
        values = pictures[image.modality](torch.from_numpy(values)).numpy()
    if values.ndim == 2:
        values = values[None]
    if values.dtype != np.uint8:
        shown: NDArray[np.float32] = (values[:3] if len(values) >= 3 else values[:1]).astype(np.float32)
        least, most = float(shown.min()), float(shown.max())
        values = ((shown - least) / max(most - least, 1e-6) * 255).astype(np.uint8)
    return Image.fromarray(values[0] if len(values) == 1 else values.transpose(1, 2, 0))


def _mask_pixels(row: Row, pixels: int = _MASK_PIXELS) -> NDArray[np.uint8]:
    """The mask as [pixels, pixels, 3]: each pixel is the mean colour of the pairs it covers."""
    length = len(row.first_key_S)
    step = -(-length // pixels)
    key = np.arange(length)
    # What the noised copies see besides themselves.
    low, high = np.zeros(length, np.int64), np.zeros(length, np.int64)
    for twin in row.twins:
        here = slice(twin.first, twin.first + twin.patches)
        low[here], high[here] = twin.first_key, twin.end_key
    colours = [
        np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) for colour in (_SEEN, _SEEN_AHEAD)
    ]
    lines = []
    starts = np.arange(0, length, step)
    for first in starts.tolist():
        query = np.arange(first, min(first + step, length))[:, None]
        seen = (key >= row.first_key_S[query]) & (key < row.end_key_S[query])
        seen |= (key >= low[query]) & (key < high[query])
        line = np.full((len(starts), 3), 255.0)
        for colour, where in zip(colours, (seen & (key <= query), seen & (key > query)), strict=True):
            covered = np.add.reduceat(where.sum(0), starts) / np.add.reduceat(
                np.full(length, len(query)), starts
            )
            line += covered[:, None] * (colour - 255.0)
        lines.append(line)
    return np.stack(lines).clip(0, 255).astype(np.uint8)


def _png(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def overview(rows: Sequence[DrawnRow], look: Look) -> Image.Image:
    """The rows at a glance: above the band of each its images and other media where they stand, beside it its mask."""
    width, height, mask, margin = 1240, 150, 118, 16
    canvas = Image.new("RGB", (width, margin + height * len(rows)), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=12)
    band_width = width - mask - 3 * margin
    for number, drawn in enumerate(rows):
        row, spans = drawn.row, list(_spans(drawn))
        top = margin + number * height
        scale = band_width / len(row.token_ids_S)
        upper, lower = top + 70, top + 98
        used = spans[-1].end if spans else 0
        for first, end, colour in _stretches(row, spans):
            draw.rectangle((margin + first * scale, upper, margin + end * scale, lower), fill=colour)
        for span in spans:
            left = margin + span.first * scale
            draw.line((left, upper - 3, left, lower + 3), fill=_BORDER)
        free = float(margin)
        for image in row.images:
            left = margin + image.first_patch * scale
            if left >= free:
                thumbnail = ImageOps.contain(_as_image(image, look.pictures).convert("RGB"), (52, 52))
                canvas.paste(thumbnail, (min(int(left), int(band_width) + margin - 52), top + 12))
                free = left + 54
        facts = f"row {number}: {len(spans)} documents or parts, {_media(row)}, {used:,} positions"
        draw.text((margin, lower + 8), facts, fill=_BORDER, font=font)
        pixels = Image.fromarray(_mask_pixels(row)).resize((mask, mask), Image.Resampling.BOX)
        canvas.paste(pixels, (width - margin - mask, top + 4))
        draw.rectangle(
            (width - margin - mask - 1, top + 3, width - margin, top + 4 + mask), outline="#8a8a8a"
        )
    return canvas


_STYLE = """
body{font:14px/1.5 system-ui,sans-serif;color:#1d2733;background:#f6f7f9;
  margin:24px auto;max-width:1240px;padding:0 16px}
h1{font-size:22px;margin:0 0 4px}h2{font-size:17px;margin:0 0 8px}h3{font-size:13px;margin:0 0 2px}
small{font-weight:400;color:#66717d}
section{background:#fff;border:1px solid #e2e5e9;border-radius:8px;padding:16px;margin:16px 0}
.legend{color:#66717d;margin:0}.key{margin-right:18px;white-space:nowrap}
.key i{display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:6px;vertical-align:-1px}
.band{width:100%;height:26px;border-radius:4px;display:block;margin-bottom:12px}
.columns{display:flex;gap:20px;align-items:flex-start}.documents{flex:1;min-width:0;max-height:560px;overflow:auto}
figure{margin:0;position:sticky;top:8px}figcaption{font-size:12px;color:#66717d;text-align:center}
.mask{width:320px;height:320px;border:1px solid #c3c9d0;image-rendering:pixelated;display:block}
article{border-left:3px solid #1d2733;padding:2px 0 2px 12px;margin:0 0 14px}
.tokens{margin:0;line-height:1.9;overflow-wrap:anywhere}
.token{background:#e3ecf5;border-radius:3px;padding:1px 1px;margin-right:1px;white-space:pre-wrap}
.token:nth-of-type(even){background:#d2e0ee}.token.silent{background:#f0f1f3}
.control{font-size:10px;background:#1d2733;color:#fff;border-radius:3px;padding:2px 5px;margin:0 3px;vertical-align:1px}
.control.silent{background:#8a94a0}
.gap{font-size:11px;color:#66717d;margin:0 8px;font-weight:400;font-style:italic}
.image{height:72px;border:2px solid #e08e45;border-radius:4px;vertical-align:middle;margin:2px 3px}
.media{display:inline-grid;grid-template-columns:auto auto;gap:2px 8px;align-items:center;vertical-align:middle;
  margin:3px 8px 3px 0;line-height:1.3}
.media .image{grid-row:1/3;max-width:100%;border-color:#4f9d69;image-rendering:pixelated}
.media small:last-child{grid-row:1/3}
.media audio{width:170px;height:30px}
audio::-webkit-media-controls-volume-control-container{display:none}
.fault{color:#a33;margin:0 0 8px}
"""
