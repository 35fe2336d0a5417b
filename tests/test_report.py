"""The report, from workdirs as the stages leave them and from damaged ones; read back by parsers that are not ours."""

import base64
import io
import json
import math
import re
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt
from matplotlib.image import imread

from experiments.report import write_report
from experiments.report.road import Findings
from experiments.report.samples import MAX_CHARS, choose_samples, side_by_side
from experiments.report.text import markdown, visible
from experiments.report.verdicts import verdicts
from ppo_jax.metrics import JsonlWriter
from ppo_jax.plots import plot_curves

HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(1)> &lt;b&gt; \"quoted\" 'so' {{ 7 * 7 }} {% raw %} "
    "| a | b | **bold** _it_ `code` [link](https://evil.example) ![x](http://evil.example/x.png) www.evil.example "
    "$x$ ~~gone~~ \\ \\| <!-- \\`\n\n# heading\n- item\n| --- |\n```\n</pre></details></div>"
)
SUMMARY = {
    "reward_model/accuracy": 0.763,
    "reward_model/annotator_ceiling": 0.79,
    "gold/base": 0.5,
    "gold/best_of_16": 2.5,
    "gold/ppo": 1.75,
    "proxy/base": 0.0,
    "proxy/best_of_16": 2.0,
    "proxy/ppo": 2.5,
    "objective/kl": 5.25,
    "of another day": 1234.5,
}
RESULTS = {
    "accuracy": 0.763,
    "accuracy_low": 0.731,
    "accuracy_high": 0.792,
    "ece": 0.031,
    "reliability": [{"confidence": 0.6, "accuracy": 0.55, "count": 20}, {"confidence": 0.9, "accuracy": 1, "count": 9}],
    "accuracy_by_margin": [{"low": 0.1, "high": 0.9, "accuracy": 0.7, "count": 29}],
    "length_correlation": {"pearson": 0.214, "spearman": None},
    "normalization": {"before": {"mean": 0.3125, "std": 1.5}, "after": {"mean": 0.0, "std": 1.0}},
}
SECTIONS = (
    "Summary",
    "Reward model",
    "Proxy against gold",
    "Score against KL",
    "Samples",
    "Learning curves",
    "Settings",
)


class Page(HTMLParser):
    """What a browser sees: tags with attributes, text, and the text in each element of a class."""

    VOID = ("meta", "img", "br", "link", "input", "hr")

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.tags, self.open, self.by_class, self.text = [], [], {}, ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag not in self.VOID:
            self.open.append((tag, attributes.get("class", tag)))
            self.by_class.setdefault(self.open[-1][1], []).append("")

    handle_startendtag = handle_starttag

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.text += data
        for _, name in self.open:
            self.by_class[name][-1] += data

    def attributes(self, tag):
        return [attributes for found, attributes in self.tags if found == tag]


def write_rows(path, rows):
    path.unlink(missing_ok=True)
    with JsonlWriter(path) as writer:
        for row in rows:
            writer.write(row)


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def metrics(count=30):
    """A proxy that rises and a gold that turns at two thirds."""
    for i in range(count):
        t = i / count
        gold = 2 * t - 1.5 * t * t
        yield {"iteration": i, "objective/kl": 6 * t, "objective/score": 2 * t, "objective/gold": gold}


def responses(count=12):
    for i in range(count):
        yield {
            "prompt": f"prompt {i}",
            "base": f"base {i}",
            "best_of_16": f"best {i}",
            "ppo": f"ppo {i}",
            "proxy_base": 0.0,
            "proxy_ppo": 1.0,
            "gold_base": 1.0,
            "gold_ppo": 1.0 + (i - 5) / 10,  # from -0.5 to +0.6
        }


@pytest.fixture
def road(tmp_path):
    """A workdir after all stages, with neither pretraining nor SFT."""
    workdir = tmp_path / "road"
    for stage in ("feedback", "reward_model", "ppo"):
        write_json(workdir / stage / "config.json", {"seed": 0, "lr": 1e-5, "stage": stage})
    write_json(workdir / "ppo" / "config.json", {"kl_limit": 6.0})
    write_json(workdir / "reward_model" / "results.json", RESULTS)
    write_rows(workdir / "ppo" / "metrics.jsonl", metrics())
    write_rows(
        workdir / "evaluation" / "best_of_n.jsonl",
        [{"n": n, "kl": math.log(n) - (n - 1) / n, "proxy": n / 8, "gold": 0.5 + n / 8} for n in (1, 2, 4, 8, 16)],
    )
    write_rows(workdir / "evaluation" / "responses.jsonl", responses())
    for stage in ("reward_model", "ppo"):
        plot_curves(list(metrics(3)), workdir / stage / "curves.png")
    return workdir


def read(workdir):
    """(the HTML as a Page, the Markdown rendered as a Page, the Markdown)."""
    source = (workdir / "report.md").read_text()
    rendered = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(source)
    return Page((workdir / "report.html").read_text()), Page(rendered), source


def words(text):
    return " ".join(text.split())


def test_both_reports_tell_the_same(road):
    write_report(road, SUMMARY)
    html, rendered, _ = read(road)
    for page in (html, rendered):
        assert tuple(page.by_class["h2"]) == SECTIONS
        for key, value in SUMMARY.items():
            assert key in page.text
            assert f"{value:,.4g}" in page.text
        for sentence in (
            "limit held: 5.25 of at most 6 nats a response",
            # gold: (1.75 - 0.5) / (2.5 - 0.5) = 62.5 %; proxy: 2.5 / 2 = 125 %
            "0.500 before PPO, 1.750 after: +62% of the distance from the base policy to its best of 16 (2.500)",
            "0.000 before PPO, 2.500 after: +125% of the distance",
            "76.3% of the held-out comparisons right (95% interval: 73.1% to 79.2%), 2.70 points below the simulated "
            "annotator's ceiling of 79.0%",
            "were made by a simulated annotator",
            "Correlation of score and length: +0.21 pearson.",
            "before training",
            "jax",
        ):
            assert sentence in words(page.text)
        assert re.search(r'"stage":\s+"reward_model"', page.text)  # settings
    assert html.by_class["good"][0].startswith("KL")
    assert len(html.by_class["good"]) == 3
    assert sum("sample" in name for name in html.by_class) == 1
    assert len(html.by_class["sample"]) == 9
    assert rendered.by_class["h3"] == html.by_class["h3"]


def test_the_html_is_one_file_that_asks_for_nothing(road):
    write_report(road, SUMMARY)
    page, _, _ = read(road)
    assert not {"script", "link", "iframe", "object", "form"} & {tag for tag, _ in page.tags}
    pictures = page.attributes("img")
    assert len(pictures) == 6  # reward model, proxy and gold, the frontier twice, the curves of two stages
    for picture in pictures:
        head, _, data = picture["src"].partition(",")
        assert head == "data:image/png;base64"
        assert imread(io.BytesIO(base64.b64decode(data, validate=True))).ndim == 3
        assert picture["alt"]
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {link["href"] for link in page.attributes("a")} == {f"#{name}" for name in ids}
    assert "url(" not in page.by_class["style"][0]


def test_the_markdown_shows_pictures_that_are_there(road):
    write_report(road, SUMMARY)
    _, rendered, _ = read(road)
    pictures = [road / attributes["src"] for attributes in rendered.attributes("img")]
    assert len(pictures) == 6
    for path in pictures:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_the_same_again_gives_the_same_bytes(road):
    write_report(road, SUMMARY)
    first = {path: path.read_bytes() for path in road.rglob("*") if path.is_file()}
    write_report(road, SUMMARY)
    assert {path: path.read_bytes() for path in road.rglob("*") if path.is_file()} == first


# --- text of strangers ---


def test_hostile_texts_are_shown_as_text(road):
    row = {key: HOSTILE if isinstance(value, str) else value for key, value in next(responses()).items()}
    write_rows(road / "evaluation" / "responses.jsonl", [row | {"gold_ppo": 100.0}])
    write_json(road / "ppo" / "config.json", {HOSTILE: HOSTILE, "kl_limit": HOSTILE})
    (road / "reward_model" / "results.json").write_text(HOSTILE)
    write_report(road, SUMMARY | {HOSTILE: HOSTILE})
    html, rendered, _ = read(road)
    assert not any(name.startswith("on") for _, attributes in html.tags for name in attributes)
    for page in (html, rendered):
        assert not {"script", "em", "s", "del"} & {tag for tag, _ in page.tags}
        assert all("evil" not in (attributes.get("src") or "") for attributes in page.attributes("img"))
        assert all("evil" not in (attributes.get("href") or "") for attributes in page.attributes("a"))
        assert tuple(page.by_class["h2"]) == SECTIONS
        assert "h1" in page.by_class
        assert len(page.by_class["h1"]) == 1
    assert html.by_class["text"] == [HOSTILE] * 6  # three answers, at random and as the biggest gain
    assert html.by_class["prompt text"] == [HOSTILE] * 2
    cells = [words(text) for text in rendered.by_class["td"]]
    assert cells.count(words(HOSTILE.replace("\n", ""))) == 9  # and words, value and key in the summary
    assert json.dumps(HOSTILE, ensure_ascii=False) in rendered.text  # a setting, in its block of code


ALPHABET = [*"ab_*`[]()<>&|~$#!\\:/.-+=\"'{}% \n", "http://", "https://x.y", "www.", "![", "&amp;", "<!--", "```", "1."]


def test_markdown_is_escaped_where_it_must_be():
    assert markdown("reward_model/a_1 = 5 - 3 (x), done.") == "reward_model/a_1 = 5 - 3 (x), done."
    assert markdown("_a_ *b*|`c` <d>&\n$e$") == "_a\\_ \\*b\\*\\|\\`c\\` &lt;d&gt;&amp;<br>\\$e\\$"
    assert markdown("https://x.y WWW.z a:b") == "https\\://x.y WWW\\.z a:b"  # GitHub links bare addresses


def test_markdown_is_read_back_as_it_was(rng):
    renderer = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    for _ in range(300):
        text = "".join(rng.choice(ALPHABET, size=rng.integers(1, 25)))
        cell = "x" + text + "x"
        page = Page(renderer.render(f"| {markdown(cell)} | second |\n|---|---|\n"))
        assert {tag for tag, _ in page.tags} <= {"table", "thead", "tbody", "tr", "th", "br"}
        assert [words(text) for text in page.by_class["th"]] == [words(cell.replace("\n", "")), "second"]


def test_what_does_not_show_is_spelled_out():
    assert visible("a\x1b[31m\r\nb\x00\u202ec\ud83d\t日本 \u200d") == "a\\x1b[31m\nb\\x00\\u202ec\\ud83d\t日本 \u200d"
    assert visible(3) == "3"


def test_texts_have_a_bounded_length():
    sample = side_by_side({"prompt": [{"role": "user", "content": "hi"}], "base": "x" * 10**6, "ppo": "  "})
    assert sample["prompt"] == '[{"role": "user", "content": "hi"}]'
    base, best, ppo = sample["answers"]
    assert len(base["text"]) < MAX_CHARS + 50
    assert base["text"].endswith("(996,000 more characters)")
    assert (best["text"], ppo["text"]) == ("–", "(nothing)")
    assert base["scores"] == ""


# --- samples ---


def test_samples_are_gains_losses_and_some_at_random():
    rows = list(responses())  # gold changes by (i - 5) / 10
    chosen = choose_samples(rows, 3)
    titles = ("At random", "Biggest gains, by the gold score", "Biggest losses, by the gold score")
    assert tuple(chosen) == titles
    assert [row["prompt"] for row in chosen[titles[1]]] == ["prompt 11", "prompt 10", "prompt 9"]
    assert [row["prompt"] for row in chosen[titles[2]]] == ["prompt 0", "prompt 1", "prompt 2"]
    assert len({row["prompt"] for row in chosen["At random"]}) == 3
    assert choose_samples(rows, 3) == chosen
    assert any(choose_samples(rows, 3, seed)["At random"] != chosen["At random"] for seed in range(1, 5))


def test_without_gold_the_proxy_says_who_gained():
    rows = [{"gold_base": None, "gold_ppo": math.nan, "proxy_base": 1.0, "proxy_ppo": x} for x in (1.0, 0.5, None, 4.0)]
    chosen = choose_samples(rows, 3)
    assert chosen["Biggest gains, by the proxy score"] == [rows[3]]
    assert chosen["Biggest losses, by the proxy score"] == [rows[1]]
    assert len(chosen["At random"]) == 3
    assert not any(choose_samples([], 3).values())


# --- verdicts ---


@pytest.mark.parametrize(
    ("change", "kind", "sentence"),
    [
        ({"objective/kl": 6.01}, "bad", "limit NOT held: 6.01 of at most 6 nats"),
        ({"objective/kl": None}, "note", "KL: not known."),
        ({"gold/ppo": 1.25}, "bad", "+38% of the distance"),  # (1.25 - 0.5) / 2
        ({"gold/ppo": 1.5}, "good", "+50% of the distance"),
        ({"gold/best_of_16": 0.5}, "note", "0.500 before PPO, 1.750 after."),
        ({"gold/base": None, "gold/ppo": None, "gold/best_of_16": None}, "note", "gold: not known."),
        ({"reward_model/accuracy": 0.7, "reward_model/annotator_ceiling": 0.76}, "bad", "6.00 points below"),
        ({"reward_model/accuracy": 0.8}, "good", "1.00 points above"),
        ({"reward_model/annotator_ceiling": None}, "note", "76.3% of the held-out comparisons right (95%"),
        ({"reward_model/accuracy": None}, "note", "accuracy not known."),
        ({"proxy/ppo": math.nan}, "note", "proxy: not known."),
    ],
)
def test_verdicts(road, change, kind, sentence):
    found = verdicts(Findings(road, SUMMARY | change, None))
    assert any(verdict.kind == kind and sentence in f"{verdict.topic}: {verdict.text}" for verdict in found)


def test_over_optimisation_names_the_peak(road):
    # gold = 2t - 1.5t^2 is highest at t = 2/3, iteration 20; means over 3 iterations keep a smooth peak in its place.
    (text,) = [
        verdict.text for verdict in verdicts(Findings(road, SUMMARY, None)) if verdict.topic == "over-optimisation"
    ]
    assert "around iteration 20, at 0.66" in text  # 4/3 - 2/3 = 0.667
    assert "the proxy went from 1.333 to 1.9" in text
    assert len(verdicts(Findings(road, SUMMARY, ()))) == 4  # nothing to say


def test_without_a_limit_and_without_a_simulated_annotator(road):
    write_json(road / "ppo" / "config.json", {"kl_limit": 0.0})
    write_report(road, {key: value for key, value in SUMMARY.items() if key != "reward_model/annotator_ceiling"})
    html, rendered, _ = read(road)
    for page in (html, rendered):
        assert "5.25 nats a response; no limit was set." in page.text
        assert "were made by people, or come from a file" in page.text
        assert "simulated" not in page.text


# --- what is missing ---


def test_an_empty_workdir_gets_a_report_of_sentences(tmp_path):
    write_report(tmp_path / "new", {})
    html, rendered, _ = read(tmp_path / "new")
    for page in (html, rendered):
        assert tuple(page.by_class["h2"]) == SECTIONS
        assert page.attributes("img") == []
        for sentence in (
            "PPO has logged no scores",
            "No KL and score are known",
            "The evaluation has left no responses",
        ):
            assert sentence in page.text
    assert list((tmp_path / "new" / "report").iterdir()) == []


def test_stages_that_are_not_of_this_road_are_not_read(road):
    write_json(road / "pretrain" / "config.json", {"secret": "of an older road"})
    plot_curves(list(metrics(3)), road / "pretrain" / "curves.png")
    write_report(road, SUMMARY, ("feedback", "reward_model", "ppo", "evaluation", "sft"))
    html, _, _ = read(road)
    assert "older road" not in html.text
    assert "There are no curves of the stage sft/." in html.text
    assert len(html.attributes("img")) == 6
    write_report(road, SUMMARY)  # whatever is there
    html, _, _ = read(road)
    assert "older road" in html.text
    assert "sft/" not in html.text


def test_people_give_no_gold_and_old_pictures_go(road):
    write_report(road, SUMMARY)
    rows = [row | {"objective/gold": None} for row in metrics(1)]
    write_rows(road / "ppo" / "metrics.jsonl", rows)
    (road / "evaluation" / "best_of_n.jsonl").unlink()
    (road / "reward_model" / "results.json").unlink()
    write_report(road, {key: None if "gold" in key else value for key, value in SUMMARY.items()})
    html, _, _ = read(road)
    assert "There is no gold score: PPO was given no judge besides the reward model." in html.text
    assert "No held-out comparison was decided by a reward model." in html.text
    assert sorted(path.name for path in (road / "report").iterdir()) == [
        "frontier.png",
        "frontier_sqrt.png",
        "proxy_and_gold.png",
    ]


def test_a_reward_model_of_ratings_has_an_error_and_no_accuracy(road):
    ratings = {"accuracy": None, "ece": None, "reliability": [], "accuracy_by_margin": [], "heldout/rmse": 0.75}
    write_json(road / "reward_model" / "results.json", ratings | {"normalization": None, "length_correlation": 0.5})
    write_report(road, SUMMARY)
    html, _, _ = read(road)
    assert "Held-out root mean square error: 0.750" in html.text
    assert "Correlation of score and length: +0.50." in html.text


def test_damaged_files_cost_their_parts_and_are_told(road):
    damages = {
        "feedback/config.json": b"[1, 2]",
        "ppo/config.json": b"{",
        "ppo/metrics.jsonl": b'{"iteration": 0}\nbroken\n{"iteration": 1}\n',
        "reward_model/results.json": b"\xff\xfe",
        "evaluation/best_of_n.jsonl": b"1\n",
        "evaluation/responses.jsonl": b"no\n",
        "ppo/curves.png": b"GIF89a",
    }
    for name, content in damages.items():
        (road / name).write_bytes(content)
    (road / "reward_model" / "curves.png").unlink()
    (road / "reward_model" / "curves.png").mkdir()
    write_report(road, SUMMARY)
    html, rendered, _ = read(road)
    for page in (html, rendered):
        told = {name for name in (*damages, "reward_model/curves.png") if f"{name} cannot be read" in page.text}
        assert told == {*damages, "reward_model/curves.png"}
        assert tuple(page.by_class["h2"]) == SECTIONS
        assert page.attributes("img") == []


@pytest.mark.parametrize("attempt", range(2))
def test_odd_values_never_stop_a_report(road, rng, attempt):
    odd_values = (None, math.nan, math.inf, "", "text", True, 10**400, 1e308, [], {}, [1], 0, -3, {"before": 1})

    def odd(value):
        if rng.random() < 0.3:
            return odd_values[rng.integers(len(odd_values))]
        return {key: odd(x) for key, x in value.items()} if isinstance(value, dict) else value

    for name, rows in (("metrics", metrics(5)), ("best_of_n", [{"n": 1, "kl": 0.0, "proxy": 1, "gold": 2}] * 3)):
        path = road / ("ppo" if name == "metrics" else "evaluation") / f"{name}.jsonl"
        path.write_text("".join(json.dumps({key: odd(x) for key, x in row.items()}) + "\n" for row in rows))
    lines = (json.dumps({key: odd(x) for key, x in row.items()}) + "\n" for row in responses())
    (road / "evaluation" / "responses.jsonl").write_text("".join(lines))
    write_json(road / "reward_model" / "results.json", {key: odd(value) for key, value in RESULTS.items()})
    write_json(road / "ppo" / "config.json", {"kl_limit": odd(1.0)})
    write_report(road, {key: odd(value) for key, value in SUMMARY.items()})
    html, rendered, _ = read(road)
    assert tuple(html.by_class["h2"]) == tuple(rendered.by_class["h2"]) == SECTIONS
