"""The networks of diffusers: loaded whole or not at all, and made anew. The only importer of diffusers."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from transfusion.config.codec_folder import CONFIG, INDEX, STEM, WEIGHTS, read_facts, weight_files
from transfusion.config.weights_folder import stored_tensors
from transfusion.errors import UserError
from transfusion.files import remove_leftover, replace_folder, unfinished_path
from transfusion.urls import hub_copy

# Classes of diffusers, whose types are not read here.
Network = Any
CLASSES = {"kl": "AutoencoderKL", "vq": "VQModel"}


def _network_class(kind: Literal["kl", "vq"]) -> Any:
    """Raises UserError where diffusers is missing or cannot be imported."""
    try:
        import diffusers

        return getattr(diffusers, CLASSES[kind])
    except ModuleNotFoundError as error:
        raise UserError(f"codec.kind=kl and vq need diffusers ({error}); pip install diffusers") from None
    except (ImportError, RuntimeError) as error:
        # diffusers imports lazily, and wraps what goes wrong, such as a torchvision of another torch, in prose.
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"diffusers cannot be imported: {reason}; if torchvision is broken, uninstall it"
        ) from None


def load_network(folder: str | Path) -> Network:
    """The network of an autoencoder's folder, fp32, frozen, on the CPU.

    Raises UserError where a weight is missing, has another shape or type or belongs to nothing, and for settings that
    this diffusers does not know: it would fill in weights at random, and pass over settings.
    """
    facts = read_facts(folder)
    kind = _network_class(facts.kind)
    _refuse_unknown(Path(folder), kind)
    try:
        with _quiet():
            network, told = kind.from_pretrained(
                str(folder),
                local_files_only=True,
                use_safetensors=True,
                low_cpu_mem_usage=False,
                torch_dtype=torch.float32,
                output_loading_info=True,
            )
    except Exception as error:
        # Whatever a torn file or a strange config makes diffusers, safetensors and torch raise.
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"codec.folder {folder} cannot be loaded: {reason}; copy it again") from None
    for what in ("missing", "unexpected", "mismatched"):
        if names := [name if isinstance(name, str) else name[0] for name in told[f"{what}_keys"]]:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(
                f"codec.folder {folder} has {what} weights: {', '.join(sorted(names)[:3])}{more}; copy it again"
            )
    frozen: Network = network.float().eval().requires_grad_(False)
    return frozen


def _refuse_unknown(folder: Path, kind: Any) -> None:
    """Raise UserError for settings and types of numbers that diffusers would pass over."""
    import diffusers

    settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    known = inspect.signature(kind.__init__).parameters
    if unknown := sorted(name for name in settings if name not in known and not name.startswith("_")):
        raise UserError(
            f"codec.folder {folder}: {unknown[0]} in {CONFIG} is no setting of {kind.__name__} in diffusers"
            f" {diffusers.__version__}; remove it there if it changes nothing, or update diffusers"
        )
    try:
        stored_tensors(weight_files(folder), STEM)
    except ValueError as error:
        raise UserError(f"codec.folder {folder}: {error}") from None


def new_network(
    kind: Literal["kl", "vq"],
    *,
    channels: int,
    latent_channels: int,
    widths: Sequence[int],
    layers: int,
    groups: int,
    attention: bool,
    image_size: int,
    codebook_size: int = 0,
    code_width: int = 0,
) -> Network:
    """A network with weights as diffusers initialises them from torch's generator.

    Each width but the last halves the image. codebook_size, code_width: entries of the codebook of a VQModel and their
    dimensions.
    """
    settings: dict[str, Any] = {
        "in_channels": channels,
        "out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "block_out_channels": tuple(widths),
        "layers_per_block": layers,
        "latent_channels": latent_channels,
        "norm_num_groups": groups,
        "sample_size": image_size,
        "mid_block_add_attention": attention,
    }
    if kind == "vq":
        settings |= {"num_vq_embeddings": codebook_size, "vq_embed_dim": code_width}
    return _network_class(kind)(**settings)


def save_network(network: Network, folder: Path, **statistics: Any) -> None:
    """Write the folder that diffusers and `load_network` read. statistics: of the latents, into its config."""
    network.register_to_config(**statistics)
    with _quiet():
        network.save_pretrained(str(folder), safe_serialization=True)


def fetch_network(name: str, folder: Path, *, subfolder: str = "") -> None:
    """Download a published network from the hub, or take a local folder, and write it as a folder of our own.

    Raises UserError as `load_network`, where nothing can be downloaded, and where `folder` exists.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists; name another folder, or remove it")
    published = Path(name) / subfolder
    if not published.is_dir():
        files = (CONFIG, WEIGHTS, INDEX, f"{STEM}-*-of-*.safetensors")
        published = hub_copy(name, [str(Path(subfolder) / file) for file in files]) / subfolder
    network = load_network(published)
    unfinished = unfinished_path(folder)
    try:
        save_network(network, unfinished)
        replace_folder(unfinished, folder)
    finally:
        remove_leftover(unfinished)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of diffusers, which here are errors of our own or about nothing."""
    from diffusers.utils import logging as its_logging

    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    its_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        its_logging.enable_progress_bar()
