"""The page and its JSON routes."""

from __future__ import annotations

import json
import logging
import queue
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from whence.errors import ConfigError, WhenceError
from whence.report.embedded import safe_json
from whence.runtime.packages import need
from whence.serve.answers import Answers, Question
from whence.serve.desk import Desk, StoppedError
from whence.serve.guard import Guard

MOST_BYTES = 256 * 1024
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
    from starlette.middleware import Middleware
    from starlette.routing import Route

    about = safe_json(answers.about())

    async def index(request: Any) -> Any:
        return _json(about)

    async def queries(request: Any) -> Any:
        return await _answered(desk, lambda body: answers.queries(_whole(body, "first", 0)), dict(request.query_params))

    async def query(request: Any) -> Any:
        return await _answered(desk, lambda body: answers.query(_question(body)), request)

    async def tokens(request: Any) -> Any:
        return await _answered(desk, lambda body: answers.tokens(_whole(body, "answer"), _whole(body, "row")), request)

    routes = [Route(path, _file(kind, parts)) for path, (kind, parts) in _FILES.items()]
    routes += [Route("/api/index", index), Route("/api/queries", queries)]
    routes += [Route("/api/query", query, methods=["POST"]), Route("/api/tokens", tokens, methods=["POST"])]
    return Starlette(routes=routes, middleware=[Middleware(Guard, bound=bound)])


def _file(kind: str, parts: list[Path]) -> Callable[[Any], Any]:
    from starlette.responses import Response

    content = "\n".join(part.read_text(encoding="utf-8") for part in parts)

    async def endpoint(request: Any) -> Any:
        return Response(content, media_type=kind)

    return endpoint


def _json(text: str, status: int = 200) -> Any:
    from starlette.responses import Response

    return Response(text, status_code=status, media_type="application/json")


async def _answered(desk: Desk, answer: Callable[[dict[str, Any]], dict[str, Any]], request: Any) -> Any:
    """Return what `answer` makes of a request's body (or of a dict), or what went wrong, as JSON."""
    try:
        body = request if isinstance(request, dict) else await _body(request)
        return _json(await desk.ask(lambda: safe_json(answer(body))))
    except _RefusedError as error:
        return _json(safe_json({"error": str(error)}), error.status)
    except WhenceError as error:
        return _json(safe_json({"error": str(error)}), 400)
    except queue.Full:
        return _json(safe_json({"error": "other questions are being answered; ask again in a moment."}), 503)
    except StoppedError:
        return _json(safe_json({"error": "whence serve has been stopped."}), 503)
    except Exception:  # noqa: BLE001  (whoever asked learns that it failed, the terminal why)
        _LOG.exception("a question was not answered")
        return _json(safe_json({"error": UNEXPECTED}), 500)


async def _body(request: Any) -> dict[str, Any]:
    """Return the JSON object in a request."""
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > MOST_BYTES:
            raise _RefusedError(413, f"the body has more than {MOST_BYTES:,} bytes.")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        raise _RefusedError(400, "the body is no JSON.") from None
    if not isinstance(found, dict):
        raise _RefusedError(400, "the body is no JSON object.")
    return found


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
