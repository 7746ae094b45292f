"""What a client is told when something is wrong, in the form of OpenAI's API.

The text of an error speaks of the request alone: no path, no traceback and no name of a class of this package.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Of the error object, by the status of the response.
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "server_error",
}


class ApiError(Exception):
    """An error response.

    Args:
      status: of HTTP.
      message: one or two sentences: what is wrong, what was expected.
      code: a word that programs can test.
      param: the field of the request that is meant.
      headers: of the response, such as Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The object under `error`."""
        return {
            "message": self.message,
            "type": _TYPES.get(self.status, "invalid_request_error"),
            "param": self.param,
            "code": self.code,
        }


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that cannot be understood (status 400).

    Args:
      message, param, code: as of `ApiError`.

    Returns:
      The error.
    """
    return ApiError(400, message, code, param)
