"""Rewards: the right logit whatever the batch, one clear line for a bad reward model, a scale that stays."""

from dataclasses import replace

import pytest
import torch

from vqa_scratch.data.news import news
from vqa_scratch.errors import UserError
from vqa_scratch.models.bert import BertConfig
from vqa_scratch.models.classifier import TextClassifier
from vqa_scratch.rl import rewards
from vqa_scratch.rl.mini_news import see_the_same, tokenizers_for
from vqa_scratch.rl.rewards import ClassifierReward, FaithfulReward, RewardPart, RewardScale, RewardSum, length_penalty
from vqa_scratch.rl.types import Prompt, Samples
from vqa_scratch.study import trace


@pytest.fixture(scope="module")
def parts():
    _, tokenizer = tokenizers_for(news(50, 0))
    size = BertConfig(
        layout="roberta",
        vocab_size=len(tokenizer),
        dim=16,
        layers=1,
        heads=2,
        hidden=16,
        max_positions=24,
        token_types=1,
        pad_id=1,
    )
    return TextClassifier(size, ("bad", "fair", "good")), tokenizer


def samples_of(*texts):
    return Samples([Prompt("")] * len(texts), [[5] * len(t.split()) for t in texts], list(texts), [True] * len(texts))


TEXTS = ("", "The mayor.", "The council in Alden will close the harbour.", "The mayor " * 30, "The bank in Zeal.")


def test_logit_of_the_named_class_whatever_the_batch(parts, monkeypatch):
    monkeypatch.setattr(rewards, "AT_ONCE", 2)
    model, tokenizer = parts
    reward = ClassifierReward(model, tokenizer, "good")
    together = reward(samples_of(*TEXTS))
    for text, value in zip(TEXTS, together, strict=True):
        ids, mask = tokenizer.encode_batch([text], max_length=22)  # 24 positions, of which RoBERTa skips two
        with torch.no_grad():
            torch.testing.assert_close(value, model(ids, mask)[0, 2])
    assert not any(p.requires_grad for p in model.parameters())


def test_a_judge_of_facts_reads_response_and_prompt_as_a_pair(parts):
    """The log-probability that all its logits say yes, from token types by hand; never above 0."""
    _, tokenizer = parts
    size = replace(parts[0].config, token_types=2)
    judge = TextClassifier(size, ("who", "where"))
    prompts = [Prompt("The council in Alden is stunned."), Prompt("The mayor"), Prompt("")]
    texts = ["The mayor of Zeal.", "", "The bank"]
    reward = FaithfulReward(judge, tokenizer)(Samples(prompts, [[1]] * 3, texts, [True] * 3))
    for prompt, text, value in zip(prompts, texts, reward, strict=True):
        first = tokenizer.encode(text)  # <s> text </s>
        second = tokenizer.encode(prompt.text)[1:]
        ids, types = torch.tensor([first + second]), torch.tensor([[0] * len(first) + [1] * len(second)])
        with torch.no_grad():
            logits = judge(ids, None, types)[0].double()
        torch.testing.assert_close(value.double(), (1 / (1 + (-logits).exp())).prod().log(), atol=1e-5, rtol=0)
    assert (reward < 0).all() and len(set(reward.tolist())) == 3


def test_the_judge_of_facts_begins_by_attending_to_equal_words(parts):
    """In the other text as in their own: most of a word's weight goes to itself and its like, whatever the side."""
    size = replace(parts[0].config, token_types=2, dim=64, heads=4, vocab_size=200, max_positions=80, init_std=0.12)
    torch.manual_seed(0)
    judge = TextClassifier(size, ("who",)).eval()
    see_the_same(judge)
    first = torch.arange(10, 40)
    ids = torch.cat([first, first.flip(0)])[None]
    with trace(judge) as t, torch.no_grad():
        judge(ids, None, torch.tensor([[0] * 30 + [1] * 30]))
    weights = t.pattern("text.0.self")[0].mean(0)[:30]
    alike = weights * (ids[0][:30, None] == ids[0])
    assert alike[:, :30].sum(1).mean() > 0.3 and alike[:, 30:].sum(1).mean() > 0.25, "of 1/60 each by chance"


def test_a_class_that_is_not_there_is_named_with_those_that_are(parts):
    with pytest.raises(UserError, match="no class 'neutral'; its classes are bad, fair, good"):
        ClassifierReward(*parts, "neutral")


def test_sum_weighs_its_parts_and_reports_them_unweighted():
    reward = RewardSum(
        [RewardPart("a", 2.0, lambda s: torch.tensor([1.0, 2.0])), RewardPart("short", 0.1, length_penalty)]
    )
    total, parts = reward(samples_of("one two three", "one"))
    torch.testing.assert_close(total, torch.tensor([1.7, 3.9]))
    assert parts["short"].tolist() == [-3.0, -1.0] and parts["a"].tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="one part or more"):
        RewardSum([])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_reward_that_is_no_number_stops_the_run_with_the_text(bad):
    reward = RewardSum([RewardPart("tone", 1.0, lambda s: torch.tensor([0.0, bad]))])
    with pytest.raises(UserError, match=rf"'tone' is {bad} for 1 of 2 responses, the first of them 'guilty text'"):
        reward(samples_of("fine", "guilty text"))


def test_a_reward_of_the_wrong_shape_is_refused():
    with pytest.raises(UserError, match=r"'tone' has shape \(1, 2\), expected \(2,\)"):
        RewardSum([RewardPart("tone", 1.0, lambda s: torch.zeros(1, 2))])(samples_of("a", "b"))


def test_scale_is_fixed_once_and_clips():
    scale = RewardScale(clip=3.0)
    scale.fit(torch.tensor([1.0, 3.0, 5.0]))
    torch.testing.assert_close(scale(torch.tensor([3.0, 5.0, 100.0])), torch.tensor([0.0, 1.0, 3.0]))
    scale.fit(torch.full((10,), 4.0))  # nothing to scale by
    torch.testing.assert_close(scale(torch.tensor([4.5])), torch.tensor([0.5]))
