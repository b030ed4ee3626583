"""What a client is told of a request that is not answered, in the form of OpenAI's API."""

from typing import Any

KINDS = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 413: "request_too_large"}
KINDS |= {429: "rate_limit_error", 500: "server_error", 503: "service_unavailable"}


class RequestError(Exception):
    """A request that is refused.

    Args:
        status: of HTTP.
        message: for people, with what to do.
        code: for programs, where the API has one.
        param: the field of the request that it is about.
    """

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def to_json(self) -> dict[str, Any]:
        """The body of the response."""
        kind = KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
