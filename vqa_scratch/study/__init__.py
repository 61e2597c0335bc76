"""Study the attention of a model: trace, certify, change and show it. Start with `trace`."""

from vqa_scratch.study.certificate import Certificate
from vqa_scratch.study.trace import Trace, trace

__all__ = ["Certificate", "Trace", "trace"]
