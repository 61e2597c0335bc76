"""Heads that begin by looking at a fixed distance: held against where their attention really is."""

from itertools import islice
from random import Random

import pytest
import torch
from model_helpers import pooling_windows

from vqa_scratch.data.spoken import drawn_split, windows
from vqa_scratch.data.voices import sentences
from vqa_scratch.nn.attention import MultiHeadAttention
from vqa_scratch.nn.layers import init_weights, sinusoid_rates, sinusoids
from vqa_scratch.nn.neighbours import Waves, look_near, places_of_tiles, read_tiles, tiled
from vqa_scratch.systems.assembly import grid_positions, grid_waves
from vqa_scratch.systems.voice_model import NEAR, small_model, speech_tokenizer
from vqa_scratch.systems.voice_options import VoiceOptions


def scores(attention, x):
    """(heads, N, N): how much each place of x (N, D) asks for each."""
    q, k, _ = attention.qkv(x).unflatten(-1, (3, attention.heads, attention.head_dim)).unbind(-3)
    return attention.scale * torch.einsum("nhd,mhd->hnm", q, k)


def plain_attention(dim, heads):
    torch.manual_seed(3)
    attention = MultiHeadAttention(dim, heads)
    return attention.apply(init_weights)


@pytest.mark.parametrize("offsets", [[[-6.0], [-2.0], [2.0], [6.0]], [[0.0], [3.0]]])
def test_each_head_looks_so_many_places_on(offsets):
    """Two offsets serve four heads in turn. The score there is `PEAK`, 5, and that of the weights' own noise."""
    attention, waves = (
        plain_attention(64, 4),
        Waves(torch.arange(8), 32 + torch.arange(8), sinusoid_rates(64)[:8, None]),
    )
    look_near(attention, waves, offsets)
    found = scores(attention, sinusoids(100, 64))
    for head in range(4):
        (offset,) = offsets[head % len(offsets)]
        places = torch.arange(10, 90)
        assert torch.equal(found[head, 10:90].argmax(1), places + int(offset))
        peaks = found[head, places, places + int(offset)]
        assert (peaks - 5).abs().max() < 0.6 and found[head, 10:90].mean().abs() < 0.6


def test_in_two_directions():
    """The table of an image has a quarter of its channels for each of the sines and cosines of columns and of rows."""
    grid, dim = (6, 8), 64
    waves = grid_waves(grid, dim).waves(4)
    offsets, attention = [[-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 1.0]], plain_attention(dim, 4)
    look_near(attention, waves, offsets)
    found = scores(attention, 2 * grid_positions(grid, dim)).argmax(2).unflatten(1, grid)
    rows, columns = torch.meshgrid(torch.arange(6), torch.arange(8), indexing="ij")
    for head, (right, down) in enumerate(offsets):
        expected = (rows + int(down)) * 8 + columns + int(right)
        assert torch.equal(found[head, 1:-1, 1:-1], expected[1:-1, 1:-1])


def test_queries_begin_with_a_tile_of_the_image_each():
    """Sixteen on 8 x 12 places: each head on the middle of a quarter of its tile of 2 x 3, and their order is kept."""
    places, queries = grid_waves((8, 12), 64), torch.nn.Parameter(torch.zeros(1, 16, 64))
    torch.manual_seed(3)
    reader = MultiHeadAttention(64, 4, context_dim=64).apply(init_weights)
    read_tiles(queries, [reader], places)
    q = reader.q(queries[0]).unflatten(-1, (4, 16))
    k = reader.kv(2 * places.table())[:, :64].unflatten(-1, (4, 16))
    pattern = (reader.scale * torch.einsum("qhd,nhd->hqn", q, k)).softmax(-1).unflatten(2, (8, 12))
    for head, (down, right) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        for query in range(16):
            strongest = pattern[head, query].flatten().argmax()
            at = strongest // 12, strongest % 12
            assert at[0] == 2 * (query // 4) + down
            assert (at[1] - (3 * (query % 4) + 0.25 + 1.5 * right)).abs() <= 0.5, "its middle lies between two places"
    assert [tiled(number) for number in (16, 12, 7, 1)] == [(4, 4), (3, 4), (1, 7), (1, 1)]


@pytest.mark.parametrize("grid, tiles", [((8, 8), (4, 4)), ((8, 12), (3, 4)), ((7, 5), (2, 3)), ((2, 3), (4, 4))])
def test_places_of_tiles_are_the_windows_of_adaptive_pooling(grid, tiles):
    """Also where they do not divide the grid, and where there are more tiles than places."""
    assert torch.equal(places_of_tiles(grid, tiles), pooling_windows(grid, tiles))


def test_more_waves_than_a_head_compares():
    with pytest.raises(ValueError, match="9 waves are more than heads of 16 channels can compare"):
        look_near(plain_attention(64, 4), Waves(torch.arange(9), 32 + torch.arange(9), torch.ones(9, 1)), [[1.0]])


def test_a_model_that_hears_begins_so():
    """On a drawn voice, in the first layer: each head's likeliest state is where it should be, one state aside at most,
    for nine of ten states; when weights and sound are at random, for one of seventy."""
    torch.manual_seed(0)
    encoder = small_model(VoiceOptions(), speech_tokenizer(list(islice(sentences(Random(0), unseen=False), 50)), 300))
    encoder = encoder.whisper.encoder
    mel = windows([drawn_split("train", 2, 0)[0].mel], 400)
    with torch.no_grad():
        x = torch.nn.functional.gelu(encoder.conv2(torch.nn.functional.gelu(encoder.conv1(mel)))).mT + encoder.positions
        first = encoder.blocks[0]
        found = scores(first.attn, first.norm1(x[0])).argmax(2)[:, 10:190]
    for head, states in enumerate(NEAR):
        assert ((found[head] - torch.arange(10, 190) - states).abs() <= 1).float().mean() > 0.9
