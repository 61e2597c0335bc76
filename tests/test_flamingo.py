"""The shared parts of Flamingo: the resampler, gated layers in any decoder, and texts with several images.

Widths are small and weights large, so that a wrong key, mask or gate shows.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, use_backend
from torch import Tensor, nn
from transformers.models.idefics.configuration_idefics import IdeficsConfig
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

from vqa_scratch.generate import Conditioning, GenerationOptions, begin, generate, rank
from vqa_scratch.generate.fast import FastState
from vqa_scratch.generate.fast.self_attention import FixedRows, OneRow, Rows
from vqa_scratch.generate.fast.state import of_steps
from vqa_scratch.generate.start import prefill
from vqa_scratch.generate.state import ModuleState
from vqa_scratch.models import GPT2, OPT, GPT2Config, Llama, LlamaConfig, OPTConfig
from vqa_scratch.models.resampler import Resampler, ResamplerConfig
from vqa_scratch.nn import Memory, MultiHeadAttention, taps
from vqa_scratch.nn.attention import BACKENDS
from vqa_scratch.nn.gated import GatedMLP
from vqa_scratch.nn.gated_cross import GatedCrossAttention, flamingo_layer
from vqa_scratch.nn.memory_parts import images_of_texts, last_images
from vqa_scratch.nn.rms_norm import RMSNorm
from vqa_scratch.study import trace

no_grad = torch.no_grad()
VOCABULARY, WIDTH, CONTEXT, LATENTS, STEPS, IMAGE = 24, 16, 12, 3, 6, 5
# Differences of fp32 sums in another order, in logits of size 1 to 10.
CLOSE = {"atol": 2e-5, "rtol": 0.0}


def shaken(model: nn.Module, size: float = 0.4) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * size)
    return model.eval()


# --- the resampler ----------------------------------------------------------------------------------------------------


@no_grad
@pytest.mark.parametrize("head_norm", [False, True])
def test_the_resampler_is_that_of_idefics(head_norm):
    """Its heads are not the width divided, its MLP has ReLU, and queries and keys may be normed."""
    sizes = {"resampler_n_latents": 5, "resampler_depth": 2, "resampler_n_heads": 2, "resampler_head_dim": 6}
    config = IdeficsConfig(
        vision_config={"embed_dim": CONTEXT}, perceiver_config={**sizes, "qk_layer_norms_perceiver": head_norm}
    )
    theirs = shaken(IdeficsPerceiverResampler(config, CONTEXT, 2, 2, 6, 5))
    ours = Resampler(
        ResamplerConfig(CONTEXT, latents=5, layers=2, heads=2, head_dim=6, activation="relu", head_norm=head_norm)
    )
    ours.latents.copy_(theirs.latents)
    ours.norm.load_state_dict(theirs.layer_norm.state_dict())
    for block, (attention, mlp) in zip(ours.blocks, theirs.blocks, strict=True):
        block.norm_image.load_state_dict(attention.context_layer_norm.state_dict())
        block.norm1.load_state_dict(attention.latents_layer_norm.state_dict())
        block.cross.q.weight.copy_(attention.q_proj.weight)
        block.cross.kv.weight.copy_(torch.cat([attention.k_proj.weight, attention.v_proj.weight]))
        block.cross.out.weight.copy_(attention.output_proj.weight)
        block.norm2.load_state_dict(mlp.ln.state_dict())
        block.mlp.up.weight.copy_(mlp.fc.weight), block.mlp.down.weight.copy_(mlp.c_proj.weight)
        if head_norm:
            block.cross.q_norm.load_state_dict(attention.q_layer_norm.state_dict())
            block.cross.k_norm.load_state_dict(attention.k_layer_norm.state_dict())
    image = torch.randn(3, 7, CONTEXT)
    assert_close(ours(image), theirs(image))
    assert ours(image[:, :4]).shape == (3, 5, CONTEXT), "an image of any number of tokens"


def test_the_resampler_reads_itself_beside_the_image():
    """An image of one constant state still gives different latents, and each image is read by itself."""
    model = Resampler(ResamplerConfig(CONTEXT, latents=4, layers=1, heads=2, head_dim=6))
    image = torch.randn(2, 7, CONTEXT)
    torch.testing.assert_close(model(image)[1:], model(image[1:]), **CLOSE)
    model(image).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


# --- gated layers in any decoder --------------------------------------------------------------------------------------

SIZES = {"vocab_size": VOCABULARY, "max_positions": 40, "dim": WIDTH, "layers": 4, "heads": 2}
DECODERS = {
    "gpt2": lambda: GPT2(GPT2Config(**SIZES)),
    "opt": lambda: OPT(OPTConfig(hidden=20, embedding_dim=8, **SIZES)),
    "llama": lambda: Llama(LlamaConfig(hidden=20, kv_heads=1, **SIZES)),
}


def llama_layer() -> GatedCrossAttention:
    """As in Idefics: root-mean-square norms, of queries and keys too, a gated MLP, a gate for each number."""
    before = RMSNorm(WIDTH // 2, 1e-6), RMSNorm(WIDTH // 2, 1e-6), nn.Identity()
    cross = MultiHeadAttention(WIDTH, 2, context_dim=CONTEXT, bias=False, before=before)
    norms = RMSNorm(WIDTH, 1e-6), RMSNorm(WIDTH, 1e-6)
    return GatedCrossAttention(norms[0], cross, norms[1], GatedMLP(WIDTH, 20, F.silu), gates=WIDTH)


LAYERS = {"flamingo": lambda: flamingo_layer(WIDTH, CONTEXT, heads=2, head_dim=5), "idefics": llama_layer}


def decoder_with(kind: str, layer: str = "flamingo", every: int = 2) -> nn.Module:
    torch.manual_seed(0)
    decoder = DECODERS[kind]()
    decoder.add_gated({number: LAYERS[layer]() for number in range(0, 4, every)})
    return shaken(decoder)


def text(rows: int = 4, length: int = 9) -> tuple[Tensor, Tensor]:
    """Ids with two places of images, the first not at the start, and the number of the image each token reads."""
    ids = torch.randint(6, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))
    for row in range(rows):
        ids[row, [1 + row % 3, 6]] = IMAGE
    return ids, last_images(ids, IMAGE)


def images(rows: int = 4, each: int = 2) -> Tensor:
    return torch.randn(rows, each, LATENTS, CONTEXT, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("kind", DECODERS)
def test_with_closed_gates_the_decoder_says_what_it_said_before(kind, every):
    """To the bit, with and without images; and in the first step only the gates move."""
    torch.manual_seed(0)
    decoder, ids = shaken(DECODERS[kind]()), text()[0]
    before = decoder(ids)
    decoder.add_gated({number: shaken(flamingo_layer(WIDTH, CONTEXT, heads=2)) for number in range(0, 4, every)})
    layers = [block.gated for block in decoder.blocks if block.gated is not None]
    for gate in (gate for layer in layers for gate in (layer.cross_gate, layer.mlp_gate)):
        nn.init.zeros_(gate)
    memory = [images_of_texts(images(), text()[1])]
    read = decoder.logits(decoder.hidden(decoder.embed(ids), memory=memory))
    assert torch.equal(read, before)
    assert torch.equal(decoder(ids), before)
    read.square().sum().backward()
    for layer in layers:
        moved = {name for name, p in layer.named_parameters() if p.grad.abs().sum() > 0}
        assert moved == {"cross_gate", "mlp_gate"}


@no_grad
@pytest.mark.parametrize("kind", DECODERS)
def test_without_images_the_gated_layers_are_left_out(kind):
    """Open gates do not touch a text without images: the decoder is what it was."""
    decoder, ids = decoder_with(kind), text()[0]
    read = decoder(ids)
    for block in decoder.blocks:
        block.gated = None
    assert torch.equal(decoder(ids), read)


@no_grad
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_is_its_formula(layer):
    module = shaken(LAYERS[layer]())
    x, states = torch.randn(2, 5, WIDTH), torch.randn(2, LATENTS, CONTEXT)
    y = x + torch.tanh(module.cross_gate) * module.cross(module.norm_cross(x), states)
    expected = y + torch.tanh(module.mlp_gate) * module.mlp(module.norm_mlp(y))
    torch.testing.assert_close(module(x, [Memory(states)], None), expected)
    attn = module.cross  # and its attention, with norms of the heads, by hand
    q = attn.q_norm(attn.q(x).unflatten(-1, (2, -1))).transpose(1, 2)
    k, v = attn.kv(states).unflatten(-1, (2, 2, -1)).permute(2, 0, 3, 1, 4)
    weights = (q @ attn.k_norm(k).transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    torch.testing.assert_close(attn(x, states), attn.out((weights @ v).transpose(1, 2).flatten(2)), **CLOSE)


# --- several images in a text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("backend", [*BACKENDS, "shown"])
def test_a_token_reads_its_last_image(backend, parts, monkeypatch):
    """As one call for each token with the image it reads, gradients included; zeros before the first image."""
    module = MultiHeadAttention(WIDTH, 2, context_dim=CONTEXT, bias=False, out_bias=False)
    own, (_, image_of_token) = images().requires_grad_(), text()
    other = torch.randn(4, 2, CONTEXT, requires_grad=True)
    x = torch.randn(4, 9, WIDTH, requires_grad=True)
    memories = [images_of_texts(own, image_of_token), Memory(other)][:parts]
    if backend == "shown":
        module.tap_prefix = "decoder.0.cross"
        with taps.activate(Watcher("decoder.0.cross.pattern")):
            got = module(x, memories)
    else:
        use_backend(monkeypatch, backend)
        got = module(x, memories)
        monkeypatch.undo()
    expected = torch.zeros_like(got)
    for row, t in ((row, t) for row in range(4) for t in range(9)):
        seen = [own[row, image_of_token[row, t]]] if image_of_token[row, t] >= 0 else []
        seen += [other[row]] if parts == 2 else []
        if seen:
            expected[row, t] = module(x[row : row + 1, t : t + 1], torch.cat(seen)[None])[0, 0]
    assert (image_of_token == -1).any() and (parts == 2 or got[image_of_token == -1].abs().max() == 0)
    torch.testing.assert_close(got, expected, **CLOSE)
    leaves, weight = [x, own, *module.parameters()], torch.randn_like(got)
    both = (torch.autograd.grad((x * weight).sum(), leaves) for x in (got, expected))
    for one, other_one in zip(*both, strict=True):
        torch.testing.assert_close(one, other_one, **CLOSE)


class Watcher:
    """A trace that changes nothing, and wants one tap or none: it makes `begin` step through the modules."""

    def __init__(self, wanted: str | None = None) -> None:
        self.wanted = wanted

    def wants(self, name: str) -> bool:
        return name == self.wanted

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        return tensor


def test_one_image_that_all_tokens_read_needs_no_mask():
    memory = images_of_texts(images(each=1), torch.zeros(4, 9, dtype=torch.long))
    assert memory.seen is None and memory.mask is None
    assert images_of_texts(images(each=1), torch.tensor([[0, 0, -1]] * 4)).seen is not None


@no_grad
@pytest.mark.parametrize("kind", DECODERS)
def test_rows_share_the_keys_of_their_image(kind, monkeypatch):
    """One projection for all questions of an image, and what a copy for each question would give."""
    decoder, ids = decoder_with(kind, every=1), text()[0]
    states, index = images(2, 1)[:, 0], torch.tensor([0, 0, 1, 1])
    entries = []
    project = MultiHeadAttention.project

    def counted(self, *args, **options):
        parts = project(self, *args, **options)
        entries.extend(len(part.k) for part in parts)
        return parts

    monkeypatch.setattr(MultiHeadAttention, "project", counted)
    shared = decoder.hidden(decoder.embed(ids), memory=[Memory(states, index=index)])
    assert entries == [2] * 4
    torch.testing.assert_close(shared, decoder.hidden(decoder.embed(ids), memory=[Memory(states[index])]), **CLOSE)


@no_grad
@pytest.mark.parametrize("kind", DECODERS)
def test_a_later_image_does_not_reach_back(kind):
    """Exactly: another second image leaves what stands before it as it was. And the first reaches its own words."""
    decoder, (ids, seen) = decoder_with(kind), text()
    one, two = images(), images()
    two[:, 1] += 1.0
    first, second = (decoder.hidden(decoder.embed(ids), memory=[images_of_texts(x, seen)]) for x in (one, two))
    assert torch.equal(first[:, :6], second[:, :6])
    assert (first[:, 6:] - second[:, 6:]).abs().amax(-1).min() > 1e-3
    two = images()
    two[:, 0] += 1.0
    second = decoder.hidden(decoder.embed(ids), memory=[images_of_texts(two, seen)])
    for row in range(4):
        place = 1 + row % 3
        assert torch.equal(first[row, :place], second[row, :place])
        assert (first[row, place:6] - second[row, place:6]).abs().amax(-1).min() > 1e-3


@no_grad
@pytest.mark.parametrize("split", [1, 4, 7])
@pytest.mark.parametrize("kind", DECODERS)
def test_a_cache_in_two_chunks(kind, split):
    """Each chunk says what its tokens read; the keys of the images are projected in the first. Left padding."""
    decoder, (ids, seen) = decoder_with(kind), text()
    real = torch.arange(9) >= torch.arange(4)[:, None] % 3
    memory = images_of_texts(images(), seen)
    whole = decoder.hidden(decoder.embed(ids), real, memory=[memory])
    cache = decoder.new_cache()
    chunks = []
    for start, end in ((0, split), (split, 9)):
        part = [images_of_texts(images(), seen[:, start:end])]
        chunks.append(decoder.hidden(decoder.embed(ids[:, start:end]), real[:, :end], memory=part, cache=cache))
    torch.testing.assert_close(torch.cat(chunks, 1)[real], whole[real], **CLOSE)
    if split == 7:  # what follows the last image needs no memory any more
        cache, part = decoder.new_cache(), [images_of_texts(images(), seen[:, :7])]
        decoder.hidden(decoder.embed(ids[:, :7]), real[:, :7], memory=part, cache=cache)
        torch.testing.assert_close(decoder.hidden(decoder.embed(ids[:, 7:]), real, cache=cache), whole[:, 7:], **CLOSE)


# --- decoding ---------------------------------------------------------------------------------------------------------


def memory_of(case: str, rows: int) -> list[Memory]:
    """What prompts of five tokens read: an image for two rows each, or texts with two images of which the last row of
    several reads none."""
    if case == "shared":
        return [Memory(images(max(1, rows // 2), 1)[:, 0], repeat=min(2, rows))]
    if case == "one state":
        return [Memory(images(rows, 1)[:, 0, :1])]
    seen = torch.tensor([[-1, 0, 0, 1, 1], [-1, -1, 0, 0, 0], [0, 0, 0, 0, 1], [-1] * 5])[:rows]
    return [images_of_texts(images(rows), seen)]


def scores_of(first: Tensor, state) -> tuple[Tensor, Tensor]:
    scores = [first]
    for _ in range(STEPS):
        scores.append(state.step(scores[-1].argmax(-1)))
    return torch.stack(scores), torch.stack(scores).argmax(-1)


@no_grad
@pytest.mark.parametrize("case", ["shared", "one state", "several"])
@pytest.mark.parametrize("state", [OneRow, Rows, FixedRows])
@pytest.mark.parametrize(("kind", "layer"), [("gpt2", "flamingo"), ("opt", "flamingo"), ("llama", "idefics")])
def test_every_state_emits_the_tokens_of_the_modules(kind, layer, state, case):
    """New tokens read what the last token of the prompt reads; what the modules say is a pass over all tokens."""
    decoder, rows = decoder_with(kind, layer), 1 if state is OneRow else 4
    ids, memory = text(rows, 7)[0][:, :5], memory_of(case, rows)
    with taps.activate(Watcher()):
        first, modules = begin(decoder, ids, None, Conditioning(memory), steps=STEPS)
        assert type(modules) is ModuleState
        wanted, tokens = scores_of(first, modules)
    whole = torch.cat([ids, tokens[:-1].t()], 1)
    seen = memory[0].seen
    if seen is not None:
        memory = [Memory(memory[0].states, seen=torch.cat([seen, seen[:, -1:].expand(-1, STEPS, -1)], 1))]
    plain = decoder.logits(decoder.hidden(decoder.embed(whole), memory=memory))[:, 4:].transpose(0, 1)
    torch.testing.assert_close(plain, wanted, **CLOSE)

    memory = memory_of(case, rows)
    first, cache, real = prefill(decoder, ids, None, Conditioning(memory))
    parts = decoder.fast_state()
    own = state(parts, cache, real, STEPS) if state is OneRow else state(parts, cache, real, *of_steps(STEPS, 1, "cpu"))
    got, said = scores_of(first, FastState(parts, own, cache))
    assert torch.equal(said, tokens)
    torch.testing.assert_close(got, wanted, **CLOSE)


@no_grad
@pytest.mark.parametrize("case", ["shared", "several"])
@pytest.mark.parametrize("kind", DECODERS)
def test_beams_and_rankings_of_the_modules(kind, case):
    decoder, ids, given = decoder_with(kind), text(4, 7)[0][:, :5], Conditioning(memory_of(case, 4))
    options = GenerationOptions(STEPS, None, num_beams=3)
    fast = generate(decoder, ids, None, given, options=options)
    candidates = [[3], [3, 4, 6], [3, 4, 7], [8, 2]]
    ranked = rank(decoder, ids, None, given, candidates)
    with taps.activate(Watcher()):
        slow = generate(decoder, ids, None, given, options=options)
        by_modules = rank(decoder, ids, None, given, candidates)
    assert torch.equal(fast.ids, slow.ids)
    torch.testing.assert_close(ranked, by_modules, **CLOSE)


# --- training and looking ---------------------------------------------------------------------------------------------


@no_grad
def test_a_trace_shows_what_gated_layers_read():
    decoder, (ids, seen) = decoder_with("llama", "idefics"), text()
    with trace(decoder, "decoder.*.cross") as shown:
        decoder.hidden(decoder.embed(ids), memory=[images_of_texts(images(), seen)])
    assert shown.attentions() == ["decoder.0.cross", "decoder.2.cross"]
    weights = shown.pattern("decoder.2.cross")  # (B, H, T, I * N)
    allowed = seen[:, None, :, None] == torch.arange(2).repeat_interleave(LATENTS)
    assert weights.masked_select(~allowed).abs().max() == 0
    torch.testing.assert_close(weights.sum(-1), (seen >= 0).float()[:, None].expand(-1, 2, -1))


# --- bad input --------------------------------------------------------------------------------------------------------


def test_a_memory_that_nothing_reads_is_refused():
    for kind in DECODERS:
        decoder, ids = DECODERS[kind](), text()[0]
        with pytest.raises(ValueError, match="has no cross-attention: build GPT2 .*, or add gated"):
            decoder.hidden(decoder.embed(ids), memory=[Memory(images()[:, 0])])


def test_what_does_not_fit_is_refused():
    states = images().flatten(1, 2)
    with pytest.raises(ValueError, match=r"what each token may read must be \(4, tokens, 6\), got \(4, 9, 5\)"):
        Memory(states, seen=torch.ones(4, 9, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="no index and no repeat"):
        Memory(states, seen=torch.ones(4, 9, 6, dtype=torch.bool), repeat=2)
    decoder, (ids, seen) = decoder_with("gpt2"), text()
    with pytest.raises(ValueError, match="8 tokens, but the memory says what 9 may read"):
        decoder.hidden(decoder.embed(ids[:, 1:]), memory=[images_of_texts(images(), seen)])
    with pytest.raises(ValueError, match="before block 4, but the blocks are 0 to 3"):
        decoder.add_gated({4: LAYERS["flamingo"]()})
    with pytest.raises(ValueError, match="have cross-attention"):
        GPT2(GPT2Config(add_cross_attention=True, **SIZES)).add_gated({0: LAYERS["flamingo"]()})
