"""The page and its JSON routes."""

from __future__ import annotations

import asyncio
import json
import logging
import queue
from collections.abc import Callable, Coroutine
from dataclasses import fields
from pathlib import Path
from typing import Any

from whence.errors import ConfigError, DataError
from whence.report.embedded import safe_json
from whence.runtime.packages import need
from whence.serve.answers import Answers, Question
from whence.serve.desk import Desk, StoppedError
from whence.serve.guard import Guard

MOST_BYTES, BODY_S = 256 * 1024, 10.0
UNEXPECTED = "something unexpected went wrong; the terminal in which whence serve runs says what."
_REPORT = Path(__file__).parents[1] / "report" / "templates"
_OWN = Path(__file__).with_name("page")
_FILES = {
    "/": ("text/html", [_OWN / "index.html"]),
    "/style.css": ("text/css", [_REPORT / "style.css", _REPORT / "run.css", _OWN / "serve.css"]),
    "/script.js": ("text/javascript", [_REPORT / "parts.js", _OWN / "serve.js"]),
}
_LOG = logging.getLogger("whence.serve")


class _RefusedError(Exception):
    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def make_app(answers: Answers, desk: Desk, *, bound: str = "127.0.0.1") -> Any:
    """Return the ASGI application.

    Args:
        answers: what is asked; only within jobs of the desk.
        desk: has the jobs done.
        bound: the address that is listened on, see `whence.serve.guard`.

    Raises:
        ConfigError: the extra `serve` is not installed.
    """
    need("starlette", "a served page needs", "serve")
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.routing import Route

    about = safe_json(answers.about())

    async def index(request: Any) -> Any:
        return _json(about)

    async def queries(request: Any) -> Any:
        return await _answered(desk, lambda body: answers.queries(_whole(body, "first", 0)), request)

    async def query(request: Any) -> Any:
        return await _answered(desk, lambda body: answers.query(_question(body)), request)

    async def tokens(request: Any) -> Any:
        return await _answered(desk, lambda body: answers.tokens(_whole(body, "answer"), _whole(body, "row")), request)

    routes = [Route(path, _file(kind, parts)) for path, (kind, parts) in _FILES.items()]
    routes += [Route("/api/index", index), Route("/api/queries", queries)]
    routes += [Route("/api/query", query, methods=["POST"]), Route("/api/tokens", tokens, methods=["POST"])]
    return Starlette(routes=routes, middleware=[Middleware(Guard, bound=bound)], exception_handlers={HTTPException: _no_route})


async def _no_route(request: Any, error: Any) -> Any:
    said = {404: "there is nothing at this address.", 405: f"{request.method} is not for this address."}
    return _error(said.get(error.status_code, str(error.detail)), error.status_code, error.headers)


def _file(kind: str, parts: list[Path]) -> Callable[[Any], Any]:
    from starlette.responses import Response

    content = "\n".join(part.read_text(encoding="utf-8") for part in parts)

    async def endpoint(request: Any) -> Any:
        return Response(content, media_type=kind)

    return endpoint


def _json(text: str, status: int = 200, headers: Any = None) -> Any:
    from starlette.responses import Response

    return Response(text, status_code=status, media_type="application/json", headers=headers)


def _error(text: str, status: int, headers: Any = None) -> Any:
    return _json(safe_json({"error": text}), status, headers)


async def _answered(desk: Desk, answer: Callable[[dict[str, Any]], dict[str, Any]], request: Any) -> Any:
    """Return what `answer` makes of a request's body (or of what stands behind its path), or what went wrong, as JSON."""
    from starlette.requests import ClientDisconnect

    try:
        body = await _body(request) if request.method == "POST" else dict(request.query_params)
        return _json(await _unless_gone(request, desk.ask(lambda: safe_json(answer(body)))))
    except ClientDisconnect:
        return _json("", 499)  # nobody reads it
    except _RefusedError as error:
        return _error(str(error), error.status, {"connection": "close"})
    except (ConfigError, DataError) as error:
        return _error(str(error), 400)
    except queue.Full:
        return _error("other questions are being answered; ask again in a moment.", 503)
    except StoppedError:
        return _error("whence serve has been stopped.", 503)
    except Exception:  # noqa: BLE001  (whoever asked learns that it failed, the terminal why)
        _LOG.exception("a question was not answered")
        return _error(UNEXPECTED, 500)


async def _unless_gone(request: Any, asked: Coroutine[Any, Any, str]) -> str:
    """Return the answer, or take the question back when whoever asked closes the connection."""
    from starlette.requests import ClientDisconnect

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answer, watch = asyncio.ensure_future(asked), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({answer, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        return answer.result()
    finally:
        answer.cancel()
        watch.cancel()
        await asyncio.gather(answer, watch, return_exceptions=True)


async def _body(request: Any) -> dict[str, Any]:
    """Return the JSON object in a request."""
    try:
        content = await asyncio.wait_for(_content(request), BODY_S)
    except TimeoutError:
        raise _RefusedError(408, f"the body did not come within {BODY_S:g} seconds.") from None
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        raise _RefusedError(400, "the body is no JSON.") from None
    if not isinstance(found, dict):
        raise _RefusedError(400, "the body is no JSON object.")
    return found


async def _content(request: Any) -> bytes:
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > MOST_BYTES:
            raise _RefusedError(413, f"the body has more than {MOST_BYTES:,} bytes.")
    return bytes(content)


def _whole(body: dict[str, Any], name: str, default: int | None = None) -> int:
    value = body.get(name, default)
    value = int(value) if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 19 else value
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise ConfigError(f"{name} must be a whole number from 0.")
    return value


def _question(body: dict[str, Any]) -> Question:
    known = [field.name for field in fields(Question)]
    unknown = [name for name in body if name not in known]
    if unknown:
        raise ConfigError(f"{unknown[0][:60]!r} is not known; a question has {', '.join(known)}.")
    return Question(**body)
