"""Human feedback: responses of a model, or given ones, on a page where people say which are better.

    python experiments/collect_feedback.py --config=experiments/configs/feedback.py --workdir=runs/feedback \
        --config.model=FOLDER --config.prompts=PROMPTS.jsonl

The workdir gets config.json, responses.jsonl (what was sampled), feedback.db (items and judgements), and at the end,
also after Ctrl-C, the judgements as pairs.jsonl, rankings.jsonl, choices.jsonl or scores.jsonl. The same command again
goes on with the same items and samples nothing twice.
"""

import dataclasses
import math
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from experiments import cli
from experiments.prompts import fitted
from experiments.responses import Prompt, Responder, options_of
from experiments.settings import FeedbackExperiment
from experiments.settings.feedback import export_names
from ppo_jax.data import DataError, load_rows
from ppo_jax.errors import InputError, check
from ppo_jax.feedback.formats import import_rows, write_export
from ppo_jax.feedback.page import check_installed, serve
from ppo_jax.feedback.store import Item, Store
from ppo_jax.metrics import JsonlWriter, read_jsonl
from ppo_jax.preferences import read_judged
from ppo_jax.runs import open_run, write_json
from ppo_jax.tokenizers import render_chat

MAY_CHANGE = ("overlap", "annotators", "host", "port", "token", "until_complete", "export")
"""Fields that a restart may change: they do not touch the items. The token is not written down at all."""
FAREWELL_S = 10.0
"""How long everything has to be judged before a server ends: the last annotator sees that it is, and may undo."""

Answered = tuple[str, list[str], str]
"""A prompt, responses to it, and who wrote them ("" when it is not known)."""


class Inputs(NamedTuple):
    """Where items come from; read and checked before anything is written."""

    given: list[Answered]
    responder: Responder | None  # of the model, when there is one
    prompts: list[Prompt]  # as the model gets them
    texts: list[str]  # and as people read them


def collect(settings: FeedbackExperiment, workdir: Path) -> Store:
    """The store of a workdir, filled: what has to be sampled is sampled, the first time only.

    Args:
        settings: see `FeedbackExperiment`.
        workdir: gets config.json, responses.jsonl, feedback.db, and when this is full, filled.json.

    Raises:
        InputError: any of the inputs cannot be used, or the workdir holds another run.
    """
    database, filled = workdir / "feedback.db", workdir / "filled.json"
    inputs = None if database.exists() and filled.exists() else prepare(settings)
    config = {name: value for name, value in dataclasses.asdict(settings).items() if name != "token"}
    open_run(workdir, config, MAY_CHANGE)
    write_json(workdir / "config.json", config)
    store = Store(database)
    store.set_overlap(settings.overlap, settings.annotators)
    if inputs:
        write_json(filled, fill(store, settings, inputs, workdir))
    return store


def prepare(settings: FeedbackExperiment) -> Inputs:
    """Reads the inputs, and loads the model.

    Raises:
        InputError: any of them cannot be used.
    """
    if not (settings.model or settings.responses or settings.judged):
        raise InputError("config: nothing to judge; expected config.model, config.responses or config.judged")
    check("config.prompts", settings.prompts, bool(settings.prompts) == bool(settings.model), "prompts, for a model")
    given = [*given_responses(settings)]
    if settings.judged:
        read_judged(settings.judged)
    if not settings.model:
        return Inputs(given, None, [], [])
    responder = Responder(settings.model, **options_of(settings))
    return Inputs(given, responder, *read_prompts(settings, responder))


def fill(store: Store, settings: FeedbackExperiment, inputs: Inputs, workdir: Path) -> dict[str, int]:
    """Puts everything that is to be judged into the store; what a kill left half done is done again, and is the same.

    Returns:
        How many items there are of each kind, and how many prompts have no two responses that differ.
    """
    answered = inputs.given + sampled_responses(settings, inputs, workdir / "responses.jsonl")
    items, skipped = make_items(answered, settings.kind, settings.scale)
    check("items", len(items), bool(items or settings.judged), "at least one prompt with responses that differ")
    store.add_items(items)
    if settings.judged:
        imported = import_rows(store, settings.judged)
        print(
            f"imported: {imported.judgements:,} judgements ({imported.repeated:,} repeated ones left out)", flush=True
        )
    counts = Counter(item.kind for item in dict.fromkeys(items))
    told = ", ".join(f"{count:,} to {kind}" for kind, count in counts.items()) or "none"
    print(f"items: {told} ({skipped:,} prompts left out: all their responses are equal)", flush=True)
    return {**counts, "skipped": skipped}


def given_responses(settings: FeedbackExperiment) -> Iterator[Answered]:
    """The rows of `settings.responses`.

    Raises:
        DataError: a row without a text `prompt` and texts in `completions`.
    """
    if not settings.responses:
        return
    least, most = {"compare": (2, 2), "rank": (2, math.inf)}.get(settings.kind, (1, math.inf))
    for number, row in enumerate(load_rows(settings.responses, settings.responses_split), start=1):
        where = f"{settings.responses}: row {number}"
        prompt, texts = row.get("prompt"), row.get("completions")
        if not (isinstance(prompt, str) and isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
            columns = ", ".join(row) or "none"
            raise DataError(
                f"{where}: got columns {columns}, expected a text in prompt, a list of texts in completions"
            )
        expected = f"{least}{'' if most == least else ' or more'}, with kind={settings.kind}"
        check(f"{where}: completions", len(texts), least <= len(texts) <= most, expected)
        yield prompt, texts, ""


def sampled_responses(settings: FeedbackExperiment, inputs: Inputs, path: Path) -> list[Answered]:
    """Samples responses to all prompts, and keeps them in a file as they come; what is there already is read.

    Args:
        settings: see `FeedbackExperiment`.
        inputs: with the model and its prompts, if there is one.
        path: JSONL; its rows are `prompt` and `completions`.
    """
    if inputs.responder is None:
        return []
    total, size = len(inputs.prompts), settings.batch_size
    done = len(read_jsonl(path)) if path.exists() else 0
    with JsonlWriter(path) as writer:
        for start in range(done // size * size, total, size):
            # In parts that do not depend on where a restart began, each with a seed of its own.
            part = slice(start, start + size)
            answers = inputs.responder.respond(inputs.prompts[part], settings.num_responses, settings.seed + start)
            for prompt, completions in list(zip(inputs.texts[part], answers, strict=True))[max(done - start, 0) :]:
                writer.write({"prompt": prompt, "completions": completions})
            now = min(part.stop, total)
            if now == total or now * 8 // total > start * 8 // total:  # about eight times
                print(f"sampled: {now:,} of {total:,} prompts", flush=True)
    rows = read_jsonl(path)
    if [row.get("prompt") for row in rows] != inputs.texts:
        raise InputError(f"{path}: its prompts are not those of {settings.prompts}; expected those of the first start")
    return [(row["prompt"], row["completions"], settings.model) for row in rows]


def read_prompts(settings: FeedbackExperiment, responder: Responder) -> tuple[list[Prompt], list[str]]:
    """The prompts that fit, as the model gets them and as people read them."""
    prompts: list[Prompt] = []
    dropped = 0
    how = (settings.prompts_split, [responder.tokenizer], settings.prompt_length, settings.long_prompts)
    for asked in fitted(settings.prompts, *how):
        if asked.prompt is None:
            dropped += 1
            continue
        prompts.append(asked.prompt)
        if len(prompts) == settings.num_prompts:
            break
    expected = f"at least one of at most {settings.prompt_length} tokens ({dropped} are longer); config.long_prompts"
    check(f"{settings.prompts}: prompts", len(prompts), bool(prompts), expected)
    texts = [p if isinstance(p, str) else render_chat(responder.tokenizer, p) for p in prompts]
    return prompts, texts


def make_items(answered: list[Answered], kind: str, scale: int) -> tuple[list[Item], int]:
    """What is asked about responses; between equal ones there is nothing to choose.

    Args:
        answered: prompts and responses.
        kind: see `FeedbackExperiment.kind`.
        scale: best score of an item that is scored.

    Returns:
        (the items, how many prompts were left out since all their responses are equal).
    """
    items, skipped = [], 0
    for prompt, responses, source in answered:
        what = kind if kind != "auto" else {1: "score", 2: "compare"}.get(len(responses), "rank")
        distinct = tuple(dict.fromkeys(responses))
        if what == "score":
            items += [Item("score", prompt, (text,), (source,) * bool(source), scale) for text in distinct]
        elif len(distinct) == 1:
            skipped += 1
        else:
            items.append(Item(what, prompt, distinct, (source,) * len(distinct) * bool(source)))
    return items, skipped


def serve_until_complete(store: Store, host: str = "127.0.0.1", port: int = 8000, token: str = "") -> None:
    """Serves the labelling page until everything is judged; at once when it is already.

    Args:
        store: what is asked, and where answers go.
        host: see `ppo_jax.feedback.page.serve`, as for the others.
        port: 0 for any that is free.
        token: "" for none.

    Raises:
        InputError: see `ppo_jax.feedback.page.serve`.
        KeyboardInterrupt: after Ctrl-C; what was judged is saved.
    """
    if not store.complete():
        _serve(store, host, port, token, until_complete=True)


def _serve(store: Store, host: str, port: int, token: str, until_complete: bool) -> None:
    told, complete_since = None, None

    def until() -> bool:
        nonlocal told, complete_since
        progress = store.progress("anybody")
        if progress != told:
            told = progress
            print(f"judged: {progress.total_judged:,} of {progress.total_needed:,}", flush=True)
        if not (until_complete and store.complete()):
            complete_since = None
            return False
        complete_since = complete_since or time.monotonic()
        return time.monotonic() - complete_since >= FAREWELL_S

    def announce(address: str) -> None:
        print(f"open {address}", "until all is judged" if until_complete else "(Ctrl-C ends)", flush=True)

    serve(store, host, port, token, until=until, announce=announce)


def main(settings: FeedbackExperiment, workdir: Path) -> None:
    """Collects, serves, and writes what was judged, however it ends."""
    check_installed()
    with collect(settings, workdir) as store:
        # A polite kill ends as Ctrl-C does, and not at once.
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            if settings.until_complete:
                serve_until_complete(store, settings.host, settings.port, settings.token)
            else:
                _serve(store, settings.host, settings.port, settings.token, until_complete=False)
        except KeyboardInterrupt:
            if settings.until_complete:
                raise
        finally:
            signal.signal(signal.SIGTERM, before)
            for name in export_names(settings.export):
                path = workdir / f"{name}.jsonl"
                print(f"{path}: {write_export(store, path, name):,} rows", flush=True)


def dry_run(settings: FeedbackExperiment) -> None:
    """Refused: nothing is trained."""
    raise InputError(
        "--dry_run: collecting feedback trains nothing; train_ppo.py --dry_run plans the sampling of the same model"
    )


if __name__ == "__main__":
    cli.launch(FeedbackExperiment, main, dry_run)
