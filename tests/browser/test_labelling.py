"""Two people label at once in a real browser, by keyboard and by mouse, while the server is killed and started again.

After each press the test waits for the next page with `expect`: a form that was sent replaces the page.
"""

import json
import re
import signal
import subprocess
import time

import folders
import pytest
from playwright.sync_api import Page, expect, sync_playwright

from ppo_jax.metrics import read_jsonl

CONFIG = f"--config={folders.ROOT / 'experiments' / 'configs' / 'feedback.py'}"
HOSTILE = "<script>document.title = 'hacked'</script><img src=x onerror=\"document.title = 'hacked'\">"

# What each of the two means to say, about each item in turn. Pairs: the first of the two in the file is better ("<"),
# the second (">"), "tie", "bad". Rankings: ranks in the order of the file. Scores: of 5.
ANNA = ["<"] * 8 + [">"] * 8 + ["tie"] * 2 + ["bad"] * 2
ANNA += [(1, 2, 3, 4), (4, 3, 2, 1), (1, 1, 2, 3), "bad", (1, 2, 3, 4)]
ANNA += [1, 2, 3, 4, 5]
BEN = [">"] * 2 + ["<"] * 6 + ["<"] * 2 + [">"] * 6 + ["tie"] * 2 + ["bad"] * 2
BEN += [(1, 2, 3, 4), (4, 3, 2, 1), (1, 1, 2, 3), "bad", (2, 1, 3, 4)]
BEN += [1, 2, 3, 4, 3]

# Pairs: 16 of 20 equal. Each of them says "<" 8 times, ">" 8, "tie" 2, "bad" 2. By chance
# (8*8 + 8*8 + 2*2 + 2*2) / 20^2 = 0.34, kappa = (0.8 - 0.34) / (1 - 0.34) = 23/33 = 0.697. Of the 40 values
# 40^2 - (16^2 + 16^2 + 4^2 + 4^2) = 1056 of 40*39 ordered pairs differ, alpha = 1 - (4/20) / (1056/1560) = 0.705.
# Rankings, as 6 pairs each: 29 of 30 equal. Anna says "<" 6+5+6 = 17 times, ">" 6, tie 1, bad 6; Ben 16, 7, 1, 6. By
# chance (17*16 + 6*7 + 1*1 + 6*6) / 30^2 = 0.39, kappa = (29/30 - 0.39) / 0.61 = 0.945. Of the 60 values
# 60^2 - (33^2 + 13^2 + 2^2 + 12^2) = 2194 of 60*59 pairs differ, alpha = 1 - (1/30) / (2194/3540) = 0.946.
# Scores: 4 of 5 equal; by chance (1*1 + 1*1 + 1*2 + 1*1 + 1*0) / 5^2 = 0.2, kappa = 0.6 / 0.8 = 0.75. Interval: one
# pair of the 10 values is 2 apart, D_o = 2 * 2^2 / 10 = 0.8. Their squares sum to 94, their mean is 2.8, so
# D_e = 2 * (94 - 10 * 2.8^2) / 9 = 3.4667, alpha = 1 - 0.8 / 3.4667 = 10/13 = 0.769.
AGREEMENT = [
    ["the better of two", "20", "40", "Anna, Ben", "80.0 %", "0.697", "0.705 (nominal)"],
    ["a ranking", "5", "10", "Anna, Ben", "96.7 %", "0.945", "0.946 (nominal)"],
    ["a score", "5", "10", "Anna, Ben", "80.0 %", "0.750", "0.769 (interval)"],
]


def make_rows() -> list[dict]:
    """20 pairs, 5 times four responses, 5 times one; the first response of each tries to be a program."""
    rows = [{"prompt": f"prompt {i}", "completions": [f"{i} a {HOSTILE}", f"{i} b"]} for i in range(20)]
    rows += [{"prompt": f"prompt {i}", "completions": [f"{i} {name}" for name in "abcd"]} for i in range(20, 25)]
    return rows + [{"prompt": f"prompt {i}", "completions": [f"{i} a"]} for i in range(25, 30)]


class Server:
    """The script as a process of its own, on one port and one workdir."""

    def __init__(self, tmp_path):
        self.workdir, self.port = tmp_path / "run", 0
        given = folders.write_jsonl(tmp_path / "given.jsonl", make_rows())
        self.flags = [CONFIG, f"--workdir={self.workdir}", "--config.model=", "--config.prompts=",
                      "--config.num_prompts=0", f"--config.responses={given}", "--config.overlap=1.0",
                      "--config.export=pairs,rankings,choices,scores"]  # fmt: skip

    def start(self) -> None:
        """Returns when the page can be opened."""
        flags = [*self.flags, f"--config.port={self.port}"]
        self.process = folders.start_script("collect_feedback.py", flags, stdout=subprocess.PIPE)
        for line in self.process.stdout:
            if address := re.search(r"http://127.0.0.1:(\d+)/", line):
                self.address, self.port = address[0], int(address[1])
                return
        raise AssertionError("no address")

    def end(self, number: int) -> int:
        """Sends a signal; the exit status."""
        self.process.send_signal(number)
        self.process.communicate(timeout=60)
        return self.process.returncode


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path)
    server.start()
    yield server
    if server.process.poll() is None:
        server.end(signal.SIGKILL)


@pytest.fixture(scope="module")
def browser(chromium):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium)
        yield browser
        browser.close()


class Person:
    """Somebody at a browser of their own."""

    def __init__(self, browser, server, name, **options):
        self.server, self.problems = server, []
        self.has_keys = options.get("java_script_enabled", True)
        self.page: Page = browser.new_context(**options).new_page()
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("dialog", lambda dialog: self.problems.append(dialog.message))
        self.page.on("console", self._note)
        self.page.goto(server.address)
        self.page.get_by_label("Your name").fill(name)
        self.page.get_by_role("button", name="Begin").click()

    def _note(self, message) -> None:
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.problems.append(message.text)

    def sees(self, number: int) -> list[int]:
        """Waits for an item; the places of its responses, in the order of the file."""
        expect(self.page.locator(".prompt .text")).to_have_text(f"prompt {number}")
        if self.has_keys:  # the text stands there before the script hears keys
            expect(self.page.locator("html")).to_have_class(re.compile("keys"))
        shown = self.page.locator(".responses .text").all_text_contents()
        return [shown.index(text) + 1 for text in make_rows()[number]["completions"]]

    def says(self, number: int, what, keys: bool) -> None:
        """Judges an item, by keys or by mouse."""
        places = self.sees(number)
        (self.presses if keys else self.clicks)(places, what)

    def presses(self, places, what) -> None:
        press = self.page.keyboard.press
        if isinstance(what, int):
            press(str(what))
        elif isinstance(what, tuple):
            # From the best to the worst, t before one that is tied with the last.
            order = sorted(range(len(what)), key=what.__getitem__)
            for before, index in zip([None, *order], order, strict=False):
                if before is not None and what[before] == what[index]:
                    press("t")
                press(str(places[index]))
            press("Enter")
        else:
            press({"<": str(places[0]), ">": str(places[-1]), "tie": "t", "bad": "b"}[what])

    def clicks(self, places, what, **options) -> None:
        if isinstance(what, tuple):
            for place, rank in zip(places, what, strict=True):
                self.page.get_by_label(f"Rank of response {place}").select_option(str(rank))
        button = self.page.locator("#judgement").get_by_role("button", name=self._label(places, what))
        button.click(**options)

    def _label(self, places, what) -> re.Pattern:
        if isinstance(what, int):
            return re.compile(f"^Score {what}$")
        if isinstance(what, tuple):
            return re.compile("^Submit the ranks")
        sides = {"<": f"Response {places[0]} is better", ">": f"Response {places[-1]} is better", "tie": "Tie"}
        return re.compile("^" + sides.get(what, "(Both|All) bad"))


def expected_rankings(said: dict[str, list]) -> dict[tuple[str, int], tuple[list[int], bool]]:
    """(annotator, item) -> (ranks in the order of the file, whether all are bad)."""
    ranks = {"<": [1, 2], ">": [2, 1], "tie": [1, 1]}
    meant = {}
    for name, verdicts in said.items():
        for number, what in enumerate(verdicts[:25]):
            bad = [1] * len(make_rows()[number]["completions"])
            meant[name, number] = (list(what) if isinstance(what, tuple) else ranks.get(what, bad), what == "bad")
    return meant


def test_two_people_label_at_once_and_the_server_dies_once(browser, server, tmp_path):
    began = time.monotonic()
    anna, ben = Person(browser, server, "Anna"), Person(browser, server, "Ben")
    for number in range(30):
        if number == 3:  # pressed the wrong one, and took it back
            anna.says(number, ">", keys=True)
            anna.sees(number + 1)
            anna.page.keyboard.press("u")
            ben.clicks(ben.sees(number), BEN[number], click_count=2)  # a double click
            anna.says(number, ANNA[number], keys=True)
            anna.sees(number + 1)
            continue
        if number == 5:  # keys do not act while a comment is typed
            anna.sees(number)
            anna.page.keyboard.press("c")
            anna.page.keyboard.type("1 tub\n2 <b>")
            anna.page.keyboard.press("Escape")
            ben.sees(number)
            ben.page.get_by_label("Comment").fill("")
            ben.page.reload()
        if number == 12:
            before = anna.sees(number), ben.sees(number)
            assert server.end(signal.SIGKILL) == -signal.SIGKILL
            anna.page.keyboard.press("1")  # into the void
            server.start()
            anna.page.goto(server.address + "judge")
            assert (anna.sees(number), ben.sees(number)) == before  # Ben has not even noticed
        anna.says(number, ANNA[number], keys=number % 2 == 0)
        ben.says(number, BEN[number], keys=number % 2 == 1)
    for person in (anna, ben):
        expect(person.page.get_by_role("heading", level=1)).to_have_text("Nothing left for you")
        assert person.problems == []
        assert "hacked" not in person.page.title()

    anna.page.get_by_role("link", name="Agreement").click()
    rows = anna.page.locator("tbody tr")
    expect(rows).to_have_count(3)
    assert [row.locator("th, td").all_text_contents() for row in rows.all()] == AGREEMENT

    ben.page.get_by_role("link", name="Export").click()
    with ben.page.expect_download() as download:
        ben.page.get_by_role("link", name="rankings.jsonl").click()
    download.value.save_as(tmp_path / "downloaded.jsonl")

    assert server.end(signal.SIGINT) == 0
    rankings = read_jsonl(server.workdir / "rankings.jsonl")
    assert read_jsonl(tmp_path / "downloaded.jsonl") == rankings
    check_exports(server, rankings)
    assert time.monotonic() - began < 90


def check_exports(server, rankings) -> None:
    """The files hold what was pressed, each once, and nothing else."""
    given = make_rows()
    found = {}
    for row in rankings:
        number = int(row["prompt"].removeprefix("prompt "))
        assert row["completions"] == given[number]["completions"]
        assert (row["annotator"], number) not in found
        found[row["annotator"], number] = (row["ranks"], row["both_bad"])
        assert row["comment"] == ("1 tub\n2 <b>" if (row["annotator"], number) == ("Anna", 5) else "")
    meant = expected_rankings({"Anna": ANNA, "Ben": BEN})
    assert found == meant

    scores = [(row["annotator"], row["prompt"], row["score"]) for row in read_jsonl(server.workdir / "scores.jsonl")]
    assert sorted(scores) == sorted(
        (name, f"prompt {25 + i}", score)
        for name, said in (("Anna", ANNA), ("Ben", BEN))
        for i, score in enumerate(said[25:])
    )
    pairs = [
        (r["annotator"], r["prompt"], r["chosen"], r["rejected"]) for r in read_jsonl(server.workdir / "pairs.jsonl")
    ]
    texts = {number: row["completions"] for number, row in enumerate(given)}
    assert sorted(pairs) == sorted(
        (name, f"prompt {number}", texts[number][a], texts[number][b])
        for (name, number), (ranks, _) in meant.items()
        for a, rank in enumerate(ranks)
        for b, other in enumerate(ranks)
        if rank < other
    )
    assert len(pairs) == 2 * 16 + 2 * (6 + 6 + 5 + 0 + 6)
    assert len(read_jsonl(server.workdir / "choices.jsonl")) == 2 * 16 + 2 * 3


def test_everything_works_without_javascript(browser, server):
    cara = Person(browser, server, "Cara", java_script_enabled=False)
    places = cara.sees(0)
    expect(cara.page.locator("kbd").first).to_be_hidden()  # nothing is promised that does not work
    cara.clicks(places, "<")
    cara.sees(1)
    cara.page.get_by_role("button", name="Undo").click()
    for number in range(20):
        cara.clicks(cara.sees(number), "tie")
    places = cara.sees(20)
    cara.page.get_by_role("button", name="Submit the ranks").click()
    assert cara.sees(20) == places  # the browser asks for the ranks first
    cara.clicks(places, (2, 1, 1, 4))
    for number in range(21, 25):
        cara.clicks(cara.sees(number), "bad")
    for number in range(25, 30):
        cara.clicks(cara.sees(number), 5)
    expect(cara.page.get_by_role("heading", level=1)).to_have_text("Nothing left for you")
    assert server.end(signal.SIGINT) == 0
    rankings = read_jsonl(server.workdir / "rankings.jsonl")
    assert [row["ranks"] for row in rankings] == [[1, 1]] * 20 + [[2, 1, 1, 3]] + [[1] * 4] * 4
    assert [row["score"] for row in read_jsonl(server.workdir / "scores.jsonl")] == [5] * 5
    assert json.dumps(cara.problems) == "[]"


def test_keys_mean_the_same_on_other_keyboards(browser, server):
    dora = Person(browser, server, "Dora")

    def press(**event):
        dora.page.locator("body").dispatch_event("keydown", {"bubbles": True, "cancelable": True} | event)

    dora.sees(0)
    for event in ({"ctrlKey": True}, {"metaKey": True}, {"altKey": True}, {"repeat": True}, {"isComposing": True}):
        press(key="1", code="Digit1", **event)
    dora.sees(0)
    press(key="&", code="Digit1")  # French
    dora.sees(1)
    press(key="2", code="Numpad2")
    dora.sees(2)
    press(key="е", code="KeyT")  # Russian
    dora.sees(3)
    press(key="B", code="KeyB", shiftKey=True)
    dora.sees(4)
    press(key="t", code="KeyK")  # Dvorak
    for number in range(5, 20):
        dora.sees(number)
        dora.page.keyboard.press("b")
    dora.sees(20)
    first, second, third, fourth = (dora.page.get_by_label(f"Rank of response {place}") for place in range(1, 5))
    for key in "t13t21":  # nothing to be tied with yet; the last press takes the 1 back
        dora.page.keyboard.press(key)
    for select, value in zip((first, second, third, fourth), ("", "2", "2", ""), strict=True):
        expect(select).to_have_value(value)
    dora.page.keyboard.press("Enter")  # not without all ranks
    second.focus()
    dora.page.keyboard.press("4")  # in a list, digits choose from it
    expect(second).to_have_value("4")
    second.blur()
    for key in "41":
        dora.page.keyboard.press(key)
    for select, value in zip((first, second, third, fourth), ("4", "2", "1", "3"), strict=True):
        expect(select).to_have_value(value)
    dora.page.keyboard.press("Enter")
    dora.sees(21)
    assert dora.problems == []
    assert server.end(signal.SIGINT) == 0
    rows = read_jsonl(server.workdir / "rankings.jsonl")
    assert [row["both_bad"] for row in rows] == [False] * 3 + [True, False] + [True] * 15 + [False]
    assert [row["ranks"].count(1) for row in rows[:3]] == [1, 1, 2]
    assert sorted(rows[20]["ranks"]) == [1, 2, 3, 4]
