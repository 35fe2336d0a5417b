"""The labelling page over HTTP, as a browser without JavaScript sees it, and as those see it who mean it harm.

A real server on a real socket; tests/browser drives a real browser.
"""

import asyncio
import http.client
import json
import re
import socket
import subprocess
import sys
import threading
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, urlencode

import pytest
import uvicorn
from starlette.responses import PlainTextResponse

from ppo_jax.errors import InputError
from ppo_jax.feedback import page
from ppo_jax.feedback.formats import export
from ppo_jax.feedback.guard import MAX_FORM, Guard, Session
from ppo_jax.feedback.store import Item, Store

TOKEN = "correct horse battery/staple?&"
FORM = "application/x-www-form-urlencoded"
HOSTILE = "\n<script>alert(1)</script>\n</div></form><img src=x onerror=alert(2)> {{ 7*7 }} & \"quoted\" 'text'"


class Seen(HTMLParser):
    """What a page shows: headings, texts of the item in their order, and forms with their fields."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.forms, self.texts, self.open = [], [], [], 0
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        if tag == "form":
            self.forms.append({"action": attrs["action"], "fields": {}})
        elif tag == "input" and attrs.get("type") == "hidden":
            self.forms[-1]["fields"][attrs["name"]] = attrs["value"]
        elif tag == "div" and attrs.get("class", "").split()[:1] == ["text"]:
            self.texts.append("")
            self.open = 1

    def handle_data(self, data):
        if self.open:
            self.texts[-1] += data

    def handle_endtag(self, tag):
        self.open = 0

    def form(self, action: str) -> dict[str, str]:
        """The hidden fields of the form whose address begins so."""
        (fields,) = [form["fields"] for form in self.forms if form["action"].startswith(action)]
        return dict(fields)

    def item(self) -> str:
        """The address that takes the judgement."""
        (action,) = [form["action"] for form in self.forms if form["action"].startswith("/judge/")]
        return action


class Answer(NamedTuple):
    """What came back."""

    status: int
    headers: http.client.HTTPMessage
    text: str

    @property
    def seen(self) -> Seen:
        return Seen(self.text)


class Visitor:
    """A browser without JavaScript: keeps cookies, says where a form comes from."""

    def __init__(self, port: int):
        self.port, self.cookies = port, {}
        self.origin = f"http://127.0.0.1:{port}"

    def ask(self, method, path, body=None, **headers) -> Answer:
        """One request; `headers` with `_` for `-`, None leaves a usual one out."""
        usual = {"Host": f"127.0.0.1:{self.port}", "Cookie": "; ".join(f"{k}={v}" for k, v in self.cookies.items())}
        if method == "POST":
            usual |= {"Content-Type": FORM, "Origin": self.origin, "Sec-Fetch-Site": "same-origin"}
        usual |= {name.replace("_", "-").title(): value for name, value in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request(method, path, body, {name: value for name, value in usual.items() if value is not None})
        response = connection.getresponse()
        answer = Answer(response.status, response.headers, response.read().decode())
        connection.close()
        for cookie in answer.headers.get_all("Set-Cookie", []):
            name, _, value = cookie.partition(";")[0].partition("=")
            self.cookies[name] = value
        return answer

    def get(self, path, **headers) -> Answer:
        return self.ask("GET", path, **headers)

    def post(self, path, form, **headers) -> Answer:
        return self.ask("POST", path, urlencode(form), **headers)

    def begin(self, name: str) -> Answer:
        """Gives a name, and looks at the first item."""
        fields = self.get("/").seen.form("/start")
        answer = self.post("/start", fields | {"name": name})
        assert (answer.status, answer.headers["Location"]) == (303, "/judge")
        return self.get("/judge")

    def judge(self, shown: Answer, /, **fields) -> Answer:
        """Fills the form of a page that was shown, and sends it."""
        return self.post(shown.seen.item(), shown.seen.form("/judge/") | fields)


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "feedback.db") as store:
        yield store


@pytest.fixture
def serve():
    """Serves the page of a store on a port of its own; gives a function that makes visitors."""
    servers = []

    def start(store, **options):
        config = uvicorn.Config(page.make_app(store, **options), log_level="critical", lifespan="off")
        server, listener = uvicorn.Server(config), socket.create_server(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="event loop")
        thread.start()
        servers.append((server, thread))
        return lambda: Visitor(listener.getsockname()[1])

    yield start
    for server, thread in servers:
        server.should_exit = True
        thread.join()


def pairs(count: int) -> list[Item]:
    return [Item("compare", f"prompt {i}", (f"first {i}", f"second {i}")) for i in range(count)]


def ranks_by_text(store: Store) -> list[dict[str, int]]:
    """Of each judgement that counts, which response has which rank."""
    return [dict(zip(one.item.responses, one.ranks, strict=True)) for one in store.judgements()]


# What people do


@pytest.mark.parametrize(
    ("choice", "ranks", "both_bad"), [("1", (1, 2), False), ("2", (2, 1), False), ("tie", (1, 1), False),
                                      ("bad", (1, 1), True)]
)  # fmt: skip
def test_a_comparison_is_what_was_pressed(store, serve, choice, ranks, both_bad):
    store.add_items(pairs(6))
    anna = serve(store)()
    shown = anna.begin("Anna")
    expected = []
    for number in range(6):
        prompt, *responses = shown.seen.texts
        assert prompt == f"prompt {number}"
        expected.append(dict(zip(responses, ranks, strict=True)))
        answer = anna.judge(shown, choice=choice, comment=f" {number} ")
        assert (answer.status, answer.headers["Location"]) == (303, "/judge")
        shown = anna.get("/judge")
    assert ranks_by_text(store) == expected
    for number, judgement in enumerate(store.judgements()):
        assert (judgement.annotator, judgement.both_bad) == ("Anna", both_bad)
        assert judgement.comment == f" {number} "
        # The order that is recorded is the one that was shown.
        assert [judgement.item.responses[i] for i in judgement.order] == list(expected[number])
    assert "Nothing left for you" in shown.text


def test_a_ranking_is_what_was_selected(store, serve, rng):
    store.add_items([Item("rank", "prompt", ("a", "b", "c", "d", "e"))])
    anna = serve(store)()
    shown = anna.begin("Anna")
    ranks = rng.integers(1, 6, 5).tolist()
    answer = anna.judge(shown, **{f"rank_{place}": rank for place, rank in enumerate(ranks, start=1)})
    assert answer.status == 303
    # Dense: 1 is the best that was given, without gaps.
    dense = [sorted(set(ranks)).index(rank) + 1 for rank in ranks]
    assert ranks_by_text(store) == [dict(zip(shown.seen.texts[1:], dense, strict=True))]


def test_a_score_is_the_button(store, serve):
    store.add_items([Item("score", f"prompt {i}", ("text",), scale=3) for i in range(3)])
    anna = serve(store)()
    shown = anna.begin("Anna")
    for score in (3, 1, 2):
        assert re.findall(r'name="score" value="(\d+)"', shown.text) == ["1", "2", "3"]
        anna.judge(shown, score=score)
        shown = anna.get("/judge")
    assert [judgement.score for judgement in store.judgements()] == [3, 1, 2]


def test_all_bad_needs_no_ranks(store, serve):
    store.add_items([Item("rank", "prompt", ("a", "b", "c"))])
    anna = serve(store)()
    anna.judge(anna.begin("Anna"), choice="bad", rank_1="", rank_2="2", rank_3="")
    (judgement,) = store.judgements()
    assert (judgement.ranks, judgement.both_bad) == ((1, 1, 1), True)


@pytest.mark.parametrize(
    ("item", "fields"),
    [
        (Item("rank", "p", ("a", "b", "c")), {"rank_1": "2", "rank_2": "", "rank_3": "1"}),
        (Item("rank", "p", ("a", "b", "c")), {"rank_1": "2", "rank_2": "1"}),
        (Item("rank", "p", ("a", "b", "c")), {"rank_1": "2", "rank_2": "1.5", "rank_3": "-1"}),
        (Item("rank", "p", ("a", "b", "c")), {"rank_1": "9" * 5000, "rank_2": "1", "rank_3": "1"}),
        (Item("rank", "p", ("a", "b", "c")), {"choice": "1"}),
        (Item("compare", "p", ("a", "b")), {}),
        (Item("compare", "p", ("a", "b")), {"choice": "3"}),
        (Item("compare", "p", ("a", "b")), {"score": "1"}),
        (Item("score", "p", ("a",), scale=5), {"score": "6"}),
        (Item("score", "p", ("a",), scale=5), {"score": "0"}),
        (Item("score", "p", ("a",), scale=5), {"score": "five"}),
        (Item("score", "p", ("a",), scale=5), {"choice": "bad"}),
    ],
)  # fmt: skip
def test_half_a_judgement_is_shown_again_with_what_was_typed(store, serve, item, fields):
    store.add_items([item])
    anna = serve(store)()
    shown = anna.begin("Anna")
    again = anna.judge(shown, comment="\nwhy & <how>", **fields)
    assert again.status == 422
    assert 'role="alert"' in again.text
    assert again.text.count("<form ") == shown.text.count("<form ")
    assert "\nwhy &amp; &lt;how&gt;</textarea>" in again.text
    assert again.seen.texts == shown.seen.texts
    assert again.seen.form("/judge/") == shown.seen.form("/judge/")
    if item.kind == "rank" and fields.get("rank_1") == "2":
        assert "<option selected>2</option>" in again.text
    assert store.judgements() == []


def test_a_reload_shows_the_same_item_in_the_same_order(store, serve):
    store.add_items([Item("rank", f"prompt {i}", tuple("abcdefgh")) for i in range(3)])
    anna = serve(store)()
    shown = anna.begin("Anna")
    for again in (anna.get("/judge"), anna.get("/judge")):
        assert again.seen.texts == shown.seen.texts
        assert again.seen.form("/judge/") == shown.seen.form("/judge/")


def test_two_submissions_of_one_judgement_count_once(store, serve):
    store.add_items(pairs(3))
    anna = serve(store)()
    shown = anna.begin("Anna")
    first = anna.judge(shown, choice="1")
    second = anna.judge(shown, choice="2")  # even when it says something else
    assert (first.status, first.headers["Location"]) == (second.status, second.headers["Location"]) == (303, "/judge")
    assert ranks_by_text(store) == [dict(zip(shown.seen.texts[1:], (1, 2), strict=True))]
    assert anna.get("/judge").seen.texts[0] == "prompt 1"


def test_a_double_click_at_the_same_moment_counts_once(store, serve):
    store.add_items(pairs(2))
    anna = serve(store)()
    shown = anna.begin("Anna")
    answers, start = [], threading.Barrier(8)

    def press():
        start.wait()
        answers.append(anna.judge(shown, choice="1").status)

    threads = [threading.Thread(target=press) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert answers == [303] * 8
    assert len(store.judgements(include_undone=True)) == 1


def test_undo_brings_the_item_back_and_a_second_press_undoes_no_more(store, serve):
    store.add_items(pairs(3))
    anna = serve(store)()
    shown = anna.begin("Anna")
    assert 'action="/undo"' not in shown.text
    orders = []
    for _ in range(2):
        orders.append(shown.seen.texts)
        anna.judge(shown, choice="1")
        shown = anna.get("/judge")
    undo = shown.seen.form("/undo")
    for _ in range(2):
        answer = anna.post("/undo", undo)
        assert (answer.status, answer.headers["Location"]) == (303, "/judge")
    again = anna.get("/judge")
    assert again.seen.texts == orders[1]  # in the same order
    assert len(store.judgements()) == 1
    anna.judge(again, choice="tie")
    assert [set(ranks.values()) for ranks in ranks_by_text(store)] == [{1, 2}, {1}]
    assert len(store.judgements(include_undone=True)) == 3
    for broken in ("", "x", "999999"):
        anna.post("/undo", undo | {"judgement": broken})
    assert len(store.judgements()) == 2


def test_annotators_do_not_see_each_others_items_unless_they_overlap(store, serve):
    store.add_items(pairs(2))
    visitor = serve(store)
    anna, ben = visitor(), visitor()
    first, second = anna.begin("Anna"), ben.begin("Ben")
    assert {first.seen.texts[0], second.seen.texts[0]} == {"prompt 0", "prompt 1"}
    anna.judge(first, choice="1")
    waiting = anna.get("/judge")
    assert "Nothing left for you" in waiting.text
    assert "waits for others" in waiting.text
    store.set_overlap(1.0, 2)
    assert anna.get("/judge").seen.texts[0] == second.seen.texts[0]
    ben.judge(second, choice="1")
    assert ben.get("/judge").seen.texts[0] == first.seen.texts[0]


def test_progress_is_told(store, serve):
    store.add_items(pairs(3))
    anna = serve(store)()
    anna.judge(anna.begin("Anna"), choice="1")
    shown = anna.get("/judge")
    assert "You have judged 1, 2 left for you. Everybody: 1 of 3." in shown.text
    assert '<progress max="3" value="1"' in shown.text


def test_names_are_kept_as_they_are_meant(store, serve):
    store.add_items(pairs(3))
    visitor = serve(store)
    for typed, kept in {
        "  Anna   Müller ": "Anna Müller",
        "李　雷": "李 雷",
        "<b>&amp;": "<b>&amp;",
        "e\u0301": "é",
    }.items():
        shown = visitor().begin(typed)
        assert f"<strong>{kept.replace('&', '&amp;').replace('<', '&lt;').replace('>', '&gt;')}</strong>" in shown.text


@pytest.mark.parametrize("name", ["", "   ", "x" * 101, "a\x00b", "a\u202eb", "\x1b[31m", "\u200b", "\ud800"])
def test_odd_names_are_refused(store, serve, name):
    anna = serve(store)()
    fields = anna.get("/").seen.form("/start")
    answer = anna.ask("POST", "/start", urlencode(fields | {"name": name}, errors="surrogatepass"))
    assert answer.status == (400 if name == "\ud800" else 422)
    assert 'role="alert"' in answer.text
    assert anna.get("/judge").headers["Location"] == "/"


def test_without_a_name_everything_leads_to_the_start(store, serve):
    store.add_items(pairs(1))
    anna = serve(store)()
    assert anna.get("/judge").headers["Location"] == "/"
    fields = anna.get("/").seen.form("/start")
    for path in ("/judge/1", "/undo"):
        answer = anna.post(path, fields)
        assert (answer.status, answer.headers["Location"]) == (303, "/")


def test_a_restarted_server_goes_on_with_open_pages(tmp_path, serve):
    with Store(tmp_path / "feedback.db") as store:
        store.add_items(pairs(2))
        anna = serve(store)()
        shown = anna.begin("Anna")
    with Store(tmp_path / "feedback.db") as store:
        later = serve(store)()
        later.cookies = {re.sub(r"\d+$", str(later.port), name): value for name, value in anna.cookies.items()}
        assert later.judge(shown, choice="2").status == 303
        assert ranks_by_text(store) == [dict(zip(shown.seen.texts[1:], (2, 1), strict=True))]


def test_pages_of_two_runs_on_one_machine_keep_apart(store, serve):
    one, other = serve(store)(), serve(store)()
    one.begin("Anna")
    other.cookies = dict(one.cookies)  # a browser sends the cookies of all ports
    other.begin("Ben")
    one.cookies = dict(other.cookies)
    assert "<strong>Anna</strong>" in one.get("/judge").text


# Downloads


def test_agreement_is_shown(store, serve):
    store.add_items(pairs(4))
    store.set_overlap(0.5, 2)
    visitor = serve(store)
    anna, ben = visitor(), visitor()
    shown = anna.begin("Anna")
    assert "Nothing has been judged by more than one" in anna.get("/agreement").text
    # Of the item's two sides Anna always prefers the first; Ben says so once and "tie" once. All four are judged by
    # Anna, the two of the overlap by Ben as well: half of them equal. Kappa: p_o = 1/2, p_e = 1 * 1/2, so 0.
    # Alpha over the values F F F T: D_o is 2 of 4, D_e is 2 * 3 of 4 * 3 ordered pairs, so 1 - (1/2) / (1/2) = 0.
    while "/judge/" in shown.text:
        anna.judge(shown, choice=shown.seen.texts.index("first" + shown.seen.texts[0].removeprefix("prompt")))
        shown = anna.get("/judge")
    shown = ben.begin("Ben")
    ben.judge(shown, choice=shown.seen.texts.index("first" + shown.seen.texts[0].removeprefix("prompt")))
    ben.judge(ben.get("/judge"), choice="tie")
    cells = re.findall(r"<td>(.*?)</td>", ben.get("/agreement").text)
    assert cells == ["2", "4", "Anna, Ben", "50.0 %", "0.000", "0.000 (nominal)"]


def test_exports_are_the_judgements(store, serve):
    store.add_items([*pairs(4), Item("score", "p", ("x",), scale=5), Item("rank", "p", ("a", "b", "c"))])
    store.set_overlap(1.0, 2)
    visitor = serve(store)
    for name in ("Anna", "Ben"):
        person = visitor()
        shown = person.begin(name)
        while "/judge/" in shown.text:
            score, ranks = {"score": "4"}, {"rank_1": "1", "rank_2": "2", "rank_3": "2"}
            fields = {1: score, 2: {"choice": "1"}, 3: ranks}[len(shown.seen.texts) - 1]
            assert person.judge(shown, **fields).status == 303
            shown = person.get("/judge")
    listed = re.findall(r'<a href="(/export/\w+\.jsonl)" download>', person.get("/export").text)
    assert {*listed} == {f"/export/{kind}.jsonl" for kind in ("pairs", "rankings", "choices", "scores")}
    for path in listed:
        answer = person.get(path)
        kind = re.findall(r"\w+", path)[1]
        assert answer.headers["Content-Disposition"] == f'attachment; filename="{kind}.jsonl"'
        rows = [json.loads(line) for line in answer.text.splitlines()]
        assert rows == json.loads(json.dumps(export(store, kind)))
        assert rows
    assert person.get("/export/secrets.jsonl").status == 404
    assert person.get("/export/../feedback.db").status == 404


# Harm


def test_responses_are_text_and_never_html(store, serve):
    store.add_items([Item("compare", HOSTILE + "p", (HOSTILE + "a", HOSTILE + "b"))])
    anna = serve(store)()
    shown = anna.begin(HOSTILE.split()[0])
    prompt, *responses = shown.seen.texts
    assert prompt == HOSTILE + "p"
    assert sorted(responses) == [HOSTILE + "a", HOSTILE + "b"]
    assert "img" not in shown.seen.tags
    assert shown.seen.tags.count("script") == 1  # keys.js
    anna.judge(shown, choice="1", comment=HOSTILE)
    assert store.judgements()[0].comment == HOSTILE
    assert "img" not in anna.judge(shown, choice="x", form="unknown", comment=HOSTILE).seen.tags


def test_every_answer_carries_the_headers(store, serve):
    anna = serve(store)()
    anna.begin("Anna")
    store.close()  # and what comes now fails within
    for path, status in {
        "/": 200, "/static/keys.js": 200, "/static/style.css": 200, "/nowhere": 404, "/judge/1": 405, "/judge": 500,
        "/static/../views.py": 404, "/static/%2e%2e/views.py": 404, "/favicon.ico": 404,
    }.items():  # fmt: skip
        answer = anna.get(path)
        assert answer.status == status, path
        policy = answer.headers["Content-Security-Policy"]
        for part in ("default-src 'none'", "script-src 'self'", "form-action 'self'", "frame-ancestors 'none'"):
            assert part in policy
        assert "unsafe" not in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "same-origin"
        assert "Traceback" not in answer.text
        if status >= 400:
            assert "<h1>" in answer.text  # a page, not a line


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1"},  # another port is another site
        {"origin": "http://127.0.0.1.evil.example:80"},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
        {"origin": None, "sec_fetch_site": "cross-site"},
        {"origin": "http://evil.example", "sec_fetch_site": None},
    ],
    ids=str,
)
def test_a_form_of_another_site_changes_nothing(store, serve, headers):
    store.add_items(pairs(1))
    anna = serve(store)()
    shown = anna.begin("Anna")
    answer = anna.post(shown.seen.item(), shown.seen.form("/judge/") | {"choice": "1"}, **headers)
    assert answer.status == 403
    assert store.judgements() == []


def test_a_form_without_the_key_of_its_session_changes_nothing(store, serve):
    store.add_items(pairs(2))
    visitor = serve(store)
    anna, ben = visitor(), visitor()
    shown, other = anna.begin("Anna"), ben.begin("Ben")
    form = shown.seen.form("/judge/") | {"choice": "1"}
    for key in ("", "x", "ü", other.seen.form("/judge/")["key"]):
        assert anna.post(shown.seen.item(), form | {"key": key}, origin=None, sec_fetch_site=None).status == 403
    assert anna.post("/undo", {"judgement": "1"}).status == 403
    assert anna.post("/start", {"name": "Eve"}).status == 403
    del form["key"]
    assert anna.post(shown.seen.item(), form).status == 403
    assert ben.post(shown.seen.item(), shown.seen.form("/judge/") | {"choice": "1"}).status == 403
    anna.cookies.clear()
    assert anna.judge(shown, choice="1").status == 403
    assert store.judgements() == []


def test_a_form_of_somebody_else_or_of_nothing_is_not_found(store, serve):
    store.add_items(pairs(2))
    visitor = serve(store)
    anna, ben = visitor(), visitor()
    shown, other = anna.begin("Anna"), ben.begin("Ben")
    mine, theirs = shown.seen.form("/judge/"), other.seen.form("/judge/")
    tries = [
        ("/judge/999", mine), ("/judge/0", mine), ("/judge/-1", mine), ("/judge/x", mine),
        ("/judge/" + "9" * 5000, mine),
        (other.seen.item(), mine), (other.seen.item(), mine | {"form": theirs["form"]}),
        (shown.seen.item(), mine | {"form": theirs["form"]}), (shown.seen.item(), mine | {"form": ""}),
    ]  # fmt: skip
    for path, form in tries:
        answer = anna.post(path, form | {"choice": "1"})
        assert answer.status == 404, path
        assert "Go on labelling" in answer.text
    assert store.judgements() == []


def test_a_foreign_name_for_this_machine_is_refused(store, serve):
    anna = serve(store)()
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "", "0.0.0.0", "[::2]"):
        assert anna.get("/", host=host).status == 421, host
    for host in ("127.0.0.1:x", "[::1", "127.0.0.1:99999"):
        assert anna.get("/", host=host).status == 400, host
    for host in ("localhost", "LOCALHOST:9000", f"127.0.0.1:{anna.port}", "[::1]:80"):
        assert anna.get("/", host=host).status == 200, host


def test_a_token_is_asked_for_everywhere(store, serve):
    store.add_items(pairs(1))
    eve = serve(store, token=TOKEN)()
    for path in ("/", "/judge", "/agreement", "/export", "/export/pairs.jsonl", "/static/keys.js", "/nowhere",
                 "/?token=", "/?token=wrong", "/?token=%C3%BC", "/export?token=" + quote(TOKEN[:-1])):  # fmt: skip
        answer = eve.get(path)
        assert answer.status == 401, path
        assert "Set-Cookie" not in answer.headers
        assert TOKEN not in answer.text
    assert eve.post("/start", {"name": "Eve"}).status == 401
    eve.cookies[f"ppo_jax_token_{eve.port}"] = TOKEN
    assert eve.get("/").status == 401


def test_the_token_is_given_once(store, serve):
    store.add_items(pairs(1))
    anna = serve(store, token=TOKEN)()
    answer = anna.get("/?" + urlencode({"token": TOKEN}), host="labels.example:8000")
    assert answer.status == 200
    assert '<meta http-equiv="refresh" content="0; url=/">' in answer.text
    cookie = answer.headers["Set-Cookie"]
    assert cookie.startswith("ppo_jax_token_8000=")
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(cookie.split("; "))
    assert "battery" not in cookie  # nor is it the token itself
    value = cookie.partition("=")[2].partition(";")[0]
    anna.cookies = {f"ppo_jax_token_{anna.port}": value}
    assert anna.judge(anna.begin("Anna"), choice="1").status == 303
    assert len(store.judgements()) == 1
    assert anna.get("/export/pairs.jsonl").status == 200
    again = anna.get("/judge?" + urlencode({"token": TOKEN}))  # a bookmark, say: it does not stay in the address
    assert '<meta http-equiv="refresh" content="0; url=/">' in again.text


def test_a_token_must_not_be_guessable(store):
    with pytest.raises(InputError, match=r"token: got '\*\*\*\*\*', expected at least 16 characters"):
        page.make_app(store, token="short")


@pytest.mark.parametrize("host", ["0.0.0.0", "", "::", "192.168.1.5", "example.org", "127.0.0.1.example.org", "127.1"])
def test_another_address_needs_a_token(store, host):
    with pytest.raises(InputError, match=rf"host: got '{re.escape(host)}', .* expected a token"):
        page.serve(store, host, 0)


def test_a_comment_of_ten_megabytes_is_refused(store, serve):
    store.add_items(pairs(1))
    anna = serve(store)()
    shown = anna.begin("Anna")
    form = urlencode(shown.seen.form("/judge/") | {"choice": "1", "comment": "x" * 10_000_000})
    for body in (form, iter([form.encode()])):  # with a length, and in chunks without one
        answer = anna.ask("POST", shown.seen.item(), body)
        assert answer.status == 413
        assert "at most 10,000 characters" in answer.text
    assert store.judgements() == []
    assert anna.judge(shown, choice="1").status == 303  # and the server goes on


@pytest.mark.parametrize(("size", "taken"), [(1, 1), (4, 4), (5, 5), (1000, 1000), (2000, 1025)])
def test_what_is_too_large_is_thrown_away_as_it_comes(size, taken):
    """Up to 130 MB in chunks of 64 KiB, straight into the guard, from somebody who says that it will be 5 bytes."""
    waiting = [{"type": "http.request", "body": b"x" * 2**16, "more_body": i > 0} for i in range(size)]
    waiting = [dict(one, body=waiting[0]["body"]) for one in waiting]  # one and the same, or the test itself is large
    sent = []

    async def receive():
        return waiting.pop()

    async def send(message):
        sent.append(message)

    guard = Guard(lambda *_: None, None, lambda status, reason: PlainTextResponse(reason, status), PlainTextResponse)
    headers = [(b"host", b"localhost"), (b"content-type", FORM.encode()), (b"content-length", b"5")]
    scope = {"type": "http", "method": "POST", "path": "/", "scheme": "http", "headers": headers, "query_string": b""}

    async def ask():
        tracemalloc.start()
        await guard(scope, receive, send)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    assert asyncio.run(ask()) < 8 * MAX_FORM
    assert sent[0]["status"] == (413 if size > 4 else 403)  # four chunks are 256 KiB; their form has no key
    assert size - len(waiting) == taken


def test_a_comment_may_have_ten_thousand_characters(store, serve):
    store.add_items(pairs(2))
    anna = serve(store)()
    shown = anna.begin("Anna")
    assert anna.judge(shown, choice="1", comment="\U0001f600" * 10_001).status == 422
    assert store.judgements() == []
    # A browser sends line breaks as two characters and counts one.
    comment = "\U0001f600\r\n" * 5000
    assert anna.judge(shown, choice="1", comment=comment).status == 303
    assert store.judgements()[0].comment == "\U0001f600\n" * 5000


def test_fields_that_no_form_of_ours_has_mean_nothing(store, serve):
    store.add_items(pairs(1))
    anna = serve(store)()
    shown = anna.begin("Anna")
    names = ("self", "session", "shown", "status", "error", "title", "request", "progress", "", "rank_1", "__class__")
    assert anna.judge(shown, **dict.fromkeys(names, "x")).status == 422
    assert anna.judge(shown, **dict.fromkeys(names, "x"), choice="1").status == 303
    assert len(store.judgements()) == 1


def test_other_kinds_of_requests_are_refused(store, serve):
    store.add_items(pairs(1))
    anna = serve(store)()
    shown = anna.begin("Anna")
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        for path in ("/", "/judge", shown.seen.item(), "/undo"):
            answer = anna.ask(method, path)
            assert answer.status == 405
            assert answer.headers["Allow"]
    assert anna.get("/undo").status == anna.get("/start").status == anna.get(shown.seen.item()).status == 405
    form = shown.seen.form("/judge/") | {"choice": "1"}
    for kind in ("multipart/form-data; boundary=x", "application/json", "text/plain", None):
        assert anna.post(shown.seen.item(), form, content_type=kind).status == 415
    for body in (b"key=%FF", b"key=\xff", "&".join(f"f{i}=" for i in range(2000)).encode()):
        assert anna.ask("POST", shown.seen.item(), body).status == 400
    assert store.judgements() == []


@pytest.mark.parametrize(
    "cookie",
    ["", "x", ".", "x.y", f"{'n' * 32}.zz", f"{'n' * 32}.ff", f"{'n' * 31}.61", f"{'n' * 32}.{'61' * 101}",
     f"{'n' * 32}.{'a‮b'.encode().hex()}"],
)  # fmt: skip
def test_a_session_that_was_tampered_with_is_none(cookie):
    assert Session.read(cookie) is None


def test_a_session_is_what_was_written():
    for name in ("", "Anna", "李 雷", "a.b=c; d"):
        session = Session.new(name)
        assert Session.read(session.cookie) == session
        assert session.form_key != Session.new(name).form_key
        assert session.form_key != session._replace(annotator="Eve").form_key


# How it is served


def test_the_database_is_never_asked_on_the_event_loop(store, serve, monkeypatch):
    threads = set()

    def noted(call):
        def noting(*args, **kwargs):
            threads.add(threading.current_thread().name)
            return call(*args, **kwargs)

        return noting

    for name in ("next_item", "judge", "undo", "progress", "judgements"):
        monkeypatch.setattr(store, name, noted(getattr(store, name)))
    store.add_items(pairs(2))
    anna = serve(store)()
    anna.judge(anna.begin("Anna"), choice="1")
    anna.post("/undo", anna.get("/judge").seen.form("/undo"))
    for path in ("/agreement", "/export", "/export/pairs.jsonl"):
        assert anna.get(path).status == 200
    assert threads
    assert not any("event loop" in thread for thread in threads)


def test_serves_until_it_is_told_to_end(store):
    store.add_items(pairs(1))
    addresses, asked = [], []

    def until():
        anna = Visitor(int(re.findall(r":(\d+)/", addresses[0])[0]))
        asked.append(anna.get("/").status)
        return len(asked) == 2

    page.serve(store, port=0, until=until, announce=addresses.append)
    assert asked == [200, 200]
    with pytest.raises(ConnectionRefusedError):
        Visitor(int(re.findall(r":(\d+)/", addresses[0])[0])).get("/")


def test_an_error_while_serving_ends_it(store):
    with pytest.raises(ZeroDivisionError):
        page.serve(store, port=0, until=lambda: 1 // 0, announce=lambda _: None)


def test_a_port_that_is_taken_is_told(store):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"host, port: got '127.0.0.1', {port}, expected ones to listen at"):
            page.serve(store, port=port)


@pytest.mark.parametrize(
    ("host", "token", "address"),
    [
        ("127.0.0.1", None, "http://127.0.0.1:80/"),
        ("::1", None, "http://[::1]:80/"),
        ("10.0.0.1", "a/b c", "http://10.0.0.1:80/?token=a%2Fb%20c"),
    ],
)
def test_the_address_can_be_opened_as_it_is(host, token, address):
    assert page._address(host, 80, token) == address


MISSING = """
import sys

import experiments.collect_feedback
from ppo_jax.feedback import page
from ppo_jax.feedback.store import Store

assert not {"starlette", "uvicorn"} & set(sys.modules)
for name in ("starlette", "uvicorn"):
    sys.modules[name] = None
    try:
        page.serve(Store(sys.argv[1]), port=0)
    except ValueError as error:
        print(type(error).__name__, error)
    del sys.modules[name]
"""


def test_without_the_extra_a_message_says_how_to_get_it(tmp_path):
    command = [sys.executable, "-c", MISSING, str(tmp_path / "feedback.db")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        f'InputError the labelling page needs {name}, which is not installed: pip install -e ".[feedback]"'
        for name in ("starlette", "uvicorn")
    ]
