"""Decoding with rotary positions and shared heads of keys: every state says what the modules say, and the reference.

All weights are random and uneven, so the best token is rarely close to the second; norms compute in fp32 anyway.
"""

import pytest
import torch
import transformers as hf
from helpers import saved

from vqa_scratch.generate import Conditioning, GenerationOptions, begin, generate
from vqa_scratch.generate.fast import FastState
from vqa_scratch.generate.fast.self_attention import FixedRows, OneRow, Rows
from vqa_scratch.generate.fast.state import of_steps
from vqa_scratch.generate.start import prefill
from vqa_scratch.generate.state import ModuleState
from vqa_scratch.models import Llama, LlamaConfig
from vqa_scratch.models.gpt2_experts import GPT2Experts, GPT2ExpertsConfig
from vqa_scratch.models.llama_experts import Mixture
from vqa_scratch.nn import taps
from vqa_scratch.nn.experts import routings
from vqa_scratch.nn.rotary import Rotary

no_grad = torch.no_grad()
VOCABULARY, WIDTH, STEPS = 24, 16, 9
PERSIMMON = {"norm": "layer", "qk_norm": True, "gated": False, "qkv_bias": True, "out_bias": True, "mlp_bias": True}
MODELS = {
    "one head of keys": {"kv_heads": 1, "tied": True},
    "two heads of keys": {"kv_heads": 2, "qkv_bias": True},
    "four heads of keys": {"kv_heads": 4, "rotary": Rotary(kind="llama3", factor=8.0, theta=50.0, original=40)},
    "persimmon": {**PERSIMMON, "rotary": Rotary(share=0.5), "head_dim": 8, "activation": "relu2"},
    "experts": {"experts": Mixture(4, 2, 12), "kv_heads": 2},
    "a shared expert": {"experts": Mixture(5, 3, 12, False, shared_hidden=8, every=2), "qkv_bias": True},
    "norms of all heads": {"experts": Mixture(3, 1, 12, False), "qk_norm": True, "clip": 0.8, "kv_heads": 2},
}
GPT2_EXPERTS = "a GPT-2 with experts"


@pytest.fixture(scope="module", params=[*MODELS, GPT2_EXPERTS])
def model(request) -> Llama | GPT2Experts:
    sizes = {"vocab_size": VOCABULARY, "max_positions": 40, "dim": WIDTH, "layers": 2, "heads": 4, "hidden": 20}
    if request.param == GPT2_EXPERTS:
        decoder = GPT2Experts(GPT2ExpertsConfig(**sizes, experts=Mixture(4, 2, 12, biased=True)))
    else:
        decoder = Llama(LlamaConfig(**sizes, **MODELS[request.param]))
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.4)
    return decoder.eval()


class Watcher:
    """A trace that wants nothing: it makes `begin` step through the modules."""

    def wants(self, name: str) -> bool:
        return False


def prompts(rows: int, padded: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCABULARY, (rows, 5), generator=generator)
    return ids, torch.arange(5) >= 1 + torch.arange(rows)[:, None] % 4 if padded else None


def scores_of(first: torch.Tensor, state) -> tuple[torch.Tensor, torch.Tensor]:
    """Of greedy steps: the scores (1 + STEPS, R, V), and the tokens."""
    scores = [first]
    for _ in range(STEPS):
        scores.append(state.step(scores[-1].argmax(-1)))
    return torch.stack(scores), torch.stack(scores).argmax(-1)


@no_grad
@pytest.mark.parametrize("with_prefix", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", [OneRow, Rows, FixedRows])
def test_every_state_emits_the_tokens_of_the_modules(model, kind, padded, with_prefix):
    rows = 1 if kind is OneRow else 4
    ids, mask = prompts(rows, padded)
    prefix = torch.randn(rows, 3, WIDTH, generator=torch.Generator().manual_seed(2))
    given = Conditioning(prefix=prefix) if with_prefix else None
    with taps.activate(Watcher()):
        first, state = begin(model, ids, mask, given, steps=STEPS)
        assert type(state) is ModuleState
        wanted, tokens = scores_of(first, state)
    first, cache, real = prefill(model, ids, mask, given)
    parts = model.fast_state()
    if kind is FixedRows:
        state = FastState(parts, FixedRows(parts, cache, real, *of_steps(STEPS, 1, cache.device)), cache)
    else:
        state = FastState.after(parts, cache, real, STEPS)
        assert type(state.own) is kind
    found, said = scores_of(first, state)
    assert torch.equal(said, tokens) and len(said.unique()) > 1
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)  # fp32 through two layers, scores of size 10


@no_grad
@pytest.mark.parametrize("rows", [1, 4])
def test_a_prompt_of_one_token_is_a_step(model, rows, monkeypatch):
    ids = prompts(rows, False)[0][:, :1]
    with taps.activate(Watcher()):
        wanted, tokens = scores_of(*begin(model, ids, None, None, steps=STEPS))
    monkeypatch.setattr("vqa_scratch.generate.start.prefill", None)  # not needed for it
    found, said = scores_of(*begin(model, ids, None, None, steps=STEPS))
    assert torch.equal(said, tokens)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    with torch.autocast("cpu", torch.bfloat16):
        first, state = begin(model, ids, None, None, steps=STEPS)
        found, _ = scores_of(first, state)
    assert (state.own.lines if rows == 1 else state.own.cached).dtype == torch.bfloat16  # as after a longer prompt
    assert (found[0] - wanted[0]).abs().max() < 0.05 * wanted.abs().max()


@no_grad
@pytest.mark.parametrize("padded", [False, True])
def test_beams_are_those_of_the_modules(model, padded):
    ids, mask = prompts(3, padded)
    options = GenerationOptions(8, 5, num_beams=3)
    with taps.activate(Watcher()):
        wanted = generate(model, ids, mask, options=options)
    assert torch.equal(generate(model, ids, mask, options=options).ids, wanted.ids)


@no_grad
def test_bf16_is_near_fp32(model):
    """Weights in bf16: the score of each token is within a few roundings of 2^-8 of the scores' size, in each state."""
    ids, mask = prompts(4, True)
    exact = model(ids, mask)
    low = type(model)(model.config).eval()
    low.load_state_dict(model.state_dict())
    low.bfloat16()
    logits = low(ids, mask)
    assert logits.dtype == torch.bfloat16
    size = exact.abs().max()
    assert (logits - exact)[mask].abs().max() < 0.05 * size
    for rows in (1, 4):
        first, state = begin(low, ids[:rows], mask[:rows], None, steps=2)
        fast = state.step(first.argmax(-1))
        with taps.activate(Watcher()):
            first, state = begin(low, ids[:rows], mask[:rows], None, steps=2)
            assert (state.step(first.argmax(-1)) - fast).abs().max() < 0.05 * size


PEERS = {
    "llama": (hf.LlamaConfig, hf.LlamaForCausalLM, {"num_key_value_heads": 2}),
    "qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM, {"num_key_value_heads": 1}),
    "persimmon": (hf.PersimmonConfig, hf.PersimmonForCausalLM, {}),
    "mixtral": (hf.MixtralConfig, hf.MixtralForCausalLM, {"num_key_value_heads": 2}),
    "qwen2_moe": (hf.Qwen2MoeConfig, hf.Qwen2MoeForCausalLM, {"num_experts": 5, "num_key_value_heads": 1}),
    "olmoe": (hf.OlmoeConfig, hf.OlmoeForCausalLM, {"num_experts": 5, "num_experts_per_tok": 2, "clip_qkv": 1.0}),
}


@no_grad
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", PEERS)
def test_tokens_equal_those_of_the_reference(tmp_path, name, beams):
    """With padding on the left, ended by an end token or not."""
    config, build, changes = PEERS[name]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 20}
    sizes |= {"vocab_size": VOCABULARY, "max_position_embeddings": 40, "initializer_range": 0.4}
    torch.manual_seed(3)
    theirs = saved(build(config(**sizes, **changes)), tmp_path)
    ours = Llama.from_pretrained(tmp_path)
    ids, mask = prompts(4, True)
    endless = generate(ours, ids, mask, options=GenerationOptions(10, None)).ids
    often, lengths = int(endless[:, 2:].flatten().mode().values), set()
    for end in (often, 1):
        made = generate(ours, ids, mask, options=GenerationOptions(10, end, num_beams=beams), fill=2)
        theirs.generation_config.eos_token_id = end
        given = {"attention_mask": mask.long(), "max_new_tokens": 10, "num_beams": beams, "pad_token_id": 2}
        assert torch.equal(made.ids, theirs.generate(ids, **given, do_sample=False)[:, 5:])
        lengths |= set(made.lengths.tolist())
    assert len(lengths) > 1, "some answers should end by themselves"


@no_grad
@pytest.mark.parametrize("beams", [1, 3])
def test_each_end_token_of_the_files_ends_a_text(tmp_path, beams):
    """Those of generation_config.json where it is there, as in the reference; its own defaults say what ends."""
    config, build, changes = PEERS["llama"]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 20}
    sizes |= {"vocab_size": VOCABULARY, "max_position_embeddings": 40, "initializer_range": 0.4, "eos_token_id": 1}
    torch.manual_seed(3)
    peer, (ids, mask) = build(config(**sizes, **changes)).eval(), prompts(4, True)
    given = {"attention_mask": mask.long(), "max_new_tokens": 10, "num_beams": beams, "pad_token_id": 2}
    ends = [13, 5, 1]  # not sorted, and not that of config.json first
    peer.generation_config.eos_token_id = ends
    theirs = saved(peer, tmp_path)
    wanted = type(theirs).from_pretrained(tmp_path).eval().generate(ids, **given, do_sample=False)[:, 5:]
    ours = Llama.from_pretrained(tmp_path)
    assert ours.config.eos_id == tuple(ends)
    options = GenerationOptions(10, ours.config.eos_id, num_beams=beams)
    made = generate(ours, ids, mask, options=options, fill=2)
    assert torch.equal(made.ids, wanted)
    last = made.ids.gather(1, made.lengths[:, None] - 1)[made.lengths < 10]
    assert len(last.unique()) > 1, "one end token would do"


@pytest.mark.parametrize("rows", [1, 4])
def test_experts_that_no_token_chooses_are_not_read(rows):
    """Numbers that are none would spoil what reads them, as they do once such an expert is chosen."""
    sizes = {"vocab_size": VOCABULARY, "dim": WIDTH, "layers": 2, "heads": 2, "init_std": 0.4}
    model, (ids, _) = Llama(LlamaConfig(**sizes, experts=Mixture(16, 1, 4))).eval(), prompts(rows, False)
    with routings(model) as found:
        made = generate(model, ids, options=GenerationOptions(6, None))
    for layer, block in enumerate(model.blocks):
        load = sum(routing.load for routing in found[layer::2])
        assert (load == 0).any()
        for number in load.eq(0).nonzero().flatten().tolist():
            for parameter in block.mlp.experts[str(number)].parameters():
                parameter.data.fill_(torch.nan)
    again = generate(model, ids, options=GenerationOptions(6, None))
    assert torch.equal(again.ids, made.ids) and torch.equal(again.log_probs, made.log_probs)
    for parameter in block.mlp.experts.parameters():
        parameter.data.fill_(torch.nan)
    assert not generate(model, ids, options=GenerationOptions(6, None)).log_probs.isfinite().any()


def test_a_graph_cannot_follow_experts():
    sizes = {"vocab_size": 9, "dim": 8, "layers": 1, "heads": 2, "experts": Mixture(2, 1, 4)}
    with pytest.raises(ValueError, match="a CUDA graph runs the same kernels at every step, but experts change"):
        generate(Llama(LlamaConfig(**sizes)).eval(), torch.ones(1, 2).long(), options=GenerationOptions(3), graph=True)
