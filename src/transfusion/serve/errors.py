"""What is wrong with a request, in the shape that OpenAI's clients read."""

from __future__ import annotations

from typing import Any, ClassVar


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
        status: Of HTTP.
        kind: OpenAI's `type`.
        code: OpenAI's `code`.
        headers: Further ones of the answer.
    """

    status: ClassVar[int] = 400
    kind: ClassVar[str] = "invalid_request_error"
    code: ClassVar[str | None] = None

    def __init__(
        self, message: str, *, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.param, self.headers = param, headers or {}

    def body(self) -> dict[str, Any]:
        """As JSON."""
        return error_body(str(self), self.kind, self.param, self.code)


class UnknownModelError(ApiError):
    """The request names another model."""

    status, code = 404, "model_not_found"


class TokenError(ApiError):
    """No token, or a wrong one."""

    status, code = 401, "invalid_api_key"

    def __init__(self) -> None:
        super().__init__(
            "this server asks for its token: send it as `Authorization: Bearer TOKEN`",
            headers={"WWW-Authenticate": "Bearer"},
        )


class ForeignOriginError(ApiError):
    """A page of another host calls."""

    status, kind, code = 403, "permission_error", "foreign_origin"


class NoSuchPathError(ApiError):
    """No endpoint has this path."""

    status = 404


class MediaTypeError(ApiError):
    """The body is of another type."""

    status, code = 415, "unsupported_media_type"


class TooLargeError(ApiError):
    """The body is over the limit."""

    status, code = 413, "request_too_large"


class SlowBodyError(ApiError):
    """The body did not arrive in time."""

    status, code = 408, "request_timeout"


class OverloadedError(ApiError):
    """As many answers are under way and waiting as may be."""

    status, kind, code = 429, "rate_limit_error", "overloaded"

    def __init__(self, retry_after: int) -> None:
        super().__init__(
            f"the server has as many requests as it takes; try again in {retry_after} s",
            headers={"Retry-After": str(retry_after)},
        )


class StoppingError(ApiError):
    """The server is about to end."""

    status, kind, code = 503, "server_error", "stopping"

    def __init__(self) -> None:
        super().__init__("the server is stopping; try again in a while", headers={"Retry-After": "10"})


class ClientGoneError(ApiError):
    """Nobody is there to be answered. For the log alone, with the status that proxies use for it."""

    status, kind, code = 499, "client_error", "client_gone"

    def __init__(self) -> None:
        super().__init__("the client has gone")


class EngineFailedError(ApiError):
    """The engine failed in the middle of the answer."""

    status, kind, code = 500, "server_error", "engine_failed"

    def __init__(self) -> None:
        super().__init__("the server failed while it answered; try again")


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's shape of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
