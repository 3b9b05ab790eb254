"""What the server refuses and how it says so: errors in OpenAI's shape."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from dvi_jax.errors import UserError, one_line

INVALID = "invalid_request_error"
UNAVAILABLE = "service_unavailable_error"


class RefusedError(UserError):
    """A request that is not served: an HTTP status and the fields of OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(one_line(message))
        self.status, self.kind, self.param, self.code, self.headers = status, kind, param, code, headers

    def body(self) -> dict[str, object]:
        """`{"error": {"message", "type", "param", "code"}}`."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


def busy(message: str, retry_after: float, code: str) -> RefusedError:
    """503 with the whole seconds after which trying again is sensible."""
    return RefusedError(
        503, message, kind=UNAVAILABLE, code=code, headers={"retry-after": str(max(math.ceil(retry_after), 1))}
    )


def failed(message: str) -> RefusedError:
    """500: nothing that the client did."""
    return RefusedError(500, message, kind="server_error")


def invalid(error: ValidationError) -> RefusedError:
    """400 that names the first field at fault; what was received is not repeated."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = [str(part) for part in first["loc"]]
    if not where:
        return RefusedError(400, f"the body is not a JSON object of the documented fields: {first['msg']}")
    if where[0] == "prompt":
        where, message = where[:1], "must be a text, a list of texts, a list of token ids or a list of such lists"
    else:
        message = first["msg"]
    return RefusedError(400, f"{'.'.join(where)}: {message}", param=where[0], code=first["type"])


async def show_refusal(request: Request, error: Exception) -> JSONResponse:
    """starlette's handler for `RefusedError`."""
    assert isinstance(error, RefusedError)
    return JSONResponse(error.body(), error.status, headers=dict(error.headers or {}))


async def show_http_error(request: Request, error: Exception) -> JSONResponse:
    """The same for what starlette itself refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    refusal = RefusedError(error.status_code, f"{request.method} {request.url.path}: {error.detail}", code="no_route")
    return JSONResponse(refusal.body(), error.status_code, headers=dict(error.headers or {}))


async def show_defect(request: Request, error: Exception) -> JSONResponse:
    """The same for a defect of ours, whose traceback goes to the log and not to the client."""
    refusal = failed("the server failed on this request; its log says why")
    return JSONResponse(refusal.body(), 500, {"connection": "close"})  # which uvicorn does then, without a word
