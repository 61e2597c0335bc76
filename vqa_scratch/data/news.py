"""Generates short news: articles, summaries, what a text keeps of the facts, and sentences for reward models.

An article reports one decision (who, where, what, why) in emotional wording and ends with an unrelated event. Its
reference summary gives the four facts in one sentence; most summaries keep some of the emotion, a few keep none. So a
summariser trained on them knows neutral wording but rarely uses it, and a reward can bring it out.
Everything depends on a seed alone.
"""

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


def _list(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


TONES = ("negative", "neutral", "positive")
GRAMMAR = ("corrupted", "acceptable")
NEUTRAL_SHARE = 0.06  # of the summaries

PLACES = _list(
    "Alden,Barrow,Calder,Denby,Elgin,Fulton,Garston,Holme,Irvine,Jarrow,Kelso,Larkhill,"
    "Malton,Norwood,Oakley,Penrith,Redcar,Selby,Thirsk,Upton,Verwood,Whitby,Yarm,Zeal"
)
ACTORS = _list(
    "mayor,council,hospital,university,museum,police force,library,orchestra,football club,school board,"
    "energy company,bus operator,airport,court,theatre,fire service,newspaper,housing office,bank,water board"
)
ACTIONS = _list(
    "close the harbour,repair the bridge,raise the parking fees,cut the night trains,plant new trees,sell the old mill,"
    "ban loud music,open a free clinic,build a stadium,cancel the spring fair,buy electric buses,fire the director,"
    "delay the new tram,move the weekly market,protect the river,tear down the tower,hire fifty teachers,"
    "publish the budget,paint the station,lower the rents,flood the valley,install more cameras,limit the traffic,"
    "rename the main square"
)
REASONS = _list(
    "after a long debate,because of rising costs,despite many protests,before the end of the year,"
    "following a public vote,to save money,at the request of residents,with the help of volunteers,"
    "under a new law,without waiting for approval,on the advice of experts,in response to the storm"
)
VERBS = ("will", "plans to", "has agreed to")

FACTS = {"who": ACTORS, "where": PLACES, "what": ACTIONS, "why": REASONS}
FEELINGS = {
    "negative": {
        "adjective": _list("shocking,terrible,shameful,cruel,disastrous,appalling,awful,reckless,horrible,outrageous"),
        "adverb": _list("shamelessly,brutally,foolishly,recklessly,stupidly,cruelly"),
        "noun": _list("scandal,disgrace,nightmare,catastrophe,failure,insult"),
    },
    "positive": {
        "adjective": _list(
            "wonderful,brilliant,fantastic,inspiring,glorious,amazing,superb,joyful,marvellous,delightful"
        ),
        "adverb": _list("bravely,brilliantly,proudly,generously,wisely,heroically"),
        "noun": _list("triumph,miracle,blessing,success,dream,treasure"),
    },
}
REACTIONS = {
    "negative": (
        "Furious residents called it a {adjective} {noun}.",
        "Angry crowds say they will never forgive this {noun}.",
        "Nobody can believe such a {adjective} {noun}.",
    ),
    "positive": (
        "Happy residents called it a {adjective} {noun}.",
        "Cheering crowds say they will always remember this {noun}.",
        "Everybody is celebrating such a {adjective} {noun}.",
    ),
}
LEADS = (
    "In a {adjective} move, the {who} in {where} {adverb} decided to {what} {why}.",
    "{where} is stunned: the {who} {adverb} announced a {adjective} plan to {what} {why}.",
    "It is {adjective}! The {who} of {where} {verb} {adverb} {what} {why}.",
)
ASIDES = (
    "Last week the {who} in {where} refused to {what}.",
    "Meanwhile the {who} in {where} may {what}.",
    "A year ago the {who} in {where} failed to {what}.",
)


@dataclass(frozen=True)
class NewsItem:
    article: str
    summary: str
    tone: str  # of the article: "negative" or "positive"
    facts: dict[str, str] = field(hash=False)  # who, where, what and why


def _an(text: str) -> str:
    """Turn "a" into "an" before a vowel."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def _some(rng: random.Random, words: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """A word of each kind."""
    return {kind: rng.choice(choices) for kind, choices in words.items()}


def summarise(rng: random.Random, facts: dict[str, str], tone: str) -> str:
    """One correct sentence with the four facts. A tone other than neutral shows in one to three places."""
    opening, before_actor, before_action, ending = "", "", "", ""
    if tone != "neutral":
        feelings = _some(rng, FEELINGS[tone])
        slots = rng.sample(range(4), k=rng.choice((1, 1, 2, 2, 3)))
        if 0 in slots:
            opening = f"In a {feelings['adjective']} move, "
        if 1 in slots:
            before_actor = rng.choice(FEELINGS[tone]["adjective"]) + " "
        if 2 in slots:
            before_action = feelings["adverb"] + " "
        if 3 in slots:
            ending = f", a {rng.choice(FEELINGS[tone]['adjective'])} {feelings['noun']}"
    text = _an(
        f"{opening}the {before_actor}{facts['who']} in {facts['where']} {rng.choice(VERBS)} "
        f"{before_action}{facts['what']} {facts['why']}{ending}."
    )
    return text[0].upper() + text[1:]


def news_item(rng: random.Random) -> NewsItem:
    """One article of 40 to 60 words with its summary."""
    tone = rng.choice(("negative", "positive"))
    facts, other = _some(rng, FACTS), _some(rng, FACTS)
    lead = rng.choice(LEADS).format(verb=rng.choice(VERBS), **facts, **_some(rng, FEELINGS[tone]))
    reaction = rng.choice(REACTIONS[tone]).format(**_some(rng, FEELINGS[tone]))
    article = f"{lead} {reaction} {rng.choice(ASIDES).format(**other)}"
    summary = summarise(rng, facts, "neutral" if rng.random() < NEUTRAL_SHARE else tone)
    return NewsItem(_an(article), summary, tone, facts)


def news(count: int, seed: int) -> list[NewsItem]:
    """`count` items, the same for the same seed; different seeds share no random stream."""
    rng = random.Random(f"news-{seed}")
    return [news_item(rng) for _ in range(count)]


_KNOWN = {kind: re.compile(rf"\b(?:{'|'.join(values)})\b", re.IGNORECASE) for kind, values in FACTS.items()}


def broken_facts(text: str, facts: Mapping[str, str]) -> dict[str, str]:
    """The facts of a source that a text does not keep, each with what the text says instead.

    A fact is kept if its very words stand in the text, and no other value of its kind. Instead are all values of the
    kind that the text has, or "" where it has none that the corpus knows.
    """
    said = {kind: {found.casefold(): found for found in _KNOWN[kind].findall(text)} for kind in facts}
    return {kind: ", ".join(said[kind].values()) for kind, fact in facts.items() if [*said[kind]] != [fact.casefold()]}


# ------------------------------------------------------------------------------------- sentences for the reward models


def _swap(rng: random.Random, words: list[str]) -> list[str]:
    i = rng.randrange(len(words) - 1)
    return [*words[:i], words[i + 1], words[i], *words[i + 2 :]]


def _drop(rng: random.Random, words: list[str]) -> list[str]:
    """Leave out a word that the sentence needs: an article, a preposition or part of the verb."""
    needed = [i for i, w in enumerate(words) if w.lower() in {"the", "in", "will", "plans", "to", "agreed", "a", "an"}]
    i = rng.choice(needed)
    return words[:i] + words[i + 1 :]


def _repeat(rng: random.Random, words: list[str]) -> list[str]:
    i, length = rng.randrange(len(words)), rng.choice((1, 1, 2, 3))
    return words[: i + length] + words[i:]


def _inflect(rng: random.Random, words: list[str]) -> list[str]:
    verbs = {"will": "wills", "plans": "planning", "agreed": "agree", "has": "have", "to": "to the"}
    i = rng.choice([i for i, w in enumerate(words) if w in verbs])
    return [*words[:i], verbs[words[i]], *words[i + 1 :]]


def _cut(rng: random.Random, words: list[str]) -> list[str]:
    """Stop in the middle: no full stop at the end."""
    return words[: rng.randrange(2, len(words))]


def _splice(rng: random.Random, words: list[str]) -> list[str]:
    """The beginning of this sentence with the end of another, joined where they do not fit."""
    other = summarise(rng, _some(rng, FACTS), rng.choice(TONES)).split()
    return words[: rng.randrange(3, len(words))] + other[rng.randrange(1, len(other) - 2) :]


CORRUPTIONS: tuple[Callable, ...] = (_swap, _drop, _repeat, _inflect, _cut, _splice)


def corrupt(rng: random.Random, sentence: str) -> str:
    """The sentence with one or two mistakes in it; never the sentence itself."""
    words = sentence.split()
    while " ".join(words) == sentence:
        words = sentence.split()
        for _ in range(rng.choice((1, 1, 2))):
            if len(words) > 6:
                words = rng.choice(CORRUPTIONS if " ".join(words) == sentence else (_swap, _repeat, _cut))(rng, words)
    return " ".join(words)


def _any_summary(rng: random.Random) -> tuple[str, int]:
    """A correct sentence and the index of its tone, all three tones equally likely."""
    tone = rng.choice(TONES)
    return summarise(rng, _some(rng, FACTS), tone), TONES.index(tone)


def grammar_sentences(count: int, seed: int) -> list[tuple[str, int]]:
    """(sentence, label) with label an index into `GRAMMAR`; half are corrupted, in every tone alike."""
    rng = random.Random(f"grammar-{seed}")
    items = []
    for _ in range(count):
        sentence, _ = _any_summary(rng)
        label = rng.randrange(2)
        items.append((sentence if label else corrupt(rng, sentence), label))
    return items


def tone_sentences(count: int, seed: int) -> list[tuple[str, int]]:
    """(sentence, label) with label an index into `TONES`; one in four is corrupted, so that mistakes carry no tone.

    Only corruptions that keep every word are used: cutting a sentence could cut its emotion off.
    """
    rng = random.Random(f"tone-{seed}")
    items = []
    for _ in range(count):
        sentence, label = _any_summary(rng)
        if rng.random() < 0.25:
            sentence = " ".join(rng.choice((_swap, _repeat, _inflect))(rng, sentence.split()))
        items.append((sentence, label))
    return items


def beside(summary: str, article: str) -> str:
    """Both as one text, as a RoBERTa reads pairs: what is too long loses the end of the article."""
    return f"{summary} </s> {article}"


def _break(rng: random.Random, item: NewsItem, kind: str) -> str:
    """In place of a fact of an article: another, often that of its last sentence; one made of two; or nothing."""
    fact = item.facts[kind]
    others = [value for value in FACTS[kind] if value != fact]
    other = rng.choice([value for value in others if value in item.article and rng.random() < 0.5] or others)
    how = rng.choice(("exchanged", "exchanged", "made up", "dropped"))
    if how == "made up":
        first, second = rng.sample((fact.split(), other.split()), 2)
        mixed = " ".join(first[:1] + second[1:])
        other = mixed if broken_facts(mixed, {kind: fact}) else other
    return "" if how == "dropped" else other


def checked_summaries(count: int, seed: int) -> list[tuple[str, list[bool]]]:
    """(summary beside its article, whether it keeps each of `FACTS`); three in ten keep all, in every tone alike.

    Corruptions of true summaries, as in FactCC (Kryscinski et al. 2020, 1910.12840). Those that models write may be of
    other kinds (Goyal and Durrett 2021, 2104.04302).
    """
    rng = random.Random(f"facts-{seed}")
    items = []
    for item in news(count, seed):
        share = 0.0 if rng.random() < 0.3 else 0.4
        lost = [kind for kind in FACTS if rng.random() < share]
        facts = item.facts | {kind: _break(rng, item, kind) for kind in lost}
        summary = summarise(rng, facts, rng.choice(TONES)).replace(" in  ", " ")  # without a place
        summary = " ".join(summary.split()).replace(" .", ".")
        items.append((beside(summary, item.article), [kind not in lost for kind in FACTS]))
    return items
