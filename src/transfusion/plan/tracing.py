"""Bytes of a forward and backward pass, found by running the real network on tensors that hold nothing.

Every operator runs on fake tensors, which have a shape and no values, and each storage is counted from the moment an
operator makes it until the last reference to it is gone: as in training, but for what an operator holds inside.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from transfusion.config import Config, ModalityConfig
from transfusion.families.build import build_model, family_of
from transfusion.observe.flops import ImageLoad, Workload
from transfusion.schema import Batch, BatchCounts, Kind, MediaGroup
from transfusion.sequence.layout import position_axes
from transfusion.sequence.sizes import IMAGE
from transfusion_kernels import IntervalMask

PARAMETERS, GRADIENTS, ACTIVATIONS, LOGITS = "parameters", "gradients", "activations", "logits"

# Layers of the two small networks from which a larger one is extended: every layer adds the same.
FEW_LAYERS = (2, 3)
# Operators whose time is that of their arithmetic; all others take that of the bytes they read and write.
PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "convolution", "convolution_backward")
ATTENTION = ("interval_attention", "interval_attention_backward")
# Operators that touch no values.
FREE = ("device", "_unsafe_view", "detach", "empty", "empty_like", "new_empty")
UNCOUNTED = frozenset((*PRODUCTS, *ATTENTION, *FREE))


@dataclass(frozen=True, slots=True)
class Trace:
    """What a micro-batch's forward and backward pass took. Bytes.

    peak: by kind, when all together were most, parameters and gradients being whole. working: activations and logits,
    when these two were most. traffic: read and written by operators that are no products and no attention.
    operators: how many touched values. accumulates: gradients of an earlier micro-batch were there.
    """

    peak: Counter[str]
    working: Counter[str]
    traffic: int
    operators: int
    accumulates: bool

    def extended(self, taller: Trace, layers: int) -> Trace:
        """Of `layers` more layers, where `taller` has one more."""

        def extend(a: Counter[str], b: Counter[str]) -> Counter[str]:
            return Counter({kind: a[kind] + layers * (b[kind] - a[kind]) for kind in a | b})

        return Trace(
            extend(self.peak, taller.peak),
            extend(self.working, taller.working),
            self.traffic + layers * (taller.traffic - self.traffic),
            self.operators + layers * (taller.operators - self.operators),
            self.accumulates,
        )


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of living storages by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.kind = ACTIVATIONS
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.working: Counter[str] = Counter()
        self.traffic, self.operators = 0, 0
        self._kinds: dict[int, str] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        name = func.overloadpacket.__name__
        self.operators += not func.is_view and name not in FREE
        if not func.is_view and name not in UNCOUNTED:
            read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.traffic += sum(tensor.numel() * tensor.element_size() for tensor in read + made)
        for tensor in made:
            self.count(tensor, self.kind)
        if self.live.total() > self.peak.total():
            self.peak = self.live.copy()
        working = {kind: self.live[kind] for kind in (ACTIVATIONS, LOGITS)}
        if sum(working.values()) > self.working.total():
            self.working = Counter(working)
        return result

    def count(self, tensor: Tensor, kind: str) -> None:
        """Count a tensor's storage under `kind`, unless it is counted already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._kinds:
            return
        self._kinds[key] = kind
        self.live[kind] += storage.nbytes()
        weakref.finalize(storage, self._freed, key, storage.nbytes())

    def recount_gradient(self, parameter: Tensor) -> None:
        """Count a parameter's gradient as such, in place of what it was counted under when it was made."""
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        former = self._kinds[storage._cdata]
        self._kinds[storage._cdata] = GRADIENTS
        self.live[former] -= storage.nbytes()
        self.live[GRADIENTS] += storage.nbytes()

    def set_kind(self, kind: str, *_: Any) -> None:
        """What tensors are counted under from now on."""
        self.kind = kind

    def _freed(self, key: int, size: int) -> None:
        self.live[self._kinds.pop(key)] -= size


def trace_step(
    config: Config,
    load: Workload,
    *,
    dtype: torch.dtype,
    accumulates: bool = False,
    whole: bool = False,
    on_gpu: bool = True,
) -> Trace:
    """Run one rank's micro-batch; the second one if it `accumulates`.

    whole: all layers. Otherwise two small networks tell what a layer adds; for activations and logits this is exact.
    on_gpu: norms are single operators there, and several on a CPU.
    """
    run = functools.partial(_run, config, load, dtype, accumulates, on_gpu)
    few, more = FEW_LAYERS
    if whole or config.model.layers <= more:
        return run(config.model.layers)
    return run(few).extended(run(more), config.model.layers - few)


def _run(
    config: Config, load: Workload, dtype: torch.dtype, accumulates: bool, on_gpu: bool, layers: int
) -> Trace:
    # Of the attentions that fake tensors of the CPU can take; all but the dense one hold alike.
    attention = "reference" if config.train.attention == "reference" else "cpu"
    train = config.train.model_copy(update={"attention": attention})
    model_config = config.model.model_copy(update={"layers": layers})
    config = config.model_copy(update={"model": model_config, "train": train})
    with torch.device("meta"):
        model = build_model(config).to(dtype)
    # Made before: its tables are kept for the whole process, and must hold values.
    loss = family_of(config).loss(config, None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _make_fake(model)
        if on_gpu:
            _fuse_norms(model)
        live = LiveBytes()
        for parameter in model.parameters():
            live.count(parameter, PARAMETERS)
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(live.recount_gradient)
        # What the text head makes, its gradients among it, counts as logits.
        head = model.get_submodule("lm_head")
        head.register_forward_pre_hook(functools.partial(live.set_kind, LOGITS))
        head.register_forward_hook(functools.partial(live.set_kind, ACTIVATIONS))
        with live:
            for _ in range(2 if accumulates else 1):
                live.traffic, live.operators = 0, 0
                batch = fake_batch(config, load)
                terms = loss.terms(model, batch)
                loss.combine(terms, terms.counts).backward()
    return Trace(live.peak, live.working, live.traffic, live.operators, accumulates)


def fake_batch(config: Config, load: Workload) -> Batch:
    """A batch of the shapes of `load`, to be made under FakeTensorMode."""
    rows = max(1, load.positions // config.data.sequence_length)
    row = (rows, load.positions // rows)
    return Batch(
        token_ids_BS=torch.zeros(row, dtype=torch.int64),
        modality_BS=torch.zeros(row, dtype=torch.uint8),
        position_BSA=torch.zeros(*row, position_axes(config.model.position), dtype=torch.int64),
        target_ids_BS=torch.zeros(row, dtype=torch.int64),
        text_weight_BS=torch.zeros(row),
        mask=IntervalMask(torch.zeros(row, dtype=torch.int32), torch.zeros(row, dtype=torch.int32)),
        media=tuple(_fake_group(config, each) for each in load.images),
        counts=BatchCounts(
            tokens=load.tokens,
            text_targets=load.text_targets,
            images=sum(each.real for each in load.images),
            image_elements=0,
            padding=load.positions - load.tokens,
        ),
    )


def _fake_group(config: Config, load: ImageLoad) -> MediaGroup:
    """Pixels, or the latents that an autoencoder has made of them before training."""
    images, (_, height, width) = load.carried, load.shape
    patches = load.patches(config.model.patch_size)
    kind: Kind = "pixels" if config.codec.kind == "pixels" else config.codec.makes
    types = {"pixels": torch.uint8, "latents": torch.float32, "tokens": torch.int32}
    shape = (images, height, width) if kind == "tokens" else (images, *load.shape)
    if load.modality != IMAGE:
        modality = next(each for each in config.modalities if each.name == load.modality)
        kind, shape = "latents", (images, modality.channels, *_values(modality, height, width))
    return MediaGroup(
        modality=load.modality,
        kind=kind,
        values=torch.zeros(shape, dtype=types[kind]),
        image_weight_I=torch.zeros(images),
        patch_slot_IP=torch.zeros(images, patches, dtype=torch.int64),
        timestep_I=torch.zeros(images, dtype=torch.int64),
        noise_key_I=torch.zeros(images, dtype=torch.int64),
        is_empty=not load.real,
    )


def _values(modality: ModalityConfig, rows: int, columns: int) -> tuple[int, int]:
    """Height and width of an array of so many patches."""
    height, width = modality.block
    return rows * height, columns * width


def _make_fake(model: nn.Module) -> None:
    """Replace the parameters, which are on the meta device, by fake ones of the CPU."""
    # A parameter of several modules stays one.
    fakes: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in fakes:
                made = torch.empty(parameter.shape, dtype=parameter.dtype)
                fakes[parameter] = nn.Parameter(made, requires_grad=parameter.requires_grad)
            setattr(module, name, fakes[parameter])


class _OneOperatorNorm(torch.autograd.Function):
    """What RMSNorm keeps, reads and writes on a GPU, where torch runs it as one operator; the values mean nothing."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        grad_x = grad + x
        return torch.empty_like(weight), grad_x


def _fuse_norms(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            module.forward = functools.partial(_OneOperatorNorm.apply, module.weight)  # type: ignore[method-assign]
