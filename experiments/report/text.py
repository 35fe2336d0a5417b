"""Templates of the report, and how text that anybody may have written becomes text in HTML and in Markdown."""

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

# Control characters but newline and tab, lone surrogates, and what turns the direction of all that follows.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
# An underscore ends emphasis only where no letter follows; an address would become a link.
_MARKUP = re.compile(r"[\\`*\[\]|~$]|_(?![^\W_])|:(?=//)|(?<=www)\.", re.IGNORECASE)
_HTML_IN_MARKDOWN = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "\n": "<br>", "\t": " "})


class Verbatim(str):
    """Text that stands in Markdown as it is, in a block of code."""


def visible(value: Any) -> str:
    r"""Text in which what does not show, or changes how the rest shows, is written as in Python: `\x1b`, `\u202e`."""
    text = str(value).replace("\r\n", "\n")
    return _HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def markdown(value: Any) -> str:
    """Text that Markdown, also in a table, shows as it is: no markup, no HTML, no links; a line ends with `<br>`."""
    text = visible(value)
    return text if isinstance(value, Verbatim) else _MARKUP.sub(r"\\\g<0>", text).translate(_HTML_IN_MARKDOWN)


def _environment(**settings: Any) -> Environment:
    folder = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(
        loader=folder, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        **settings,
    )  # fmt: skip
    environment.filters["verbatim"] = Verbatim
    return environment


# Whatever a template prints goes through `finalize`, so that no place can be forgotten. HTML is escaped after it.
HTML = _environment(finalize=visible, autoescape=True).get_template("report.html.j2")
MARKDOWN = _environment(finalize=markdown).get_template("report.md.j2")
