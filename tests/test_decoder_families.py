"""A decoder or an image encoder of another family in the VQA system: what its line in `models/released.py` gives."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from run_helpers import command, picture
from vqa_helpers import CPU

from train import train_step
from vqa_scratch import systems
from vqa_scratch.data.images import ImageProcessor
from vqa_scratch.data.text import train_bpe
from vqa_scratch.errors import UserError
from vqa_scratch.models import (
    CLIP,
    OPT,
    CLIPConfig,
    CLIPTextConfig,
    Llama,
    LlamaConfig,
    OPTConfig,
    ViT,
    ViTConfig,
    released,
)
from vqa_scratch.models.llama_experts import Mixture
from vqa_scratch.systems.options import read_command_line
from vqa_scratch.systems.run_folder import save_weights
from vqa_scratch.systems.vqa import VQASystem
from vqa_scratch.training.optimizers import Optimizers
from vqa_scratch.training.precision import Precision

QUESTION = "what color is the square?"
SIZES = {"dim": 16, "heads": 2, "layers": 2, "hidden": 32}


FAMILIES = {
    "OPT": (OPT, OPTConfig, {}),
    "OPT-350M": (OPT, OPTConfig, {"embedding_dim": 8, "norm_first": False}),
    "Llama": (Llama, LlamaConfig, {"kv_heads": 1}),
    "Persimmon": (Llama, LlamaConfig, {"layout": "persimmon", "norm": "layer", "qk_norm": True, "gated": False}),
}
FAMILIES["Mixtral"] = Llama, LlamaConfig, {"layout": "mixtral", "experts": Mixture(4, 2, SIZES["hidden"])}
FAMILIES["Persimmon"][2].update(dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), True))


def image_model(kind: str, folder: Path) -> None:
    """A small image encoder, or a whole CLIP or SigLIP, in the layout of released ones."""
    if kind in CLIPConfig.LAYOUTS:
        tower = ViTConfig(image_size=32, patch_size=16, layout=f"{kind}_vision_model", **SIZES)
        words = CLIPTextConfig(vocab_size=60, layout=f"{kind}_text_model", **SIZES)
        model = CLIP(CLIPConfig(tower, words, projection_dim=16, layout=kind))
    else:
        model = ViT(ViTConfig(image_size=32, patch_size=16, layout=kind, **SIZES))
    model.save_pretrained(folder), ImageProcessor(size=(32, 32)).save_pretrained(folder)


def checkpoints(folder: Path, family: str, image: str = "vit") -> list[str]:
    """The flags of a small image encoder and a small decoder in the layouts of released ones."""
    words = train_bpe([f" {QUESTION}", " red blue two circle"], 300)
    kind, config, sizes = FAMILIES[family]
    ids = {"bos_id": words.bos_id, "pad_id": words.pad_id}
    decoder = kind(config(vocab_size=len(words), max_positions=256, **ids, **SIZES, **sizes))
    decoder.save_pretrained(folder / "words"), words.save(folder / "words")
    image_model(image, folder / "image")
    return ["--image-model", str(folder / "image"), "--decoder-model", str(folder / "words")]


def options(data: Path, folder: Path, connector: str, *flags: str):
    flags = flags[2:] if connector == "patches" else flags  # without --image-model
    values = ["--preset", "book", "--init", "pretrained", "--connector", connector, "--question-prompt", *flags]
    return read_command_line([*values, "--data", str(data), "--out", str(folder / "run"), "--questions-per-step", "32"])


@torch.enable_grad()
@pytest.mark.parametrize("connector", ["prefix", "patches", "qformer", "resampler"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_answers(data, tmp_path, capsys, monkeypatch, connector, family):
    """It trains, is saved, opened, asked, studied and exported as a GPT-2 is; OPT-350M has a narrow embedding."""
    from_training_to_export(data, tmp_path, capsys, monkeypatch, connector, family)


@torch.enable_grad()
@pytest.mark.parametrize("image", ["clip", "siglip", "clip_vision_model", "siglip_vision_model"])
def test_the_images_of_a_clip_or_siglip_are_answered_about(data, tmp_path, capsys, monkeypatch, image):
    """As `--image-model`, whole or its image tower alone."""
    opened = from_training_to_export(data, tmp_path, capsys, monkeypatch, "prefix", "OPT", image)
    assert opened.model.image.config.layout == f"{image.split('_')[0]}_vision_model"


def from_training_to_export(data, tmp_path, capsys, monkeypatch, connector, family, image="vit"):
    chosen = options(data, tmp_path, connector, *checkpoints(tmp_path, family, image))
    samples = VQASystem.read(chosen)
    system = VQASystem.build(chosen, samples, Precision("fp32", CPU))
    system.train_on(samples)
    rates = {"kind": "adamw", "learning_rate": 3e-3, "matrix_learning_rate": 0.0, "weight_decay": 0.0}
    batch, optimizers = system.batch(system.epoch(0)[0]), Optimizers(system.model, **rates)
    system.loss(batch)[0].backward()  # every parameter takes part: ranks wait for the gradient of each
    assert all(p.grad is not None for p in system.model.parameters())
    optimizers.zero_grad()
    losses = [float(train_step(system.loss, batch, optimizers, system.precision)[0]) for _ in range(3)]
    assert losses[2] < losses[0]
    system.save(chosen.out)
    save_weights(chosen.out / "model.safetensors", system.model)

    opened = systems.load(chosen.out)
    assert type(opened.model.decoder) is FAMILIES[family][0]
    assert opened.model.decoder.config == system.model.decoder.config
    (answer,), _ = opened.ask(picture(data), QUESTION)
    study = ("study", chosen.out, "--image", picture(data), "--question", QUESTION, "--out", tmp_path / "study")
    command(*study)
    summary = json.loads((tmp_path / "study" / "summary.json").read_text())
    certificate = summary["certificate"]
    assert max(certificate[k] for k in ("mass", "output", "softmax")) <= 1e-5 and certificate["rows"] > 0
    # The last row of the lens is what the model said, whatever norm and projection stand before the head.
    assert summary["probability"] == pytest.approx(answer.probability, rel=1e-4)
    opened.export(tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    Image.open(picture(data)).save("picture.png")
    program = re.search(r"```python\n(.*?)```", Path("README.md").read_text(), re.S)[1]
    capsys.readouterr()
    exec(compile(program, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out.strip() == (answer.text or "(nothing)")
    return opened


@pytest.mark.parametrize("family", ["OPT", "Llama"])
def test_it_has_no_cross_attention(tmp_path, family):
    *_, folder = checkpoints(tmp_path, family)
    with pytest.raises(UserError, match=f"'{family.lower()}'; decoders with cross-attention are gpt2$"):
        released.decoder(folder, cross_attention=True)
