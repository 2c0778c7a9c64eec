"""The counter-based noise: normal, independent, and a function of its key alone."""

from __future__ import annotations

import torch

from transfusion.diffusion.noise import counter_normal


def test_moments_are_those_of_the_normal_distribution() -> None:
    sample = counter_normal(torch.arange(200), (5000,)).double().flatten()
    n = sample.numel()
    assert abs(sample.mean()) < 5 / n**0.5
    assert abs(sample.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((sample**3).mean()) < 5 * (15 / n) ** 0.5
    assert abs((sample**4).mean() - 3) < 5 * (96 / n) ** 0.5
    edges = torch.linspace(0, 1, 65)
    counts = torch.histogram(torch.special.ndtr(sample).float(), edges).hist
    expected = n / 64
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 63 + 5 * (2 * 63) ** 0.5


def test_keys_streams_and_elements_are_uncorrelated() -> None:
    keys = torch.arange(64)
    by_key = counter_normal(keys, (4096,))
    by_stream = torch.cat([counter_normal(keys[:1], (4096,), stream=stream) for stream in range(64)])
    by_element = by_key.T[:64, :]
    for sample in (by_key, by_stream, by_element):
        correlation = torch.corrcoef(sample) - torch.eye(len(sample))
        assert correlation.abs().max() < 5.5 / sample.shape[1] ** 0.5
    # The two halves of the Box-Muller pairs, and neighbours.
    first, second = by_key[:, :2048], by_key[:, 2048:]
    assert abs((first * second).mean()) < 5 / first.numel() ** 0.5
    assert abs((first**2 * second**2).mean() - 1) < 5 * 8 / first.numel() ** 0.5


def test_noise_depends_on_the_key_alone() -> None:
    keys = torch.tensor([7, -1, 2**62, 0, 7])
    together = counter_normal(keys, (3, 5, 5), stream=4)
    for i in range(len(keys)):
        assert torch.equal(together[i], counter_normal(keys[i : i + 1], (3, 5, 5), stream=4)[0])
    assert torch.equal(together[0], together[4])
    assert not torch.equal(together[0], together[1])
    state = torch.random.get_rng_state()
    counter_normal(keys, (3,))
    assert torch.equal(state, torch.random.get_rng_state())


def test_noise_is_the_same_for_ever() -> None:
    """Samples and resumed runs rest on these values."""
    values = counter_normal(torch.tensor([0, 1]), (2,), stream=3)
    expected = torch.tensor([[-0.9802809954, -1.1885539293], [-1.4478776455, 1.6573514938]])
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-6)


def test_every_stream_of_a_sampler_can_be_drawn() -> None:
    key = torch.tensor([5])
    drawn = [counter_normal(key, (4,), stream=stream) for stream in (0, 1, 2, 999, 1 << 20)]
    assert all(torch.isfinite(noise).all() for noise in drawn)
    assert len({tuple(noise.flatten().tolist()) for noise in drawn}) == len(drawn)
