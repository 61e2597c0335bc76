"""The two sides of the decoding benchmark, and the model both load: a decoder whose answers have given lengths.

Random weights would never stop, or stop anywhere. In the GPT-2 positions push the last state towards the end token,
and the content of the memory, through cross-attention of the last layer, pulls it back by the wanted length of the
answer. In a Llama or a Mixtral, which has neither, the head makes the token before it in the vocabulary follow each
token, and the prompt is as far from the end token as the answer is long. So row b writes its end token after
`lengths[b]` tokens, greedily and in a beam.

Shapes: B rows, N memory tokens, D width.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tests.torchvision_shim  # noqa: F401  lets transformers import beside a CPU-only torch
from bench.timing import forget_peak, peak_memory_gb
from vqa_scratch.generate import Conditioning, GenerationOptions, generate
from vqa_scratch.models import GPT2, Llama
from vqa_scratch.nn.experts import MixtureOfExperts
from vqa_scratch.nn.memory import Memory
from vqa_scratch.training.allocator import keep_freed_memory
from vqa_scratch.training.precision import DTYPES

SIZES = {
    "shapes": {"n_embd": 128, "n_layer": 4, "n_head": 4, "vocab_size": 512, "n_positions": 64},
    "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257, "n_positions": 1024},
    "llama": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
}
# As many weights a token as the Llama, and as many in all as a Llama with an MLP four times as wide.
SIZES["moe"] = SIZES["llama"] | {"intermediate_size": 1024, "num_local_experts": 8, "num_experts_per_tok": 2}
SIZES["wide"] = SIZES["llama"] | {"intermediate_size": 8192}
MODELS = {"shapes": GPT2, "gpt2": GPT2, "llama": Llama, "moe": Llama, "wide": Llama}
MEMORY = {"shapes": 81, "gpt2": 1}  # tokens: 64 patches, class and 16 words; the one key of connector `mean`
# The tokens of 16 answers before their end: most of VQA v2 are one word, a few are three (Antol et al. 2015, section 4
# counts 89, 7 and 3 % of one, two and three words), and byte-pair encoding cuts the rare ones.
REAL_LENGTHS = (1, 1, 2, 1, 1, 1, 5, 1, 1, 3, 1, 1, 2, 1, 1, 1)
PUSH, PULL, EOS = 6.0, 20.0, 1
LONGEST = 24  # tokens at most


@dataclass(frozen=True)
class Case:
    """One comparison. `lengths` is "real" or a number of tokens that every answer has."""

    size: str = "shapes"
    batch: int = 1
    beams: int = 1
    precision: str = "fp32"
    lengths: str = "20"
    device: str = "cpu"

    @property
    def name(self) -> str:
        beams = f", {self.beams} beams" if self.beams > 1 else ""
        return f"{self.size} size, batch {self.batch}{beams}, {self.precision}, lengths {self.lengths}"

    def tokens(self) -> list[int]:
        """Tokens of each row before its end token."""
        if self.lengths != "real":
            return [int(self.lengths)] * self.batch
        return [REAL_LENGTHS[row % len(REAL_LENGTHS)] for row in range(self.batch)]


def make_model(folder: Path, case: Case, sizes: dict[str, int]) -> None:
    """Write the model and its inputs to `folder`."""
    torch.manual_seed(0)
    (make_llama if MODELS[case.size] is Llama else make_gpt2)(folder, case, sizes)


def make_llama(folder: Path, case: Case, sizes: dict[str, int]) -> None:
    """Row b's prompt is token EOS + 1 + length, and each token is followed by the one before it in the vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    kind, config = LlamaForCausalLM, LlamaConfig
    if "num_local_experts" in sizes:
        kind, config = MixtralForCausalLM, MixtralConfig
    model = kind(config(**sizes, bos_token_id=0, eos_token_id=EOS, pad_token_id=EOS)).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_()  # what the blocks add to it is smaller
        model.lm_head.weight += PULL / sizes["hidden_size"] * model.model.embed_tokens.weight.roll(-1, 0)
    model.save_pretrained(folder / "model")
    prompt = torch.tensor(case.tokens())[:, None] + EOS + 1
    save_file({"prompt": prompt}, folder / "inputs.safetensors")


def make_gpt2(folder: Path, case: Case, sizes: dict[str, int]) -> None:
    """See above; u is the direction of the end token."""
    from transformers import GPT2Config, GPT2LMHeadModel

    given = {"bos_token_id": 0, "eos_token_id": EOS, "pad_token_id": EOS, "add_cross_attention": True}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **given)).eval()
    width, core = sizes["n_embd"], model.transformer
    generator = torch.Generator().manual_seed(1)
    towards, carried, content = torch.randn(3, width, generator=generator)  # u, what carries it, what the memory holds
    towards = towards - towards.mean()
    towards, carried, content = (x / x.norm() for x in (towards, carried, content))
    with torch.no_grad():
        steps = torch.arange(sizes["n_positions"]).clamp(max=LONGEST + 2) + 0.5
        core.wpe.weight += PUSH * steps[:, None] * towards
        core.wte.weight[EOS] = 4 * towards
        cross = core.h[-1].crossattention
        cross.c_attn.weight[:, width:] += content[:, None] * carried
        cross.c_proj.weight += carried[:, None] * (-PUSH * towards)
    model.save_pretrained(folder / "model")
    states = torch.randn(case.batch, MEMORY[case.size], width, generator=generator) * 0.1
    states -= (states @ content)[..., None] * content
    states += torch.tensor(case.tokens(), dtype=torch.float32)[:, None, None] * content
    prompt = torch.randint(2, sizes["vocab_size"], (case.batch, 1), generator=generator)
    save_file({"states": states, "prompt": prompt}, folder / "inputs.safetensors")


class Side:
    """What both have in common: the inputs, the clock, the memory."""

    def __init__(self, folder: Path, case: Case) -> None:
        self.case, self.dtype = case, DTYPES[case.precision]
        inputs = load_file(folder / "inputs.safetensors")
        self.prompt = inputs["prompt"].to(case.device)
        self.states = inputs["states"].to(case.device, self.dtype) if "states" in inputs else None

    def made(self) -> Tensor:
        """The new tokens (B, A), the end token in place of all that follows it."""
        raise NotImplementedError

    def tokens(self) -> list[list[int]]:
        """The new tokens of each row up to its end token."""
        rows = self.made().tolist()
        return [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]

    def seconds(self, times: int) -> float:
        """Of one batch, the mean over `times`."""
        start = time.perf_counter()
        for _ in range(times):
            self.made()
        if self.case.device != "cpu":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / times

    def peak(self) -> float:
        """GB."""
        return peak_memory_gb() if self.case.device == "cpu" else torch.cuda.max_memory_allocated() / 1e9


class Ours(Side):
    """This project's `generate`."""

    def __init__(self, folder: Path, case: Case) -> None:
        super().__init__(folder, case)
        self.model = MODELS[case.size].from_pretrained(folder / "model").to(case.device, self.dtype)
        self.options = GenerationOptions(LONGEST, EOS, num_beams=case.beams)
        forget_peak()
        keep_freed_memory()

    def made(self) -> Tensor:
        given = None if self.states is None else Conditioning([Memory(self.states)])
        graph = self.case.device != "cpu" and self.case.beams == 1 and self.case.size != "moe"
        return generate(self.model, self.prompt, None, given, options=self.options, fill=EOS, graph=graph).ids

    def reads(self) -> int:
        """Bytes of weights that a step of one row reads: of a table one row, of experts the chosen ones."""
        model, left = self.model, 0
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding) and module.weight is not model.head:
                left += module.weight.nbytes
            if isinstance(module, MixtureOfExperts):
                choice, bytes_of_all = module.router.choice, sum(p.nbytes for p in module.experts.parameters())
                left += bytes_of_all * (choice.experts - choice.per_token) // choice.experts
        return sum(p.nbytes for p in model.parameters()) - left

    @torch.no_grad()
    def gap(self, rows: list[list[int]]) -> float:
        """How far the score of the worst of these tokens is below the best one's, each after the tokens before it."""
        worst = 0.0
        for i, (prompt, row) in enumerate(zip(self.prompt, rows, strict=True)):
            ids, memory = torch.tensor(row, device=prompt.device), None
            if self.states is not None:
                memory = [Memory(self.states[i : i + 1])]
            read = self.model.embed(torch.cat([prompt, ids[:-1]])[None])
            logits = self.model.logits(self.model.hidden(read, memory=memory))[0]
            worst = max(worst, float((logits.max(-1).values - logits.gather(1, ids[:, None])[:, 0]).max()))
        return worst


class Peer(Side):
    """`transformers`, its model and its `generate`."""

    def __init__(self, folder: Path, case: Case) -> None:
        from transformers import AutoModelForCausalLM

        super().__init__(folder, case)
        self.model = AutoModelForCausalLM.from_pretrained(folder / "model").eval().to(case.device, self.dtype)
        options: dict[str, Any] = {"max_new_tokens": LONGEST, "do_sample": False, "num_beams": case.beams}
        self.options = options | {"eos_token_id": EOS, "pad_token_id": EOS}
        if self.states is not None:
            self.options["encoder_hidden_states"] = self.states
        forget_peak()

    def made(self) -> Tensor:
        mask = torch.ones_like(self.prompt)
        made = self.model.generate(self.prompt, attention_mask=mask, **self.options)
        return made[:, 1:]


class CompiledPeer(Peer):
    """The same with a static cache, for which `generate` compiles the forward pass where there is a GPU."""

    def __init__(self, folder: Path, case: Case) -> None:
        super().__init__(folder, case)
        self.options["cache_implementation"] = "static"
