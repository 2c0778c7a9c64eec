"""A plan as a person reads it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from transfusion.observe.progress import duration
from transfusion.plan.advice import suggest_speedups, to_fit
from transfusion.plan.machines import GIB, MIB
from transfusion.plan.prediction import Plan

MEANINGS = {
    "exact": "visible pairs, real tokens",
    "hardware": "with padding and recomputation",
    "palm": "6N + 12 LDS a position, as PaLM counts",
}
# Communication that is waited for longer than this share of a step is warned of.
MUCH_WAITING = 0.1


def report(plan: Plan) -> str:
    """The whole plan, warnings last."""
    return "\n".join([*_figures(plan), *(f"warning: {text}" for text in warnings(plan))])


def warnings(plan: Plan) -> list[str]:
    """What will not work, each with the setting that fixes it."""
    found = plan.config.warnings()
    if not plan.fits:
        lacking = f"{gib(plan.memory.total)} of tensors do not fit into the {gib(plan.gpu.usable)} of a {plan.gpu.name}"
        advice = to_fit(plan)
        remedy = "no setting that was tried makes it fit: take a larger GPU or a smaller model"
        if advice:
            remedy = f"set {advice}: {gib(advice.plan.memory.total)}, {advice.plan.tokens_per_second:,.0f} tokens/s"
        return [*found, f"{lacking}; {remedy}"]
    best = next(iter(suggest_speedups(plan)), None)
    gain = f"{best.plan.tokens_per_second / plan.tokens_per_second:.2f}x as fast" if best else ""
    share = plan.seconds.exposed / plan.seconds.total
    if share > MUCH_WAITING:
        remedy = (
            f"set {best}: {gain}" if best else "more rows per micro-batch, or fewer GPUs, would wait less"
        )
        found.append(f"{share:.0%} of a step waits for communication; {remedy}")
    elif best:
        found.append(f"{best} would be {gain} and fits ({gib(best.plan.memory.total)})")
    return found


def gib(size: float) -> str:
    """A size as a person reads it."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / MIB:.0f} MiB"


def _figures(plan: Plan) -> Iterator[str]:
    config, division, network = plan.config, plan.division, plan.network
    documents, media = plan.document_mix, config.media_sizes.modalities
    yield f"{config.run.name} on {division.gpus} {plan.gpu.name}: a prediction, not a measurement"
    pairs = f"pairs with {' or '.join(media)}, as many of each size" if len(media) > 1 else "pairs"
    yield (
        f"assumed: {documents.pair_share:.0%} of the tokens in {pairs} (captions of {documents.caption_tokens} tokens),"
        f" texts of {documents.text_tokens}"
    )
    yield ""
    assumed = ", which is assumed: there is no tokenizer yet" if plan.assumes_vocabulary else ""
    vocabulary = f"with a vocabulary of {config.model.vocabulary:,}{assumed}"
    yield _row("parameters", f"{network.elements:,}, {vocabulary}")
    for name, count in network.parts.items():
        yield _row(f"  {name}", f"{count:,}  {count / network.elements:.2%}")
    yield ""
    yield _row("a step", f"{plan.tokens_of_step:,} tokens in {config.data.global_batch_size} rows")
    yield _row("  a GPU", f"{division.micro_batches} micro-batches of {division.micro_batch_size} rows")
    for name, meaning in MEANINGS.items():
        part = getattr(plan.work, name)
        share = f"{part.attention / part.total:.1%} attention"
        yield _row(f"  FLOPs, {name}", f"{plan.operations(name):.4g}  {share}; {meaning}")
    yield ""
    for field in fields(plan.memory):
        yield _row(f"memory, {field.name}", gib(getattr(plan.memory, field.name)))
    yield _row("memory, all on a GPU", f"{gib(plan.memory.total)} of {gib(plan.gpu.usable)} usable")
    yield ""
    yield from _communication(plan)
    seconds = plan.seconds
    parts = ", ".join(
        f"{field.name} {getattr(seconds, field.name) / seconds.total:.0%}" for field in fields(seconds)
    )
    yield _row("a step takes", f"{seconds.total:.3f} s: {parts}")
    yield _row(
        "tokens a second",
        f"{plan.tokens_per_second:,.0f}, {plan.tokens_per_second / division.gpus:,.0f} a GPU",
    )
    shares = [(name, plan.share_of_peak(convention)) for name, convention in _SHARES]
    yield _row("of the peak", ", ".join(f"{name} {share:.1%}" for name, share in shares))
    yield _row(
        "to the end",
        f"{config.train.steps:,} steps, {duration(plan.hours * 3600)}, {plan.gpu_hours:,.0f} GPU-hours",
    )


_SHARES = (("MFU (exact mask)", "exact"), ("HFU", "hardware"), ("MFU (PaLM)", "palm"))


def _communication(plan: Plan) -> Iterator[str]:
    sent = plan.communication
    if not sent.reduced:
        return
    yield _row(
        "communication",
        f"a micro-batch gathers {gib(sent.gathered)} and reduces {gib(sent.reduced)} in {sent.calls} calls,"
        f" {sent.seconds_of_micro_batch:.3f} s",
    )
    if sent.exchanged:
        yield _row(
            "  between layers",
            f"{gib(sent.exchanged)} of heads and positions, {sent.seconds_between_layers:.3f} s",
        )
    if sent.seconds_of_step:
        yield _row("  once a step", f"{gib(sent.after_step)} gathered, {sent.seconds_of_step:.3f} s")


def _row(name: str, value: str) -> str:
    return f"{name:<22}{value}"
