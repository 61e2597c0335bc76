"""Trains small Flamingos to bind invented words to pictures in context, and measures what the shots are worth.

Three stages, as in the paper (Alayrac et al. 2022, 2204.14198), each from the weights of those before it:

1. eyes: a ViT learns to name color and shape of a drawn object;
2. language: a Llama learns the episodes of `bench/binding_episodes.py` with each picture written in words, and sees no
   image;
3. a resampler and gated cross-attention layers learn to show that Llama what the eyes see. The eyes stay as they are,
   and so does the Llama of the variant "frozen", as in the paper; in "trained" it learns too, and in "scratch" it
   learns too and starts from random weights.

A finished stage leaves its weights and figures in the folder, and is not trained again.

Shapes: E episodes of S pictures, T tokens, V vocabulary, P pictures of a pool, N states of a picture, D width.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import trange

from bench import binding_episodes as drawn
from bench.binding_episodes import Episodes, Pictures, crossed_episodes, draw_episodes
from vqa_scratch.data.images import ImageProcessor
from vqa_scratch.data.scenes import COLORS, PIXELS, SHAPES
from vqa_scratch.errors import UserError
from vqa_scratch.models.llama import Llama, LlamaConfig
from vqa_scratch.models.resampler import Resampler, ResamplerConfig
from vqa_scratch.models.vit import ConvStem, ViT, ViTConfig
from vqa_scratch.nn.gated_cross import flamingo_layer
from vqa_scratch.nn.memory import Memory
from vqa_scratch.nn.memory_parts import images_of_texts, last_images
from vqa_scratch.nn.rotary import Rotary
from vqa_scratch.storage import read_object, write_json
from vqa_scratch.training.optimizers import Optimizers, schedule
from vqa_scratch.weights.files import write_safetensors

SHOTS = (0, 1, 2, 4)
LOOKED_AT = [*(f"true {shots}" for shots in SHOTS), f"shuffled {SHOTS[-1]}"]  # while it trains
VARIANTS = ("frozen", "trained", "scratch")
OF_TEST = 16  # pictures of every color and shape
GATE_LEARNING_RATE = 0.03
Answerer = Callable[[Tensor, Tensor], Tensor]  # prompts (E, T), pictures (E, S) -> scores (E, V) of the next token
Look = Callable[[int], None]  # called with the number of finished steps


@dataclass(frozen=True)
class Plan:
    """Sizes of the models, and lengths of the stages in steps."""

    words: int = 2  # of an episode
    segments: int = 8  # of a training episode
    width: int = 32  # of all three models, whose heads are 16 wide
    layers: int = 2  # of the Llama; each has a gated layer before it
    latents: int = 2
    pictures: int = 96  # of every color and shape, to train on
    batch: int = 64  # episodes a step
    eye_steps: int = 400
    language_steps: int = 700
    steps: int = 400
    blocks: int = 216  # of a test
    every: int = 50  # steps between two looks at the accuracy


# ------------------------------------------------------------------------------------------------ models


def small_eyes(plan: Plan) -> ViT:
    """Two layers on patches of 16 pixels, behind a convolutional stem."""
    sizes: dict[str, Any] = {"layers": 2, "heads": plan.width // 16, "mlp_ratio": 2}
    config = ViTConfig(image_size=PIXELS, patch_size=16, dim=plan.width, norm_eps=1e-6, **sizes)
    return ViT(config, ConvStem(3, plan.width, 16))


def small_llama(plan: Plan) -> Llama:
    """Half of each head turns: the other half can match what lies any number of tokens apart."""
    sizes: dict[str, Any] = {"layers": plan.layers, "heads": plan.width // 16, "hidden": 2 * plan.width}
    rotary = Rotary(theta=100.0, share=0.5)
    return Llama(LlamaConfig(len(drawn.VOCABULARY), dim=plan.width, tied=True, rotary=rotary, **sizes))


class FewShot(nn.Module):
    """A ViT, a resampler, and a Llama whose tokens read the latents of the last picture before them."""

    def __init__(self, plan: Plan, eyes: ViT, language: Llama) -> None:
        super().__init__()
        heads = {"heads": plan.width // 16, "head_dim": 16}
        self.eyes, self.language = eyes, language
        self.resampler = Resampler(ResamplerConfig(plan.width, plan.latents, layers=2, **heads))
        language.add_gated({i: flamingo_layer(plan.width, plan.width, **heads) for i in range(plan.layers)})

    def forward(self, ids: Tensor, states: Tensor) -> Tensor:
        """ids (E, T), the states of their pictures (E, S, N, D) -> logits (E, T, V)."""
        latents = self.resampler(states.flatten(0, 1)).unflatten(0, states.shape[:2])
        return self.read(ids, images_of_texts(latents, last_images(ids, drawn.IMAGE)))

    def freeze(self, language: bool) -> None:
        """Leave the resampler and the gated layers trainable, and the Llama unless `language`."""
        self.eyes.requires_grad_(False)
        for name, parameter in self.language.named_parameters():
            parameter.requires_grad_(".gated." in name or not language)

    def read(self, ids: Tensor, memory: Memory) -> Tensor:
        """(E, T) -> logits (E, T, V)."""
        return self.language.logits(self.language.hidden(self.language.embed(ids), memory=[memory]))

    def gates(self) -> list[list[float]]:
        """For each layer the factors of its attention and of its MLP."""
        layers = [block.gated for block in self.language.blocks]
        return [[gate.tanh().item() for gate in (layer.cross_gate, layer.mlp_gate)] for layer in layers]


class Pool:
    """Pictures of one seed, and what the eyes make of them."""

    def __init__(self, each: int, seed: int) -> None:
        self.pictures = Pictures(each, seed)
        self.pixels = ImageProcessor(size=(PIXELS, PIXELS)).normalize(self.pictures.pixels)  # (P, 3, H, W)
        self.states = torch.empty(0)

    @torch.no_grad()
    def see(self, eyes: ViT) -> None:
        """Keep the states (P, N, D) of eyes that learn no more."""
        self.states = torch.cat([eyes(part) for part in self.pixels.split(256)])


# ------------------------------------------------------------------------------------------------ training


def faster(optimizers: Optimizers, gates: list[nn.Parameter]) -> None:
    """Give the gates a learning rate of their own: they are single numbers on the way from zero to about one."""
    adam, ids = optimizers.optimizers[-1], {id(gate) for gate in gates}
    for group in adam.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in ids]
    adam.add_param_group({"params": gates, "lr": GATE_LEARNING_RATE, "weight_decay": 0.0})
    optimizers.peaks[-1].append(GATE_LEARNING_RATE)


def train(
    model: nn.Module,
    loss: Callable[[], Tensor],
    steps: int,
    name: str,
    look: Look = lambda step: None,
    learning_rate: float = 3e-3,
) -> float:
    """Train what is trainable, with Muon and AdamW. Returns the seconds it took."""
    start = time.perf_counter()
    rates = {"learning_rate": learning_rate, "matrix_learning_rate": 0.02, "weight_decay": 0.01}
    optimizers = Optimizers(model, kind="muon", **rates)
    gates = [p for name, p in model.named_parameters() if name.endswith("_gate")]
    if gates:
        faster(optimizers, gates)
    for step in trange(steps, desc=name, unit="step"):
        look(step)
        optimizers.set_factor(schedule(step, step / steps, warmup_steps=20, decay_from=0.5))
        optimizers.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(optimizers.parameters, 1.0)
        for optimizer in optimizers.optimizers:
            optimizer.step()
    look(steps)
    return time.perf_counter() - start


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross-entropy of every next token but `<image>`, which is given; (E, T, V), (E, T)."""
    targets = ids[:, 1:].masked_fill(ids[:, 1:] == drawn.IMAGE, -100)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())


def train_eyes(plan: Plan, eyes: ViT, pool: Pool, rng: np.random.Generator) -> float:
    """Teach the ViT to tell color and shape of the pairs that training shows."""
    heads = nn.ModuleList(nn.Linear(plan.width, len(names)) for names in (COLORS, SHAPES))
    shown = np.flatnonzero(np.isin(pool.pictures.pair, drawn.SEEN))
    named = torch.from_numpy(np.stack(np.divmod(pool.pictures.pair, len(SHAPES))))  # (2, P)

    def loss() -> Tensor:
        rows = torch.from_numpy(rng.choice(shown, plan.batch))
        mean = eyes(pool.pixels[rows])[:, eyes.prefix_tokens :].mean(1)
        color, shape = (F.cross_entropy(head(mean), names[rows]) for head, names in zip(heads, named, strict=True))
        return color + shape

    return train(nn.ModuleList([eyes, heads]), loss, plan.eye_steps, "eyes", learning_rate=6e-3)


def train_language(plan: Plan, language: Llama, rng: np.random.Generator) -> float:
    """Teach the Llama to bind words to what is written."""

    def loss() -> Tensor:
        ids = torch.from_numpy(draw_episodes(rng, plan.batch, plan.segments, plan.words).tokens(written=True))
        return next_token_loss(language(ids), ids)

    return train(language, loss, plan.language_steps, "language")


def train_few_shot(plan: Plan, model: FewShot, pool: Pool, rng: np.random.Generator, name: str, look: Look) -> float:
    """Teach a model to bind words to what is shown."""

    def loss() -> Tensor:
        episodes = draw_episodes(rng, plan.batch, plan.segments, plan.words)
        places = torch.from_numpy(pool.pictures.pick(rng, episodes.shown))
        ids = torch.from_numpy(episodes.tokens())
        return next_token_loss(model(ids, pool.states[places]), ids)

    return train(model, loss, plan.steps, name, look)


# ------------------------------------------------------------------------------------------------ measuring


@torch.no_grad()
def score(answer: Answerer, episodes: Episodes, places: np.ndarray, *, written: bool = False) -> dict[str, float]:
    """How often the answer is right, with the pictures at these places (E, S) of a pool: `chosen` among the words of
    the episode, and `said`, chosen among all tokens. `last`: how often the word of the last shot is chosen."""
    words, order = torch.from_numpy(episodes.words), torch.from_numpy(episodes.order)
    scores = answer(torch.from_numpy(episodes.prompts(written=written)), torch.from_numpy(places))
    right, chosen = order[:, -1:], scores.gather(1, drawn.FIRST_WORD + words).argmax(1, keepdim=True)
    said = scores.argmax(1, keepdim=True) == drawn.FIRST_WORD + words.gather(1, right)
    shares = {"chosen": chosen == right, "said": said, "last": chosen == order[:, -2:-1]}
    return {name: share.double().mean().item() for name, share in shares.items() if share.numel()}


def tests(plan: Plan, pictures: Pictures, seed: int) -> dict[str, tuple[Episodes, np.ndarray]]:
    """The episodes of the test and its controls, "true 4" and so on, with places of pictures for them."""
    made = {}
    for shots in SHOTS:
        rng = np.random.default_rng([seed, shots])
        episodes = crossed_episodes(rng, shots, plan.words, blocks=plan.blocks)
        unseen = crossed_episodes(rng, shots, plan.words, blocks=plan.blocks, held_out=True)
        kinds = {"true": episodes, "shuffled": episodes.shuffled(rng), "exchanged": episodes.exchanged()}
        for kind, those in (kinds | {"held out": unseen}).items():
            made[f"{kind} {shots}"] = those, pictures.pick(rng, those.shown)
    return made


@torch.no_grad()
def text_losses(model: FewShot, plan: Plan) -> dict[str, float]:
    """The loss on written episodes: of the Llama by itself, and with an image that stands behind the text."""
    ids = torch.from_numpy(draw_episodes(np.random.default_rng(0), 512, plan.segments, plan.words).tokens(written=True))
    later = images_of_texts(torch.zeros(len(ids), 1, 1, plan.width), torch.full_like(ids, -1))
    alone = next_token_loss(model.language(ids), ids)
    return {"text": alone.item(), "text before an image": next_token_loss(model.read(ids, later), ids).item()}


class Seed:
    """All stages of one seed: each is read from its files, or trained and written there."""

    def __init__(self, plan: Plan, seed: int, folder: Path) -> None:
        self.plan, self.seed, self.folder = plan, seed, folder / f"seed{seed}"
        self.pool, self.unseen = Pool(plan.pictures, 2 * seed), Pool(OF_TEST, 2 * seed + 1)
        self.tests = tests(plan, self.unseen.pictures, seed)
        self.folder.mkdir(parents=True, exist_ok=True)

    def rng(self, stage: str) -> np.random.Generator:
        """The random numbers of a stage; those of its initial weights begin anew with it."""
        torch.manual_seed(self.seed)
        return np.random.default_rng([self.seed, *stage.encode()])

    def finished(self, stage: str, model: nn.Module) -> dict[str, Any] | None:
        """The figures of a finished stage, whose weights are put into `model`; None: it is to be done."""
        path = self.folder / f"{stage}.json"
        if not path.is_file():
            return None
        record = read_object(path)
        if record["plan"] != asdict(self.plan):
            raise UserError(f"{path} is of another plan: give another --out")
        model.load_state_dict(load_file(path.with_suffix(".safetensors")))
        return record

    def finish(self, stage: str, model: nn.Module, **figures: Any) -> dict[str, Any]:
        """Write the weights, then the figures: with these the stage is finished."""
        record = {"plan": asdict(self.plan), **figures}
        write_safetensors(self.folder / f"{stage}.safetensors", model.state_dict())
        write_json(self.folder / f"{stage}.json", record)
        return record

    def eyes(self) -> ViT:
        """The ViT after the first stage."""
        rng, eyes = self.rng("eyes"), small_eyes(self.plan)
        if self.finished("eyes", eyes) is None:
            self.finish("eyes", eyes, seconds=train_eyes(self.plan, eyes, self.pool, rng))
        return eyes

    def language(self) -> tuple[Llama, dict[str, Any]]:
        """The Llama after the second stage, and its figures."""
        rng, language = self.rng("language"), small_llama(self.plan)
        if (record := self.finished("language", language)) is None:
            seconds = train_language(self.plan, language, rng)
            scores = self.scores(lambda ids, _: language(ids)[:, -1], written=True)
            record = self.finish("language", language, seconds=seconds, scores=scores)
        return language, record

    def few_shot(self, variant: str) -> tuple[FewShot, dict[str, Any]]:
        """The model after the third stage, and its figures."""
        plan = self.plan
        eyes, language = self.eyes(), self.language()[0]
        rng = self.rng(variant)
        model = FewShot(plan, eyes, small_llama(plan) if variant == "scratch" else language)
        record = self.finished(variant, model)
        model.freeze(language=variant == "frozen")
        for pool in (self.pool, self.unseen):
            pool.see(eyes)
        if record is not None:
            return model, record
        history: list[dict[str, Any]] = []
        few = plan.blocks // 3 * plan.words**2  # while it trains a third of the episodes will do

        def answer(ids: Tensor, places: Tensor) -> Tensor:
            return model(ids, self.unseen.states[places])[:, -1]

        def look(step: int) -> None:
            if step % plan.every == 0 or step == plan.steps:
                seen = {name: score(answer, *(part[:few] for part in self.tests[name]))["chosen"] for name in LOOKED_AT}
                history.append({"step": step, "gates": model.gates(), **seen})

        before = text_losses(model, plan)
        seconds = train_few_shot(plan, model, self.pool, rng, variant, look)
        figures = {"seconds": seconds, "scores": self.scores(answer), "history": history}
        return model, self.finish(variant, model, **figures, before=before, after=text_losses(model, plan))

    def scores(self, answer: Answerer, written: bool = False) -> dict[str, dict[str, float]]:
        """The scores of every test."""
        return {name: score(answer, *test, written=written) for name, test in self.tests.items()}
