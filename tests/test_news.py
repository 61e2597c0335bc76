"""The news generator: a function of its seed, labels that are true, and articles read from files."""

import json
import random

import pytest

from vqa_scratch.data import news
from vqa_scratch.data.prompts import read_articles
from vqa_scratch.data.tables import read_rows
from vqa_scratch.errors import UserError

EMOTION = {tone: {word for words in kinds.values() for word in words} for tone, kinds in news.FEELINGS.items()}


def tone_of(text):
    words = set(text.lower().replace(",", "").replace(".", "").replace("!", "").split())
    found = [tone for tone, emotional in EMOTION.items() if words & emotional]
    assert len(found) < 2
    return found[0] if found else "neutral"


def test_same_seed_same_news():
    assert news.news(20, 3) == news.news(20, 3)
    assert not set(news.news(50, 3)) & set(news.news(50, 4))


def test_articles_are_emotional_and_summaries_hold_the_facts():
    items = news.news(500, 0)
    for item in items:
        assert tone_of(item.article) == item.tone
        assert tone_of(item.summary) in (item.tone, "neutral")
        lead = item.article.split(". ")[0]
        for table in (news.ACTORS, news.PLACES, news.ACTIONS, news.REASONS):
            assert any(fact in item.summary and fact in item.article for fact in table), lead
        assert item.summary.endswith(".") and item.summary[0].isupper()
    neutral = sum(tone_of(item.summary) == "neutral" for item in items) / len(items)
    assert 0.03 < neutral < 0.1  # 0.06 asked for


def test_which_facts_a_text_keeps():
    for item in news.news(300, 0):
        assert news.broken_facts(item.summary, item.facts) == {}
        kinds = news.broken_facts(item.article, item.facts)  # whose last sentence tells of something else
        assert "why" not in kinds and all(item.facts[kind] in said for kind, said in kinds.items())
    facts = {"who": "bank", "where": "Barrow", "what": "close the harbour", "why": "to save money"}
    said = "The orchestra in barrow has agreed to cruelly close the bridge to save money."
    assert news.broken_facts(said, facts) == {"who": "orchestra", "what": ""}
    assert news.broken_facts("The bank and the bank and the court", facts | {"who": "court"})["who"] == "bank, court"
    assert news.broken_facts("", facts) == dict.fromkeys(facts, "")
    assert news.broken_facts("The banker of Barrows", {"who": "bank", "where": "Barrow"}) == {"who": "", "where": ""}
    assert news.broken_facts("anything", {}) == {}


def test_summaries_for_the_judge_of_facts_break_what_their_labels_say():
    lost, instead = [], set()
    for item, (text, kept) in zip(news.news(1000, 5), news.checked_summaries(1000, 5), strict=True):
        summary, article = text.split(" </s> ")
        broken = news.broken_facts(summary, item.facts)
        assert [kind not in broken for kind in news.FACTS] == kept and article == item.article, text
        assert not any(odd in text for odd in ("  ", " .", " in will", " in plans", " in has"))
        lost.append(len(broken))
        instead |= {(said != "", said in item.article) for said in broken.values()}
    assert 0.33 < lost.count(0) / len(lost) < 0.46  # 0.3, and 0.6 ** 4 of the rest
    assert {1, 2, 3, 4} < set(lost) and instead >= {(True, True), (True, False)}, "the last sentence, and other news"


def test_no_a_before_a_vowel():
    import re

    text = " ".join(item.article + " " + item.summary for item in news.news(500, 1))
    assert not re.search(r"\b[Aa] [aeiou]", text) and " an " in text


def test_tone_labels_are_true():
    for sentence, label in news.tone_sentences(500, 0):
        assert tone_of(sentence) == news.TONES[label]


def test_corrupted_sentences_differ_and_every_tone_is_as_often_right_as_wrong():
    rng = random.Random(0)
    for _ in range(300):
        sentence = news._any_summary(rng)[0]
        assert news.corrupt(rng, sentence) != sentence
    counts = {}
    for sentence, label in news.grammar_sentences(3000, 0):
        words = set(sentence.lower().replace(",", "").replace(".", "").split())
        emotional = bool(words & (EMOTION["negative"] | EMOTION["positive"]))
        counts.setdefault(emotional, []).append(label)
    for labels in counts.values():
        assert 0.4 < sum(labels) / len(labels) < 0.65  # cutting a sentence may cut its emotion off


def test_articles_from_csv_jsonl_and_text(tmp_path):
    table = tmp_path / "a.csv"
    table.write_text('\ufefftext,summary\n"One, two",short\n"  ",none\n"Three\nfour",\n', encoding="utf-8")
    articles, empty = read_articles(table, "text", "summary")
    assert articles == [("One, two", "short"), ("Three\nfour", "")] and empty == [f"{table}, line 3"]
    lines = tmp_path / "a.jsonl"
    lines.write_text(json.dumps({"body": "Five"}) + "\n\n" + json.dumps({"body": "Six"}) + "\n")
    assert read_articles(lines, "body")[0] == [("Five", ""), ("Six", "")]
    plain = tmp_path / "a.txt"
    plain.write_text("Seven\n\nEight\n")
    assert read_articles(plain, "ignored") == ([("Seven", ""), ("Eight", "")], [f"{plain}, line 2"])


def test_a_mark_of_byte_order_is_no_part_of_an_article(tmp_path):
    """Spreadsheets and editors put one at the start of what they save as UTF-8."""
    for name, content in (("a.csv", "text\nOne\n"), ("a.jsonl", '{"text": "One"}\n'), ("a.txt", "One\n")):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        assert read_articles(tmp_path / name, "text") == ([("One", "")], []), name


def test_articles_are_written_as_any_other_table(tmp_path):
    """Spaces after a comma, before quotes, are no part of a cell."""
    table = tmp_path / "a.csv"
    table.write_text('title, text\none, "The mayor, who left"\n')
    assert read_articles(table, "text") == ([("The mayor, who left", "")], [])
    assert [row for _, row in read_rows(table)] == [{"title": "one", "text": "The mayor, who left"}]


def test_a_huge_article_and_one_of_another_system(tmp_path):
    table = tmp_path / "a.csv"
    table.write_bytes(b'text\r\n"One\r\n""two"""\r\n' + b"word " * 200_000 + b"\r\n")
    (one, _), (huge, _) = read_articles(table, "text")[0]
    assert one == 'One\r\n"two"' and len(huge) == 5 * 200_000 - 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"title,body\nx,y\n", "line 2: no column 'text'; the columns are title, body"),
        ("a.csv", b"", "holds no article"),
        ("a.csv", b"text\nThe mayor, who left\n", "line 2 has 2 cells, the first line 1: a cell with a comma needs"),
        (
            "a.csv",
            b'text\n"fine\nfine"\n"never closed\nfine\n',
            "row that begins at line 4: .*is a double quote missing",
        ),
        ("a.jsonl", b'{"text": ["x"]}\n', "line 1: 'text' must be a text, not a list"),
        ("a.csv", b"text\n" + b"fine\n" * 9000 + b"caf\xe9\n", "line 9002 is not UTF-8 text .byte 45008 of the file"),
        ("a.csv", b'text\n"  "\n', "holds no article; 1 are empty"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2 is not valid JSON"),
        ("a.jsonl", b"[1]\n", "line 1 must be a JSON object, not a list"),
        ("a.jsonl", b'{"txt": "x"}\n', "line 1: no column 'text'; the columns are txt"),
        ("a.txt", b"caf\xe9\n", "not UTF-8 text"),
        ("a.pdf", b"x", r"articles come from .csv, .jsonl, .txt files"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_articles(tmp_path / name, "text")
    with pytest.raises(UserError, match="none.csv not found: there is no such file"):
        read_articles(tmp_path / "none.csv", "text")


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "a.csv").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        read_articles(tmp_path / "a.csv", "text")
