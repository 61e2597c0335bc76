"""Use what `train.py` has trained:  python -m vqa_scratch COMMAND --help"""

import sys

from vqa_scratch.commands.ask import ask
from vqa_scratch.commands.convert import convert
from vqa_scratch.commands.evaluate import evaluate
from vqa_scratch.commands.export import export
from vqa_scratch.commands.line import NearGroup, call
from vqa_scratch.commands.study import study
from vqa_scratch.options import run_program

COMMANDS = [ask, evaluate, study, export, convert]
PROGRAM = NearGroup("vqa_scratch", {c.name: c for c in COMMANDS}, help="Use what train.py has trained.")


if __name__ == "__main__":
    run_program(lambda: call(PROGRAM, sys.argv[1:], "python -m vqa_scratch"))
