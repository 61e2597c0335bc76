"""Draws scenes and writes questions about them: the content of the built-in data set, without its files.

A scene is 64 x 64 pixels with 2 to 5 objects on a jittered 4 x 4 grid; an object has one of 3 shapes, 6 colours and
2 sizes. Eight question families need colour, shape, place, existence, counting, comparing, a spatial relation and a
nearest neighbour, in the spirit of CLEVR (Johnson et al. 2017). Every question is unambiguous. Its answer is the one
that its template has used least among those the scene allows, so the question alone gives nothing away. Ten simulated
annotators answer it: most agree, some are wrong, some say the same in other words.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle")
COLORS = {
    "red": (214, 40, 40),
    "green": (42, 157, 76),
    "blue": (38, 84, 214),
    "yellow": (244, 202, 34),
    "purple": (140, 60, 190),
    "gray": (128, 128, 128),
}
SIZES = {"small": 4, "large": 7}  # radius in pixels
HELD_OUT = frozenset({("red", "square"), ("blue", "circle"), ("green", "triangle")})
PIXELS, GRID = 64, 4
CELL = PIXELS // GRID

# family: (question type as in VQA v2, answer type)
FAMILIES = {
    "color": ("what color is the", "other"),
    "shape": ("what shape is the", "other"),
    "where": ("where is the", "other"),
    "exist": ("is there a", "yes/no"),
    "count": ("how many", "number"),
    "compare": ("are there more", "yes/no"),
    "relation": ("is the", "yes/no"),
    "closest": ("what is closest to the", "other"),
}
FAMILY_OF_TYPE = {question_type: family for family, (question_type, _) in FAMILIES.items()}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
MIN_OFFSET = 6  # pixels between two centres before "left of" is asked
MIN_GAP = 5  # pixels by which the nearest object must beat the second nearest

Description = tuple[str | None, str | None, str | None]  # (size, color, shape); None: not mentioned


@dataclass(frozen=True)
class Object:
    """One drawn object with its centre (`x`, `y`) in pixels; `radius` is half its width."""

    shape: str
    color: str
    size: str
    x: int
    y: int

    @property
    def radius(self) -> int:
        return SIZES[self.size]

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) in pixels, the last two exclusive."""
        return (self.x - self.radius, self.y - self.radius, self.x + self.radius, self.y + self.radius)

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def words(self) -> tuple[str, str, str]:
        """(size, color, shape)."""
        return self.size, self.color, self.shape

    @property
    def place(self) -> str:
        """The quarter of the image it lies in; cells keep every object off the two middle lines."""
        return f"{'top' if self.y < PIXELS / 2 else 'bottom'} {'left' if self.x < PIXELS / 2 else 'right'}"

    def distance(self, other: "Object") -> float:
        """Between the centres, in pixels."""
        return ((self.x - other.x) ** 2 + (self.y - other.y) ** 2) ** 0.5


Scene = tuple[Object, ...]


@dataclass(frozen=True)
class Question:
    """`template` groups the questions whose answers are balanced; `about` are the objects that the question names."""

    family: str
    template: str
    text: str
    answer: str
    about: tuple[int, ...] = ()


def draw_scene(rng: random.Random, *, held_out: bool = False) -> Scene:
    """Two to five objects in distinct grid cells; with `held_out`, the first and no other is a held-out pair."""
    objects = []
    cells = rng.sample(range(GRID * GRID), rng.randint(2, 5))
    for position, cell in enumerate(cells):
        color, shape = rng.choice(sorted(HELD_OUT)) if held_out and position == 0 else _allowed_pair(rng)
        size = rng.choice(("small", "large"))
        radius, row, column = SIZES[size], cell // GRID, cell % GRID
        x = column * CELL + rng.randint(radius, CELL - radius)
        y = row * CELL + rng.randint(radius, CELL - radius)
        objects.append(Object(shape, color, size, x, y))
    return tuple(objects)


def _allowed_pair(rng: random.Random) -> tuple[str, str]:
    while True:
        pair = rng.choice(tuple(COLORS)), rng.choice(SHAPES)
        if pair not in HELD_OUT:
            return pair


def render(scene: Scene, rng: random.Random) -> Image.Image:
    """The scene as an RGB image, drawn at twice the size and halved; tones vary a little from object to object."""
    scale = 2
    tone = rng.randint(225, 255)
    image = Image.new("RGB", (PIXELS * scale, PIXELS * scale), (tone, tone, tone))
    canvas = ImageDraw.Draw(image)
    for thing in scene:
        fill = tuple(min(255, max(0, channel + rng.randint(-14, 14))) for channel in COLORS[thing.color])
        left, top, right, bottom = (scale * edge for edge in thing.box)
        if thing.shape == "circle":
            canvas.ellipse((left, top, right - 1, bottom - 1), fill=fill)
        elif thing.shape == "square":
            canvas.rectangle((left + 1, top + 1, right - 2, bottom - 2), fill=fill)
        else:
            canvas.polygon(((left, bottom - 1), (right - 1, bottom - 1), (scale * thing.x, top)), fill=fill)
    return image.reduce(scale)


def phrase(description: Description, plural: bool = False) -> str:
    """("small", "red", None) -> "small red object"."""
    size, color, shape = description
    noun = (shape or "object") + ("s" if plural else "")
    return " ".join(word for word in (size, color, noun) if word)


def describe(thing: Object, kind: str) -> Description:
    """The words of a kind: "z" for the size, "c" for the color, "s" for the shape, "zs" for size and shape, ..."""
    size, color, shape = thing.words
    return size if "z" in kind else None, color if "c" in kind else None, shape if "s" in kind else None


def _all_of_kind(kind: str) -> list[Description]:
    words = (("z", SIZES), ("c", COLORS), ("s", SHAPES))
    sizes, colors, shapes = (list(values) if letter in kind else [None] for letter, values in words)
    return list(product(sizes, colors, shapes))


KINDS = {kind: _all_of_kind(kind) for kind in ("", "z", "c", "s", "zs", "zc", "cs", "zcs")}
SEEN_KINDS = {kind: [d for d in all_ if (d[1], d[2]) not in HELD_OUT] for kind, all_ in KINDS.items()}
REFERENCES = ("cs", "cs", "s", "c", "zs", "zcs")  # how where, relation and closest questions name their objects
# What is drawn first for a question of a family: the kind of its descriptions, or the relation.
CHOICES: dict[str, tuple[str, ...]] = {
    "color": ("s", "zs", "z"),
    "shape": ("c", "zc", "z"),
    "where": (),
    "exist": ("s", "c", "cs", "zs", "zc", "zcs"),
    "count": ("", "s", "s", "c", "z", "zs", "cs"),
    "compare": ("s", "c", "z", "zs", "cs"),
    "relation": tuple(RELATIONS),
    "closest": (),
}
Fits = Counter[Description]  # how many objects of a scene each description fits: the ground truth of all questions
Possible = Iterator[tuple[str, str, tuple[int, ...]]]  # (answer, the end of the question, the objects that it names)


class QuestionWriter:
    """Draws questions about scenes and balances the answers of each template.

    `tally[template][answer]` counts what was written. Each question takes the feasible answer with the lowest count.
    """

    def __init__(self, rng: random.Random, *, held_out: bool = False) -> None:
        self.rng, self.held_out = rng, held_out
        self.kinds = KINDS if held_out else SEEN_KINDS
        self.tally: dict[str, Counter[str]] = defaultdict(Counter)
        self.makers = {family: getattr(self, f"_{family}") for family in FAMILIES}

    def write(self, scene: Scene, number: int) -> list[Question]:
        """`number` different questions about the scene, families in rotation from a random start."""
        fits = Counter(describe(thing, kind) for thing in scene for kind in KINDS)
        order = self.rng.sample(tuple(FAMILIES), len(FAMILIES))
        most = -(-number // len(FAMILIES))  # questions of one family, so that none crowds out another
        questions: dict[str, Question] = {}
        written: Counter[str] = Counter()
        for attempt in range(number * 6):
            if len(questions) == number:
                break
            family = order[attempt % len(order)]
            if written[family] == most:
                continue
            question = self._question(family, scene, fits)
            if question is not None and question.text not in questions and self._wanted(question):
                questions[question.text] = question
                written[family] += 1
                self.tally[question.template][question.answer] += 1
        return list(questions.values())

    def _wanted(self, question: Question) -> bool:
        """In the hold-out split a question must name a held-out pair, point at one, or have one as its answer."""
        if not self.held_out:
            return True
        words = f"{question.text} {question.answer}".replace("s ", " ")
        return 0 in question.about or any(f"{color} {shape}" in words for color, shape in HELD_OUT)

    def _question(self, family: str, scene: Scene, fits: Fits) -> Question | None:
        """The question whose answer its template has used least; None with too few possible answers.

        Where a scene allows one answer only, a yes/no question would unbalance its template.
        """
        kind = self.rng.choice(CHOICES[family]) if CHOICES[family] else ""
        options: defaultdict[str, list[tuple[str, tuple[int, ...]]]] = defaultdict(list)
        for answer, text, about in self.makers[family](scene, fits, kind):
            options[answer].append((text, about))
        if len(options) < (2 if family in ("exist", "compare") else 1):
            return None
        template = f"{family}/{kind}"
        tally = self.tally[template]
        answer = min(options, key=lambda a: (tally[a], self.rng.random()))
        text, about = self.rng.choice(options[answer])
        return Question(family, template, f"{FAMILIES[family][0]} {text}?", answer, about)

    def _color(self, scene: Scene, fits: Fits, kind: str) -> Possible:
        for i, thing in enumerate(scene):
            if fits[description := describe(thing, kind)] == 1:
                yield thing.color, phrase(description), (i,)

    def _shape(self, scene: Scene, fits: Fits, kind: str) -> Possible:
        for i, thing in enumerate(scene):
            if fits[description := describe(thing, kind)] == 1:
                yield thing.shape, phrase(description), (i,)

    def _where(self, scene: Scene, fits: Fits, _: str) -> Possible:
        for i, thing in enumerate(scene):
            if reference := self._reference(scene, fits, i):
                yield thing.place, reference, (i,)

    def _exist(self, scene: Scene, fits: Fits, kind: str) -> Possible:
        for description in self.kinds[kind]:
            yield "yes" if fits[description] else "no", phrase(description), ()

    def _count(self, scene: Scene, fits: Fits, kind: str) -> Possible:
        for description in self.kinds[kind]:
            yield str(fits[description]), f"{phrase(description, plural=True)} are there", ()

    def _compare(self, scene: Scene, fits: Fits, kind: str) -> Possible:
        for _ in range(8):
            one, other = self.rng.sample(self.kinds[kind], 2)
            if fits[one] or fits[other]:
                more = "yes" if fits[one] > fits[other] else "no"
                yield more, f"{phrase(one, plural=True)} than {phrase(other, plural=True)}", ()

    def _reference(self, scene: Scene, fits: Fits, i: int) -> str | None:
        unique = [d for d in (describe(scene[i], kind) for kind in REFERENCES) if fits[d] == 1]
        return phrase(self.rng.choice(unique)) if unique else None

    def _relation(self, scene: Scene, fits: Fits, relation: str) -> Possible:
        dx, dy = RELATIONS[relation]
        for (i, one), (j, other) in product(enumerate(scene), repeat=2):
            offset = (one.x - other.x) * dx + (one.y - other.y) * dy
            if i == j or abs(offset) < MIN_OFFSET:
                continue
            first, second = self._reference(scene, fits, i), self._reference(scene, fits, j)
            if first and second:
                yield "yes" if offset > 0 else "no", f"{first} {relation} the {second}", (i, j)

    def _closest(self, scene: Scene, fits: Fits, _: str) -> Possible:
        for i, thing in enumerate(scene):
            ranked = sorted((thing.distance(other), other.name) for other in scene if other is not thing)
            if len(ranked) > 1 and ranked[1][0] - ranked[0][0] < MIN_GAP:
                continue
            if reference := self._reference(scene, fits, i):
                yield ranked[0][1], reference, (i,)


# ------------------------------------------------------------------------------------------------ annotators

NUMBER_WORDS = {"0": "none", "1": "one", "2": "two", "3": "three", "4": "four", "5": "five"}
RIVALS = {
    "yes/no": ("yes", "no"),
    "number": tuple(NUMBER_WORDS),
    "color": tuple(COLORS),
    "shape": SHAPES,
    "where": tuple(f"{row} {column}" for row in ("top", "bottom") for column in ("left", "right")),
    "closest": tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES),
}


def same_in_other_words(answer: str) -> str:
    """A synonym or spelling that people use. The official normalisation undoes some of them ("two" -> "2"), not all."""
    if answer in NUMBER_WORDS:
        return NUMBER_WORDS[answer]
    for word, other in (("gray", "grey"), ("top", "upper")):
        if word in answer:
            return answer.replace(word, other)
    if " " in answer:
        return f"a {answer}"
    return {"yes": "yes.", "no": "no."}.get(answer, answer)


def annotate(rng: random.Random, question: Question) -> tuple[str, ...]:
    """Ten answers. About 70 % of the questions are unanimous; on the others 1 to 4 people differ, rarely 7."""
    answers = [question.answer] * 10
    fate = rng.random()
    if fate < 0.7:
        return tuple(answers)
    differing = 7 if fate > 0.99 else rng.randint(1, 4)
    answer_type = FAMILIES[question.family][1]
    rivals = [r for r in RIVALS.get(question.family, RIVALS.get(answer_type, ())) if r != question.answer]
    rng.shuffle(rivals)
    for seat, i in enumerate(rng.sample(range(10), differing)):
        if rng.random() < 0.4 and differing < 7:
            answers[i] = same_in_other_words(question.answer)
        elif differing < 7 or len(rivals) > 2:
            answers[i] = rivals[seat % len(rivals)]
    return tuple(answers)
