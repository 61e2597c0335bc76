"""The server: one page, its modules, and JSON. It answers this machine alone, and only to its own page.

Every request names the host that the server is known by (a page of another name that is pointed here, DNS rebinding,
does not), comes from the server's own page if a browser says where it comes from, and carries the token if there is
one. What is posted is JSON of limited size, so no form of another page can send it.
"""

import asyncio
import re
import secrets
import socket
import weakref
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from importlib.resources import files
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from vqa_scratch.audio.reading import read_wav
from vqa_scratch.data.placed import editor
from vqa_scratch.errors import UserError
from vqa_scratch.play import answers
from vqa_scratch.play.models import Played
from vqa_scratch.play.worker import Job
from vqa_scratch.storage import parse_json, typed
from vqa_scratch.transcription import Transcriber

LARGEST_BODY, MOST_SCENES = 12_000_000, 60  # bytes: an upload of 8 MB in base64
FOLDERS = {"page": "vqa_scratch.play", "study": "vqa_scratch.study"}  # whose folder page/ is served
KINDS = {"js": "text/javascript", "css": "text/css", "html": "text/html", "svg": "image/svg+xml"}
JSON, NDJSON = "application/json", "application/x-ndjson"
POSTED = {
    **dict.fromkeys((answers.ask, answers.heads), NDJSON),
    **dict.fromkeys((answers.study, answers.number), JSON),
    answers.report: "text/html",
}
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self'; media-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


async def refusal(request: Request, error: Exception) -> Response:
    """What is wrong with a request, in a line of JSON."""
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code)
    return JSONResponse({"error": str(error)}, 400)


async def body_of(request: Request) -> bytes:
    """What is posted. Raises HTTPException for too much of it, or for no length, as no browser sends."""
    if not 0 <= int(request.headers.get("content-length", -1)) <= LARGEST_BODY:
        raise HTTPException(413, f"a request has at most {LARGEST_BODY:,} bytes; make the picture smaller")
    return await request.body()


class Lines(Response):
    """The lines of a job as they come. If the browser goes, the job stops."""

    def __init__(self, job: Job, kind: str) -> None:
        self.job, self.kind = job, kind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self.job.stop()

        watching = asyncio.create_task(watch())
        try:
            line = await self.job.lines.get()
            wrong = line is not None and line.startswith('{"error":')
            kind = f"{JSON if wrong else self.kind}; charset=utf-8".encode()
            head = {"status": 400 if wrong else 200, "headers": [(b"content-type", kind)]}
            await send({"type": "http.response.start"} | head)
            while line is not None:
                await send({"type": "http.response.body", "body": line.encode(), "more_body": True})
                line = await self.job.lines.get()
            await send({"type": "http.response.body", "body": b""})
        finally:
            watching.cancel()
            self.job.stop()


class Play:
    """The answers to every path, for one or two models; `ears` hear spoken questions.

    `hosts` are the names that the server is known by, with its port; None: any, for one that only has a `token`.
    """

    def __init__(
        self, models: Sequence[Played], ears: Transcriber | None, hosts: Sequence[str] | None, token: str | None
    ) -> None:
        self.models, self.hosts, self.token = {played.name: played for played in models}, hosts, token
        self.ears = ears or next((played.ears for played in models if played.ears is not None), None)
        self.jobs = weakref.WeakSet[Job]()

    def guarded(self, endpoint: Callable[..., Awaitable[Response]]) -> Callable[..., Awaitable[Response]]:
        """The endpoint, for requests from the server's own page alone; it raises HTTPException for others."""

        async def guarded(request: Request) -> Response:
            headers, path = request.headers, request.url.path
            host, origin, api = headers.get("host", "").lower(), headers.get("origin"), path.startswith("/api/")
            if self.hosts is not None and host not in self.hosts:
                raise HTTPException(403, f"this server is not known as {host!r}")
            # Anybody may link to the page.
            own = not api or headers.get("sec-fetch-site", "none") in ("same-origin", "none")
            if not own or (origin is not None and origin.lower() != f"http://{host}"):
                raise HTTPException(403, "this server answers to its own page alone")
            given, token = request.query_params.get("token", ""), self.token or ""
            if (api or path == "/") and token and not secrets.compare_digest(given.encode(), token.encode()):
                raise HTTPException(403, "the address needs its token, as the terminal shows it: /?token=...")
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            wanted = "audio/wav" if path == "/api/voice" else JSON
            if request.method == "POST" and kind != wanted:
                raise HTTPException(415, f"what is posted must be {wanted}, not {kind or 'of no type'}")
            return await endpoint(request)

        return guarded

    def played(self, name: Any) -> Played:
        """The model that a request names."""
        if name not in self.models:
            raise UserError(f"there is no model {name!r}; there are {', '.join(self.models)}")
        return self.models[name]

    async def file(self, request: Request, folder: str) -> Response:
        """The page, one of its modules, or one of those that draw a study."""
        name = request.path_params.get("name", "index.html")
        found, path = re.fullmatch(r"[a-z0-9_-]+\.([a-z]+)", name), files(FOLDERS[folder]).joinpath("page", name)
        if found is None or found[1] not in KINDS or not path.is_file():
            raise HTTPException(404, f"there is no {request.url.path}")
        return Response(path.read_bytes(), media_type=KINDS[found[1]])

    async def got(self, request: Request) -> Response:
        """What needs no state: the models, what draws a scene, unseen scenes, the rows of a log."""
        name = request.path_params["name"]
        if name == "models":
            return JSONResponse([one.described() | {"voice": self.ears is not None} for one in self.models.values()])
        if name == "shapes":
            return JSONResponse(editor())
        if name not in ("scenes", "training"):
            raise HTTPException(404, f"there is no {request.url.path} to get")
        played = self.played(request.query_params.get("model"))
        if name == "training":  # the thread looks for newer weights meanwhile
            self._answer(played, lambda job: iter(()), JSON)
            return JSONResponse(played.training(number_in(request, "after", 0)))
        many, seed = min(number_in(request, "n", 12), MOST_SCENES), number_in(request, "seed", 0)
        one, some = request.query_params.get("id"), played.pictures
        return self._answer(played, lambda job: iter([[some.scene(one)] if one else some.scenes(many, seed)]), JSON)

    async def asked(self, request: Request, work: Callable[..., Iterator[Any]], kind: str) -> Response:
        """What a model says to a state."""
        state = parse_json((await body_of(request)).decode(errors="replace"), "the request")
        (name,) = typed("the request", state, {"model": str})
        played = self.played(name)
        return self._answer(played, lambda job: work(played, state, job), kind, in_pieces=work is answers.heads)

    async def heard(self, request: Request) -> Response:
        """The words of a question that was asked aloud."""
        if (ears := self.ears) is None:
            raise HTTPException(404, "nothing here hears: start with --voice-model")
        data, played = await body_of(request), next(iter(self.models.values()))
        return self._answer(played, lambda job: iter([{"text": ears.words(read_wav(data, "the recording"))}]), JSON)

    def _answer(self, played: Played, work: Callable[[Job], Any], kind: str, in_pieces: bool = False) -> Response:
        def fresh(job: Job) -> Iterator[Any]:
            played.refresh()
            yield from work(job)

        job = Job(fresh, in_pieces=in_pieces)
        self.jobs.add(job)
        played.worker.add(job)
        return Lines(job, kind)

    def app(self) -> ASGIApp:
        """All paths."""
        got: dict[str, Callable[..., Awaitable[Response]]] = {"/": partial(self.file, folder="page")}
        got |= {f"/{folder}/{{name}}": partial(self.file, folder=folder) for folder in FOLDERS}
        posted: dict[str, Any] = {"/api/voice": self.heard}
        posted |= {f"/api/{work.__name__}": partial(self.asked, work=work, kind=kind) for work, kind in POSTED.items()}
        routes = [Route(path, self.guarded(endpoint), methods=["POST"]) for path, endpoint in posted.items()]
        routes += [Route(path, self.guarded(endpoint)) for path, endpoint in (got | {"/api/{name}": self.got}).items()]
        wrong: Any = dict.fromkeys((HTTPException, UserError, ClientDisconnect), refusal)
        return Starlette(routes=routes, exception_handlers=wrong)


def number_in(request: Request, name: str, default: int) -> int:
    """A whole number of the address. Raises UserError for anything else."""
    text = request.query_params.get(name, str(default))
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise UserError(f"{name} is a whole number of at most nine digits, not {text!r}")
    return int(text)


class Server(uvicorn.Server):
    """Serves until Ctrl-C, which ends it at once: open answers end first, since uvicorn would wait for them."""

    def __init__(self, play: Play) -> None:
        self.play = play
        quiet: dict[str, Any] = {"lifespan": "off", "ws": "none", "access_log": False, "log_level": "critical"}
        quiet |= {"server_header": False, "timeout_graceful_shutdown": 1, "headers": list(HEADERS.items())}
        super().__init__(uvicorn.Config(play.app(), **quiet))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for job in self.play.jobs:
            job.stop()
        await super().shutdown(sockets)
        for played in self.play.models.values():
            played.worker.close()
