"""Who may ask: the page itself on this machine, and no other page that the browser has open.

A page from elsewhere can send requests to an address of this machine, and by a name that it lets point here (DNS rebinding) it
could read the answers too. So the Host header must be an address or a name of this machine, and what is asked of the model, by GET
too, must come from the page itself.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from typing import Any

from whence.report.embedded import safe_json

_NAME = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]/@\s]+)(:\d{1,5})?")
POLICY = (
    "default-src 'none'; img-src data:; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


def is_loopback(host: str) -> bool:
    """Whether an address or name is reached from this machine alone."""
    address = _address(host)
    return host.lower() == "localhost" if address is None else address.is_loopback


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None


def host_allowed(header: str, bound: str) -> bool:
    """Whether a Host header names this machine.

    Args:
        header: `NAME`, or `NAME:PORT`; any port, which may be forwarded.
        bound: the address that is listened on. On loopback only loopback is allowed; else also every bare address, which no
            foreign page can have in the place of its own name, and the names of this machine.
    """
    found = _NAME.fullmatch(header.strip().lower())
    if found is None:
        return False
    name = found[1].rstrip(".")
    if is_loopback(name):
        return True
    return not is_loopback(bound) and (_address(name) is not None or name in {bound.lower(), socket.gethostname().lower()})


def refusal(method: str, path: str, headers: Any, bound: str) -> tuple[int, str] | None:
    """Return status and reason for which a request is refused; None: it is not."""
    host = headers.get("host", "")
    if len(headers.getlist("host")) != 1 or not host_allowed(host, bound):
        return 403, f"the name {host[:100]!r} is none of this machine's. Open the page by the address that whence serve printed."
    if not path.startswith("/api/"):
        return None
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    if (origin is not None and origin.lower() not in (f"http://{host.lower()}", f"https://{host.lower()}")) or (
        site is not None and site not in ("same-origin", "none")
    ):
        return 403, "another page asked this; only the page itself may."
    if method == "POST" and headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        return 415, "the body is not declared as application/json."
    return None


class Guard:
    """Refuses what may not ask, and gives every answer the headers that keep a browser to this page alone."""

    def __init__(self, app: Any, *, bound: str) -> None:
        self.app, self.bound = app, bound

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle one request."""
        from starlette.datastructures import Headers, MutableHeaders
        from starlette.responses import Response

        if scope["type"] != "http":
            return

        async def sent(message: Any) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refused = refusal(scope["method"], scope["path"], Headers(scope=scope), self.bound)
        answer = self.app
        if refused is not None:
            answer = Response(safe_json({"error": refused[1]}), status_code=refused[0], media_type="application/json")
        await answer(scope, receive, sent)
