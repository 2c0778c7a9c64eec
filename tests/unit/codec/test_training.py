"""A codec's training: every loss pulls, resuming is exact, and the folder it leaves is measured."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from transfusion.codec import open_codec
from transfusion.codec.preview import read_preview
from transfusion.codec_train import codebook, features
from transfusion.codec_train.losses import adaptive_weight, discriminator_loss
from transfusion.codec_train.settings import CodecTrainConfig
from transfusion.codec_train.train import CodecTrainer, train_codec
from transfusion.config import CodecConfig
from transfusion.config.checking import check_as
from transfusion.config.codec_folder import WEIGHTS
from transfusion.errors import UserError
from transfusion.observe.console import start_logging
from transfusion.observe.metrics import read_metrics

CPU = torch.device("cpu")


@pytest.fixture
def make(shards: Path, tmp_path: Path) -> Iterator[Callable[..., CodecTrainConfig]]:
    def build(run: str = "run", loss: dict[str, Any] | None = None, **values: Any) -> CodecTrainConfig:
        none = {"perceptual_features": "none", "adversarial": 0.0}
        plain = {
            "run": {"dir": str(tmp_path / run)},
            "network": {"widths": [8, 8, 8], "layers": 1, "latent_channels": 4, "groups": 4, "codebook_size": 16,
                        "code_width": 3, "attention": False},
            "images": {"shards": f"{shards}/*.tar", "image_size": 16},
            "loss": none | (loss or {}),
            "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2, "ema_decay": 0.5},
            "steps": 4, "batch": 4, "threads": 1, "checkpoint_every": 2, "log_every": 1,
            **values,
        }  # fmt: skip
        return check_as(CodecTrainConfig, plain, where="test")

    yield build
    start_logging(None)


def weights(config: CodecTrainConfig) -> dict[str, Tensor]:
    trainer = CodecTrainer(config, CPU)
    try:
        return {
            **{f"raw {name}": value.clone() for name, value in trainer.network.state_dict().items()},
            **{f"judge {name}": value.clone() for name, value in trainer.discriminator.state_dict().items()},
            **{f"mean {n}": value.clone() for n, value in enumerate(trainer.average.averages)},
        }
    finally:
        trainer.close()


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_a_stopped_training_goes_on_exactly(make: Callable[..., CodecTrainConfig], kind: str) -> None:
    loss = {"adversarial": 0.5, "adversarial_from": 1, "revive_every": 3}
    whole, parts = make("whole", loss, kind=kind), make("parts", loss, kind=kind)
    assert train_codec(whole) == 0
    assert train_codec(parts.model_copy(update={"steps": 2})) == 0
    assert train_codec(parts) == 0
    one, other = weights(whole), weights(parts)
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    with pytest.raises(UserError, match="training of another codec"):
        train_codec(make("parts", loss, kind="vq" if kind == "kl" else "kl"))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("kl", {"reconstruction": "l2"}),
        ("kl", {"kl": 1e-3}),
        ("kl", {"perceptual_features": "random"}),
        ("kl", {"perceptual_features": "random", "perceptual": 2.0}),
        ("kl", {"identity_features": "random"}),
        ("kl", {"adversarial": 0.5, "adversarial_from": 0}),
        ("kl", {"adversarial": 0.5, "adversarial_from": 0, "adaptive": False}),
        ("vq", {"commitment": 4.0}),
        ("vq", {"revive_every": 0}),
    ],
)
def test_every_loss_pulls(make: Callable[..., CodecTrainConfig], kind: str, changes: dict[str, Any]) -> None:
    """The gradient of one step is another one with the setting, and of the discriminator only from its step on."""

    def step(run: str, loss: dict[str, Any], number: int = 0) -> tuple[CodecTrainer, list[Tensor]]:
        trainer = CodecTrainer(make(run, loss, kind=kind), CPU)
        trainer.step = number
        trainer.train_step()
        return trainer, [parameter.detach().clone() for parameter in trainer.network.parameters()]

    plain, changed = (
        {"adversarial_from": 10} | {k: v for k, v in changes.items() if k == "adversarial"},
        changes,
    )
    trainer, before = step("plain", plain)
    other, after = step("changed", changed)
    assert not all(map(torch.equal, before, after))
    for each in (trainer, other):
        each.close()


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("kl", {"run": {"seed": 1}}),
        ("kl", {"network": {"widths": [8, 8, 16]}}),
        ("kl", {"network": {"layers": 2}}),
        ("kl", {"network": {"latent_channels": 8}}),
        ("kl", {"network": {"groups": 2}}),
        ("kl", {"network": {"attention": True}}),
        ("vq", {"network": {"codebook_size": 8}}),
        ("vq", {"network": {"code_width": 2}}),
        ("kl", {"images": {"channels": 1}}),
        ("kl", {"images": {"image_size": 32}}),
        ("kl", {"images": {"flip": False}}),
        ("kl", {"optimizer": {"learning_rate": 1e-3}}),
        ("kl", {"optimizer": {"warmup_steps": 9}}),
        ("kl", {"optimizer": {"decay_steps": 4}}),
        ("kl", {"optimizer": {"betas": [0.9, 0.9]}}),
        ("kl", {"optimizer": {"gradient_clip": 1e-9}}),
        ("kl", {"optimizer": {"ema_decay": 0.0}}),
        ("kl", {"batch": 3}),
        ("kl", {"precision": "bf16"}),
        ("kl", {"loss": {"adversarial": 0.5, "adversarial_from": 1}}),
        ("kl", {"loss": {"identity_features": "random", "identity": 1.0}}),
    ],
)
def test_every_setting_counts(
    make: Callable[..., CodecTrainConfig], kind: str, changes: dict[str, Any]
) -> None:
    """Two steps with the setting leave another codec than two steps without."""

    def saved(run: str, changes: dict[str, Any]) -> dict[str, Tensor]:
        plain = make(run, kind=kind, steps=2).as_dict()
        for name, value in changes.items():
            plain[name] = plain[name] | value if isinstance(value, dict) else value
        config = check_as(CodecTrainConfig, plain, where="test")
        assert train_codec(config) == 0
        return load_file(Path(config.run.folder) / "codec" / WEIGHTS)

    one, other = saved("one", {}), saved("other", changes)
    same = one.keys() == other.keys() and all(
        value.shape == other[name].shape and torch.equal(value, other[name]) for name, value in one.items()
    )
    assert not same


def metrics_of(config: CodecTrainConfig) -> list[dict[str, Any]]:
    return read_metrics(Path(config.run.folder) / "metrics.jsonl")


def test_what_is_trained_on_and_left_away_is_told(
    make: Callable[..., CodecTrainConfig],
) -> None:
    loss = {"perceptual_features": "random", "identity": 0.0, "adversarial": 0.5, "adversarial_from": 1}
    for run, changes, told in (
        (
            "late",
            {"adversarial_from": 3, "adaptive": False},
            "none: this loss of the paper is off, as advers",
        ),
        ("judged", {}, "0.5 x patch discriminator from step 1, scaled by the ratio of the gradients"),
    ):
        config = make(run, loss | changes, steps=3)
        assert train_codec(config) == 0
        log = (Path(config.run.folder) / "log.txt").read_text()
        record = json.loads((Path(config.run.folder) / "codec" / "codec.json").read_text())
        losses = record["losses"]
        assert losses["perceptual"].startswith("1 x random features") and losses["identity"].startswith(
            "none"
        )
        assert losses["adversarial"].startswith(told) and f"adversarial loss: {told}" in log
        judged = ["discriminator" in line for line in metrics_of(config)]
        assert judged == ([False] * 3 if run == "late" else [False, True, True])


def test_a_training_may_begin_with_weights_and_judge_on_others(
    make: Callable[..., CodecTrainConfig], shards: Path
) -> None:
    assert train_codec(make("first")) == 0
    start = str(make("first").run.folder) + "/codec"
    own = {"shards": f"{shards}/00000.tar", "validation": f"{shards}/00001.tar", "image_size": 16}
    trainer = CodecTrainer(make("second", start=start, images=own), CPU)
    begun, given = trainer.network.state_dict(), load_file(Path(start) / WEIGHTS)
    assert all(torch.equal(begun[name], value) for name, value in given.items())
    assert len(trainer.images) == 6 and len(trainer.validation) == 5
    one, other = (next(each.in_order(1)) for each in (trainer.images, trainer.validation))
    assert not torch.equal(one, other)
    trainer.close()
    strange = {"widths": [4, 20], "groups": 2, "latent_channels": 5, "layers": 1}
    grey = {"shards": f"{shards}/*.tar", "image_size": 16, "channels": 1}
    with pytest.raises(UserError, match="has no weight of the same name and shape"):
        CodecTrainer(make("third", start=start, network=strange, images=grey), CPU)


def test_steps_between_lines_and_checkpoints(make: Callable[..., CodecTrainConfig]) -> None:
    config = make(log_every=3, checkpoint_every=1, steps=5)
    threads = torch.get_num_threads()
    try:
        assert train_codec(config.model_copy(update={"threads": threads + 1})) == 0
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    folder = Path(config.run.folder)
    lines = metrics_of(config)
    # Measured at each checkpoint, logged at every third step and at the last.
    assert [line["step"] for line in lines if "learning_rate" in line] == [3, 5]
    assert [line["step"] for line in lines if "validation_psnr" in line] == [1, 2, 3, 4, 5]
    # The two newest are kept.
    assert [path.stem for path in sorted((folder / "checkpoints").iterdir())] == [
        "step_00000004",
        "step_00000005",
    ]


def test_a_step_that_revives_tells_what_it_counted(make: Callable[..., CodecTrainConfig]) -> None:
    config = make(kind="vq", loss={"revive_every": 2})
    assert train_codec(config) == 0
    assert all(line["codebook_used"] > 0 for line in metrics_of(config))
    assert read_preview(Path(config.run.folder) / "codec") is not None


def test_the_folder_is_measured_and_loads(
    make: Callable[..., CodecTrainConfig], settings: Callable[..., CodecConfig]
) -> None:
    config = make(
        steps=30, optimizer={"learning_rate": 3e-3, "warmup_steps": 2, "decay_steps": 10, "ema_decay": 0.5}
    )
    assert train_codec(config) == 0
    folder = Path(config.run.folder)
    lines = metrics_of(config)
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert lines[-1]["validation_psnr"] > lines[1]["validation_psnr"] + 1
    rates = [line["learning_rate"] for line in lines]
    assert rates[0] == pytest.approx(1.5e-3) and rates[15] == pytest.approx(3e-3) and rates[-1] < 4e-4
    record = json.loads((folder / "codec" / "codec.json").read_text())
    assert record["losses"]["perceptual"].startswith("none") and record["images_left_out"] == 1
    trainer = CodecTrainer(config, CPU)
    images = torch.cat(list(trainer.images.in_order(8)))
    trainer.close()
    codec = open_codec(settings(folder / "codec"))
    latents = codec.encode(images)
    assert latents.mean().abs() < 1e-4 and abs(latents.std() - 1) < 1e-4
    fitted = read_preview(folder / "codec")
    assert fitted is not None and fitted.images == 11
    assert fitted.describe() in (folder / "log.txt").read_text()
    # By chance four channels would explain 2% of 176 places.
    assert fitted.explained > 0.1 and codec.preview(latents).shape == images.shape


def test_batches_depend_on_seed_and_step_alone(make: Callable[..., CodecTrainConfig]) -> None:
    trainer = CodecTrainer(make(), CPU)
    chosen = [trainer.images.batch(step, 4, seed=0, flip=True) for step in (0, 1, 2, 1)]
    assert torch.equal(chosen[1], chosen[3]) and not torch.equal(chosen[0], chosen[1])
    plain = [trainer.images.batch(step, 4, seed=0, flip=False) for step in range(3)]
    # An epoch of twelve has every image; the one that cannot be decoded is stood in for by the next.
    assert len({bytes(image.numpy()) for batch in plain for image in batch}) == 11
    turned = [
        torch.equal(*pair)
        for one, other in zip(chosen[:3], plain, strict=True)
        for pair in zip(one, other.flip(-1), strict=True)
    ]
    assert 0 < sum(turned) < 12
    trainer.close()


def test_dead_entries_come_alive() -> None:
    entry_KC, chosen_K = torch.zeros(8, 2), torch.tensor([3.0, 0, 0, 1, 0, 0, 0, 0])
    entry_KC[0] = 7.0
    encoded_NC = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    found = codebook.use(chosen_K)
    assert (found.used, found.dead) == (0.25, 6) and found.perplexity == pytest.approx(1.7548, abs=1e-3)
    dead = codebook.revive(entry_KC, chosen_K, encoded_NC, torch.Generator().manual_seed(0))
    assert dead.tolist() == [1, 2, 4, 5, 6, 7] and (entry_KC[0] == 7).all() and (entry_KC[3] == 0).all()
    assert torch.cdist(entry_KC[dead], encoded_NC).min(1).values.max() < 0.2
    assert len(entry_KC[dead].unique(dim=0)) == 6


def test_gradients_pass_the_codebook_and_weigh_as_the_paper_says() -> None:
    encoded, entries = torch.randn(1, 2, 3, 3, requires_grad=True), torch.randn(5, 2, requires_grad=True)
    found = codebook.quantise(encoded, entries)
    found.code_IChw.sum().backward(retain_graph=True)
    assert torch.equal(encoded.grad, torch.ones_like(encoded))  # type: ignore[arg-type]
    # The codebook is pulled by its own term alone, the encoder by the commitment alone.
    encoded.grad = entries.grad = None
    found.codebook_loss.backward(retain_graph=True)
    assert encoded.grad is None and entries.grad is not None
    entries.grad = None
    found.commitment_loss.backward()
    assert encoded.grad is not None and entries.grad is None


def test_discriminator_losses() -> None:
    assert discriminator_loss(torch.tensor([2.0]), torch.tensor([-3.0])) == 0
    assert discriminator_loss(torch.tensor([0.5]), torch.tensor([0.0])) == pytest.approx(0.5 * (0.5 + 1))
    weight = torch.tensor([1.0, 1.0], requires_grad=True)
    ratio = adaptive_weight((6 * weight).sum(), (2 * weight).sum(), weight)
    assert ratio == pytest.approx(3, abs=1e-3) and not ratio.requires_grad


def _torchvision_names(network: torch.nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        name: torch.rand_like(value) * 0.1 if value.is_floating_point() else value
        for name, value in network.state_dict().items()
    }


def test_features_come_from_the_weights_that_are_named(tmp_path: Path) -> None:
    state = _torchvision_names(features.VGG16())
    assert state.keys() >= {"features.0.weight", "features.28.bias"}
    save_file(state, tmp_path / "vgg.safetensors")
    one, other = torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2, 3, 32, 32) * 2 - 1
    plain = features.feature_distance("vgg16", str(tmp_path / "vgg.safetensors"))
    assert plain is not None
    assert plain(one, one).abs().max() == 0 and plain(one, other).min() > 0
    # By hand: the first layer's part of LPIPS, with its channel weights alone not zero.
    lin = {
        f"lin{k}.model.1.weight": torch.zeros(1, width, 1, 1)
        for k, width in enumerate((64, 128, 256, 512, 512))
    }
    lin["lin0.model.1.weight"] += torch.rand(1, 64, 1, 1)
    torch.save({**state, **lin}, tmp_path / "lpips.pth")
    lpips = features.feature_distance("vgg16", str(tmp_path / "lpips.pth"))
    assert lpips is not None

    def first(value: Tensor) -> Tensor:
        value = (value + 1) / 2 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
        value = value / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        for layer in (0, 2):
            value = F.relu(
                F.conv2d(value, state[f"features.{layer}.weight"], state[f"features.{layer}.bias"], padding=1)
            )
        return F.normalize(value, dim=1)

    wanted = ((first(one) - first(other)).square() * lin["lin0.model.1.weight"]).sum(1).mean((1, 2))
    torch.testing.assert_close(lpips(one, other), wanted, rtol=1e-4, atol=1e-6)


def test_moco_weights_are_read_and_others_refused(tmp_path: Path) -> None:
    state = _torchvision_names(features.ResNet50())
    assert len([name for name in state if "conv" in name]) == 49 and "layer4.2.bn3.running_var" in state
    moco = {f"module.encoder_q.{name}": value for name, value in state.items()}
    torch.save(
        {"epoch": 1, "state_dict": {**moco, "module.queue": torch.zeros(2)}}, tmp_path / "moco.pth.tar"
    )
    found = features.feature_distance("resnet50", str(tmp_path / "moco.pth.tar"))
    assert found is not None and torch.equal(found.layers.conv1.weight, state["conv1.weight"])  # type: ignore[union-attr]
    assert [each.shape[1] for each in found.layers(torch.rand(1, 3, 64, 64))] == [256, 512, 1024, 2048]
    with pytest.raises(UserError, match="is not a state dict of VGG16"):
        features.feature_distance("vgg16", str(tmp_path / "moco.pth.tar"))
    with pytest.raises(UserError, match="cannot read weights"):
        features.feature_distance("vgg16", str(tmp_path / "none.pth"))
    (tmp_path / "text.pth").write_text("weights")
    with pytest.raises(UserError, match="is not a file of weights"):
        features.feature_distance("vgg16", str(tmp_path / "text.pth"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"features.0.bias": None}, r"features\.0\.bias is missing"),
        ({"features.0.bias": torch.zeros(5)}, r"features\.0\.bias has shape \[5\] instead of \[4\]"),
        ({"features.13.bias": torch.zeros(4)}, r"features\.13\.bias is left over"),
        ({"lin0.model.1.weight": torch.zeros(1, 64, 1, 1)}, r"lin1\.model\.1\.weight is missing"),
        ({"lins.0.model.1.weight": torch.zeros(1, 64, 1, 1)}, r"lins\.0\.model\.1\.weight is left over"),
        (
            {"features.0.bias": torch.zeros(4, dtype=torch.int8)},
            r"features\.0\.bias is stored as torch\.int8",
        ),
        (
            {"features.0.bias": torch.zeros(4).to(torch.float8_e5m2)},
            r"features\.0\.bias is stored as torch\.float8",
        ),
    ],
)
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_features_of_weights_that_mean_something_else(
    tmp_path: Path, changes: dict[str, Tensor | None], told: str, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "_VGG16", (4, 0, 4, 0, 4, 0, 4, 0, 4))
    path, write = tmp_path / f"vgg.{suffix}", save_file if suffix == "safetensors" else torch.save
    state = _torchvision_names(features.VGG16()) | {"classifier.0.weight": torch.zeros(3)}
    write(state, path)
    assert features.feature_distance("vgg16", str(path)) is not None, "the head is not needed"
    write({name: each for name, each in {**state, **changes}.items() if each is not None}, path)
    with pytest.raises(UserError, match=f"is not a state dict of VGG16: {told}"):
        features.feature_distance("vgg16", str(path))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_runs_nothing_and_a_torn_one_is_refused(tmp_path: Path) -> None:
    class Running:
        def __reduce__(self) -> Any:
            return (tmp_path.joinpath("ran").touch, ())

    path = tmp_path / "vgg.pth"
    torch.save({"features.0.weight": Running()}, path)
    whole = io.BytesIO()
    torch.save({"features.0.weight": torch.zeros(2)}, whole, _use_new_zipfile_serialization=False)
    data = whole.getvalue()
    for content in (
        path.read_bytes(),
        *(data[:cut] + b"\x80" + data[cut + 1 :] for cut in range(0, len(data), 5)),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is not a"):
            features.feature_distance("vgg16", str(path))
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_that_holds_something_else(make: Callable[..., CodecTrainConfig]) -> None:
    network = make().network.as_dict() | {"attention": True}
    loss = {"adversarial": 0.5, "adversarial_from": 0}
    config = make(loss=loss, steps=1, network=network)
    assert train_codec(config) == 0
    CodecTrainer(config, CPU).close()
    path = Path(config.run.folder) / "checkpoints" / "step_00000001.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    saved = load_file(path)
    of_bias = [name for name in saved if name.endswith(("decoder.conv_out.bias", "layers.0.bias"))]
    assert len(of_bias) == 7, "weight, average and moments, of the discriminator no average"
    one = torch.zeros(1)
    cases: list[tuple[dict[str, Tensor | None], str]] = [
        *(({name: None}, f"step 1 does not fit this codec: {name} is missing") for name in of_bias),
        ({"network/weight/more": one}, "network/weight/more is left over"),
        ({"another": one}, "another is left over"),
        ({"chosen": one}, r"chosen has shape \[1\] instead of \[0\]"),
        ({"chosen": torch.zeros(0, dtype=torch.int64)}, r"is damaged \(chosen is stored as I64"),
    ]
    for changes, told in cases:
        changed = {**saved, **changes}
        save_file({name: each for name, each in changed.items() if each is not None}, path, metadata=metadata)
        with pytest.raises(UserError, match=told):
            CodecTrainer(config, CPU)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"images": {"shards": ""}}, r"images\.shards is empty"),
        ({"images": {"shards": "x.tar", "image_size": 18}}, "multiple of 4"),
        ({"loss": {"perceptual_features": "vgg16"}}, r"needs loss\.perceptual_weights"),
        ({"loss": {"identity_weights": "moco.pth"}}, r"set loss\.identity_features=resnet50"),
        ({"network": {"widths": [8], "groups": 3}}, r"multiples of network\.groups 3"),
        ({"optimiser": {}}, "did you mean optimizer"),
    ],
)
def test_settings_that_cannot_be(
    make: Callable[..., CodecTrainConfig], values: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        make(**values)
