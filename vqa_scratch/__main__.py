"""Use what `train.py` has trained:  python -m vqa_scratch COMMAND --help"""

import sys

from vqa_scratch.command_line import run_program
from vqa_scratch.commands.line import CommandGroup, call

PROGRAM = CommandGroup(
    "vqa_scratch",
    ["ask", "retrieve", "transcribe", "speak", "evaluate", "study", "play", "export", "convert", "data"],
    help="Use what train.py has trained. Training itself is `python train.py`, and feedback `python rlhf.py`, in a "
    "clone of the project; this serves their runs.\n\n\b\nExample:\n"
    '  python -m vqa_scratch ask runs/vqa --image photo.jpg --question "how many dogs are there?"',
)


def main() -> None:
    """What `python -m vqa_scratch` and the script `vqa-scratch` run."""
    name = "python -m vqa_scratch" if sys.argv[0].endswith("__main__.py") else "vqa-scratch"
    run_program(lambda: call(PROGRAM, sys.argv[1:], name))


if __name__ == "__main__":
    main()
