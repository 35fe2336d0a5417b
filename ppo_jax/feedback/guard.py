"""What stands between the network and the labelling page: who may ask, from where, and how much."""

import hashlib
import hmac
import secrets
from collections.abc import Callable
from typing import Literal, NamedTuple
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ppo_jax.feedback.items import check_name

FORM = "application/x-www-form-urlencoded"
MAX_FORM = 256 * 1024
"""Bytes of a form; a comment of 10,000 characters takes at most 120,000 of them, percent-encoded."""
MAX_DRAINED = 64 * 1024 * 1024
"""Bytes of a refused form that are thrown away before the answer: a browser shows no answer to a form half sent."""
LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")
HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'self'; script-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    # Another site learns no address of ours. `no-referrer` would turn the origin of our own forms into "null" as well.
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Refusal(Exception):
    """A request that is not let in."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


class Session(NamedTuple):
    """Who sits at a browser. It lies in a cookie and nowhere else, and so outlives the server."""

    nonce: str  # random, 32 characters; only this browser knows it
    annotator: str  # "" until a name is given

    @property
    def cookie(self) -> str:
        """The value of the cookie."""
        return f"{self.nonce}.{self.annotator.encode().hex()}"

    @property
    def form_key(self) -> str:
        """What every form of this session carries, and no other site can know."""
        return hmac.new(self.nonce.encode(), self.annotator.encode(), "sha256").hexdigest()

    @classmethod
    def new(cls, annotator: str = "") -> "Session":
        """A session of its own."""
        return cls(secrets.token_urlsafe(24), annotator)

    @classmethod
    def read(cls, cookie: str) -> "Session | None":
        """The session of a cookie's value; None for what `cookie` cannot have made."""
        nonce, _, name = cookie.partition(".")
        try:
            annotator = bytes.fromhex(name).decode()
            return cls(nonce, annotator and check_name(annotator)) if len(nonce) == 32 else None
        except ValueError:  # FeedbackError and UnicodeDecodeError are among them
            return None


class Guard:
    """The outermost layer: lets in what may come in, with `scope["session"]` and, for a POST, `scope["form"]`.

    - Without a token it answers to this machine's names for itself only: a foreign name that was made to point here
      (DNS rebinding) is refused.
    - With a token, it asks for it: once in the address (`?token=...`), then in a cookie that no script can read and no
      other site can send.
    - A POST comes from a page of ours: the browser says so (`Sec-Fetch-Site`, `Origin`), and the form carries the key
      of the session.
    - No form of more than `MAX_FORM` bytes is ever held in memory.
    """

    def __init__(
        self,
        app: ASGIApp,
        token: str | None,
        error_page: Callable[[int, str], Response],
        entrance: Callable[[], Response],
    ):
        """Wraps an app.

        Args:
            app: the page.
            token: the secret, if there is one.
            error_page: (status, reason) -> response.
            entrance: the page that leads on to the start, once the token was right.
        """
        self._app, self._error_page, self._entrance = app, error_page, entrance
        self._pass = _digest(token) if token else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request, or refuses it with a page that says why."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        try:
            answer = await self._admit(Request(scope, receive))
        except Refusal as refusal:
            answer = self._error_page(refusal.status, refusal.reason)
        except ClientDisconnect:  # while the form came in
            return
        await (answer or self._app)(scope, receive, send_with_headers)

    async def _admit(self, request: Request) -> Response | None:
        name, _ = _host(request)
        if self._pass is None:
            if name not in LOOPBACK_NAMES:
                raise Refusal(421, "Without a token this page answers at http://127.0.0.1 and http://localhost only.")
        elif "token" in request.query_params or not _same(_cookie(request, "token"), self._pass):
            return self._enter(request, self._pass)
        session = Session.read(_cookie(request, "session"))
        request.scope["session"] = session
        if request.method == "POST":
            _check_source(request)
            form = request.scope["form"] = await _read_form(request)
            if session is None or not _same(form.get("key", ""), session.form_key):
                raise Refusal(403, "The form is out of date, or none of ours. Nothing was changed.")
        return None

    def _enter(self, request: Request, key: str) -> Response:
        given = request.query_params.get("token", "")
        if not _same(_digest(given), key):
            raise Refusal(401, "This page asks for its token: open the whole address that you were given, with ?token=")
        # A page that leads on, not a redirect: where the link stood on another site, the redirected request would come
        # without the cookie.
        response = self._entrance()
        set_cookie(request, response, "token", key, "strict")
        return response


def set_cookie(
    request: Request, response: Response, what: str, value: str, same_site: Literal["lax", "strict"] = "lax"
) -> None:
    """Sets a cookie that no script can read, until the browser is closed."""
    secure = request.url.scheme == "https"
    response.set_cookie(_cookie_name(request, what), value, httponly=True, secure=secure, samesite=same_site)


def _cookie(request: Request, what: str) -> str:
    return request.cookies.get(_cookie_name(request, what), "")


def _cookie_name(request: Request, what: str) -> str:
    """Of one page: the ports of a machine share their cookies, and the pages of two runs may be open at once."""
    return f"ppo_jax_{what}_{_host(request)[1]}"


def _host(request: Request) -> tuple[str, int]:
    """Name and port that the browser asked for."""
    try:
        parts = urlsplit("//" + request.headers.get("host", ""))
        return parts.hostname or "", parts.port or (443 if request.url.scheme == "https" else 80)
    except ValueError as error:
        raise Refusal(400, "The request names no host.") from error


def _digest(token: str) -> str:
    return hashlib.sha256(b"ppo_jax feedback " + token.encode("utf-8", "replace")).hexdigest()


def _same(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode("utf-8", "replace"), other.encode("utf-8", "replace"))


def _check_source(request: Request) -> None:
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    here = origin is None or origin.partition("://")[2] == request.headers.get("host")
    if site not in (None, "same-origin", "none") or not here:
        raise Refusal(403, "The form came from another site. Nothing was changed.")


async def _read_form(request: Request) -> dict[str, str]:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != FORM:
        raise Refusal(415, f"A form has to come as {FORM}.")
    declared = request.headers.get("content-length", "")
    too_large = declared.isdecimal() and int(declared) > MAX_FORM
    body, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        too_large = too_large or size > MAX_FORM
        if size > MAX_DRAINED:
            break
        if not too_large:
            body += chunk
    if too_large:
        raise Refusal(413, f"The form is larger than {MAX_FORM // 1024} KiB; a comment has at most 10,000 characters.")
    try:
        fields = parse_qs(body.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=1000)
    except ValueError as error:
        raise Refusal(400, "The form is not text in UTF-8.") from error
    return {name: values[-1] for name, values in fields.items()}
