"""What small autoencoders give back of 64 px images that they never saw, beside a PCA; trained where there is none.

    .venv/bin/python benchmarks/codec.py --data DIR [--runs runs] [--components 512] [--out FILE]

DIR holds train/*.tar and val/*.tar, shards of images. Each config of configs/codec is trained into RUNS/NAME by
`transfusion codec train` where that folder has no finished codec: about half an hour a codec, on one core. PSNR is the
mean of the validation images' own. The PCA is fitted to the training images. On every validation image the latents,
tokens and images of diffusers, loaded from the saved folder, must be ours, value for value. Writes FILE, and beside
it an image for each codec. Exits with 3 when the KL codec misses the bar or anything differs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limits import find_device, record_head, write_json
from transfusion.codec import open_codec
from transfusion.codec_train.images import ImageSet
from transfusion.codec_train.measure import psnr
from transfusion.codec_train.report import write_report
from transfusion.config import CodecConfig
from transfusion.config.checking import check_as
from transfusion.config.codec_folder import completed, read_facts, trained_size

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "codec.json"
CONFIGS = ("emoji-kl", "emoji-vq")
BAR_DECIBELS, BAR_CPU_MINUTES = 26.0, 2 * 40.0
AT_ONCE = 32


def trained(name: str, data: Path, runs: Path) -> Path:
    """The folder of the config's codec, trained or trained further if it is not there."""
    folder = runs / name / "codec"
    if not folder.is_dir():
        command = [sys.executable, "-m", "transfusion", "codec", "train", f"{ROOT}/configs/codec/{name}.yaml"]
        command += [f"images.shards={data}/train/*.tar", f"images.validation={data}/val/*.tar"]
        subprocess.run([*command, f"run.dir={runs / name}"], check=True)
    return folder


def settings(folder: Path) -> CodecConfig:
    """The section `codec` of a configuration that names the folder."""
    problems: list[str] = []
    values = {
        "kind": read_facts(folder).kind,
        "folder": str(folder),
        "image_size": trained_size(folder),
    }
    return check_as(CodecConfig, completed(values, problems), problems=problems, where=str(folder))


@torch.no_grad()
def equal_to_diffusers(codec: CodecConfig, images: ImageSet) -> dict[str, bool]:
    """Whether diffusers makes the same latents (or tokens) and images from the same folder, bit for bit."""
    import diffusers

    found = {"encoded": True, "images": True}
    if codec.kind == "vq":
        tokens = open_codec(codec)
        theirs = diffusers.VQModel.from_pretrained(codec.folder, low_cpu_mem_usage=False).requires_grad_(
            False
        )
    else:
        latents = open_codec(codec)
        theirs = diffusers.AutoencoderKL.from_pretrained(
            codec.folder, low_cpu_mem_usage=False
        ).requires_grad_(False)
    for values_ICHW in images.in_order(AT_ONCE):
        real_ICHW = values_ICHW.float() / 127.5 - 1
        if codec.kind == "vq":
            mine = tokens.encode(values_ICHW)
            wanted = theirs.quantize(theirs.encode(real_ICHW).latents)[2][2].view_as(mine)
            code = theirs.quantize.get_codebook_entry(
                wanted.flatten(), (*wanted.shape, theirs.config.vq_embed_dim)
            )
            made, sample = tokens.decode(mine), theirs.decode(code, force_not_quantize=True).sample
        else:
            mine = latents.encode(values_ICHW)
            factor, shift = theirs.config.scaling_factor, theirs.config.shift_factor or 0.0
            wanted = (theirs.encode(real_ICHW).latent_dist.mode() - shift) * factor
            made, sample = latents.decode(mine), theirs.decode(wanted / factor + shift).sample
        found["encoded"] &= torch.equal(mine, wanted)
        found["images"] &= torch.equal(made, ((sample + 1) * 127.5).round().clamp(0, 255).byte())
    return found


def pca_psnr(training: ImageSet, validation: ImageSet, components: int) -> float:
    """Mean PSNR of validation images through the first components of the training images, in dB."""
    known_NF = torch.cat(list(training.in_order(AT_ONCE))).flatten(1).float()
    mean_F = known_NF.mean(0)
    torch.manual_seed(0)
    # Randomised, with components to spare, so that those kept are as good as exact.
    _, _, basis_FK = torch.pca_lowrank(
        known_NF - mean_F, q=min(components + 64, *known_NF.shape), center=False
    )
    basis_FK = basis_FK[:, :components]
    found: list[Tensor] = []
    for values_ICHW in validation.in_order(AT_ONCE):
        flat_IF = values_ICHW.flatten(1).float() - mean_F
        made_IF = (flat_IF @ basis_FK @ basis_FK.T + mean_F).round().clamp(0, 255)
        found.append(psnr(made_IF.view_as(values_ICHW), values_ICHW))
    return torch.cat(found).mean().item()


def measure_codec(name: str, folder: Path, validation: Sequence[str], image: Path) -> dict[str, Any]:
    """The figures of one codec; its images as `image`."""
    codec = settings(folder)
    with tempfile.TemporaryDirectory() as scratch:
        found = write_report(codec, validation, Path(scratch) / name)
        image.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(scratch) / f"{name}.png", image)
    images = ImageSet(validation, channels=codec.channels, image_size=codec.image_size)
    same = equal_to_diffusers(codec, images)
    images.close()
    record = json.loads((folder / "codec.json").read_text(encoding="utf-8"))
    made = record["environment"]
    return {
        **asdict(found),
        "equal_to_diffusers": same,
        "latents_an_image": list(codec.latent_shape(codec.image_size, codec.image_size)),
        "trained": {name: record[name] for name in ("step", "cpu_seconds", "parameters", "losses")}
        | {name: made[name] for name in ("time", "cpu", "packages")},
        "fingerprint": codec.fingerprint,
    }


def verdict(found: dict[str, Any]) -> dict[str, bool]:
    """Each bar by name. Of a codec that was not asked for there is none."""
    bars = {
        f"{name} equals diffusers": all(each["equal_to_diffusers"].values()) for name, each in found.items()
    }
    if "emoji-kl" in found:
        kl = found["emoji-kl"]
        bars[f"PSNR of at least {BAR_DECIBELS:g} dB"] = kl["psnr"] >= BAR_DECIBELS
        bars["40 minutes on two cores"] = kl["trained"]["cpu_seconds"] <= 60 * BAR_CPU_MINUTES
    return bars


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with train/*.tar and val/*.tar")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the run folders")
    parser.add_argument("--configs", default=",".join(CONFIGS), help="names in configs/codec")
    parser.add_argument("--components", type=int, default=512, help="of the PCA")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file")
    given = parser.parse_args()
    record: dict[str, Any] = {"environment": record_head(find_device("cpu"))}
    record["environment"]["command"] = "python benchmarks/codec.py --data DIR"
    validation = [f"{given.data}/val/*.tar"]
    codecs = record["codecs"] = {}
    for name in given.configs.split(","):
        folder = trained(name, given.data, given.runs)
        codecs[name] = measure_codec(
            name, folder, validation, given.out.with_name(f"{given.out.stem}-{name}.png")
        )
    size = {"channels": 3, "image_size": trained_size(folder), "workers": 2}
    sets = [ImageSet(shards, **size) for shards in ([f"{given.data}/train/*.tar"], validation)]
    record["pca"] = {"components": given.components, "psnr": pca_psnr(*sets, given.components)}
    for each in sets:
        each.close()
    record["bars"] = verdict(codecs)
    write_json(record, given.out)
    for name, found in codecs.items():
        cost = f"{found['trained']['step']} steps, {found['trained']['cpu_seconds'] / 60:.0f} CPU minutes"
        print(f"{name:12} {found['psnr']:.2f} dB, SSIM {found['ssim']:.4f}, {found['images']} images; {cost}")
    print(f"{'PCA':12} {record['pca']['psnr']:.2f} dB, {given.components} components")
    for bar, reached in record["bars"].items():
        print(f"{'reached' if reached else 'MISSED':12} {bar}")
    return 0 if all(record["bars"].values()) else 3


if __name__ == "__main__":
    sys.exit(main())
