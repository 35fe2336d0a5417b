"""What a run shows on the terminal: a progress line, and now and then a table of prompts and responses."""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Column, Table
from rich.text import Text

PPO_COLUMNS = (
    ("score", "objective/score", ".3f"),
    ("KL", "objective/kl", ".2f"),
    ("tokens/s", "time/tokens_per_s", ",.0f"),
)
_RECENT_ITERATIONS = 10  # the time left is told from these
_WIDTH_OF_A_LOG = 120  # characters
_WIDTH_FOR_A_BAR = 90


class Reporter:
    """Shows how a run goes: a live progress line on a terminal, one plain line an iteration everywhere else.

    Everywhere else is a pipe, a log file, CI, a notebook. Use it as a context manager; what is printed meanwhile (also
    by `print` and by loggers) appears above the live line. Texts are shown as they are: never read as markup, control
    characters escaped as in Python, and what the output's encoding cannot show replaced by `?`.

    Args:
        total_iterations: iterations of the whole run.
        start_iteration: iterations already done when this process began (a resumed run).
        columns: (label, key of the metrics, format specification) of each number shown; a missing metric shows as `-`.
        label: what an iteration is called.
        console: where to print; standard output when None.
        live: whether to show the live line; None finds out.
        clock: seconds, rising; only differences count.
    """

    def __init__(
        self,
        total_iterations: int,
        start_iteration: int = 0,
        columns: Sequence[tuple[str, str, str]] = PPO_COLUMNS,
        *,
        label: str = "iteration",
        console: Console | None = None,
        live: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total_iterations = total_iterations
        self.start_iteration = start_iteration
        self.columns = tuple(columns)
        self.label = label
        self.console = _make_console() if console is None else console
        self.live = _is_live(self.console) if live is None else live
        self._clock = clock
        self._ends: deque[tuple[int, float]] = deque(maxlen=_RECENT_ITERATIONS + 1)
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> "Reporter":
        if self.live:
            self._progress = _make_progress(self.console)
            self._task = self._progress.add_task(
                self.label, total=self.total_iterations, completed=self.start_iteration, numbers=""
            )
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def update(self, iteration: int, metrics: Mapping[str, float | None]) -> None:
        """Shows the metrics of an iteration that has ended.

        Args:
            iteration: its number, the first one is 0; shown as "1/40".
            metrics: of which the chosen columns are shown.
        """
        done = iteration + 1
        self._ends.append((done, self._clock()))
        numbers = [f"{label} {_number(metrics.get(key), spec)}" for label, key, spec in self.columns]
        numbers.append(f"left {_duration(self._seconds_left(done))}")
        line = _visible("  ".join(numbers), self.console.encoding)
        if self._progress is not None:
            self._progress.update(self._task, completed=done, numbers=line, refresh=True)
        else:
            width = len(str(self.total_iterations))
            self.print(f"{self.label} {done:{width}}/{self.total_iterations}  {line}")

    def print(self, text: str) -> None:
        """Prints a text as it is, above the live line when there is one."""
        lines = [_visible(line, self.console.encoding) for line in text.split("\n")]
        self.console.print(Text("\n".join(lines)), soft_wrap=True)

    def samples_table(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        scores: Sequence[float] | None = None,
        *,
        title: str = "",
        max_rows: int = 4,
        max_chars: int = 240,
    ) -> None:
        """Prints a few prompts with their responses and scores.

        Args:
            prompts: texts; of a long one the end is shown, where the response goes on.
            responses: texts; of a long one the beginning is shown.
            scores: the judge's, left out when None.
            title: printed above the table.
            max_rows: the first so many rows are shown.
            max_chars: characters shown of a response, half as many of a prompt; an escaped one counts once.

        Raises:
            ValueError: the lengths differ.
        """
        lengths = [len(texts) for texts in (prompts, responses, scores) if texts is not None]
        if len(set(lengths)) != 1:
            raise ValueError(f"prompts, responses and scores: expected as many of each, got {lengths}")
        encoding = self.console.encoding
        table = Table(
            Column("prompt", ratio=2, overflow="fold"),
            Column("response", ratio=3, overflow="fold"),
            title=Text(_visible(title, encoding), style="bold") if title else None,
            title_justify="left",
            box=box.HORIZONTALS,
            show_lines=True,
            expand=True,
        )
        if scores is not None:
            table.add_column("score", justify="right", no_wrap=True)
        for i in range(min(max_rows, len(prompts))):
            prompt, response = prompts[i], responses[i]
            if len(prompt) > max_chars // 2:
                prompt = "..." + prompt[-(max_chars // 2) :]
            if len(response) > max_chars:
                response = response[:max_chars] + "..."
            row = [Text(_visible(prompt, encoding)), Text(_visible(response, encoding))]
            table.add_row(*row, *([] if scores is None else [_number(scores[i], ".3f")]))
        self.console.print(table)

    def _seconds_left(self, done: int) -> float | None:
        """From the pace of the last updates; None after the first one, which may compile and tells nothing."""
        if len(self._ends) < 2:
            return 0.0 if done >= self.total_iterations else None
        (first, began), (last, ended) = self._ends[0], self._ends[-1]
        pace = (ended - began) / max(1, last - first)  # an update may come every tenth iteration
        return pace * max(0, self.total_iterations - done)


def _make_console() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal and not console.is_jupyter:
        console = Console(highlight=False, width=_WIDTH_OF_A_LOG)
    return console


def _is_live(console: Console) -> bool:
    # Not console.is_terminal: FORCE_COLOR makes it true in CI logs, where a live line is hundreds of lines.
    return console.file.isatty() and not console.is_dumb_terminal and not console.is_jupyter


def _make_progress(console: Console) -> Progress:
    text = "{task.description} {task.completed:.0f}/{task.total:.0f}  {task.fields[numbers]}"
    line = TextColumn(text, markup=False, table_column=Column(no_wrap=True, overflow="crop"))
    bar = (BarColumn(bar_width=16),) if console.width >= _WIDTH_FOR_A_BAR else ()
    # Two frames a second are enough to show that the program lives; the cores belong to the training.
    return Progress(SpinnerColumn("line"), *bar, line, console=console, refresh_per_second=2)


def _number(value: Any, spec: str) -> str:
    return "-" if value is None else format(float(value), spec)


def _duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return "-:--"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def _visible(text: str, encoding: str) -> str:
    """Escapes what does not print (control characters, odd spaces, changes of direction); fits the encoding."""
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return escaped.encode(encoding, "replace").decode(encoding)
