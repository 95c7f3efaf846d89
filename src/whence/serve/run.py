"""The server: a socket, a thread for the network, and the main thread for the model."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

from whence.errors import ConfigError
from whence.runtime.packages import need
from whence.serve.answers import Answers, Question
from whence.serve.app import make_app
from whence.serve.desk import Desk


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """Give a socket that listens on an address, before anything long begins; whoever connects early waits.

    Raises:
        ConfigError: the extra `serve` is not installed, the port is taken or not allowed, or the address is none of this machine's.
    """
    need("uvicorn", "a served page needs", "serve")
    need("starlette", "a served page needs", "serve")
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError, OverflowError) as error:
        raise ConfigError(f"--host {host}: {getattr(error, 'strerror', None) or error}. Give an address of this machine.") from error
    with socket.socket(family, kind, protocol) as bound:
        # Elsewhere this would let two programs have one port.
        if hasattr(socket, "AF_UNIX"):
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind(address)
            bound.listen()  # two programs can bind the same port, but not both listen on it
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"--port {port}: {host} cannot be listened on: {reason}. Give another --port; 0 takes a free one.") from error
        yield bound


def url_of(bound: socket.socket) -> str:
    """Return the address of the page on a bound socket."""
    host, port = bound.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def serve(answers: Answers, bound: socket.socket, *, host: str, ready: Callable[[str], None]) -> None:
    """Serve the page until Ctrl-C.

    The index is asked once first, so that one of another model is refused here and not on the page.

    Args:
        answers: what is asked.
        bound: of `listening`.
        host: the address that was asked for, see `whence.serve.guard`.
        ready: called with the page's address, once it can be opened.

    Raises:
        KeyboardInterrupt: Ctrl-C. ConfigError: the server did not start, or ended by itself. Others as of `Answers.query`.
    """
    import uvicorn

    if len(answers.recipe.queries):
        answers.query(Question(query=0, k=1, exact=bool(answers.rescore)))
    desk = Desk()
    app = make_app(answers, desk, bound=host)
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        proxy_headers=False,
        server_header=False,
        limit_concurrency=64,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, name="whence-serve", daemon=True)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            thread.join(0.02)
        if not server.started:
            raise ConfigError(f"{url_of(bound)} could not be served; what went wrong stands above. Give another --port.")
        ready(url_of(bound))
        desk.work(thread.is_alive)
        raise ConfigError(f"the server of {url_of(bound)} ended by itself; what went wrong stands above. Start it again.")
    finally:
        desk.close()
        server.should_exit = True
        thread.join(3)
