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
from vqa_scratch.commands.line import DEVICE, FOLDER, PRECISION, open_ears, open_latest
from vqa_scratch.errors import UserError

PORT = 8321  # unless it is taken
HERE, WHERE = ("127.0.0.1", "localhost"), "Server"


@click.command(
    "play",
    cls=GroupedCommand,
    params=[
        click.Argument(["runs"], type=FOLDER, nargs=-1, metavar="[RUN] [RUN2]"),
        Flag(["--model"], help="Instead of a RUN: a released BLIP-2, LLaVA, Fuyu or Idefics, a folder or Hub id."),
        Flag(["--voice-model"], help="What hears spoken questions: a run of preset voice, or a Whisper."),
        Flag(["--host"], default=HERE[0], help="Address to serve; others may come to another than this.", group=WHERE),
        Flag(["--port"], type=click.IntRange(0, 65535), help="A free one if it is taken.", shown=PORT, group=WHERE),
        Flag(["--browser/--no-browser"], default=True, help="Open the page.", group=WHERE),
        DEVICE,
        PRECISION,
    ],
)
def play(
    runs: tuple[Path, ...],
    model: str | None,
    voice_model: str | None,
    host: str,
    port: int | None,
    browser: bool,
    **how: str,
) -> None:
    """Serve a page that shows the run in the folder RUN while it answers; with RUN2, two side by side.

    \b
    Examples:
      python -m vqa_scratch play                      # the newest run below runs/
      python -m vqa_scratch play runs/vqa runs/prefix
      python -m vqa_scratch play --model ./llava-1.5
    A run that is still training is shown with its last checkpoint, and its curves as they grow.
    """
    try:
        import starlette, uvicorn  # noqa: E401, F401, I001
    except ImportError:
        raise UserError("play needs starlette and uvicorn: pip install 'vqa-scratch[play]'") from None
    import torch

    from vqa_scratch.play.models import Played
    from vqa_scratch.play.server import Play, Server
    from vqa_scratch.study.opened import run_name
    from vqa_scratch.systems.run_folder import newest_run
    from vqa_scratch.training.precision import pick_device
    from vqa_scratch.zero_shot import open_zero_shot

    if len(runs) + (model is not None) > 2:
        raise UserError("the page shows one model, or two side by side")
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))  # one core is the browser's
    bound, hosts = bind(host, port)
    runs = runs or ((newest_run(Path("runs")),) if model is None else ())
    opens: list[tuple[str, Any, Path | None]] = [(run_name(run), partial(open_latest, run, **how), run) for run in runs]
    if model is not None:
        place = pick_device(how["device"])
        opens.append((run_name(Path(model)), lambda: (open_zero_shot(model, place, how["precision"]), None), None))
    same = len({name for name, _, _ in opens}) < len(opens)
    models = [Played(f"{name} {i}" if same else name, *more) for i, (name, *more) in enumerate(opens, 1)]
    ears = None if voice_model is None else open_ears(voice_model, **how)
    token = None if host in HERE else secrets.token_urlsafe(16)
    if token is not None:
        print("warning: whoever learns this address can use the page; nothing is encrypted on the way", file=sys.stderr)
    address = f"http://{hosts[0]}/" + (f"?token={token}" if token else "")
    print(f"{' and '.join(played.name for played in models)}: {address} (Ctrl-C ends)", flush=True)
    if browser:
        threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
    Server(Play(models, ears, None if host == "0.0.0.0" else hosts, token)).run(sockets=[bound])


def bind(host: str, port: int | None) -> tuple[socket.socket, list[str]]:
    """A socket that listens, and the names that a browser may call it by. Raises UserError if there is none."""
    try:
        bound = socket.create_server((host, PORT if port is None else port), backlog=1024)
        return bound, [f"{name}:{bound.getsockname()[1]}" for name in (HERE if host in HERE else (host,))]
    except OSError as error:
        if port is None:
            return bind(host, 0)
        raise UserError(f"cannot serve at {host}:{port}: {error.strerror}; give another --host or --port") from None
