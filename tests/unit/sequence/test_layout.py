"""The layout of documents, against examples written by hand."""

from __future__ import annotations

import numpy as np

from transfusion.schema import ImageSegment, Modality, Segment, SpecialToken, TextSegment
from transfusion.sequence.layout import lay_out, lay_out_all, tokenize_text

BOS, EOS, BOI, EOI, PATCH = (
    int(token)
    for token in (
        SpecialToken.BEGIN_DOCUMENT,
        SpecialToken.END_DOCUMENT,
        SpecialToken.BEGIN_IMAGE,
        SpecialToken.END_IMAGE,
        SpecialToken.PATCH,
    )
)
CAPTION = TextSegment((50, 51))
IMAGE = ImageSegment(None, 4)


def learned(segments: list[Segment]) -> list[tuple[int, int]]:
    """(input, target) of every position whose target is learned."""
    layout = lay_out(segments)
    weights = layout.text_weight_S.tolist()
    pairs = zip(layout.token_ids_S.tolist(), layout.target_ids_S.tolist(), strict=True)
    assert set(weights) <= {0.0, 1.0}
    return [pair for pair, weight in zip(pairs, weights, strict=True) if weight]


def test_caption_first() -> None:
    layout = lay_out([CAPTION, IMAGE])
    assert layout.token_ids_S.tolist() == [BOS, 50, 51, BOI, PATCH, PATCH, PATCH, PATCH, EOI, EOS]
    assert layout.target_ids_S.tolist()[:-1] == layout.token_ids_S.tolist()[1:]
    assert layout.text_weight_S.tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 1, 0]
    assert layout.modality_S.tolist() == [Modality.TEXT] * 4 + [Modality.IMAGE] * 4 + [Modality.TEXT] * 2
    # <BOI> and <EOI> stay causal; each patch sees to the end of its image.
    assert layout.end_key_S.tolist() == [1, 2, 3, 4, 8, 8, 8, 8, 9, 10]
    assert layout.images == ((4, 4),)
    assert layout.position_SA[:, 0].tolist() == list(range(10))


def test_causal_images() -> None:
    layout = lay_out([CAPTION, IMAGE], causal_images=True)
    assert layout.end_key_S.tolist() == list(range(1, 11)) and layout.images == ((4, 4),)


def test_image_first() -> None:
    layout = lay_out([IMAGE, CAPTION])
    assert layout.token_ids_S.tolist() == [BOS, BOI, PATCH, PATCH, PATCH, PATCH, EOI, 50, 51, EOS]
    assert layout.text_weight_S.tolist() == [1, 0, 0, 0, 0, 0, 1, 1, 1, 0]
    assert layout.end_key_S.tolist() == [1, 2, 6, 6, 6, 6, 7, 8, 9, 10]


def test_what_is_predicted() -> None:
    """N6: the target is the next token. <BOI> and <EOS> are learned, patches and <EOI> never, and nothing where
    the input is <BOI>, a patch or <EOS>."""
    assert learned([CAPTION, IMAGE]) == [(BOS, 50), (50, 51), (51, BOI), (EOI, EOS)]
    assert learned([IMAGE, CAPTION]) == [(BOS, BOI), (EOI, 50), (50, 51), (51, EOS)]
    assert learned([CAPTION]) == [(BOS, 50), (50, 51), (51, EOS)]
    both = learned([IMAGE, CAPTION, IMAGE, TextSegment((60,))])
    assert both == [(BOS, BOI), (EOI, 50), (50, 51), (51, BOI), (EOI, 60), (60, EOS)]


def test_a_dropped_caption_is_the_unconditional_prefix_and_has_no_text_loss() -> None:
    layout = lay_out([IMAGE])
    assert layout.token_ids_S.tolist() == [BOS, BOI, PATCH, PATCH, PATCH, PATCH, EOI, EOS]
    assert not layout.text_weight_S.any()
    prefix = lay_out([IMAGE], finished=False)
    assert prefix.token_ids_S.tolist() == layout.token_ids_S.tolist()[:-1]
    for name in ("position_SA", "end_key_S", "modality_S"):
        assert np.array_equal(getattr(prefix, name), getattr(layout, name)[:-1])


def test_an_unfinished_document_predicts_nothing_after_its_end() -> None:
    prefix = lay_out([CAPTION], finished=False)
    assert prefix.token_ids_S.tolist() == [BOS, 50, 51]
    assert prefix.text_weight_S.tolist() == [1, 1, 0]


def test_positions_with_rows_and_columns() -> None:
    layout = lay_out([CAPTION, IMAGE], axes=3)
    assert layout.position_SA[:4].tolist() == [[p, p, p] for p in range(4)]
    assert layout.position_SA[4:8].tolist() == [[4, 4, 4], [4, 4, 5], [4, 5, 4], [4, 5, 5]]
    # The running position goes on as in one dimension.
    assert layout.position_SA[8:].tolist() == [[8, 8, 8], [9, 9, 9]]


def test_pieces_of_a_text_keep_every_target() -> None:
    ids = np.arange(100, 130, dtype=np.uint16)
    whole = lay_out([TextSegment(tuple(ids.tolist()))])
    for cuts in ([32], [1, 31], [10, 10, 12], [31, 1]):
        first, targets, weights, inputs = 0, [], [], []
        for tokens in cuts:
            piece = lay_out_all([tokenize_text(ids, first, tokens)])
            assert len(piece) == tokens
            assert piece.position_SA[:, 0].tolist() == list(range(tokens))
            assert piece.end_key_S.tolist() == list(range(1, tokens + 1))
            inputs += piece.token_ids_S.tolist()
            targets += piece.target_ids_S.tolist()
            weights += piece.text_weight_S.tolist()
            first += tokens
        assert inputs == whole.token_ids_S.tolist()
        assert targets == whole.target_ids_S.tolist()
        assert weights == whole.text_weight_S.tolist() == [1] * 31 + [0]
