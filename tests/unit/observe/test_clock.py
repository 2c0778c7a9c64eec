"""Spans, pauses, speed and the time left, on a clock that the test turns."""

from __future__ import annotations

import pytest

from transfusion.observe.clock import ETA_WINDOW, Clock, TimeLimit


class Hand:
    """A clock hand that moves only when told."""

    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time

    def move(self, seconds: float) -> None:
        self.time += seconds


def test_a_lap_tells_speed_and_shares() -> None:
    hand = Hand()
    clock = Clock(hand)
    for _ in range(2):
        with clock.span("data_wait"):
            hand.move(1.0)
        with clock.span("step"):
            hand.move(3.0)
        clock.step_done(tokens=100)
    interval = clock.interval()
    assert interval.seconds == pytest.approx(8.0)
    assert interval.tokens_per_second == pytest.approx(25.0)
    assert interval.shares == pytest.approx({"data_wait": 0.25, "step": 0.75})


def test_a_lap_starts_empty_and_an_empty_one_has_no_speed() -> None:
    hand = Hand()
    clock = Clock(hand)
    with clock.span("data_wait"):
        hand.move(1.0)
    clock.step_done(tokens=10)
    clock.interval()
    assert clock.interval().tokens_per_second is None
    hand.move(2.0)
    interval = clock.interval()
    assert interval.shares == {} and interval.tokens_per_second == 0


def test_pauses_count_for_nothing_also_inside_a_span_and_nested() -> None:
    hand = Hand()
    clock = Clock(hand)
    with clock.span("step"):
        hand.move(2.0)
        with clock.pause(), clock.pause():
            hand.move(100.0)
    clock.step_done(tokens=50)
    with clock.pause():
        hand.move(100.0)
    interval = clock.interval()
    assert interval.seconds == pytest.approx(2.0)
    assert interval.shares["step"] == pytest.approx(1.0)
    assert interval.tokens_per_second == pytest.approx(25.0)


def test_a_span_counts_also_when_it_fails() -> None:
    hand = Hand()
    clock = Clock(hand)
    with pytest.raises(KeyError), clock.span("step"):
        hand.move(1.0)
        raise KeyError
    assert clock.interval().shares["step"] == pytest.approx(1.0)


def test_time_left_needs_a_step_of_this_start() -> None:
    hand = Hand()
    clock = Clock(hand)
    assert clock.seconds_left(10) is None
    hand.move(2.0)
    clock.step_done(tokens=1)
    assert clock.seconds_left(10) == pytest.approx(20.0)
    assert clock.seconds_left(0) == 0.0
    assert clock.seconds_left(-3) == 0.0, "a resumed run past its end is not early"


def test_time_left_forgets_slow_first_steps() -> None:
    hand = Hand()
    clock = Clock(hand)
    hand.move(500.0)
    clock.step_done(tokens=1)
    for _ in range(ETA_WINDOW):
        hand.move(1.0)
        clock.step_done(tokens=1)
    assert clock.seconds_left(100) == pytest.approx(100.0)


def test_time_left_expects_pauses_to_go_on() -> None:
    hand = Hand()
    clock = Clock(hand)
    for _ in range(10):
        hand.move(1.0)
        clock.step_done(tokens=1)
    with clock.pause():
        hand.move(5.0)
    assert clock.seconds_left(10) == pytest.approx(15.0)


def test_a_time_limit_keeps_room_for_a_step_and_a_save() -> None:
    """100 minutes; steps of two, then a save of six: room for twice both must be left."""
    now = 0.0
    limit = TimeLimit(100.0, now=lambda: now)

    def step(minutes: float) -> None:
        nonlocal now
        limit.step_begins()
        now += 60 * minutes
        limit.step_ends()

    # Before the first save a twentieth of the limit is kept for it.
    while not limit.reached:
        step(2.0)
    assert now == 60 * 86
    limit.save_begins()
    now -= 60 * 30
    limit.save_begins()
    now += 60 * 6
    limit.save_ends()
    assert not limit.reached
    while not limit.reached:
        step(2.0)
    assert now == 60 * 84
    assert not TimeLimit(0.0, now=lambda: 1e9).reached
