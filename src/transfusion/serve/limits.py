"""What one request and all requests together may take."""

from __future__ import annotations

from dataclasses import dataclass

# Previews of an image that can be asked for, as at OpenAI.
MAX_PARTIAL_IMAGES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of a server. What exceeds them is refused before it costs anything.

    Attributes:
        body_bytes: Of the body of a request.
        held_bytes: Of the bodies of all requests at a time.
        body_values: Keys, values and elements of a JSON body, about.
        body_seconds: Until a body has arrived.
        prompt_images: Images of a prompt.
        images: New images of a request.
        tokens: New text tokens of an answer.
        steps: Sampler steps of an image.
        running: Answers that are under way at a time.
        waiting: Answers that may wait for their turn. One more is refused with 429.
    """

    body_bytes: int = 32 << 20
    held_bytes: int = 512 << 20
    body_values: int = 20_000
    body_seconds: float = 60.0
    prompt_images: int = 16
    images: int = 10
    tokens: int = 4096
    steps: int = 250
    running: int = 64
    waiting: int = 64

    @property
    def answers(self) -> int:
        """How many answers there are at a time."""
        return self.running + self.waiting
