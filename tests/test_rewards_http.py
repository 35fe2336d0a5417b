"""A reward service that is asked over HTTP, against real servers on this machine that fail, hang and lie."""

import contextlib
import json
import shutil
import socket
import ssl
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from ppo_jax.errors import InputError
from ppo_jax.rewards import HttpOptions, RewardError, call_reward, http, load_host_reward, load_reward

PROMPTS, ANSWERS = ["the cat", "a dog", "the film"], [" sat", " was good", ""]
NO_COLUMNS = [{}, {}, {}]
FAST = dict(backoff_s=0.01, timeout_s=5.0)


class Service:
    """A server that answers each request by the next of `script`, and by the last one when they run out.

    An entry is a function of the request's JSON to (status, bytes), or of the handler, which then does all by itself.
    """

    def __init__(self, port: int = 0):
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                service.requests.append(json.loads(body))
                service.headers.append(dict(self.headers))
                service.paths.append(self.path)
                act = service.script[min(len(service.requests), len(service.script)) - 1]
                if getattr(act, "raw", False):
                    # The client may be gone by then.
                    with contextlib.suppress(OSError):
                        act(self)
                    self.close_connection = True
                    return
                status, answer = act(service.requests[-1])
                self.send_response(status)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def do_GET(self):
                service.requests.append("GET")
                self.send_error(405)

            def log_message(self, *_):
                pass

        self.requests, self.headers, self.paths, self.script = [], [], [], [judge]
        self.released = threading.Event()  # what hangs, hangs until then
        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.handle_error = lambda *_: None
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/score"

    def close(self):
        self.released.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def service():
    service = Service()
    yield service
    service.close()


def judge(given) -> tuple[int, bytes]:
    """The number of letters of each response."""
    return 200, json.dumps({"scores": [len(text) for text in given["completions"]]}).encode()


def says(status: int, text: str):
    return lambda given: (status, text.encode())


def raw(act):
    act.raw = True
    return act


def ask(service, prompts=PROMPTS, answers=ANSWERS, columns=NO_COLUMNS, **options) -> list[float]:
    reward = load_host_reward(service.url, HttpOptions(**(FAST | options)))
    return call_reward(reward, prompts, answers, columns).tolist()


def refused(service, **options) -> str:
    with pytest.raises(RewardError) as error:
        ask(service, **options)
    text = str(error.value)
    assert text.startswith(f"reward {service.url}: "), text
    assert text.endswith("; prompts: 'the cat', 'a dog', 'the film'"), text
    assert text.isprintable()
    assert len(text) < 700
    return text


# What is sent, and what comes back


def test_texts_and_columns_are_sent_and_the_scores_are_read(service):
    columns = [{"label": 1, "tag": "ü\n"}, {"label": None}, {"label": [1.5, {"a": True}]}]
    assert ask(service, columns=columns) == [4, 9, 0]
    assert service.requests == [
        {
            "prompts": PROMPTS,
            "completions": ANSWERS,
            "label": [1, None, [1.5, {"a": True}]],
            "tag": ["ü\n", None, None],
        }
    ]
    assert service.headers[0]["Content-Type"] == "application/json"
    assert service.paths == ["/score"]


def test_any_text_arrives_as_it_is(service, rng):
    """Also what is no Unicode text by itself: half a pair."""
    texts = ["".join(chr(c) for c in rng.integers(1, 0x3000, 50)) for _ in range(3)] + ["\ud800 half", "\U0001f600", ""]
    ask(service, texts, texts[::-1], [{}] * 6)
    assert (service.requests[0]["prompts"], service.requests[0]["completions"]) == (texts, texts[::-1])


@pytest.mark.parametrize(("num", "size", "sizes"), [(7, 3, [3, 3, 1]), (6, 3, [3, 3]), (2, 64, [2]), (3, 1, [1] * 3)])
def test_many_are_sent_in_parts_and_keep_their_order(service, rng, num, size, sizes):
    answers = ["x" * int(n) for n in rng.integers(0, 100, num)]
    columns = [{"number": i} for i in range(num)]
    assert ask(service, [f"p{i}" for i in range(num)], answers, columns, batch_size=size) == list(map(len, answers))
    assert [len(given["prompts"]) for given in service.requests] == sizes
    assert [i for given in service.requests for i in given["number"]] == list(range(num))


def test_nothing_is_asked_for_nothing(service):
    assert ask(service, [], [], []) == []
    assert service.requests == []


def test_an_address_may_have_a_query_and_no_path(service):
    service.url = service.url.removesuffix("/score")
    ask(service)
    service.url += "?model=a%2Cb"
    ask(service)
    assert service.paths == ["/", "/?model=a%2Cb"]


def test_it_is_one_of_several_judges(service):
    judges = load_reward(f"vader*2,{service.url}*-0.5", tokenizer=None, http=HttpOptions(**FAST))
    scores = judges.judge(PROMPTS, ANSWERS, NO_COLUMNS, None)
    # VADER's "good" is 0.4404 (see test_rewards.py); lengths are 4, 9, 0.
    np.testing.assert_allclose(scores.total, [-2, 2 * 0.4404 - 4.5, 0], atol=1e-6)
    assert scores.parts[judges.names[1]].tolist() == [4, 9, 0]
    assert judges.names[1] == service.url.removeprefix("http://").replace(":", "_").replace("/", "_")


# What is tried again


@pytest.mark.parametrize("status", [500, 502, 503, 504, 599])
def test_a_service_that_stumbles_is_asked_again(service, status):
    service.script = [says(status, "no"), says(status, "no"), judge]
    assert ask(service) == [4, 9, 0]
    assert len(service.requests) == 3
    assert service.requests[0] == service.requests[2]


def test_only_the_part_that_failed_is_asked_again(service):
    service.script = [judge, says(500, "no"), judge]
    assert ask(service, batch_size=2) == [4, 9, 0]
    assert [given["prompts"] for given in service.requests] == [PROMPTS[:2], PROMPTS[2:], PROMPTS[2:]]


def test_a_service_that_stays_down_is_an_error_in_the_end(service):
    service.script = [says(503, "busy \x1b[31m\nline two")]
    assert "ConnectionError: status 503: 'busy \\x1b[31m\\nline two'; tried 3 times; " in refused(service, retries=2)
    assert len(service.requests) == 3
    service.requests.clear()
    assert "status 503" in (told := refused(service, retries=0))
    assert "tried" not in told
    assert len(service.requests) == 1


def test_the_pauses_double_up_to_half_a_minute(service, monkeypatch):
    pauses = []

    class Clock(threading.Event):
        def wait(self, timeout=None):
            pauses.append(timeout)

    def post(*_):
        raise http._Failure("no")

    monkeypatch.setattr(http, "_post", post)
    monkeypatch.setattr(http.threading, "Event", Clock)
    refused(service, retries=8, backoff_s=0.5)
    assert pauses == [0.5, 1, 2, 4, 8, 16, 30, 30]


def broken_off(handler):
    """Fewer bytes than were promised; what there is would be a complete answer."""
    answer = judge({"completions": ANSWERS})[1]
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(answer) + 7))
    handler.end_headers()
    handler.wfile.write(answer)


def broken_chunks(handler):
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b'5\r\n{"sco\r\n')


def hangs_up(handler):
    handler.connection.shutdown(socket.SHUT_RDWR)


def resets(handler):
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    handler.connection.close()


def speaks_otherwise(handler):
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n")


def endless_header(handler):
    handler.wfile.write(b"HTTP/1.0 200 OK\r\nX: " + b"x" * (1 << 17))


BROKEN = {
    "broken off": (broken_off, "the answer broke off 7 bytes before its end"),
    "broken chunks": (broken_chunks, "IncompleteRead"),
    "hangs up": (hangs_up, "RemoteDisconnected"),
    "resets": (resets, "Connection"),
    "another protocol": (speaks_otherwise, "BadStatusLine"),
    "endless header": (endless_header, "LineTooLong"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_connection_that_breaks_is_tried_again(service, name):
    act, told = BROKEN[name]
    service.script = [raw(act), judge]
    assert ask(service) == [4, 9, 0]
    service.script = [raw(act)]
    service.requests.clear()
    assert told in refused(service, retries=1)
    assert len(service.requests) == 2


@pytest.fixture
def empty_port() -> int:
    """Where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_nobody_there(empty_port):
    reward = load_host_reward(f"http://127.0.0.1:{empty_port}", HttpOptions(**FAST, retries=1))
    with pytest.raises(RewardError, match=r"ConnectionError: ConnectionRefusedError: .*; tried 2 times; prompts: "):
        call_reward(reward, PROMPTS, ANSWERS, NO_COLUMNS)


def test_a_service_that_comes_up_late_is_waited_for(empty_port):
    """As when both are started at once."""
    services = []
    timer = threading.Timer(0.2, lambda: services.append(Service(empty_port)))
    timer.start()
    reward = load_host_reward(f"http://127.0.0.1:{empty_port}", HttpOptions(**FAST, retries=12))
    try:
        assert reward(PROMPTS, ANSWERS) == [4, 9, 0]
    finally:
        timer.join()
        services[0].close()


# What is late


def hangs(service):
    return raw(lambda handler: service.released.wait(20))


def drips(service, start: bytes, drop: bytes):
    """A byte now and then, so that a timeout between two of them never comes."""

    def act(handler):
        handler.wfile.write(start)
        while not service.released.wait(0.05):
            handler.wfile.write(drop)

    return raw(act)


LATE = {
    "silent": hangs,
    "drips a body": lambda service: drips(service, b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b" "),
    "drips without a length": lambda service: drips(service, b'HTTP/1.0 200 OK\r\n\r\n{"scores": [1, 2, 3]}', b" "),
    "drips chunks": lambda service: drips(
        service, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"
    ),
    "drips headers": lambda service: drips(service, b"HTTP/1.1 200 OK\r\n", b"x"),
    "always goes on": lambda service: drips(service, b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
}


@pytest.mark.parametrize("name", LATE)
def test_a_late_answer_is_given_up_on_time_and_asked_for_again(service, name):
    late = LATE[name](service)
    service.script = [late, judge]
    began = time.monotonic()
    assert ask(service, timeout_s=0.4) == [4, 9, 0]
    assert 0.4 <= time.monotonic() - began < 3
    service.script = [late]
    service.requests.clear()
    assert "ConnectionError: no answer within 0.4 s; tried 2 times; " in refused(service, timeout_s=0.4, retries=1)
    assert len(service.requests) == 2


def test_no_thread_stays_behind(service):
    service.script = [says(500, "no"), judge]
    ask(service, timeout_s=30)
    deadline = time.monotonic() + 5
    while any(isinstance(thread, threading.Timer) for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


# What is refused at once


@pytest.mark.parametrize("status", [300, 301, 302, 307, 400, 401, 404, 413, 422, 429, 600])
def test_a_request_that_is_wrong_is_not_repeated(service, status):
    service.script = [says(status, '{"error": "no such model"}'), judge]
    assert f"""ConnectionError: status {status}: '{{"error": "no such model"}}'; prompts""" in refused(service)
    assert len(service.requests) == 1


def test_a_redirect_is_not_followed(service):
    @raw
    def elsewhere(handler):
        handler.send_response(302)
        handler.send_header("Location", service.url)
        handler.end_headers()

    service.script = [elsewhere, judge]
    assert "status 302" in refused(service)
    assert len(service.requests) == 1


def test_a_refusal_before_the_request_was_read_is_heard():
    """A service may say 413 to the header alone, and hang up while the body still comes."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            peer, _ = server.accept()
            with peer:
                peer.recv(100)
                peer.sendall(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 3\r\n\r\nbig")
                peer.shutdown(socket.SHUT_WR)
                time.sleep(0.5)

        thread = threading.Thread(target=answer)
        thread.start()
        reward = load_host_reward(f"http://127.0.0.1:{server.getsockname()[1]}", HttpOptions(**FAST, retries=0))
        with pytest.raises(ConnectionError, match="status 413: 'big'"):
            reward(["x" * 30_000_000], [""])
        thread.join()


LIES = {
    "nothing": ("", "ValueError: the answer is not JSON: ''"),
    "a page": ("<html>good</html>", "ValueError: the answer is not JSON: '<html>good</html>'"),
    "half": ('{"scores": [1, 2', "ValueError: the answer is not JSON"),
    "deep": ("[" * 100_000, "RecursionError: "),
    "a list": ("[1, 2, 3]", """ValueError: expected {"scores": [...]}, got '[1, 2, 3]'"""),
    "a number": ("0", """ValueError: expected {"scores": [...]}, got '0'"""),
    "null": ("null", """ValueError: expected {"scores": [...]}, got 'null'"""),
    "another name": ('{"rewards": [1, 2, 3]}', 'expected {"scores": [...]}, got'),
    "no list": ('{"scores": {"0": 1, "1": 2, "2": 3}}', 'expected {"scores": [...]}, got'),
    "a string": ('{"scores": "123"}', 'expected {"scores": [...]}, got'),
    "too few": ('{"scores": [1, 2]}', "ValueError: got 2 scores for 3 responses"),
    "too many": ('{"scores": [1, 2, 3, 4]}', "ValueError: got 4 scores for 3 responses"),
    "none": ('{"scores": []}', "ValueError: got 0 scores for 3 responses"),
    "strings": ('{"scores": ["1", "2", "3"]}', "ValueError: expected numbers, got"),
    "nulls": ('{"scores": [1, null, 3]}', "ValueError: expected numbers, got"),
    "truths": ('{"scores": [true, false, true]}', "ValueError: expected numbers, got"),
    "nested": ('{"scores": [[1], [2], [3]]}', "ValueError: expected numbers, got"),
    "no text": ("\udcff\udcfe", "ValueError: the answer is not JSON"),
    "long digits": ('{"scores": [1, 2, %s]}' % ("9" * 10_000), "ValueError: the answer is not JSON"),
    "huge": ('{"scores": [1, 2, %s]}' % ("9" * 1_000), "OverflowError: "),
}


@pytest.mark.parametrize("name", LIES)
def test_an_answer_that_is_no_list_of_numbers_is_refused_and_never_a_score(service, name):
    answer, told = LIES[name]
    service.script = [lambda given: (200, answer.encode(errors="surrogateescape")), judge]
    assert told in refused(service)
    assert len(service.requests) == 1


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "1e39"])
def test_a_score_that_is_not_finite_is_refused_with_its_prompt(service, number):
    service.script = [says(200, f'{{"scores": [1, {number}, 0]}}')]
    with pytest.raises(RewardError, match=r"for 1 of 3 responses, expected finite numbers; prompts: 'a dog'$"):
        ask(service)


def test_parts_that_lie_do_not_make_up_for_each_other(service):
    """Three scores for three responses, of which two were sent in the one request and one in the other."""
    service.script = [says(200, '{"scores": [1]}'), says(200, '{"scores": [1, 2]}')]
    assert "got 1 scores for 2 responses" in refused(service, batch_size=2)


@pytest.mark.parametrize("length", [True, False], ids=["told", "untold"])
def test_an_answer_without_end_is_not_read_to_its_end(service, length, monkeypatch):
    monkeypatch.setattr(http, "_MOST_BYTES", 1 << 20)
    sent = []

    @raw
    def floods(handler):
        handler.send_response(200)
        if length:
            handler.send_header("Content-Length", str(1 << 40))
        handler.end_headers()
        for _ in range(10_000):
            handler.wfile.write(b" " * (1 << 16))
            sent.append(1 << 16)

    service.script = [floods]
    assert "ValueError: the answer is larger than 1 MiB" in refused(service)
    assert len(service.requests) == 1
    assert sum(sent) < 100 << 20


def test_what_is_no_json_is_not_sent(service):
    for value, told in ((float("nan"), "ValueError: "), (b"bytes", "TypeError: ")):
        assert told in refused(service, columns=[{"label": value}] * 3)
    assert service.requests == []


def test_an_interrupt_is_not_tried_again(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(http, "_post", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call_reward(load_host_reward("http://127.0.0.1:1"), PROMPTS, ANSWERS, NO_COLUMNS)


@pytest.fixture
def tls(service, tmp_path):
    """The service behind TLS; the file of its certificate, which it signed itself."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl, for a certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    options = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test -addext"
    names = "subjectAltName=IP:127.0.0.1"
    command = ["openssl", "req", "-x509", *options.split(), names, "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    service.server.socket = context.wrap_socket(service.server.socket, server_side=True)
    service.url = service.url.replace("http://", "https://")
    return certificate


def test_a_certificate_that_nobody_trusts_is_refused_at_once(service, tls):
    """The service at the other end could be anybody."""
    assert "CERTIFICATE_VERIFY_FAILED" in (told := refused(service))
    assert "tried" not in told
    assert service.requests == []


def test_an_encrypted_service_whose_certificate_is_trusted(service, tls, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(tls))
    assert ask(service) == [4, 9, 0]
    for late in (hangs(service), LATE["drips a body"](service)):
        service.script = [late, judge]
        service.requests.clear()
        assert ask(service, timeout_s=0.4) == [4, 9, 0]
        assert len(service.requests) == 2


# Options and addresses


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("timeout_s", 0.0),
        ("timeout_s", -1.0),
        ("timeout_s", float("nan")),
        ("timeout_s", float("inf")),
        ("retries", -1),
        ("batch_size", 0),
        ("backoff_s", -0.1),
        ("backoff_s", float("inf")),
    ],
)
def test_an_option_out_of_range_is_refused(name, value):
    with pytest.raises(InputError, match=f"^reward_{name}: got {value}, expected "):
        HttpOptions(**{name: value})


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http:///score",
        "http://:8000/",
        "http://host:port/",
        "http://host:99999/",
        "http://user:secret@host/",
        "http://host/a b",
        "http://host/\r\nX: 1",
        "http://höst/",
        "http://[::1/",
        "https://",
    ],
)
def test_what_is_no_address_is_refused_before_the_start(url):
    for load in (load_host_reward, lambda spec: load_reward(spec, tokenizer=None)):
        with pytest.raises(InputError, match=r"^config\.reward: got ") as error:
            load(url)
        assert "\n" not in str(error.value)


def test_an_address_of_the_sixth_version(service):
    """Its colons are not a port's."""
    try:
        server = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("this machine has no IPv6")
    with server:
        reached = threading.Thread(target=lambda: server.accept()[0].close())
        reached.start()
        url = f"http://[::1]:{server.getsockname()[1]}/score"
        with pytest.raises(ConnectionError, match=r"RemoteDisconnected|ConnectionResetError"):
            load_host_reward(url, HttpOptions(retries=0, timeout_s=5))(["a"], ["b"])
        reached.join()
    assert http._read_url("http://[::1]/x")[1:] == ("::1", 80, "/x")
    assert http._read_url("https://h/x#part")[1:] == ("h", 443, "/x")
