"""What a reader leaves out of a data set, counted with the reason and one example each."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Skips:
    """`skipped` counts by reason; `examples` holds the first entry that each reason met."""

    skipped: Counter[str] = field(default_factory=Counter, kw_only=True)
    examples: dict[str, str] = field(default_factory=dict, kw_only=True)

    def skip(self, reason: str, example: object = None, count: int = 1) -> None:
        self.skipped[reason] += count
        if example is not None:
            self.examples.setdefault(reason, str(example))

    def lines(self) -> list[str]:
        """A line for each reason, the most frequent first."""
        first = {reason: f" (first: {example})" for reason, example in self.examples.items()}
        return [f"  left out {n:,}: {reason}{first.get(reason, '')}" for reason, n in self.skipped.most_common()]

    def reasons(self) -> str:
        """All of it in one line, for an error when nothing is left."""
        first = {reason: f" ({example})" for reason, example in self.examples.items()}
        return "; ".join(f"{n} because {reason}{first.get(reason, '')}" for reason, n in self.skipped.most_common())
