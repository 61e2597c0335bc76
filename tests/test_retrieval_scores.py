"""Ranks and R@k against sorting by hand, and what equal similarities count."""

import pytest
import torch

from vqa_scratch.systems.retrieval_scores import ranks_of, retrieval


def by_hand(similarity, belongs):
    """Sort the candidates of each query, those that do not belong first among equals; count to the first that does."""
    ranks = []
    for row, own in zip(similarity.tolist(), belongs.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda c: (-row[c], own[c]))
        ranks.append(1 + next(place for place, c in enumerate(order) if own[c]))
    return ranks


@pytest.mark.parametrize("ties", [False, True])
def test_ranks_by_hand(ties):
    for seed in range(20):
        torch.manual_seed(seed)
        similarity = torch.randint(0, 4, (7, 15)).float() if ties else torch.randn(7, 15)
        belongs = torch.rand(7, 15) < 0.2
        belongs[range(7), torch.randint(0, 15, (7,))] = True
        assert ranks_of(similarity, belongs).tolist() == by_hand(similarity, belongs)


def test_both_ways():
    """Three images, the first with two captions; image 2 takes its own text for the fourth best."""
    similarity = torch.tensor([[0.1, 0.9, 0.3, 0.4], [0.2, 0.0, 0.8, 0.1], [0.5, 0.6, 0.7, 0.2]])
    figures = retrieval(similarity, [0, 0, 1, 2], first=(1, 2, 4))
    assert figures == {
        "text_r@1": pytest.approx(2 / 3),
        "text_r@2": pytest.approx(2 / 3),
        "text_r@4": 1.0,
        "text_median_rank": 1.0,
        "image_r@1": pytest.approx(2 / 4),  # texts 1 and 2
        "image_r@2": pytest.approx(3 / 4),  # text 3 too
        "image_r@4": 1.0,
        "image_median_rank": 1.5,
    }


def test_what_finds_all_alike_finds_nothing():
    figures = retrieval(torch.zeros(50, 50), range(50))
    assert figures["text_r@10"] == figures["image_r@10"] == 0 and figures["text_median_rank"] == 50
    perfect = retrieval(torch.eye(50), range(50))
    assert perfect["text_r@1"] == perfect["image_r@1"] == perfect["image_median_rank"] == 1
    with pytest.raises(ValueError, match="nothing belongs to query 1"):
        ranks_of(torch.zeros(2, 2), torch.tensor([[True, False], [False, False]]))
