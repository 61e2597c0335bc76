"""Use what `train.py` has trained:  python -m vqa_scratch COMMAND --help"""

import sys

from vqa_scratch.command_line import run_program
from vqa_scratch.commands.line import CommandGroup, call

PROGRAM = CommandGroup(
    "vqa_scratch",
    ["ask", "evaluate", "study", "export", "convert", "data"],
    help="Use what train.py has trained.\n\n\b\nExample:\n"
    '  python -m vqa_scratch ask runs/vqa --image photo.jpg --question "how many dogs are there?"',
)


if __name__ == "__main__":
    run_program(lambda: call(PROGRAM, sys.argv[1:], "python -m vqa_scratch"))
