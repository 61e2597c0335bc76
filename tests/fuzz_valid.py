"""Valid files of every kind for `fuzz.py`, all of them tiny: data, runs, released checkpoints, articles, images."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from run_helpers import command
from safetensors.torch import load_file
from vqa_helpers import CPU, SIZES, small_data, small_flags

import rlhf
import train
from vqa_scratch.data import text as texts
from vqa_scratch.data.captions import read_captions
from vqa_scratch.data.clip_bpe import END, START
from vqa_scratch.data.fuyu_images import FuyuImageProcessor
from vqa_scratch.data.images import ImageProcessor
from vqa_scratch.models import (
    CLIP,
    GPT2,
    OPT,
    T5,
    Bert,
    BertConfig,
    Blip2,
    Blip2Config,
    CLIPConfig,
    CLIPTextConfig,
    Fuyu,
    FuyuConfig,
    GPT2Config,
    Idefics,
    IdeficsConfig,
    Llama,
    LlamaConfig,
    Llava,
    LlavaConfig,
    OPTConfig,
    QFormerConfig,
    ResNet,
    ResNetConfig,
    T5Config,
    ViLT,
    ViLTConfig,
    ViT,
    ViTConfig,
)
from vqa_scratch.models.classifier import TextClassifier
from vqa_scratch.models.llama_experts import Mixture
from vqa_scratch.models.resampler import ResamplerConfig
from vqa_scratch.nn.rotary import Rotary
from vqa_scratch.storage import write_json
from vqa_scratch.systems import vilt as vilt_system
from vqa_scratch.training.precision import Precision

SYSTEMS = ("vqa", "vilt", "caption", "clip")
FP32 = Precision("fp32", CPU)
QUESTION = "what color is the circle?"
WORDS = [QUESTION, "is there a red square?", "how many circles are there?", "where is the large blue triangle?"]
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0}
TINY = {"dim": 16, "layers": 1, "heads": 2}
CAPTION = "--preset caption --width 32 --heads 2 --decoder-layers 1 --image-width 16 --captions-per-step 16 --steps 1"
CAPTION += " --max-caption-tokens 8 --captions-per-image 4 --question-share 0.4 --questions-per-step 16"
CAPTION += " --eval-captions 4 --eval-questions 8"
VILT = "--preset vilt --width 32 --heads 2 --layers 1 --questions-per-step 16 --min-answer-count 1 --steps 1"
CLIP_RUN = "--preset clip --width 16 --heads 2 --image-layers 1 --text-layers 1 --projection 8 --pairs-per-step 4"
CLIP_RUN += " --stem linear --max-caption-tokens 16 --steps 1"
VOICE = "--preset voice --width 16 --heads 2 --encoder-layers 1 --decoder-layers 1 --utterances-per-step 4 --steps 1"
SPOKEN = "--preset spoken --start-from runs/vqa --voice-model runs/voice --steps 1"
SHARED = "--warmup-steps 1 --samples 2 --device cpu --precision fp32 --no-image-cache"
BOOK = "--preset book --prompts 2 --samples 2 --max-new-tokens 4 --eval-prompts 2 --eval-samples 1 --frontier-prompts 2"
BOOK += " --frontier-samples 2 --precision fp32 --device cpu --iterations 1 --max-prompt-tokens 16 --critic-warmup 0"
BOOK += " --grammar-label good --tone-label good"


class Valid:
    """Makes the files below `root` once; `flags` and `book_flags` are the command lines of the runs among them."""

    def __init__(self, root: Path) -> None:
        torch.manual_seed(0)
        self.root = root
        self.data = root / "data"
        sizes = {"train": 4, "val": 2, "test": 2, "holdout": 1, "questions_per_scene": 4}
        shutil.copytree(small_data(root / "drawn", **sizes), self.data)
        self.picture = next((self.data / "val2014").glob("*.png"))
        self.captioned = self._captions()
        self.plain = {name: self._run(name) for name in SYSTEMS}
        self.small = root / "small"
        command("export", self.plain["vqa"], self.small, "--quantize", "int8")
        self.checkpoints = self._checkpoints(root / "released")
        self.articles = root / "articles"
        self._articles()
        self.tables = self._tables(root / "tables")
        self.tuned = self._tuned(root / "tuned")

    # ------------------------------------------------------------------------------------------------ valid files

    def _captions(self) -> Path:
        """A folder in COCO's layout, with questions about the same images and no scenes."""
        folder = self.root / "captioned"
        shutil.copytree(self.data, folder, ignore=shutil.ignore_patterns("scenes_*"))
        for split in ("train", "val", "test"):
            samples = read_captions(self.data, split).samples
            images = {s.image_id: {"id": s.image_id, "file_name": s.image_path.name} for s in samples}
            entries = [{"id": s.question_id, "image_id": s.image_id, "caption": s.answer} for s in samples]
            subtype = "test2015" if split == "test" else f"{split}2014"
            write_json(folder / f"captions_{subtype}.json", {"images": [*images.values()], "annotations": entries})
        return folder

    def flags(self, name: str, out: Path, data: Path | None = None) -> list[str]:
        """The command line of a tiny run of a system."""
        data = data or self.data
        if name == "vqa":
            changes = {"steps": 1, "eval_questions": 4, "samples": 2, "questions_per_step": 16, "question_prompt": None}
            return small_flags(data, out, **SIZES | changes)
        words = {"vilt": VILT, "caption": CAPTION, "clip": CLIP_RUN, "voice": VOICE, "spoken": SPOKEN}[name]
        shared = SHARED.replace("--no-image-cache", "") if name == "voice" else SHARED
        return [*words.split(), *shared.split(), "--data", str(data), "--cache", str(self.root), "--out", str(out)]

    def _run(self, name: str) -> Path:
        out = self.root / "runs" / name
        train.main(train.read_command_line(self.flags(name, out)))
        for picture in ("curves.png", "samples.html", "results.png"):
            (out / picture).unlink(missing_ok=True)
        return out

    def _checkpoints(self, root: Path) -> dict[str, Path]:
        """Tiny random checkpoints of every released layout, with tokenizers and preprocessing beside them."""
        words, pieces = texts.train_wordpiece(WORDS, 120), texts.train_bpe([f" {text}" for text in WORDS], 290)
        many, vit = len(pieces), ViTConfig(image_size=16, patch_size=8, hidden=32, **TINY)
        ends = {"bos_id": pieces.bos_id, "eos_id": pieces.eos_id, "pad_id": pieces.pad_id}
        bert = BertConfig(vocab_size=len(words), hidden=32, max_positions=40, pad_id=words.pad_id, **TINY)
        roberta = BertConfig(
            layout="roberta", vocab_size=many, hidden=32, max_positions=40, token_types=1, pad_id=pieces.pad_id, **TINY
        )
        opt = OPTConfig(vocab_size=many, max_positions=80, hidden=32, **TINY, **ends)
        grouped = LlamaConfig(
            vocab_size=many, max_positions=80, hidden=32, kv_heads=1, bos_id=pieces.bos_id, eos_id=(pieces.eos_id,),
            pad_id=pieces.pad_id, rotary=Rotary("llama3", factor=8.0, low=1.0, high=4.0, original=64), **TINY,
        )  # fmt: skip

        def towers(kind: str) -> dict[str, Any]:
            image = ViTConfig(image_size=16, patch_size=8, hidden=32, layout=f"{kind}_vision_model", **TINY)
            ids = {"vocab_size": len(words), "max_positions": 12, "eos_id": words.sep_id}
            return {"image": image, "text": CLIPTextConfig(hidden=32, layout=f"{kind}_text_model", **ids, **TINY)}

        t5 = T5Config(
            vocab_size=many, dim=16, head_dim=8, hidden=24, encoder_layers=1, decoder_layers=1, heads=2,
            pad_id=pieces.pad_id, eos_id=pieces.eos_id, start_id=pieces.pad_id,
        )  # fmt: skip
        vilt = ViLTConfig(image_size=64, patch_size=32, hidden=32, vocab_size=len(words), max_positions=40, **TINY)
        qformer = QFormerConfig(hidden=32, **TINY)
        clip, placed = replace(vit, layout="clip_vision_model"), texts.train_bpe([f" {text}" for text in WORDS], 290)
        own = ["|SPEAKER|", "|NEWLINE|", "<0x04>", "<image>", "<fake_token_around_image>", "<end_of_utterance>"]
        placed.backend.add_special_tokens(own)
        place = placed.backend.token_to_id("|SPEAKER|")
        llama = LlamaConfig(vocab_size=len(placed), max_positions=80, hidden=32, bos_id=placed.bos_id, **TINY)
        persimmon = LlamaConfig.from_hf(llama.to_hf() | {"model_type": "persimmon"})
        sizes = {"latents": 2, "layers": 1, "heads": 2, "head_dim": 4, "head_norm": True}
        resampler = ResamplerConfig(clip.dim, activation="relu", **sizes)
        models: dict[str, Any] = {
            "vit": ViT(vit),
            "bert": Bert(bert),
            "gpt2": GPT2(GPT2Config(vocab_size=many, max_positions=80, **TINY, **ends)),
            "opt": OPT(opt),
            "llama": Llama(grouped),
            "experts": Llama(replace(grouped, layout="qwen2_moe", experts=Mixture(3, 2, 8, shared_hidden=12))),
            "clip": CLIP(CLIPConfig(**towers("clip"), projection_dim=8)),
            "siglip": CLIP(CLIPConfig(**towers("siglip"), projection_dim=16, layout="siglip")),
            "t5": T5(t5),
            "vilt": ViLT(vilt),
            "blip2": Blip2(Blip2Config(vision=vit, qformer=qformer, language=opt, queries=2)),
            "llava": Llava(LlavaConfig(clip, llama, place)),
            "fuyu": Fuyu(FuyuConfig(persimmon, patch_size=8, image_token=place)),
            "idefics": Idefics(IdeficsConfig(clip, llama, resampler, added=3, head_norm=True, gates="vector")),
            "classifier": TextClassifier(roberta, ("bad", "good")),
        }
        for name, model in models.items():
            model.save_pretrained(root / name)
            if name in ("bert", "vilt", "clip", "siglip"):
                words.save(root / name)
            elif name != "vit":
                pieces.save(root / name)
            if name in ("llava", "fuyu", "idefics"):
                placed.save(root / name)
            if name in ("vit", "blip2", "clip", "siglip", "llava", "idefics"):
                ImageProcessor(size=(16, 16)).save_pretrained(root / name)
        vilt_system.ViltImageProcessor(size=64).save_pretrained(root / "vilt")
        FuyuImageProcessor(size=(32, 48), patch_size=8).save_pretrained(root / "fuyu")
        write_json(
            root / "llava" / "chat_template.json",
            {"chat_template": "<s>|SPEAKER|{{ messages[0]['content'][1]['text'] }}"},
        )
        resnet = ResNet(ResNetConfig("basic", (1, 1), (8, 16)))
        (root / "resnet").mkdir()
        resnet.save_pretrained(root / "resnet" / "resnet.safetensors")
        torch.save(load_file(root / "resnet" / "resnet.safetensors"), root / "resnet" / "resnet.bin")
        self._old_tokenizers(root, words, pieces)
        return {folder.name: folder for folder in root.iterdir()}

    def _old_tokenizers(self, root: Path, words: texts.Tokenizer, pieces: texts.Tokenizer) -> None:
        """Folders with vocab.txt, and with vocab.json and merges.txt, in place of tokenizer.json."""
        for name in ("wordpiece", "bytes"):
            (root / name).mkdir()
        vocabulary = words.backend.get_vocab()
        (root / "wordpiece" / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.get)) + "\n")
        write_json(root / "wordpiece" / "tokenizer_config.json", {"do_lower_case": True, "strip_accents": None})
        model = json.loads(pieces.backend.to_str())["model"]
        write_json(root / "bytes" / "vocab.json", {**model["vocab"], "<|endoftext|>": len(model["vocab"])})
        lines = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        (root / "bytes" / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]) + "\n")
        special = {"bos_token": "<|endoftext|>", "eos_token": {"content": "<|endoftext|>"}}
        write_json(root / "bytes" / "special_tokens_map.json", special)
        letters = [letter for letter in model["vocab"] if len(letter) == 1]
        tokens = [*letters, *(f"{letter}</w>" for letter in letters), "re", "red</w>", START, END]
        (root / "clip_bytes").mkdir()
        write_json(root / "clip_bytes" / "vocab.json", {token: index for index, token in enumerate(tokens)})
        (root / "clip_bytes" / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
        write_json(root / "clip_bytes" / "special_tokens_map.json", {"bos_token": START, "eos_token": END})

    def _articles(self) -> None:
        self.articles.mkdir()
        rows = [f"The council of town {i} will close the harbour, and the mayor will sell it." for i in range(6)]
        quoted = "\n".join(f'"{row}","The harbour closes."' for row in rows)
        (self.articles / "news.csv").write_text(f"text,summary\n{quoted}\n")
        lines = [json.dumps({"text": row, "summary": "The harbour closes."}) for row in rows]
        (self.articles / "news.jsonl").write_text("\n".join(lines) + "\n")
        (self.articles / "news.txt").write_text("\n".join(rows) + "\n")

    def _tables(self, folder: Path) -> Path:
        """Three images, and questions about them in tables of every kind."""
        folder.mkdir()
        pictures = [
            shutil.copy(path, folder / f"photo {i}.png") for i, path in enumerate(self.data.glob("train2014/*.png"))
        ]
        rows = [{"image": p.name, "question": question, "answer": "red"} for p in pictures for question in WORDS[:2]]
        (folder / "table.json").write_text(json.dumps(rows))
        (folder / "table.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        for suffix, between in ((".csv", ","), (".tsv", "\t")):
            lines = [between.join(row.values()) for row in [{name: name for name in rows[0]}, *rows]]
            (folder / f"table{suffix}").write_text("\n".join(lines) + "\n")
        return folder

    def book_flags(self, articles: Path, out: Path, **folders: Path) -> list[str]:
        where = {"policy": "t5", "grammar_model": "classifier", "tone_model": "classifier"}
        found = {name: self.checkpoints[kind] for name, kind in where.items()} | folders
        named = [part for name, path in found.items() for part in (f"--{name.replace('_', '-')}", str(path))]
        columns = [] if articles.suffix == ".txt" else ["--summary-column", "summary"]
        return [*BOOK.split(), *named, *columns, "--articles", str(articles), "--out", str(out)]

    def _tuned(self, out: Path) -> Path:
        rlhf.run(self.book_flags(self.articles / "news.csv", out))
        for picture in ("curves.png", "frontier.png", "samples.html"):
            (out / picture).unlink(missing_ok=True)
        return out

    def alone(self, file: Path) -> Path:
        """A folder that holds this file only."""
        folder = self.root / "alone" / file.suffix[1:]
        folder.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(file, folder)).parent

    def images(self, folder: Path) -> list[Path]:
        folder.mkdir()
        pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
        for suffix in ("png", "jpg", "gif", "webp", "tiff", "bmp"):
            Image.fromarray(pixels).save(folder / f"image.{suffix}")
        return sorted(folder.iterdir())
