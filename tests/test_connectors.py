"""Connectors against their arithmetic written out, prefixes against GPT-2 of `transformers`, and a connector that
somebody else adds."""

import json
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, brute_force_attention
from model_helpers import GRID, SIDE, SIZES, pooling_windows, tiny_image, tiny_model
from model_helpers import decoder as tiny_decoder
from torch import Tensor, nn
from transformers import GPT2LMHeadModel
from vqa_helpers import CPU, small_flags, small_options, small_system

from train import train_step
from vqa_scratch import systems
from vqa_scratch.connectors import CONNECTORS, connect, connector_class, connector_sizes
from vqa_scratch.connectors.mean import masked_average
from vqa_scratch.errors import UserError
from vqa_scratch.generate import GenerationOptions, generate, rank
from vqa_scratch.models import VQAModel
from vqa_scratch.models.patches import PixelPatchesConfig
from vqa_scratch.nn.connecting import Conditioning, Connector
from vqa_scratch.nn.memory import Memory
from vqa_scratch.nn.neighbours import GridWaves
from vqa_scratch.nn.states import States
from vqa_scratch.systems.options import PRESETS, VQAOptions, read_command_line
from vqa_scratch.systems.run_folder import save_weights
from vqa_scratch.systems.splits import ANY_SAMPLE
from vqa_scratch.systems.vqa import VQASystem
from vqa_scratch.systems.vqa_models import released_models, small_models
from vqa_scratch.training.optimizers import Optimizers
from vqa_scratch.training.precision import Precision
from vqa_scratch.training.ranks import World
from vqa_scratch.training.recompute import recompute_blocks

EXACT = 1e-10  # of sums in float64 in another order
INDEX = torch.tensor([1, 0, 1, 1, 0])  # five rows about two images, in no order
LENGTHS = torch.tensor([6, 2, 4, 1, 6])  # of their questions
MASK = torch.arange(6) < LENGTHS[:, None]
FEW = {"mean": 1, "prefix": 9, "patches": 9}  # tokens that a connector keeps, if not all 10
PREFIXES = [kind for kind in CONNECTORS if not connector_class(kind).uses_memory]


@pytest.fixture(autouse=True)
def no_gradients():
    """Every test here compares values; the one that trains asks for gradients itself."""
    with torch.no_grad():
        yield


def states(model: VQAModel, height: int = SIDE, width: int = SIDE) -> tuple[States, States | None]:
    """Two images and five questions of different lengths, encoded."""
    g = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, height, width, generator=g, dtype=torch.float64)
    ids = torch.randint(40, MASK.shape, generator=g)
    return model.image.states(pixels), None if model.text is None else model.text.states(ids, MASK)


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return torch.einsum("oi,...i->...o", layer.weight, x) + layer.bias


def same(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape and theirs.abs().max() > 0.1
    assert (ours - theirs).abs().max() < EXACT


# ------------------------------------------------------------------------------------------------ by hand


def per_row(memory):
    """(B, N, D): the states that each row reads."""
    keys = memory.states[:, None]  # of one head
    return memory.project(keys, keys).per_row().k[:, 0]


@pytest.mark.parametrize("texts", [True, False])
@pytest.mark.parametrize("size", [(SIDE, SIDE), (SIDE, 2 * SIDE)])
def test_tokens(texts, size):
    """Every token is a key; image tokens get their place once more, and with a text both sides their modality."""
    model = tiny_model("tokens", texts=texts).double()
    image, text = states(model, *size)
    own, parts = model.connector, model.connector(image, text, INDEX).memory
    table = own.places[0]
    if size != (SIDE, SIDE):  # the table of 3x3 places, made as wide as the image
        places = table[1:].T.reshape(1, -1, *GRID)
        places = F.interpolate(places, size=(3, 6), mode="bicubic", align_corners=False)
        table = torch.cat([table[:1], places.flatten(2)[0].T])
    modality = own.modality if texts else torch.zeros(2, 16)
    for row, entry in enumerate(INDEX):
        keys = linear(own.image_projection, image.tokens[entry]) + table + modality[0]
        same(per_row(parts[0])[row], keys)
        if texts:
            same(per_row(parts[1])[row], linear(own.text_projection, text.tokens[row]) + modality[1])
    assert parts[0].mask is None, "no image token is padding"
    assert len(parts[0].states) == 2, "the keys of an image are not copied"
    assert len(parts) == 1 + texts and all(torch.equal(part.mask, MASK) for part in parts[1:])


@pytest.mark.parametrize("texts", [True, False])
def test_mean(texts):
    """One key: the average of two averages, each over real tokens alone."""
    model = tiny_model("mean", texts=texts).double()
    image, text = states(model)
    own, (memory,) = model.connector, model.connector(image, text, INDEX).memory
    assert memory.states.shape == (5, 1, 16) and memory.mask is None
    for row, entry in enumerate(INDEX):
        key = linear(own.image_projection, image.tokens[entry]).mean(0)
        if texts:
            words = linear(own.text_projection, text.tokens[row, : LENGTHS[row]])
            key = (key + words.mean(0)) / 2
        same(memory.states[row, 0], key)


def test_masked_average_of_nothing_is_zero():
    x = torch.randn(2, 3, 4)
    assert torch.equal(masked_average(x, torch.zeros(2, 3, dtype=torch.bool)), torch.zeros(2, 4))
    assert torch.allclose(masked_average(x, None), x.mean(1))


def test_prefix():
    """Linear, GELU, linear on every place; the class token is none."""
    model = tiny_model("prefix").double()
    image, text = states(model)
    own, prefix = model.connector, model.connector(image, text, INDEX).prefix
    hidden = linear(own.up, image.tokens[:, 1:])
    expected = linear(own.down, hidden * (1 + torch.erf(hidden / 2**0.5)) / 2)
    same(prefix, expected)
    assert text is None and prefix.shape == (2, 9, 16)


@pytest.mark.parametrize("newlines", [True, False])
@pytest.mark.parametrize("size", [(SIDE, SIDE), (16, 40)])
def test_patches(size, newlines):
    """Every pixel of a patch, row by row and the colours of each together, through one linear map; a newline after the
    last patch of a row."""
    model = tiny_model("patches").double()
    model.connector = connect({"kind": "patches", "newlines": newlines}, model.image, None, model.decoder).double()
    pixels = torch.randn(2, 3, *size, dtype=torch.float64)
    own, image = model.connector, model.image.states(pixels)
    prefix, rows = own(image, None, INDEX).prefix, []
    for top in range(0, size[0], 8):
        for left in range(0, size[1], 8):
            patch = [pixels[:, c, top + y, left + x] for y in range(8) for x in range(8) for c in range(3)]
            rows.append(linear(own.projection, torch.stack(patch, 1)))
        rows += [own.newline.expand(2, -1)] if newlines else []
    same(prefix, torch.stack(rows, 1))
    assert prefix.shape[1] == own.prefix_length(image.places.grid, own.sizes)
    assert image.places == (tuple(side // 8 for side in size), 4, 8) and image.prefix_tokens == 0
    assert not list(model.image.parameters())


def test_patches_show_where_they_are():
    """A newline is a token of its own and no place: rows of `mixing` say which token is about which patch."""
    grid = (2, 3)
    own = tiny_model("patches").connector
    assert own.marks(grid) == ["newline 1", "newline 2"]
    expected = [2, 3, 4, 0, 5, 6, 7, 1]  # the two newlines come first among the sources
    assert own.mixing(6, 0, grid).argmax(1).tolist() == expected
    assert torch.equal(own.mixing(6, 0, grid).sum(1), torch.ones(8))
    plain = connect({"kind": "patches", "newlines": False}, tiny_model("patches").image, None, tiny_model().decoder)
    assert plain.marks(grid) == [] and torch.equal(plain.mixing(6, 0, grid), torch.eye(6))


def test_patches_that_cannot_be_are_told():
    model = tiny_model("patches")
    with pytest.raises(UserError, match="^an image of 20x24 pixels does not divide into patches of 8x8$"):
        model.image.states(torch.zeros(1, 3, 20, 24))
    with pytest.raises(UserError, match="^there are no patches of 0 pixels a side with 3 channels$"):
        PixelPatchesConfig(0)
    with pytest.raises(UserError, match="^a connector patches cannot have a newlines of 1$"):
        connect({"kind": "patches", "newlines": 1}, model.image, None, model.decoder)


def with_queries(kind: str, tiles: bool) -> tuple[VQAModel, Tensor]:
    """A model whose learned queries read a tile each, or all of the image; and (5, 10), what each query may read."""
    model = tiny_model(kind).double()
    model.connector.tiles = tiles
    if not tiles:
        return model, torch.ones(5, 10, dtype=torch.bool)
    return model, F.pad(pooling_windows(GRID, (1, 5)), (1, 0))  # 5 queries are 1 x 5 tiles; the class token is in none


@pytest.mark.parametrize("tiles", [True, False])
def test_qformer(tiles):
    """Blocks of self-attention, attention to the image, and MLP, each sum normed; attention from its definition."""
    model, may_read = with_queries("qformer", tiles)
    image, _ = states(model)
    own = model.connector
    former, x = own.qformer, own.qformer.norm(own.qformer.queries).expand(2, -1, -1)

    def attention(layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (4, -1)).transpose(1, 2) for part in (q, k, v))
        allowed = allowed.expand(2, 4, -1, -1)
        read = brute_force_attention(q, k, v, allowed, None, q.shape[-1] ** -0.5)
        return linear(layer.out, read.transpose(1, 2).flatten(2))

    assert len(former.blocks) == 2
    for block in former.blocks:
        each_other = torch.ones(5, 5, dtype=torch.bool)
        x = block.norm1(x + attention(block.attn, *linear(block.attn.qkv, x).chunk(3, -1), each_other))
        asked = linear(block.cross.q, x), *linear(block.cross.kv, image.tokens + own.places).chunk(2, -1)
        x = block.norm_cross(x + attention(block.cross, *asked, may_read))
        hidden = linear(block.mlp.up, x)
        x = block.norm2(x + linear(block.mlp.down, hidden * (1 + torch.erf(hidden / 2**0.5)) / 2))
    same(own(image, None, INDEX).prefix, linear(own.projection, x))


@pytest.mark.parametrize("tiles", [True, False])
def test_resampler(tiles):
    """Pre-norm blocks in which latents read image and latents, a last norm; from the definition of attention."""
    model, may_read = with_queries("resampler", tiles)
    hidden_keys = ~torch.cat([may_read, torch.ones(5, 5, dtype=torch.bool)], 1)
    image, text = states(model)
    own, (memory,) = model.connector, model.connector(image, text, INDEX).memory
    latents = own.resampler.latents.expand(2, -1, -1)
    for block in own.resampler.blocks:
        asked = block.norm1(latents)
        keys = torch.cat([block.norm_image(image.tokens + own.places), asked], 1)
        read = []
        for head in range(4):
            part = slice(4 * head, 4 * head + 4)
            q = asked @ block.cross.q.weight[part].T
            k, v = (keys @ weight[part].T for weight in block.cross.kv.weight.chunk(2))
            read.append((q @ k.mT / 2).masked_fill(hidden_keys, -torch.inf).softmax(-1) @ v)
        latents = latents + torch.cat(read, 2) @ block.cross.out.weight.T
        hidden = block.norm2(latents) @ block.mlp.up.weight.T
        latents = latents + (hidden * (1 + torch.erf(hidden / 2**0.5)) / 2) @ block.mlp.down.weight.T
    for row, entry in enumerate(INDEX):
        same(per_row(memory)[row], own.resampler.norm(latents)[entry])
    assert len(memory.states) == 2 and own.sizes == SIZES["resampler"] | {"grid": [3, 3], "tiles": tiles}


@pytest.mark.parametrize("kind", ["qformer", "resampler"])
def test_learned_queries_of_runs_before_they_were_given_places(kind):
    """Without a grid there is no table, and the image is read as if it were zero."""
    model = tiny_model(kind).double()
    sizes = {name: value for name, value in model.connector.sizes.items() if name not in ("grid", "tiles")}
    before = connect({"kind": kind, **sizes}, model.image, None, model.decoder).double().eval()
    assert before.sizes == sizes | {"tiles": False} and "places" not in before.state_dict()
    model.connector.tiles = False
    weights = model.connector.state_dict()
    with torch.no_grad():
        weights.pop("places")
        model.connector.places.zero_()
    before.load_state_dict(weights)
    image, _ = states(model)
    for ours, theirs in zip(
        rows_of(before(image, None, INDEX)), rows_of(model.connector(image, None, INDEX)), strict=True
    ):
        same(ours, theirs)


@pytest.mark.parametrize("kind", ["qformer", "resampler"])
def test_tiles_cut_an_image_of_any_size(kind):
    """An image twice as wide has wider tiles, and without its grid there are none."""
    model = tiny_model(kind).double()
    image, _ = states(model, SIDE, 2 * SIDE)
    _, seen = model.connector.read(image)
    assert torch.equal(seen[:, 1:], pooling_windows((3, 6), (1, 5))) and not seen[:, 0].any()
    with pytest.raises(UserError, match="^learned queries that read a tile each need the grid of the image's places$"):
        connect({"kind": kind, "tiles": True}, model.image, None, model.decoder)


def test_gates_are_open_where_a_decoder_begins_at_random():
    """The small models; a connector between other models leaves them closed, as the next test says."""
    options = read_command_line(["--connector", "resampler", "--question-prompt", "--steps", "1"])
    decoder = small_models(options, [ANY_SAMPLE])[0].decoder
    gates = [gate for name, gate in decoder.named_parameters() if name.endswith("_gate")]
    assert len(gates) == 2 * len(decoder.blocks) and all(gate.item() == 0.5 for gate in gates)


def test_latents_begin_by_hearing_the_image():
    """What a new resampler's first block adds of the image is about as large as its latents; it was a sixteenth."""
    options = read_command_line(["--connector", "resampler", "--question-prompt", "--steps", "1"])
    torch.manual_seed(0)
    model = small_models(options, [ANY_SAMPLE])[0].eval()
    image, seen = model.connector.read(model.image.states(torch.randn(8, 3, 64, 64)))
    resampler = model.connector.resampler
    latents, block = resampler.latents.expand(8, -1, -1), resampler.blocks[0]
    visible = F.pad(seen, (0, 16), value=True).expand(8, -1, -1)
    keys = torch.cat([block.norm_image(image), block.norm1(latents)], 1)
    read = block.cross(block.norm1(latents), Memory(keys, seen=visible))
    assert 0.4 < read.norm() / latents.norm() < 1.6


@pytest.mark.parametrize("kind", ["prefix", "patches", "qformer"])
def test_positions_of_a_prefix_begin_as_places(kind):
    """Neighbours in a column are as alike as neighbours in a row, where the prefix is laid out as the image is."""
    options = read_command_line(["--connector", kind, "--question-prompt", "--steps", "1"])
    model = small_models(options, [ANY_SAMPLE])[0]
    grid = {"prefix": (8, 8), "patches": (8, 9), "qformer": (4, 4)}[kind]
    assert connector_class(kind).prefix_grid((8, 8), model.connector.sizes) == grid
    length = grid[0] * grid[1]
    table = model.decoder.positions.weight[:length].detach().unflatten(0, grid)
    across, down = (table.diff(dim=of).norm(dim=-1).mean() for of in (1, 0))
    assert 0.9 < across / down < 1.1 and model.decoder.positions.weight[length:].std() < 0.03


def test_closed_gates_are_the_bare_decoder():
    """A new resampler changes no bit of what its decoder says; in its layers the first step moves the gates alone."""
    image, decoder = tiny_image("resampler"), tiny_decoder(False)
    ids = torch.randint(30, MASK.shape)
    bare = decoder.eval().hidden(decoder.embed(ids), MASK.flip(1))
    connector = connect({"kind": "resampler", "queries": 3}, image, None, decoder)
    model = VQAModel(image, None, connector, decoder).eval()
    seen = model.image.states(torch.randn(2, 3, SIDE, SIDE))
    assert torch.equal(model.hidden(seen, None, ids, INDEX, MASK.flip(1)), bare)
    with torch.enable_grad():
        model.hidden(seen, None, ids, INDEX).square().sum().backward()
    moved = {name.split("gated.")[1] for name, p in decoder.named_parameters() if "gated" in name and p.grad.any()}
    assert moved == {"cross_gate", "mlp_gate"} and not connector.resampler.latents.grad.any()
    with torch.no_grad():
        decoder.blocks[1].gated.cross_gate.fill_(0.1)
    assert not torch.equal(model.hidden(seen, None, ids, INDEX, MASK.flip(1)), bare)


# ------------------------------------------------------------------------------------------------ all of them


@pytest.fixture(params=CONNECTORS)
def kind(request) -> str:
    return request.param


def rows_of(given: Conditioning) -> list[Tensor]:
    """What each row of the decoder is given: keys of every part, or a prefix."""
    if given.prefix is None:
        return [per_row(part) for part in given.memory]
    return [given.prefix if given.prefix_index is None else given.prefix[given.prefix_index]]


def test_questions_of_an_image_share_it(kind):
    """An index says the same as the image once for each of its questions, and None the same as their order."""
    model = tiny_model(kind).double()
    image, text = states(model)
    apart = States(image.tokens[INDEX], places=image.places)
    wanted = rows_of(model.connector(apart, text, torch.arange(5)))
    for given in (model.connector(image, text, INDEX), model.connector(apart, text)):
        for ours, theirs in zip(rows_of(given), wanted, strict=True):
            same(ours, theirs)


def test_what_is_kept_is_all_that_is_read(kind):
    """A cache of features keeps `kept`, and the connector takes it for the image."""
    model = tiny_model(kind).double()
    image, text = states(model)
    kept = model.connector.kept(image)
    assert kept.tokens.shape[1] == FEW.get(kind, 10)
    whole, part = (rows_of(model.connector(some, text, INDEX)) for some in (image, kept))
    for ours, theirs in zip(part, whole, strict=True):
        same(ours, theirs)


def test_sizes_build_it_again(kind):
    """From the words in config.json, and in the length that the decoder's positions are counted by."""
    model = tiny_model(kind).double()
    sizes = json.loads(json.dumps(connector_sizes(model.connector)))
    assert sizes["kind"] == kind and type(model.connector) is connector_class(kind)
    again = connect(sizes, model.image, model.text, model.decoder).double()
    assert connector_sizes(again) == sizes
    again.load_state_dict(model.connector.state_dict())
    given = model.connector(*states(model), INDEX)
    for ours, theirs in zip(rows_of(again.eval()(*states(model), INDEX)), rows_of(given), strict=True):
        assert torch.equal(ours, theirs)
    length = connector_class(kind).prefix_length(GRID, {name: v for name, v in sizes.items() if name != "kind"})
    assert length == (0 if given.prefix is None else given.prefix.shape[1])


PLACED = {"places", "queries", "latents", "cross"}


def test_places_tell_each_other_apart_from_the_start(kind):
    """In a table, which has none for the class token, and by what learned queries read; others have nothing."""
    model = tiny_model(kind)
    before = {name: tensor.clone() for name, tensor in model.connector.state_dict().items()}
    model.connector.start_from_places(GridWaves(GRID, 16))
    changed = {name: t for name, t in model.connector.state_dict().items() if not torch.equal(t, before[name])}
    assert {part for name in changed for part in name.split(".") if part in PLACED} == {
        "tokens": {"places"},
        "qformer": {"places", "queries", "cross"},
        "resampler": {"places", "latents", "cross"},
    }.get(kind, set())
    if changed:
        table = (1 if kind == "tokens" else 2) * GridWaves(GRID, 16).table()
        same(changed["places"][0, 1:].double(), table.double())
        assert torch.equal(changed["places"][0, 0], before["places"][0, 0])


def test_padding_of_prompts_never_reaches_the_image(kind):
    """Rows whose prompts are padded on the left say what they say alone, whatever the padding holds, and none of it
    hides the image: another one changes every row."""
    model = tiny_model(kind).double()
    image, text = states(model)
    ids = torch.randint(30, MASK.shape)
    mask = MASK.flip(1)  # padded on the left
    other = ids.masked_fill(~mask, 7)
    ours, filled = (model.hidden(image, text, some, INDEX, mask) for some in (ids, other))
    assert torch.equal(ours[mask], filled[mask])
    turned = States(-image.tokens, image.mask, image.places)
    moved = (model.hidden(turned, text, ids, INDEX, mask) - ours).abs().amax(2)
    assert (moved[mask] > 1e-6).all()
    for row in range(5):
        one = slice(row, row + 1)
        question = None if text is None else States(text.tokens[one], text.mask[one])
        alone = model.hidden(image, question, ids[one, 6 - LENGTHS[row] :], INDEX[one])
        same(ours[row, 6 - LENGTHS[row] :], alone[0])


# ------------------------------------------------------------------------------------------------ prefixes


@pytest.mark.parametrize("kind", PREFIXES)
def test_a_prefix_is_read_as_the_reference_reads_it(kind, tmp_path):
    """GPT2LMHeadModel on the same embeddings, with prompts padded on the left."""
    model = tiny_model(kind)
    model.decoder.save_pretrained(tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    image, _ = states(model.double())
    model.float()
    image = States(image.tokens.float(), places=image.places)
    ids, mask = torch.randint(30, MASK.shape), MASK.flip(1)
    prefix = model.connector(image, None).prefix[INDEX]
    whole = torch.cat([torch.ones(prefix.shape[:2]), mask], 1)
    asked = {
        "inputs_embeds": torch.cat([prefix, theirs.transformer.wte(ids)], 1),
        "attention_mask": whole.long(),
        "position_ids": (whole.cumsum(1) - 1).clamp(min=0).long(),
    }
    wanted = theirs(**asked).logits[:, prefix.shape[1] :]
    ours = model.decoder.logits(model.hidden(image, None, ids, INDEX, mask))
    assert_close(ours, wanted, where=mask)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", PREFIXES)
@torch.enable_grad()
def test_a_prefix_goes_through_the_decoder_once(kind, checkpointing):
    """For all questions of its image: states and every gradient are those of a prefix for each question, also when
    blocks are run again in the backward pass."""
    model = tiny_model(kind).double().train()
    ids, passed = torch.randint(30, MASK.shape), []
    if checkpointing:
        recompute_blocks(model)
    hook = model.decoder.blocks[0].norm1.register_forward_hook(lambda _, given, out: passed.append(out.shape[:2]))

    def run(image: States, index: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        hidden = model.hidden(image, None, ids, index)
        (hidden * weight).sum().backward()
        return hidden, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    with torch.no_grad():
        image, weight = states(model)[0], torch.randn(5, 6, 16).double()
    shared, gradients = run(image, INDEX)
    length = {"prefix": 9, "patches": 12, "qformer": 5}[kind]
    assert passed[:2] == [(2, length), (5, 6)]
    apart, expected = run(States(image.tokens[INDEX], places=image.places), None)
    assert (5, length + 6) in passed
    same(shared, apart)
    assert gradients.keys() == expected.keys() and len(gradients) > 30
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-11, rtol=1e-9, msg=name)
    hook.remove()


@pytest.mark.parametrize("kind", PREFIXES)
def test_candidates_after_a_shared_prefix(kind):
    """Ranked as after a prefix for each row."""
    model = tiny_model(kind).double().eval()
    image, _ = states(model)
    ids, mask, candidates = torch.randint(3, 30, MASK.shape), MASK.flip(1), [[5, 2], [5, 7, 2], [9]]
    prefix = model.connector(image, None).prefix
    shared = rank(model.decoder, ids, mask, Conditioning(None, prefix, INDEX), candidates)
    apart = rank(model.decoder, ids, mask, Conditioning(prefix=prefix[INDEX]), candidates)
    torch.testing.assert_close(shared, apart, atol=1e-5, rtol=0)  # float32, sums of up to three log-probabilities


@pytest.mark.parametrize("kind", CONNECTORS)
def test_greedy_decoding_is_the_model_without_a_cache(kind):
    """Prompts of different lengths; the same tokens and log-probabilities as running the whole model for each token."""
    model = tiny_model(kind).double()
    image, text = states(model)
    given, ids, mask = model.connector(image, text, INDEX), torch.randint(3, 30, MASK.shape), MASK.flip(1)
    options = GenerationOptions(7, 2)
    made = generate(model.decoder, ids, mask, given, options=options)
    for row in range(5):
        one, length = slice(row, row + 1), int(made.lengths[row])
        question = None if text is None else States(text.tokens[one], text.mask[one])
        said = ids[one, 6 - LENGTHS[row] :]
        for step in range(length):
            logits = model.decoder.logits(model.hidden(image, question, said, INDEX[one]))[0, -1]
            score, token = logits.float().log_softmax(-1).max(-1)  # decoding keeps them in float32
            assert int(token) == int(made.ids[row, step])
            assert float(score) == pytest.approx(float(made.log_probs[row, step]), abs=1e-5)
            said = torch.cat([said, token[None, None]], 1)
        assert length == 7 or int(token) == 2
    assert len({tuple(ids) for ids in made.ids.tolist()}) > 1, "every row says the same: the test says little"


def test_prefixes_need_room():
    """The decoder's positions serve prefix and words together."""
    model = tiny_model("prefix").double()
    image, _ = states(model)
    assert model.hidden(image, None, torch.ones(2, 23, dtype=torch.long)).shape == (2, 23, 16)
    with pytest.raises(ValueError, match="33 tokens, but the position table serves 32"):
        model.hidden(image, None, torch.ones(2, 24, dtype=torch.long))


# ------------------------------------------------------------------------------------------------ another connector


class RowsConnector(Connector):
    """A prefix with one embedding for each row of places: their average, mapped linearly."""

    reads_text = False
    uses_memory = False

    def __init__(self, image: nn.Module, text: None, decoder: nn.Module, *, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.map = nn.Linear(image.dim, decoder.config.dim)

    @classmethod
    def sizes_for(cls, grid: tuple[int, int], options: Any) -> dict[str, Any]:
        return {"rows": grid[0]}

    @classmethod
    def prefix_length(cls, grid: tuple[int, int], sizes: dict[str, Any]) -> int:
        return sizes["rows"]

    @property
    def sizes(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def mixing(self, image: int, text: int, grid: tuple[int, int]) -> torch.Tensor:
        rows = torch.eye(self.rows).repeat_interleave(self.rows, 1) / self.rows
        return F.pad(rows, (image - self.rows**2, 0))

    def recipe(self, with_text: bool) -> str:
        return f'prefix = linear("map", image_states[:, -{self.rows**2}:].unflatten(1, ({self.rows}, -1)).mean(2))'

    def forward(self, image: States, text: None, image_index: Tensor | None = None) -> Conditioning:
        places = image.tokens[:, image.prefix_tokens :].unflatten(1, image.places.grid)  # (I, rows, columns, D)
        prefix = self.map(places.mean(2))
        return Conditioning(prefix=prefix if image_index is None else prefix[image_index])


@torch.enable_grad()
def test_a_new_connector_is_one_file_and_a_line(data, tmp_path, monkeypatch):
    """What the table in `vqa_scratch/connectors/__init__.py` promises: a class in a file of that folder, and a line in
    the table. It has its word on the command line, trains, and is saved, opened and asked like any other."""
    monkeypatch.setitem(sys.modules, "vqa_scratch.connectors.rows", sys.modules[__name__])  # the file
    monkeypatch.setitem(CONNECTORS, "rows", ("rows", "RowsConnector"))  # the line
    options = read_command_line([*small_flags(data, tmp_path / "run", connector="rows"), "--question-prompt"])
    samples = VQASystem.read(options)
    system = VQASystem.build(options, samples, Precision("fp32", CPU))
    system.train_on(samples)
    assert type(system.model.connector) is RowsConnector and system.model.text is None
    before = system.model.connector.map.weight.detach().clone()
    rates = {"kind": "adamw", "learning_rate": 1e-2, "matrix_learning_rate": 0.0, "weight_decay": 0.0}
    batch, optimizers = system.batch(system.epoch(0)[0]), Optimizers(system.model, **rates)
    losses = [float(train_step(system.loss, batch, optimizers, system.precision)[0]) for _ in range(2)]
    assert losses[1] < losses[0] and not torch.equal(system.model.connector.map.weight, before)
    system.save(options.out)
    save_weights(options.out / "model.safetensors", system.model)
    opened = systems.load(options.out)
    assert opened.sizes["connector"] == {"kind": "rows", "rows": 8}
    sample = samples.samples["val"][0]
    (answer,), _ = opened.ask(sample.image_path, sample.question)
    assert answer.text == system.answer([sample])[sample.question_id].text
    assert opened.export(tmp_path / "out") and "connector `rows`" in (tmp_path / "out" / "README.md").read_text()


def test_words_are_labels_for_the_first_steps(data, tmp_path):
    """Counted over epochs, and on every rank; what a step is scored on is not."""
    options = small_options(data, tmp_path / "run", question_prompt=True, text_encoder=False, question_loss=True)
    epoch = len(small_system(options).epoch(0))
    system = small_system(replace(options, question_loss_steps=epoch + 1))
    keys = [*system.epoch(0), *system.epoch(1)]
    assert [key.step for key in keys] == list(range(2 * epoch)) and epoch > 1
    for key in keys:
        batch, questions = system.batch(key), system.splits["train"].questions
        words = questions.batch(key.rows, system.splits["train"].images, words=key.step <= epoch)
        assert torch.equal(batch.labels, words.labels), key.step
    first, after = (system.batch(keys[step]).counts for step in (epoch, epoch + 1))
    assert first[1] > 4 * first[0] and after[1] <= 4 * after[0], "a question has more words than an answer"
    share, _ = system.share(keys[epoch + 1], World(rank=1, size=2))
    assert share.step == epoch + 1
    assert small_system(replace(options, question_loss=False)).batch(keys[0]).counts[1] <= 4 * first[0]


LACKING = "--freeze {} means nothing with {}: there"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--connector prefix", "--connector prefix gives the decoder the image alone: add --question-prompt"),
        ("--no-text-encoder", "--no-text-encoder gives the decoder the image alone: add --question-prompt"),
        (
            "--connector prefix --question-prompt --text-encoder",
            "--text-encoder means nothing with --connector prefix: it takes no states of a text encoder",
        ),
        ("--question-prompt --text-encoder", "--text-encoder tells the decoder the question: add --no-question-loss"),
        *(
            (f"{flags} --question-prompt --freeze {part}", LACKING.format(part, flags))
            for flags, part in (
                ("--no-text-encoder", "text_encoder"),
                ("--connector prefix", "text_encoder"),
                ("--connector patches", "text_encoder"),
                ("--connector patches", "image_encoder"),
                ("--connector patches", "encoders"),
            )
        ),
    ],
)
def test_the_question_reaches_the_decoder_and_what_is_frozen_is_there(data, tmp_path, flags, message):
    argv = small_flags(data, tmp_path / "run", text_layers=None, image_layers=None)
    with pytest.raises(UserError, match=f"^{message}"):
        VQASystem.check(read_command_line([*argv, "--no-question-prompt", *flags.split()]))


@pytest.mark.parametrize("flags", ["--text-layers 2", "--preset book --data x --text-model y"])
def test_sizes_of_a_text_encoder_go_with_one(flags):
    with pytest.raises(UserError, match="without --text-encoder: it goes with --text-encoder"):
        read_command_line(["--no-text-encoder", *flags.split()])


@pytest.mark.parametrize("preset", ["shapes", "book"])
@pytest.mark.parametrize("kind", ["tokens", "mean"])
def test_without_a_text_encoder_the_question_is_the_prompt(data, tmp_path, kind, preset):
    """Trained, saved, opened, and asked: what differs from the run with a text encoder is that there is none."""
    choices = {"connector": kind, "question_prompt": True, "text_encoder": False, "preset": preset}
    if preset == "book":  # random weights of a released size are too large for a test: their sizes are looked at alone
        with torch.device("meta"):
            plain = VQAOptions(**PRESETS["book"] | choices | {"data": data, "init": "random"})
            model, words, _ = released_models(plain, [ANY_SAMPLE])
        assert model.text is None and words.text is None
        return
    system = small_system(small_options(data, tmp_path / "run", **choices))
    assert system.model.text is None and not any("text" in name for name, _ in system.model.named_parameters())
    system.save(tmp_path / "run")
    save_weights(tmp_path / "run" / "model.safetensors", system.model)
    opened, sample = systems.load(tmp_path / "run"), system.data.samples["val"][0]
    (answer,), _ = opened.ask(sample.image_path, sample.question)
    assert answer.text == system.answer([sample])[sample.question_id].text
    longer = small_options(data, tmp_path / "more", start_from=tmp_path / "run")
    with torch.enable_grad():
        assert VQASystem.build(longer, system.data, system.precision).model.text is None
