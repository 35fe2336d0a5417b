"""The labelling page as an application and as a server; needs the `feedback` extra when called, not when imported."""

import concurrent.futures
import importlib
import ipaddress
import socket
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any
from urllib.parse import quote

from ppo_jax.errors import InputError, check
from ppo_jax.feedback.store import Store

MIN_TOKEN = 16  # characters; cannot be guessed over a network


def check_access(host: str, token: str | None) -> None:
    """Refuses an address that other machines reach without a token, and a token that can be guessed.

    Args:
        host: name or address to listen at.
        token: the secret, if there is one.

    Raises:
        InputError: says what to give.
    """
    if token:
        check("token", "*" * len(token), len(token) >= MIN_TOKEN, f"at least {MIN_TOKEN} characters")
    if not token and not _is_loopback(host):
        raise InputError(f"host: got {host!r}, which other machines reach; expected a token with it, or 127.0.0.1")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_installed() -> None:
    """Refuses to go on without the `feedback` extra: for callers whose work before the page takes long.

    Raises:
        InputError: says how to get it.
    """
    for module in ("ppo_jax.feedback.views", "uvicorn"):
        _extra(module)


def make_app(store: Store, *, token: str | None = None, title: str = "Feedback") -> Any:
    """The labelling page over a store, an ASGI application.

    Without a token it answers requests to 127.0.0.1 and localhost only. A reverse proxy in front of it has to pass on
    the `Host` header.

    Args:
        store: what is asked, and where answers go.
        token: demanded from everybody, once in the address (`/?token=...`), then in a cookie.
        title: stands on every page.

    Raises:
        InputError: the `feedback` extra is not installed; the token is too short.
    """
    check_access("localhost", token)
    return _extra("ppo_jax.feedback.views").build(store, token, title)


def serve(
    store: Store,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    *,
    title: str = "Feedback",
    until: Callable[[], bool] = lambda: False,
    announce: Callable[[str], None] = print,
) -> None:
    """Serves the page until `until()` or an interrupt; requests that are under way are answered.

    Args:
        store: see `make_app`.
        host: name or address to listen at; one that other machines reach needs a token.
        port: 0 for any that is free.
        token: see `make_app`.
        title: see `make_app`.
        until: asked every second, in a thread of its own.
        announce: is given the address, with the token, as soon as a browser can open it.

    Raises:
        InputError: the address cannot be listened at, or needs a token; the `feedback` extra is not installed.
        KeyboardInterrupt: after Ctrl-C.
    """
    check_access(host, token)
    app, uvicorn = make_app(store, token=token, title=title), _extra("uvicorn")
    # No access log: the first address holds the token.
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, lifespan="off", ws="none",
        timeout_graceful_shutdown=3,
    )  # fmt: skip
    stopped = threading.Event()

    def watch() -> None:
        try:
            while not stopped.wait(1.0) and not until():
                pass
        finally:
            server.should_exit = True

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            # Not earlier: an interrupt that follows the announcement has to find uvicorn's handlers in place.
            announce(_address(host, listener.getsockname()[1], token))
            self.watching = pool.submit(watch)

    server = Server(config)
    with _listen(host, port) as listener, concurrent.futures.ThreadPoolExecutor(1) as pool:
        try:
            server.run(sockets=[listener])
        finally:
            stopped.set()
    server.watching.result()


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address, family=family)
    except (OSError, OverflowError) as error:
        raise InputError(f"host, port: got {host!r}, {port}, expected ones to listen at: {error}") from error


def _address(host: str, port: int, token: str | None) -> str:
    name = socket.gethostname() if host in ("0.0.0.0", "::", "") else f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}/" + (f"?token={quote(token, safe='')}" if token else "")


def _extra(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package == "ppo_jax":
            raise
        raise InputError(
            f'the labelling page needs {package}, which is not installed: pip install -e ".[feedback]"'
        ) from error
