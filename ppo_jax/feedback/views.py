"""The pages of the labelling page: what is shown, what a form means. Plain functions, run off the event loop."""

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from ppo_jax.feedback.agreement import agreement
from ppo_jax.feedback.formats import EXPORTS, export
from ppo_jax.feedback.guard import Guard, Session, set_cookie
from ppo_jax.feedback.items import check_name
from ppo_jax.feedback.store import FeedbackError, Shown, Store

FOLDER = Path(__file__).parent
REASONS = {
    404: "There is nothing at this address.",
    405: "This address does not take that kind of request.",
    500: "Something went wrong; the terminal of the server says what. What was saved before is safe.",
}


class Page:
    """The labelling page over a store; its methods answer requests, each in a thread of its own."""

    def __init__(self, store: Store, title: str):
        self._store, self._title = store, title
        self._templates = jinja2.Environment(
            loader=jinja2.FileSystemLoader(FOLDER / "templates"),
            autoescape=True,  # a response is text, whatever is in it
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )

    def html(self, template: str, status: int = 200, session: Session | None = None, **values: Any) -> HTMLResponse:
        """A page from a template."""
        values |= {"title": self._title, "session": session, "status": status}
        text = self._templates.get_template(template).render(values)
        return HTMLResponse(text, status)

    def error(self, status: int, reason: str) -> HTMLResponse:
        """A page that says what is wrong, and leads back."""
        return self.html("error.html", status, reason=reason)

    def entrance(self) -> HTMLResponse:
        """Leads on to the start."""
        return self.html("entrance.html")

    def start(self, request: Request) -> Response:
        """Asks for a name."""
        return self._ask_name(request)

    def _ask_name(self, request: Request, status: int = 200, error: str = "", name: str = "") -> Response:
        session = request.scope["session"] or Session.new()
        response = self.html("start.html", status, session, error=error, name=name or session.annotator)
        set_cookie(request, response, "session", session.cookie)
        return response

    def enter(self, request: Request) -> Response:
        """Takes a name, and goes on to the first item."""
        name = request.scope["form"].get("name", "")
        try:
            session = Session.new(check_name(" ".join(name.split())))
        except FeedbackError as error:
            return self._ask_name(request, 422, str(error), name[:200])
        response = _see("/judge")
        set_cookie(request, response, "session", session.cookie)
        return response

    def item(self, request: Request) -> Response:
        """Shows the item that the annotator judges next."""
        session = request.scope["session"]
        return self._show(session, self._store.next_item(session.annotator), {})

    def _show(
        self, session: Session, shown: Shown | None, form: dict[str, str], status: int = 200, error: str = ""
    ) -> Response:
        progress = self._store.progress(session.annotator)
        template = "item.html" if shown else "done.html"
        return self.html(template, status, session, shown=shown, progress=progress, form=form, error=error)

    def judge(self, request: Request) -> Response:
        """Takes a judgement, and goes on to the next item; the same form a second time changes nothing."""
        session, form, item_id = request.scope["session"], request.scope["form"], _whole(request.path_params["item"])
        token = form.get("form", "")
        comment = form.get("comment", "").replace("\r\n", "\n")  # as it was typed
        try:
            self._store.judge(session.annotator, item_id, token, comment=comment, **_verdict(form))
        except FeedbackError as error:
            shown = self._store.next_item(session.annotator)
            if shown is None or (shown.item_id, shown.form_token) != (item_id, token):
                return self.html("error.html", 404, session, reason=str(error))
            return self._show(session, shown, form | {"comment": comment}, 422, str(error))
        return _see("/judge")

    def undo(self, request: Request) -> Response:
        """Withdraws the judgement that the button stood for, and shows its item again."""
        self._store.undo(request.scope["session"].annotator, _whole(request.scope["form"].get("judgement", "")))
        return _see("/judge")

    def agreement(self, request: Request) -> Response:
        """How far annotators agree."""
        return self.html("agreement.html", 200, request.scope["session"], report=agreement(self._store))

    def exports(self, request: Request) -> Response:
        """What can be downloaded."""
        counts = {kind: len(export(self._store, kind)) for kind in EXPORTS}
        return self.html("export.html", 200, request.scope["session"], counts=counts)

    def download(self, request: Request) -> Response:
        """All judgements in one of the formats, a JSON object a line."""
        kind = request.path_params["kind"]
        if kind not in EXPORTS:
            raise HTTPException(404)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in export(self._store, kind))
        headers = {"content-disposition": f'attachment; filename="{quote(kind)}.jsonl"'}
        return Response(text, media_type="application/jsonl; charset=utf-8", headers=headers)


def build(store: Store, token: str | None, title: str) -> Guard:
    """The application; see `ppo_jax.feedback.page.make_app`."""
    page = Page(store, title)

    def http_error(_: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            return page.error(500, REASONS[500])
        response = page.error(error.status_code, REASONS.get(error.status_code, error.detail))
        response.headers.update(error.headers or {})
        return response

    def store_error(_: Request, error: Exception) -> Response:
        return page.error(500, str(error))

    app = Starlette(
        routes=[
            Route("/", page.start),
            Route("/start", page.enter, methods=["POST"]),
            Route("/judge", _named(page.item)),
            Route("/judge/{item}", _named(page.judge), methods=["POST"]),
            Route("/undo", _named(page.undo), methods=["POST"]),
            Route("/agreement", page.agreement),
            Route("/export", page.exports),
            Route("/export/{kind}.jsonl", page.download),
            Mount("/static", StaticFiles(directory=FOLDER / "static")),
        ],
        exception_handlers={HTTPException: http_error, FeedbackError: store_error, Exception: http_error},
    )
    return Guard(app, token, page.error, page.entrance)


def _named(endpoint: Callable[[Request], Response]) -> Callable[[Request], Response]:
    """Sends whoever has no name yet to the start."""

    def answer(request: Request) -> Response:
        session = request.scope["session"]
        return endpoint(request) if session and session.annotator else _see("/")

    return answer


def _see(path: str) -> Response:
    """A form is answered with another page to look at, so that a reload sends nothing twice."""
    return RedirectResponse(path, status_code=303)


def _verdict(form: dict[str, str]) -> dict[str, Any]:
    """What the pressed button and the filled fields say, as arguments of `Store.judge`."""
    choice = form.get("choice", "")
    if choice == "bad":
        return {"both_bad": True}
    if choice == "tie":
        return {"ranks": [1, 1]}
    if choice in ("1", "2"):
        return {"ranks": [1, 2] if choice == "1" else [2, 1]}
    if "score" in form:
        return {"score": _whole(form["score"])}
    places = itertools.takewhile(form.__contains__, (f"rank_{place}" for place in itertools.count(1)))
    return {"ranks": [_whole(form[place]) for place in places]}


def _whole(text: str) -> int:
    """The number; 0, which nothing takes for a rank, a score or an id, for all that is none."""
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else 0
