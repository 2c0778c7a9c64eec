"""CUDA graphs of a tick, as far as no GPU is needed: fixed shapes, the same answers, and nothing that waits."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import pytest
import torch
from tests.unit.generate.test_engine import assert_same, random_request, run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from transfusion.generate import Pipeline
from transfusion.inference import captured
from transfusion.inference.cache import PagedCache
from transfusion.inference.captured import MOST_GRAPHS, WARM_UPS, Call, CapturedCalls
from transfusion.inference.image_diffusion import predict
from transfusion.inference.runner import ModelRunner
from transfusion.model import Transfusion
from transfusion.sequence.sizes import Size

Build = Callable[..., Pipeline]


def record(function: Call, inputs: tuple[Tensor, ...]) -> Call:
    """What a CUDA graph does: it reads the inputs where they were, and its result is written over by the next."""
    kept = [input.clone() for input in inputs]
    output = function(*kept)

    def launch(*inputs: Tensor) -> Tensor:
        for place, input in zip(kept, inputs, strict=True):
            place.copy_(input)
        output.copy_(function(*kept))
        return output.clone()

    return launch


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> list[Hashable]:
    """Caches of the engine have captured calls. The names of those that were recorded."""
    found: list[Hashable] = []

    class Named(CapturedCalls):
        def __call__(self, name: Hashable, function: Call, *inputs: Tensor) -> Tensor:
            before = len(self._recorded)
            result = super().__call__(name, function, *inputs)
            found.extend([name] * (len(self._recorded) - before))
            return result

    def cache(runner: ModelRunner, pages: int) -> PagedCache:
        made = PagedCache(runner.model.config.layers, pages, runner.device)
        made.captured = Named(record)
        return made

    monkeypatch.setattr(ModelRunner, "cache", cache)
    monkeypatch.setattr(captured, "WARM_UPS", 0)
    return found


@pytest.mark.parametrize("fields", [{}, {"position": "2d", "image_sizes": ["8x8", "8x16"]}])
def test_answers_are_those_of_plain_calls(
    build_pipeline: Build, make_image: Any, fields: Any, request: pytest.FixtureRequest
) -> None:
    draw = random.Random(5)
    pipeline = build_pipeline(image=2.0, end=2.0, **fields)
    requests = [random_request(draw, make_image) for _ in range(9)]
    plain = [run(pipeline.engine(), [one])[0] for one in requests]
    recorded = request.getfixturevalue("names")
    for mine, theirs in zip(run(pipeline.engine(most_requests=5), requests), plain, strict=True):
        assert_same(mine, theirs)
    assert "tokens" in recorded and any(isinstance(name, tuple) and name[0] == "image" for name in recorded)


class _Fixed(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold: tensors of the host, and values that the host waits for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        assert name not in ("aten::lift_fresh", "aten::_local_scalar_dense", "aten::nonzero"), name
        devices = {
            x.device.type for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)
        }
        assert devices <= {"meta"}, f"{name} on {devices}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "fields",
    [
        {"patch_position": "none"},
        {"patch_position": "sincos", "position": "2d"},
        {"patch_position": "learned", "patch_embed": "unet"},
    ],
)
def test_recorded_calls_wait_for_nothing(build_pipeline: Build, fields: Any) -> None:
    pipeline, meta = build_pipeline(), torch.device("meta")
    config = pipeline.config.model_copy(update={"model": pipeline.config.model.model_copy(update=fields)})
    with meta:
        model = Transfusion(config.model, config.codec)
    runner = ModelRunner(model, config, meta, pipeline.runner.codec)
    cache = runner.cache(40)
    seen: list[Hashable] = []

    def under_rule(name: Hashable, function: Call, *inputs: Tensor) -> Tensor:
        function(*inputs)  # the memory of the cache is made
        with _Fixed():
            seen.append(name)
            return function(*inputs)

    cache.captured = under_rule  # type: ignore[assignment]
    view, size = cache.view([cache.row(40) for _ in range(3)]), runner.sizes.first
    with torch.no_grad():
        assert len(runner.read_tokens(view, [5, 6, 7])) == 3
        latents = torch.empty(2, *runner.latent_shape(size), device=meta)
        two = torch.empty(2, device=meta)
        assert predict(runner, view, latents, two, size, [1]).shape == (3, *latents.shape[1:])
    assert seen == ["tokens", ("image", size, (1,))] and view.lengths == [1, 1, 1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_answers_of_cuda_graphs(build_pipeline: Build, make_image: Any) -> None:
    draw = random.Random(5)
    made = build_pipeline(image=2.0, end=2.0)
    pipeline = Pipeline(made.runner.model.cuda(), made.tokenizer, made.config, "cuda", captures=True)
    requests = [random_request(draw, make_image) for _ in range(9)]
    engine = pipeline.engine(most_requests=5)
    graphs = run(engine, requests)
    calls = engine.cache.captured
    assert calls is not None and calls._recorded and not calls._fails
    pipeline.runner.captures = False
    for mine, theirs in zip(graphs, run(pipeline.engine(most_requests=5), requests), strict=True):
        assert_same(mine, theirs)


def test_shapes_are_few(build_pipeline: Build, names: list[Hashable]) -> None:
    """Rows up to the next power of two, and pages, so that a long answer is a graph or two."""
    runner, shapes = build_pipeline().runner, set()
    cache = runner.cache(400)
    calls = cache.captured

    def noted(name: Hashable, function: Call, *inputs: Tensor) -> Tensor:
        assert calls is not None
        shapes.add(tuple(tuple(input.shape) for input in inputs))
        return calls(name, function, *inputs)

    cache.captured = noted  # type: ignore[assignment]
    with torch.no_grad():
        for rows in range(1, 6):
            view = cache.view([cache.row(16 * rows) for _ in range(rows)])
            for _ in range(3):
                runner.read_tokens(view, [5] * rows)
    assert shapes == {((rows, 1), (rows, 17)) for rows in (1, 2, 4, 8)}


def test_a_shape_is_recorded_when_it_comes_again() -> None:
    recorded: list[tuple[Size, ...]] = []

    def noting(function: Call, inputs: tuple[Tensor, ...]) -> Call:
        recorded.append(tuple(tuple(input.shape) for input in inputs))  # type: ignore[arg-type]
        return record(function, inputs)

    calls = CapturedCalls(noting)
    for number in range(WARM_UPS + 2):
        for size in (1, 2):
            x = torch.full((size,), float(number))
            assert calls("double", lambda x: 2 * x, x).tolist() == [2.0 * number] * size
        assert recorded == ([] if number < WARM_UPS else [((1,),), ((2,),)])


def test_what_cannot_be_recorded_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(function: Call, inputs: Sequence[Tensor]) -> Call:
        raise RuntimeError("operation not permitted when stream is capturing")

    calls = CapturedCalls(fails)
    x = torch.ones(1)
    for _ in range(WARM_UPS):
        calls("double", lambda x: 2 * x, x)
    with pytest.warns(UserWarning, match="launched one by one: operation not permitted"):
        assert calls("double", lambda x: 2 * x, x) == 2
    for _ in range(WARM_UPS + 1):  # and it is not tried again
        assert calls("treble", lambda x: 3 * x, x) == 3


def test_the_graph_that_was_not_used_for_longest_gives_way() -> None:
    recorded: list[int] = []

    def noting(function: Call, inputs: tuple[Tensor, ...]) -> Call:
        recorded.append(len(inputs[0]))
        return record(function, inputs)

    calls = CapturedCalls(noting)
    for size in range(MOST_GRAPHS + 1):
        for again in [0] * (size > 0) + [size] * (WARM_UPS + 1):
            assert len(calls("double", lambda x: 2 * x, torch.ones(again))) == again
    assert recorded == list(range(MOST_GRAPHS + 1)) and len(calls._recorded) == MOST_GRAPHS
    calls("double", lambda x: 2 * x, torch.ones(0))
    assert len(recorded) == MOST_GRAPHS + 1
    calls("double", lambda x: 2 * x, torch.ones(1))
    assert recorded[-1] == 1
