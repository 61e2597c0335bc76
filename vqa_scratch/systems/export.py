"""Writes a run in the layouts that `transformers` loads: one folder a model, and the connector beside them.

The README of an exported folder has a program that answers one question with the models of `transformers`; a test runs
it unchanged.
"""

from pathlib import Path
from textwrap import indent
from typing import Any

from torch import nn

from vqa_scratch.models.resnet import FrozenBatchNorm, ResNet
from vqa_scratch.models.vit import ConvStem
from vqa_scratch.storage import write_json, write_text
from vqa_scratch.systems.assembly import image_sizes
from vqa_scratch.systems.base import System
from vqa_scratch.weights.files import write_safetensors

README = """\
# {title}

- `image/`  {image_kind}; `preprocessor_config.json` says how an image becomes pixels
{text_line}- `decoder/`  {decoder_kind}{with_cross} with its tokenizer
- `connector.safetensors`  what joins them (connector `{connector}`): {tensors}

Run this in the folder to ask about one image. What the decoder writes starts after the token {bos} and ends at the
token {eos}.

```python
{imports}

{load_image}
decoder = {decoder_kind}.from_pretrained("decoder").eval()
connector = load_file("connector.safetensors")
words = AutoTokenizer.from_pretrained("decoder")


def linear(name, x):
    return x @ connector[name + ".weight"].T + connector[name + ".bias"]


pixels = ImageProcessor.from_pretrained("image")([Image.open("picture.png")])
{question}
with torch.no_grad():
    image_states = {states}
{read}
    ids = torch.tensor([[{prompt}{bos_id}]])
    first = ids.shape[1]
    for _ in range({most}):
        {step}
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        if ids[0, -1] == {eos_id}:
            break
print(words.decode(ids[0, first:], skip_special_tokens=True).strip())
```
"""
LOAD_OWN = """\
# This image encoder has {part}, which {layout} has no place for: its weights are in image/model.safetensors
# under the names of vqa_scratch, its sizes in image/encoder.json.
image = image_encoder(json.load(open("image/encoder.json"))).eval()
image.load_state_dict(load_file("image/model.safetensors"))"""
STEM_HINT = " (--stem linear trains one that fits)"
OWN = "from vqa_scratch.systems.assembly import image_encoder"
TEXT = """\
text = AutoModel.from_pretrained("text").eval()
tokens = AutoTokenizer.from_pretrained("text")("what color is the square?", return_tensors="pt")
attention_mask = tokens["attention_mask"].float()"""
MEMORY = "logits = decoder(ids, encoder_hidden_states=memory, encoder_attention_mask=mask).logits"
PREFIX = "logits = decoder(inputs_embeds=torch.cat([prefix, decoder.get_input_embeddings()(ids)], 1)).logits"
VILT_README = """\
# A ViLT that chooses its answer from a list

`id2label` names the answers in the order of the logits; each has a probability of its own, sigmoid(logit). Run this in
the folder to ask about one image.

```python
{load}
tokenizer = AutoTokenizer.from_pretrained(".")
processor = ImageProcessor.from_pretrained(".")
pixels = processor([Image.open("picture.png")])
question = tokenizer("what color is the square?", return_tensors="pt")
with torch.no_grad():
    scores = answer(pixels, question["input_ids"], question["attention_mask"]).sigmoid()[0]
for score, place in zip(*scores.topk(3)):
    print(f"{{labels[int(place)]:20s}} {{score:.3f}}")
```
"""
LOAD_VILT = """\
import torch
from PIL import Image
from transformers import AutoTokenizer, ViltForQuestionAnswering

from vqa_scratch.data.images import ImageProcessor

model = ViltForQuestionAnswering.from_pretrained(".").eval()
labels = model.config.id2label


def answer(pixels, ids, mask):
    return model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits

"""
LOAD_OWN_VILT = """\
import json

import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer

from vqa_scratch.data.images import ImageProcessor
from vqa_scratch.models import ViLTClassifier, ViLTConfig
from vqa_scratch.systems.vilt import build_vilt

# A convolutional stem has no place in the ViLT layout of transformers: weights and sizes go by names of vqa_scratch.
sizes = json.load(open("model.json"))
labels = list(sizes["id2label"].values())
answer = ViLTClassifier(build_vilt(ViLTConfig.from_hf(sizes), sizes["stem"]), labels).eval()
answer.load_state_dict(load_file("model.safetensors"))"""


def _tensors(module: nn.Module) -> dict[str, Any]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}


def _export_image(image: nn.Module, folder: Path) -> tuple[str, str, str, list[str], str | None]:
    """Write the image encoder. Returns what it is, how to load it, how to run it, imports, and a note or None."""
    if isinstance(image, ResNet) and isinstance(image.norm1, FrozenBatchNorm):
        image.save_pretrained(folder / "model.safetensors")
        load = 'image = ResNet.from_pretrained("image/model.safetensors")'
        kind, states = "a ResNet in torchvision's layout", "image(pixels).flatten(2).transpose(1, 2)"
        return kind, load, states, ["from vqa_scratch.models import ResNet"], None
    if not isinstance(image, ResNet) and not isinstance(image.patch_embed, ConvStem):
        image.save_pretrained(folder)
        load = 'image = AutoModel.from_pretrained("image").eval()'
        return image.config.to_hf()["architectures"][0], load, "image(pixels).last_hidden_state", [], None
    write_safetensors(folder / "model.safetensors", _tensors(image))
    write_json(folder / "encoder.json", image_sizes(image))
    if isinstance(image, ResNet):
        kind, part, layout, hint = "a small ResNet", "group norm", "no released layout", ""
    else:
        kind, part, layout, hint = "a ViT", "a convolutional stem", "the ViT layout", STEM_HINT
    load, kind = LOAD_OWN.format(part=part, layout=layout), f"{kind} with {part}, under names of our own"
    why = f"the image encoder has {part}, which {layout} has no place for{hint}"
    return kind, load, "image.states(pixels).tokens", ["import json", OWN], why


def export_writer(system: System, folder: Path) -> list[str]:
    """Export a system of encoder, connector and decoder. Returns a line on each part that no released layout fits."""
    model, tokenizers = system.model, system.tokenizers
    for name in ("image", "decoder"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    kind, load, states, imports, note = _export_image(model.image, folder / "image")
    system.processor.save_pretrained(folder / "image")
    parts = [("decoder", model.decoder, tokenizers.decoder)]
    if model.text is not None:
        parts.append(("text", model.text, tokenizers.text))
    for name, part, tokenizer in parts:
        part.save_pretrained(folder / name)
        tokenizer.save(folder / name)
    state = _tensors(model.connector)
    connector = system.sizes["connector"]["kind"]
    write_safetensors(folder / "connector.safetensors", state, {"connector": connector})
    write_json(folder / "connector.json", system.sizes["connector"])

    has_text, memory = model.text is not None, model.connector.uses_memory
    text_kind = model.text.config.to_hf()["architectures"][0] if has_text else ""
    text_states = '    text_states = text(tokens["input_ids"], tokens["attention_mask"]).last_hidden_state\n'
    asked = tokenizers.question_prompt and system.name != "caption"
    prompt = 'prompt = words(" what color is the square?", add_special_tokens=False)["input_ids"]' if asked else ""
    decoder_kind = model.decoder.config.family.architecture
    hf = ("AutoModel, " if has_text or "AutoModel" in load else "") + f"AutoTokenizer, {decoder_kind}"
    lines = ["import torch", "from PIL import Image", "from safetensors.torch import load_file"]
    own = ["from vqa_scratch.data.images import ImageProcessor", *imports, *model.connector.recipe_imports(has_text)]
    standard = [line for line in own if line.startswith("import ")]
    own = sorted(line for line in own if not line.startswith("import "))
    token = tokenizers.decoder.backend.id_to_token
    page = README.format(
        title="A visual question answering system in parts" if has_text or asked else "A captioner in parts",
        image_kind=kind,
        text_line=f"- `text/`  {text_kind} with its tokenizer\n" if has_text else "",
        decoder_kind=decoder_kind,
        with_cross=" with cross-attention" if memory else "",
        connector=connector,
        tensors=", ".join(f"`{name}`" for name in state) if len(state) < 10 else f"{len(state)} tensors",
        bos=f"`{token(tokenizers.start_id)}`",
        eos=f"`{token(tokenizers.end_id)}`",
        imports="\n".join([*standard, *lines, f"from transformers import {hf}", "", *own]),
        load_image=load,
        question="\n".join(line for line in (TEXT if has_text else "", prompt) if line),
        states=states,
        read=(text_states if has_text else "") + indent(model.connector.recipe(has_text), "    "),
        prompt="*prompt, " if asked else "",
        bos_id=tokenizers.start_id,
        eos_id=tokenizers.end_id,
        most=tokenizers.max_answer_tokens,
        step=MEMORY if memory else PREFIX,
    )
    write_text(folder / "README.md", page)
    return [] if note is None else [f"{note}: {folder / 'image'} holds it under names of our own, see its README.md"]


def export_vilt(system: System, folder: Path) -> list[str]:
    """Export in the layout of ViltForQuestionAnswering; a model with a convolutional stem keeps our names."""
    system.tokenizers.text.save(folder)
    system.processor.save_pretrained(folder)
    write_text(folder / "README.md", VILT_README.format(load=LOAD_OWN_VILT if system.has_stem else LOAD_VILT))
    if not system.has_stem:
        system.model.save_pretrained(folder)
        return []
    write_safetensors(folder / "model.safetensors", _tensors(system.model))
    write_json(folder / "model.json", system.sizes)
    return [
        f"the model has a convolutional stem, which the ViLT layout has no place for{STEM_HINT}: {folder} holds it "
        "under names of our own, with its sizes in model.json"
    ]
