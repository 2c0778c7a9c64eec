"""The spoken digits: is a voice understood that was never heard, is what the model says a word that others understand?

I sounds, E values of a spectrogram.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from transfusion.codec import open_media_codecs
from transfusion.codec.mel import spectrogram
from transfusion.config import SourceConfig
from transfusion.config.objectives import SAMPLERS
from transfusion.config.sections import SOUND
from transfusion.data.loading.validation import documents
from transfusion.data.prepare.digits import DIGIT_WORDS, digit_in_caption
from transfusion.data.sounds.files import as_wav
from transfusion.errors import UserError
from transfusion.evaluate.captioned_images import sources_of_the_same_name
from transfusion.evaluate.metrics.bootstrap import mean_interval
from transfusion.evaluate.metrics.metric import Metric
from transfusion.evaluate.progress_lines import ProgressLines
from transfusion.evaluate.suites.digits import Labels, share_named
from transfusion.evaluate.suites.evidence import Drawing, save_drawn
from transfusion.evaluate.suites.settings import SpokenDigitsSuite
from transfusion.generate.pipeline import Pipeline, SampledImage
from transfusion.inference.runner import Media
from transfusion.schema import ImageSegment, TextSegment

Features = NDArray[np.float64]
GENERATION_BAR = 0.80


def spoken_digits(pipeline: Pipeline, out: Path, settings: SpokenDigitsSuite) -> dict[str, Metric]:
    """Transcriptions of the validation sounds, and generated words read by a classifier of real ones.

    Leaves evidence under OUT/evaluation: spectrograms as images in generated/ and validation/, beside each its sound as
    NNNN.wav, and captions.jsonl. Raises UserError for a model that does not learn sound as spectrograms, and for data
    without spoken digits.
    """
    if not any(each.name == SOUND and each.kind == "mel" for each in pipeline.config.modalities):
        raise UserError(
            "the suite spoken_digits is for models with a modality sound of kind mel; choose another suite"
        )
    train, train_labels = _sounds(pipeline, sources_of_the_same_name(pipeline.config))
    test, test_labels = _sounds(pipeline, pipeline.config.data.validation)
    metrics = _transcriptions(pipeline, out, settings, test, test_labels)
    return metrics | _generation(pipeline, out, settings, train, train_labels, test, test_labels)


def _transcriptions(
    pipeline: Pipeline, out: Path, settings: SpokenDigitsSuite, sounds: list[Tensor], labels: Labels
) -> dict[str, Metric]:
    tell = ProgressLines(f"writing down {len(sounds)} sounds")
    said: list[str] = []
    for start in range(0, len(sounds), settings.caption_batch):
        tell(start, len(sounds))
        part = sounds[start : start + settings.caption_batch]
        answers = pipeline.generate(
            [[Media(SOUND, sound)] for sound in part],
            max_tokens=settings.max_tokens,
            max_images=0,
            batch=settings.caption_batch,
        )
        said += ["".join(each for each in answer[1:] if isinstance(each, str)) for answer in answers]
    how = f"greedy texts of the {len(said)} validation sounds that name exactly the right digit"
    accuracy = share_named(said, labels, _pictures(pipeline, sounds), out, how)
    _save_sounds(sounds, out / "evaluation" / "validation")
    return {"transcription_accuracy": accuracy}


def _generation(
    pipeline: Pipeline,
    out: Path,
    settings: SpokenDigitsSuite,
    train: list[Tensor],
    train_labels: Labels,
    test: list[Tensor],
    test_labels: Labels,
) -> dict[str, Metric]:
    from sklearn.svm import SVC

    classifier = SVC(C=10.0).fit(_features(train), train_labels)
    modality = next(each for each in pipeline.config.modalities if each.name == SOUND)
    drawing = Drawing.of(settings, pipeline)
    if not settings.sampler:
        drawing = drawing._replace(sampler=SAMPLERS[modality.diffusion.prediction][0])
    drawn = pipeline.sample_media(
        SOUND,
        DIGIT_WORDS,
        per_prompt=settings.count,
        guidance=drawing.guidance,
        steps=drawing.steps,
        sampler=drawing.sampler,
        seed=drawing.seed,
        batch=settings.batch,
        on_call=ProgressLines(f"saying each of {len(DIGIT_WORDS)} digits {settings.count} times"),
    )
    sounds = [media.values for media in drawn]
    wanted = np.repeat(np.arange(len(DIGIT_WORDS)), settings.count)
    pictures = [
        SampledImage(picture, DIGIT_WORDS[digit], drawing.seed + number)
        for number, (picture, digit) in enumerate(
            zip(_pictures(pipeline, sounds), wanted.tolist(), strict=True)
        )
    ]
    save_drawn(pictures, out)
    _save_sounds(sounds, out / "evaluation" / "generated")
    right = (classifier.predict(_features(sounds)) == wanted).astype(np.float64)
    real = float((classifier.predict(_features(test)) == test_labels).mean())
    return {
        "spoken_generation_accuracy": Metric(
            value=float(right.mean()),
            count=len(right),
            interval=mean_interval(right.tolist()),
            threshold=GENERATION_BAR,
            how=f"SVC(C=10) of log-mel spectrograms, trained on {len(train)} real sounds, understands {settings.count}"
            f" sounds of each of {len(DIGIT_WORDS)} digits; {drawing}",
        ),
        "spoken_classifier_accuracy_on_real": Metric(
            value=real, how=f"the same SVC on the {len(test)} real validation sounds"
        ),
    }


def _sounds(pipeline: Pipeline, sources: list[SourceConfig]) -> tuple[list[Tensor], Labels]:
    """float32 [1, 1, T] and digits of the documents of one sound and a digit's name."""
    sounds, labels = [], []
    sizes = pipeline.config.media_sizes
    tell = ProgressLines("reading the sounds of " + " and ".join(source.name for source in sources))
    for document in tell.each(documents(pipeline.config, sources, pipeline.tokenizer)):
        media = [part for part in document.segments if isinstance(part, ImageSegment)]
        texts = [part for part in document.segments if isinstance(part, TextSegment)]
        digit = digit_in_caption("".join(pipeline.tokenizer.decode(list(part.token_ids)) for part in texts))
        if len(media) == 1 and digit is not None and not sizes.is_image(media[0].begin):
            sounds.append(torch.as_tensor(media[0].values_CHW))
            labels.append(digit)
    if len(set(labels)) < len(DIGIT_WORDS):
        raise UserError(
            f"the suite spoken_digits needs sounds of all ten digits, found {len(set(labels))};"
            " it is for models trained on `transfusion prepare spoken-digits`"
        )
    return sounds, np.array(labels)


def _pictures(pipeline: Pipeline, sounds: list[Tensor]) -> list[Tensor]:
    codec = open_media_codecs(pipeline.config.modalities)[SOUND]
    return [codec.picture(sound) for sound in sounds]


def _save_sounds(sounds: list[Tensor], folder: Path) -> None:
    """Beside each picture its sound, by the same name."""
    for number, sound in enumerate(sounds):
        (folder / f"{number:04d}.wav").write_bytes(as_wav(sound.flatten().numpy()))


def _features(sounds: list[Tensor]) -> Features:
    """Log-mel spectrograms [I, E], those of shorter sounds with silence behind them."""
    longest = max(sound.shape[-1] for sound in sounds)
    padded = torch.stack([torch.nn.functional.pad(sound, (0, longest - sound.shape[-1])) for sound in sounds])
    return spectrogram(padded).flatten(1).numpy().astype(np.float64)
