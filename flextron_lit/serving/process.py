"""The process: a port, an engine and a web server, from the start until the last answer is given."""

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from signal import SIGINT, SIGTERM, signal

import uvicorn
from starlette.applications import Starlette

from flextron_lit.serving.engine import Engine


def bound(host: str, port: int) -> socket.socket:
    """A socket that nobody else has; it refuses clients until the server listens.

    Args:
        host: a name or a number of this machine.
        port: 0 takes one that is free.

    Raises:
        ValueError: if it cannot be had.
    """
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except (OSError, OverflowError) as error:
        found.close()
        raise ValueError(f"cannot listen on {host}:{port} ({error}); choose another --host or --port") from error
    return found


def run(app: Starlette, engine: Engine, place: socket.socket, ready: Callable[[], None], drain: int) -> None:
    """Serve until SIGTERM or Ctrl-C, then answer what is in the house and return.

    Args:
        app: the routes.
        engine: what they ask, started and ended here.
        place: where to listen.
        ready: called when clients may come.
        drain: seconds for what is in the house at the end; what takes longer is broken off.
    """
    config = uvicorn.Config(
        app, lifespan="off", log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=drain
    )
    engine.start()
    try:
        _Server(config, ready).run([place])
    finally:
        engine.close()


class _Server(uvicorn.Server):
    """Says when it listens, and takes a signal for a wish to end well: the library's own ends by the signal."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: Sequence[socket.socket] | None = None) -> None:
        await super().startup(list(sockets or ()))
        self._ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal(number, self.handle_exit) for number in (SIGTERM, SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal(number, handler)
