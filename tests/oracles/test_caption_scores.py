"""Words, CIDEr-D and BLEU equal those of pycocoevalcap 1.2 and its Java tokenizer.

It is in no extra, since it brings 100 MB: `pip install --no-deps pycocoevalcap==1.2`, and a Java on the path.
`PYTHONPATH=src:kernels python tests/oracles/test_caption_scores.py` writes the oracle's answers of
tests/assets/captions.json anew. The questions stay as they stand there.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from transfusion.evaluate.metrics.caption_scores import cider_d, corpus_bleu
from transfusion.evaluate.metrics.ptb import ptb_tokens

cider = pytest.importorskip("pycocoevalcap.cider.cider", reason="pycocoevalcap is not installed")
bleu = pytest.importorskip("pycocoevalcap.bleu.bleu", reason="pycocoevalcap is not installed")
java = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer", reason="pycocoevalcap is not installed")
pytestmark = pytest.mark.skipif(not shutil.which("java"), reason="there is no java")

FROZEN = Path(__file__).parents[1] / "assets" / "captions.json"


def cut(captions: list[str]) -> list[str]:
    """What the Java tokenizer makes of each. A line between two keeps it from looking at the next."""
    # Java before 18 reads files as the locale says.
    os.environ["LC_ALL"] = "C.UTF-8"
    lines = {number: [{"caption": each}, {"caption": "x"}] for number, each in enumerate(captions)}
    return [first for first, _ in java.PTBTokenizer().tokenize(lines).values()]


def answers(frozen: dict[str, Any]) -> dict[str, Any]:
    """The oracle's answers to the questions of the file."""
    captions = cut([caption for caption, _ in frozen["captions"]])
    sets = []
    for each in frozen["sets"]:
        references = dict(enumerate(each["references"]))
        said = {number: [caption] for number, caption in enumerate(each["said"])}
        scores = [float(score) for score in cider.Cider().compute_score(references, said)[1]]
        together = bleu.Bleu(4).compute_score(references, said, verbose=0)[0]
        sets.append({**each, "cider": scores, "bleu": together})
    asked = [caption for caption, _ in frozen["captions"]]
    return {"captions": [list(pair) for pair in zip(asked, captions, strict=True)], "sets": sets}


def test_the_frozen_answers_are_those_of_the_oracle() -> None:
    frozen = json.loads(FROZEN.read_text(encoding="utf-8"))
    made = answers(frozen)
    assert made["captions"] == frozen["captions"]
    for one, other in zip(made["sets"], frozen["sets"], strict=True):
        assert one["cider"] == pytest.approx(other["cider"], rel=0, abs=1e-12)
        assert one["bleu"] == pytest.approx(other["bleu"], rel=0, abs=1e-12)


def test_a_thousand_captions_of_hard_pieces_are_cut_alike() -> None:
    """Words of the frozen captions in new orders, some of them glued together."""
    draw = random.Random(0)
    pieces = [
        piece
        for caption, _ in json.loads(FROZEN.read_text("utf-8"))["captions"]
        for piece in caption.split(" ")
    ]
    captions = []
    for _ in range(1000):
        chosen = draw.choices(pieces, k=draw.randint(2, 12))
        captions.append("".join(piece + draw.choice([" ", " ", " ", ""]) for piece in chosen))
    assert [" ".join(ptb_tokens(caption)) for caption in captions] == cut(captions)


@pytest.mark.parametrize("seed", range(20))
def test_scores_of_random_captions_equal_the_oracle(seed: int) -> None:
    draw = random.Random(seed)
    images, words = draw.choice([2, 3, 40]), draw.choice([3, 10, 40])

    def caption() -> str:
        return " ".join(f"w{draw.randrange(words)}" for _ in range(draw.choice([0, 1, 3, 8, 20])))

    references = {number: [caption() for _ in range(draw.randint(1, 5))] for number in range(images)}
    said = {number: [draw.choice([caption(), each[0]])] for number, each in references.items()}
    ours = (
        [each.split() for [each] in said.values()],
        [[each.split() for each in those] for those in references.values()],
    )
    assert cider_d(*ours) == pytest.approx(cider.Cider().compute_score(references, said)[1], rel=0, abs=1e-12)
    expected = bleu.Bleu(4).compute_score(references, said, verbose=0)[0]
    assert corpus_bleu(*ours) == pytest.approx(expected, rel=0, abs=1e-12)


if __name__ == "__main__":
    made = answers(json.loads(FROZEN.read_text(encoding="utf-8")))
    parts = [
        f'"{name}": [\n' + ",\n".join(json.dumps(each, ensure_ascii=False) for each in made[name]) + "\n]"
        for name in ("captions", "sets")
    ]
    FROZEN.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
