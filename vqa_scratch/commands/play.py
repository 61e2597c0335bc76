"""`play`: a live page that shows a model while it answers, and lets a hand change it."""

import secrets
import socket
import sys
import threading
import webbrowser
from functools import partial
from pathlib import Path
from typing import Any

import click

from vqa_scratch.command_line import Flag, GroupedCommand
from vqa_scratch.commands.line import DEVICE, FOLDER, MODEL, PRECISION, open_asked
from vqa_scratch.errors import UserError

PORT = 8321  # unless it is taken
HERE, WHERE = ("127.0.0.1", "localhost", "[::1]"), "Server"


@click.command(
    "play",
    cls=GroupedCommand,
    params=[
        click.Argument(["runs"], type=FOLDER, nargs=-1, metavar="[RUN] [RUN2]"),
        MODEL,
        Flag(["--host"], default=HERE[0], help="Address to serve; others may come to another than this.", group=WHERE),
        Flag(["--port"], type=click.IntRange(0, 65535), help="Else a free one if it is taken.", shown=PORT, group=WHERE),
        Flag(["--browser/--no-browser"], default=True, help="Open the page.", group=WHERE),
        DEVICE,
        PRECISION,
    ],
)
def play(runs: tuple[Path, ...], model: str | None, host: str, port: int | None, browser: bool, **how: str) -> None:
    """Serve a page that shows the run in the folder RUN while it answers; with RUN2, two side by side.

    \b
    Examples:
      python -m vqa_scratch play                      # the newest run below runs/
      python -m vqa_scratch play runs/vqa runs/prefix
      python -m vqa_scratch play --model ./llava-1.5
    A run that is still training is shown with its last checkpoint, and its curves as they grow.
    """
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise UserError("play needs starlette and uvicorn: pip install 'vqa-scratch[play]'") from None
    if len(runs) + (model is not None) > 2:
        raise UserError("the page shows one model, or two side by side")
    if not runs and model is None:
        runs = (newest(Path("runs")),)
    bound, hosts = bind(host, port)
    from vqa_scratch.play.models import Played
    from vqa_scratch.play.server import Server
    from vqa_scratch.study.opened import run_name

    opens: list[tuple[str, Any, Path | None]] = [(run_name(run), partial(open_run, run, **how), run) for run in runs]
    if model is not None:
        opens.append((run_name(Path(model)), lambda: (open_asked(None, model, **how), None), None))
    models = [Played(str(number), *one) for number, one in enumerate(opens)]
    token = None if host in HERE else secrets.token_urlsafe(16)
    if token is not None:
        print("warning: whoever learns this address can use the page; nothing is encrypted on the way", file=sys.stderr)
    address = f"http://{hosts[0]}/" + (f"?token={token}" if token else "")
    print(f"{' and '.join(played.name for played in models)}: {address} (Ctrl-C ends)", flush=True)
    if browser:
        threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
    Server(models, None if host in ("0.0.0.0", "::") else hosts, token).run(sockets=[bound])


def open_run(folder: Path, device: str, precision: str) -> tuple[Any, int | None]:
    """A run with the newest of its weights, and their step."""
    from vqa_scratch import systems
    from vqa_scratch.commands.study_files import run_folder
    from vqa_scratch.training.precision import pick_device

    return systems.load_latest(run_folder(folder), pick_device(device), precision)


def newest(folder: Path) -> Path:
    """The run below a folder that changed last. Raises UserError if there is none with weights."""
    found = [path for name in ("model.safetensors", "checkpoints/last.pt") for path in folder.glob(f"*/{name}")]
    if not found:
        raise UserError(f"there is no run below {folder}/: give RUN, or --model, or train one: python train.py")
    last = max(found, key=lambda path: path.stat().st_mtime)
    return last.parent if last.suffix == ".safetensors" else last.parent.parent


def bind(host: str, port: int | None) -> tuple[socket.socket, list[str]]:
    """A socket that listens, and the names that a browser may call it by. Raises UserError if there is none."""
    family, why = socket.AF_INET6 if ":" in host else socket.AF_INET, ""
    for wanted in [PORT, 0] if port is None else [port]:
        try:
            bound = socket.create_server((host.strip("[]"), wanted), family=family, backlog=1024)
            names = HERE if host in HERE else (f"[{host}]" if ":" in host else host,)
            return bound, [f"{name}:{bound.getsockname()[1]}" for name in names]
        except OSError as error:
            why = error.strerror or str(error)
    raise UserError(f"cannot serve at {host}, port {port or PORT}: {why}; give another --host or --port")
