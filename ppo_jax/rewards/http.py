"""A judge that is asked over HTTP: a POST for some responses at a time, again where the service stumbles."""

import dataclasses
import http.client
import json
import math
import socket
import ssl
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from ppo_jax.errors import InputError, check
from ppo_jax.rewards.host import HostReward

_LONGEST_PAUSE_S = 30.0
_MOST_BYTES = 1 << 24  # of an answer; no list of scores is as long
_SHOWN = 200  # characters of an answer in a message


@dataclasses.dataclass(frozen=True)
class HttpOptions:
    """How a service is asked.

    Raises:
        InputError: a field outside its range.
    """

    timeout_s: float = 60.0  # for the connection, and again for request and answer together
    retries: int = 4  # more tries of a request that failed; the pause before them doubles
    batch_size: int = 64  # responses in a request
    backoff_s: float = 1.0  # the first pause

    def __post_init__(self) -> None:
        """Refuses what cannot be."""
        check("reward_timeout_s", self.timeout_s, 0 < self.timeout_s < math.inf, "a number above 0")
        check("reward_retries", self.retries, self.retries >= 0, "0 or more")
        check("reward_batch_size", self.batch_size, self.batch_size >= 1, "at least 1")
        check("reward_backoff_s", self.backoff_s, 0 <= self.backoff_s < math.inf, "0 or more")


def make_http_reward(url: str, options: HttpOptions | None = None) -> HostReward:
    """A host reward that POSTs `{"prompts": [...], "completions": [...]}` and the data's other columns, each a list, as
    JSON, and reads `{"scores": [...]}`, a number for each.

    A connection that fails, an answer that is late or breaks off and a status of 5xx are tried again, after a pause
    that doubles (at most 30 s). Any other status, and an answer that is no such list, is an error at once: it would be
    the same the next time. Redirects are not followed, proxies are not used. A score is never made up: what fails in
    the end raises, and `call_reward` makes a RewardError of it.

    Args:
        url: http:// or https:// with a certificate that the system trusts.
        options: batches, timeouts, retries; None: the defaults.

    Raises:
        InputError: no such address.
    """
    service, options = _read_url(url), options or HttpOptions()

    def reward(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
        given = {"prompts": prompts, "completions": completions, **columns}
        scores: list[float] = []
        for start in range(0, len(prompts), options.batch_size):
            part = {name: list(x[start : start + options.batch_size]) for name, x in given.items()}
            answer = _ask(service, json.dumps(part, allow_nan=False).encode(), options)
            scores += _read_scores(answer, len(part["prompts"]))
        return scores

    reward.__name__ = url  # what `call_reward` calls it
    return reward


class _Service(NamedTuple):
    connection: type[http.client.HTTPConnection]
    host: str
    port: int
    target: str  # path and query


class _Failure(Exception):
    """Trying again may help."""


def _read_url(url: str) -> _Service:
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname
    except ValueError as error:
        raise InputError(f"config.reward: got {url!r}: {error}") from error
    plain = url.isascii() and url.isprintable() and " " not in url
    fits = plain and bool(host) and parts.scheme in ("http", "https") and "@" not in parts.netloc
    check("config.reward", url, fits, "http://HOST:PORT/PATH or https://, percent-encoded, without user and password")
    secure = parts.scheme == "https"
    connection = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    target = (parts.path or "/") + ("?" + parts.query if parts.query else "")
    return _Service(connection, str(host), port or (443 if secure else 80), target)


def _ask(service: _Service, body: bytes, options: HttpOptions) -> bytes:
    pause, tries = options.backoff_s, 0
    while True:
        tries += 1
        try:
            return _post(service, body, options.timeout_s)
        except _Failure as failure:
            if tries > options.retries:
                raise ConnectionError(f"{failure}; tried {tries} times" if tries > 1 else str(failure)) from failure
        threading.Event().wait(min(pause, _LONGEST_PAUSE_S))
        pause = min(2 * pause, _LONGEST_PAUSE_S)


def _post(service: _Service, body: bytes, timeout_s: float) -> bytes:
    """One request.

    Raises:
        _Failure: of a kind that may pass.
        ConnectionError: of another kind.
    """
    connection = service.connection(service.host, service.port, timeout=timeout_s)
    try:
        connection.connect()
        with _hang_up_after(connection.sock, timeout_s):
            headers = {"Content-Type": "application/json", "Accept": "application/json", "Connection": "close"}
            with suppress(BrokenPipeError):  # a service may refuse without reading all: it has answered
                connection.request("POST", service.target, body, headers)
            with connection.getresponse() as response:
                answer = response.read(_MOST_BYTES + 1)
    except ssl.SSLCertVerificationError as error:
        raise ConnectionError(str(error)) from error
    except TimeoutError as error:
        raise _Failure(f"no answer within {timeout_s:g} s") from error
    except (OSError, http.client.HTTPException) as error:
        raise _Failure(f"{type(error).__name__}: {error}") from error
    finally:
        connection.close()
    if 500 <= response.status < 600:
        raise _Failure(f"status {response.status}: {_excerpt(answer)}")
    if not 200 <= response.status < 300:
        raise ConnectionError(f"status {response.status}: {_excerpt(answer)}")
    if len(answer) > _MOST_BYTES:
        raise ValueError(f"the answer is larger than {_MOST_BYTES >> 20} MiB")
    if response.length:  # of what the header promised
        raise _Failure(f"the answer broke off {response.length} bytes before its end")
    return answer


@contextmanager
def _hang_up_after(sock: socket.socket, seconds: float) -> Iterator[None]:
    """Ends a connection that takes longer, with a TimeoutError. A socket's own timeout counts from the last byte, so
    that a service that sends one now and then would never be late.
    """
    late = threading.Event()

    def hang_up() -> None:
        late.set()
        with suppress(OSError):  # it has just ended by itself
            socket.socket.shutdown(sock, socket.SHUT_RDWR)  # TLS included: whoever waits for the socket wakes up

    timer = threading.Timer(seconds, hang_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    except (OSError, http.client.HTTPException):
        if not late.is_set():
            raise
    finally:
        timer.cancel()
    if late.is_set():  # an answer without a length seems to end where it was cut
        raise TimeoutError


def _read_scores(answer: bytes, num: int) -> list[float]:
    try:
        said = json.loads(answer)
    except ValueError as error:
        raise ValueError(f"the answer is not JSON: {_excerpt(answer)}") from error
    scores = said.get("scores") if isinstance(said, dict) else None
    if not isinstance(scores, list):
        raise ValueError(f'expected {{"scores": [...]}}, got {_excerpt(answer)}')
    if len(scores) != num:
        raise ValueError(f"got {len(scores)} scores for {num} responses")
    if any(type(score) not in (int, float) for score in scores):
        raise ValueError(f"expected numbers, got {_excerpt(answer)}")
    return scores


def _excerpt(answer: bytes) -> str:
    """The beginning of an answer, in one line and without anything that a terminal obeys."""
    text = answer[: 4 * _SHOWN].decode(errors="replace").strip()
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")
