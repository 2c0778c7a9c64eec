"""A small network that reads words off images; its features rate generated images.

It is trained on the training images of one data set, to tell which of the commonest words of the captions an image
has. The same file serves every model of an experiment; it holds what the training images' features are together, so
that nobody reads those images again. Its distances are its own: they are no FID, and compare with no figure from
elsewhere.

I images, C channels, H/W height and width, F features, K words.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from transfusion.config import Config
from transfusion.config.weights_folder import check_tensors, stored_tensors
from transfusion.errors import UserError
from transfusion.evaluate.captioned_images import captioned_images
from transfusion.evaluate.metrics.frechet import Gaussian, gaussian_of
from transfusion.evaluate.progress_lines import ProgressLines
from transfusion.evaluate.progress_lines import say as say_on_stderr
from transfusion.files import atomic_file
from transfusion.sequence.sizes import Size
from transfusion.sequence.tokenizer import Tokenizer

FORMAT = "transfusion classifier"
FEATURES = 64
WIDTHS = (32, 64, 128)
MAX_WORDS = 128
MIN_IMAGES = 20
BATCH = 64
LEARNING_RATE = 2e-3
_MAX_SHIFT = 2


class Classifier(nn.Module):
    """Three strided convolutions, the mean over places, FEATURES numbers, and a logit for each word.

    sizes: of the images that it reads. images, mean_F, covariance_FF: how many it was trained on, and their features as
    a Gaussian.
    """

    mean_F: Tensor
    covariance_FF: Tensor

    def __init__(self, words: Sequence[str], channels: int, sizes: Sequence[Size]) -> None:
        super().__init__()
        self.words, self.channels, self.sizes = tuple(words), channels, tuple(sizes)
        layers: list[nn.Module] = []
        for inputs, width in itertools.pairwise((channels, *WIDTHS)):
            layers += [nn.Conv2d(inputs, width, 3, stride=2, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.to_features = nn.Linear(WIDTHS[-1], FEATURES)
        self.to_words = nn.Linear(FEATURES, len(words))
        self.images = 0
        self.register_buffer("mean_F", torch.zeros(FEATURES, dtype=torch.float64))
        self.register_buffer("covariance_FF", torch.zeros(FEATURES, FEATURES, dtype=torch.float64))

    @property
    def reference(self) -> Gaussian:
        """Of the features of the training images."""
        return Gaussian(self.mean_F.numpy(), self.covariance_FF.numpy())

    def features(self, pixels_ICHW: Tensor) -> Tensor:
        """Features [I, F] of uint8 images [I, C, H, W]."""
        places = self.body(pixels_ICHW.float() / 127.5 - 1.0)
        return self.to_features(places.mean((2, 3)))

    def forward(self, pixels_ICHW: Tensor) -> Tensor:
        """A logit for each word, [I, K]."""
        return self.to_words(nn.functional.silu(self.features(pixels_ICHW)))

    def has_words(self, captions: Sequence[str]) -> Tensor:
        """float32 [I, K]: 1 where the caption has the word."""
        found = [set(words_of(caption)) for caption in captions]
        return torch.tensor([[float(word in have) for word in self.words] for have in found])


def words_of(caption: str) -> list[str]:
    """The words of a caption, in lower case and without punctuation."""
    return re.findall(r"\w+", caption.lower())


def common_words(captions: Sequence[str]) -> list[str]:
    """The commonest words, none of them rare, and none that almost every caption has. Equals follow the alphabet."""
    counts = Counter(word for caption in captions for word in set(words_of(caption)))
    most = 0.9 * len(captions)
    fitting = [word for word, count in counts.items() if MIN_IMAGES <= count <= most]
    return sorted(fitting, key=lambda word: (-counts[word], word))[:MAX_WORDS]


def train_classifier(
    images: Sequence[Tensor],
    captions: Sequence[str],
    *,
    epochs: int = 8,
    seed: int = 0,
    say: Callable[[str], None] = say_on_stderr,
) -> Classifier:
    """A classifier of these images; AdamW, images shifted by up to two pixels. Raises UserError without words."""
    words = common_words(captions)
    if len(words) < 2:
        raise UserError(
            f"fewer than two words are in the captions of {MIN_IMAGES} images or more but not of nearly all:"
            " there is nothing to learn a classifier from"
        )
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = sorted({Size(*image.shape[1:]) for image in images})
        classifier = Classifier(words, images[0].shape[0], sizes)
    wanted_IK = classifier.has_words(captions)
    steps = epochs * -(-len(images) // BATCH)
    tell = ProgressLines(f"training on {len(images)} images and {len(words)} words", say=say)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for epoch in range(epochs):
        total = 0.0
        for chosen in torch.randperm(len(images), generator=generator).split(BATCH):
            tell(schedule.last_epoch, steps)
            part = [images[number] for number in chosen.tolist()]
            logit_IK = _by_size(part, lambda pixels: classifier(_shifted(pixels, generator)))
            loss = nn.functional.binary_cross_entropy_with_logits(logit_IK, wanted_IK[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(chosen)
        say(f"epoch {epoch + 1} of {epochs}: {total / len(images):.4f} nats a word and image")
    mean, covariance = gaussian_of(features_of(classifier, images).numpy())
    classifier.mean_F.copy_(torch.from_numpy(mean))
    classifier.covariance_FF.copy_(torch.from_numpy(covariance))
    classifier.images = len(images)
    return classifier.eval()


def recall(classifier: Classifier, images: Sequence[Tensor], captions: Sequence[str]) -> float:
    """Share of the captions' known words that are among the likeliest ones, as many as the caption has."""
    found, wanted = recall_of_each(classifier, images, captions)
    return sum(found) / max(sum(wanted), 1.0)


@torch.no_grad()
def recall_of_each(
    classifier: Classifier, images: Sequence[Tensor], captions: Sequence[str]
) -> tuple[list[float], list[float]]:
    """Of each image how many of its caption's known words are among the likeliest ones, and how many there are."""
    wanted_IK = classifier.has_words(captions)
    logit_IK = _by_size(images, classifier)
    rank_IK = logit_IK.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    found_IK = (rank_IK < wanted_IK.sum(-1, keepdim=True)) * wanted_IK
    return found_IK.sum(-1).tolist(), wanted_IK.sum(-1).tolist()


@torch.no_grad()
def features_of(classifier: Classifier, images: Sequence[Tensor]) -> Tensor:
    """float32 [I, F]. Raises UserError for images of other sizes than the classifier's."""
    known = {(classifier.channels, *size.sides) for size in classifier.sizes}
    if others := sorted({tuple(image.shape) for image in images} - known):
        reads, found = (
            " or ".join(" x ".join(map(str, shape)) for shape in shapes) for shapes in (sorted(known), others)
        )
        raise UserError(f"the classifier reads {reads}, the images are {found}; train one for their size")
    return _by_size(images, classifier.features)


def _by_size(images: Sequence[Tensor], read: Callable[[Tensor], Tensor]) -> Tensor:
    """What `read` says of each image, from BATCH of one size at a time."""
    places: dict[torch.Size, list[int]] = {}
    for place, image in enumerate(images):
        places.setdefault(image.shape, []).append(place)
    parts = [same[start : start + BATCH] for same in places.values() for start in range(0, len(same), BATCH)]
    answers = torch.cat([read(torch.stack([images[place] for place in part])) for part in parts])
    return answers[torch.tensor([place for part in parts for place in part]).argsort()]


def save_classifier(classifier: Classifier, path: Path) -> None:
    """Write weights, words and size as one safetensors file."""
    facts = {
        "words": classifier.words,
        "channels": classifier.channels,
        "sizes": [size.sides for size in classifier.sizes],
        "images": classifier.images,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"format": FORMAT, "classifier": json.dumps(facts)}
    with atomic_file(path) as unfinished:
        save_file(classifier.state_dict(), unfinished, metadata=metadata)


def load_classifier(path: Path) -> Classifier:
    """A saved classifier. Raises UserError for a missing or foreign file, and names a tensor that does not fit."""
    try:
        stored = stored_tensors([path], path.stem)
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        if metadata.get("format") != FORMAT:
            raise ValueError("it says so nowhere")
        facts = json.loads(metadata["classifier"])
        # Files of before had one size, a square.
        sizes = facts["sizes"] if "sizes" in facts else [[facts["image_size"]] * 2]
        classifier = Classifier(facts["words"], facts["channels"], [Size(*size) for size in sizes])
        check_tensors(
            {name: tensor.shape for name, tensor in stored.items()},
            {name: tensor.shape for name, tensor in classifier.state_dict().items()},
        )
        classifier.load_state_dict(weights)
        classifier.images = facts["images"]
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{path} is not a classifier ({reason}); `transfusion classifier CONFIG --out {path}` makes one"
        ) from None
    return classifier.eval()


def train_from_config(
    config: Config, *, epochs: int = 8, say: Callable[[str], None] = say_on_stderr
) -> Classifier:
    """A classifier of a configuration's training images, seeded by run.seed; says its recall on validation ones."""
    tokenizer = Tokenizer(config.data.tokenizer)
    images, captions = captioned_images(config, tokenizer, validation=False)
    classifier = train_classifier(images, captions, epochs=epochs, seed=config.run.seed, say=say)
    if config.data.validation:
        validation = captioned_images(config, tokenizer, validation=True)
        say(f"recall of the words of validation captions: {recall(classifier, *validation):.3f}")
    return classifier


def _shifted(pixels_ICHW: Tensor, generator: torch.Generator) -> Tensor:
    """The images moved by up to _MAX_SHIFT pixels each way, all alike, their borders repeated."""
    down, right = torch.randint(0, 2 * _MAX_SHIFT + 1, (2,), generator=generator).tolist()
    wide = nn.functional.pad(pixels_ICHW.float(), (_MAX_SHIFT,) * 4, mode="replicate")
    _, _, height, width = pixels_ICHW.shape
    return wide[:, :, down : down + height, right : right + width]
