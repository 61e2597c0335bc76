"""Trains the models for PPO on made-up news: a small T5 that summarises, and small reward models, the judges.

Cross-entropy for a few minutes on two cores. The name of their folder is a hash of the settings and of this code.

Shapes: B batch, N input tokens, T output tokens, V vocabulary.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import torch
import torch.nn.functional as F
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from tqdm import tqdm

from vqa_scratch.data import news
from vqa_scratch.data.text import Tokenizer
from vqa_scratch.models.bert import BertConfig
from vqa_scratch.models.classifier import TextClassifier
from vqa_scratch.models.t5 import T5, T5Config
from vqa_scratch.rl.rewards import read
from vqa_scratch.storage import check_writable, unfinished

TRAIN_SEED, HELD_OUT_SEED, REWARD_SEED = 0, 1, 2  # of the articles; PPO may train on the first, never on the second
BATCH = 64


class Lessons(NamedTuple):
    """What a judge learns from."""

    sentences: Callable[
        [int, int], Sequence[tuple[str, Any]]
    ]  # with what is true of each; from their number and a seed
    labels: tuple[str, ...]  # of one of which a sentence is
    pairs: bool = False  # or each of which a sentence may have, beside the text it is about


FACTS = "facts"  # the judge that reads the article too, trained only for those who ask
JUDGES = {
    "grammar": Lessons(news.grammar_sentences, news.GRAMMAR),
    "tone": Lessons(news.tone_sentences, news.TONES),
    FACTS: Lessons(news.checked_summaries, tuple(news.FACTS), pairs=True),
}
# The token of each role, in the order of their ids.
T5_ROLES = {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"}
ROBERTA_ROLES = {
    "bos": "<s>",
    "pad": "<pad>",
    "eos": "</s>",
    "unk": "<unk>",
    "mask": "<mask>",
    "cls": "<s>",
    "sep": "</s>",
}

Made = tuple[T5 | TextClassifier, Tokenizer]


class Models(NamedTuple):
    """The results of the first two steps of RLHF: a summariser, and judges of what it writes, by name."""

    summariser: T5
    tokenizer: Tokenizer
    judges: dict[str, tuple[TextClassifier, Tokenizer]]


def load(summariser: str | Path, judges: Mapping[str, str | Path]) -> Models:
    """Read them from folders or the Hub."""
    made = {n: (TextClassifier.from_pretrained(at), Tokenizer.from_pretrained(at)) for n, at in judges.items()}
    return Models(T5.from_pretrained(summariser), Tokenizer.from_pretrained(summariser), made)


def train_tokenizer(texts: Iterable[str], roles: dict[str, str], template: str) -> Tokenizer:
    """Byte-pair encoding over words and punctuation; words as common as these become one token each."""
    special = list(dict.fromkeys(roles.values()))
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    used = [(token, backend.token_to_id(token)) for token in special if token in template.split()]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    return Tokenizer(backend, roles)


def tokenizers_for(items: list[news.NewsItem]) -> tuple[Tokenizer, Tokenizer]:
    """One as T5 uses them (`text </s>`) and one as RoBERTa does (`<s> text </s>`), over the same words."""
    texts = [text for item in items for text in (item.article, item.summary)]
    texts += [text for text, _ in news.grammar_sentences(len(items), REWARD_SEED)]
    return train_tokenizer(texts, T5_ROLES, "$A </s>"), train_tokenizer(texts, ROBERTA_ROLES, "<s> $A </s>")


def fit(model: nn.Module, loss_of: Callable[[], Tensor], steps: int, learning_rate: float, title: str) -> None:
    """AdamW with warm-up and linear decay on `loss_of()`, the loss of a new batch."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, max(0.0, 1 - step / steps))
    )
    with tqdm(range(steps), desc=title, unit="step", dynamic_ncols=True) as bar:
        for step in bar:
            loss = loss_of()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


def train_summariser(tokenizer: Tokenizer, seed: int, steps: int, device: str) -> T5:
    """Step 1: a small T5 learns article -> summary by teacher forcing."""
    torch.manual_seed(seed)
    small = replace(T5Config(), encoder_layers=2, decoder_layers=2, heads=4, dim=96, head_dim=24, hidden=192)
    size = replace(small, vocab_size=len(tokenizer), dropout=0.0)
    model = T5(size).to(device)
    items = news.news(min(20_000, steps * BATCH), TRAIN_SEED)
    generator = torch.Generator().manual_seed(seed)

    def loss_of() -> Tensor:
        rows = torch.randint(len(items), (BATCH,), generator=generator).tolist()
        ids, mask = tokenizer.encode_batch([items[i].article for i in rows])
        labels, real = tokenizer.encode_batch([items[i].summary for i in rows])  # (B, T), </s> at the end
        start = torch.full_like(labels[:, :1], size.start_id)
        logits = model(ids.to(device), mask.to(device), torch.cat([start, labels[:, :-1]], 1).to(device))
        return F.cross_entropy(logits[real], labels[real].to(device))

    fit(model, loss_of, steps, learning_rate=3e-3, title="1 of 3: summariser")
    return model


def train_judge(name: str, tokenizer: Tokenizer, seed: int, steps: int, device: str) -> TextClassifier:
    """Step 2: a small RoBERTa learns sentence -> label. Smoothed targets keep its logits within a few units."""
    torch.manual_seed(seed)
    lessons = JUDGES[name]
    size = BertConfig(
        layout="roberta",
        vocab_size=len(tokenizer),
        dim=64,
        layers=2,
        heads=4,
        hidden=128,
        max_positions=130 if lessons.pairs else 66,
        token_types=2 if lessons.pairs else 1,
        norm_eps=1e-5,
        dropout=0.0,
        attention_dropout=0.0,
        init_std=0.12,  # 64**-0.5: attention this narrow learns word order late from the usual 0.02
        pad_id=tokenizer.pad_id or 0,
    )
    model, sentences = (
        TextClassifier(size, lessons.labels).to(device),
        lessons.sentences(min(20_000, steps * BATCH), REWARD_SEED),
    )
    generator = torch.Generator().manual_seed(seed)

    def loss_of() -> Tensor:
        rows = torch.randint(len(sentences), (BATCH,), generator=generator).tolist()
        logits = read(model, tokenizer, [sentences[i][0] for i in rows])
        target = torch.tensor([sentences[i][1] for i in rows], device=device)
        if lessons.pairs:
            return F.binary_cross_entropy_with_logits(logits, 0.025 + 0.95 * target)
        return F.cross_entropy(logits, target, label_smoothing=0.05)

    if lessons.pairs:
        see_the_same(model)
    fit(model, loss_of, steps, learning_rate=2e-3 if lessons.pairs else 1e-3, title=f"2 of 3: {name} reward")
    return model


@torch.no_grad()
def see_the_same(model: TextClassifier) -> None:
    """Let words of a pair attend to the same words, in either text, from the start: it is learned late otherwise."""
    encoder = model.encoder
    assert encoder.token_types is not None
    encoder.positions.weight.mul_(0.15)
    first, second = encoder.token_types.weight.mul_(0.3)
    queries, keys, _ = encoder.get_parameter("blocks.0.attn.qkv.weight").chunk(3)
    side = F.normalize(second - first, dim=0)  # which text a word is in: what it reads, not what it looks for
    queries -= (queries @ side)[:, None] * side
    keys.copy_(queries.mul_(1.7))


def recipe_hash(**settings: object) -> str:
    """A hash of the settings, of this file and of the generator."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for file in (__file__, news.__file__):
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()[:16]


def prepare(
    cache: Path, seed: int, sft_steps: int, reward_steps: int, device: str = "cpu", facts: bool = False
) -> Path:
    """The folder with the results of steps 1 and 2, of this run or of an earlier one with the same recipe.

    With `facts` the judge of facts is among them. Raises UserError if `cache` cannot be written to.
    """
    folder = cache / f"mini-news-{recipe_hash(seed=seed, sft_steps=sft_steps, reward_steps=reward_steps)}"
    if not folder.is_dir():
        check_writable(cache)  # now, not after minutes of training
        tokenizer, words = tokenizers_for(news.news(2_000, TRAIN_SEED))
        made: dict[str, Made] = {"summariser": (train_summariser(tokenizer, seed, sft_steps, device), tokenizer)}
        for name in ("grammar", "tone"):
            made[name] = train_judge(name, words, seed, reward_steps, device), words
        keep(folder, made)
    if facts and not (folder / FACTS).is_dir():
        check_writable(folder)
        words = Tokenizer.from_pretrained(folder / "tone")
        keep(folder / FACTS, {"": (train_judge(FACTS, words, seed, reward_steps, device), words)})
    return folder


def keep(folder: Path, made: Mapping[str, Made]) -> None:
    """Write models and their tokenizers into parts of a new folder, unless another process was faster."""
    with unfinished(folder, folder=True, tidy=True) as own:
        for name, (model, tokenizer) in made.items():
            model.save_pretrained(own / name)
            tokenizer.save(own / name)
        if not folder.is_dir():
            own.rename(folder)
