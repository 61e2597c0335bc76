"""Writes a run in the layouts that `transformers` loads: one folder a model, and the connector beside them.

The README of an exported folder has a program that answers one question with the models of `transformers`; a test runs
it unchanged.
"""

from pathlib import Path
from textwrap import indent
from typing import Any

from torch import nn

from vqa_scratch.errors import UserError
from vqa_scratch.models.clip import CLIP
from vqa_scratch.models.hf_config import Released
from vqa_scratch.models.patches import PixelPatches
from vqa_scratch.models.resnet import FrozenBatchNorm, ResNet
from vqa_scratch.models.vilt import ViLTClassifier
from vqa_scratch.models.vit import ConvStem, ViT
from vqa_scratch.models.vqa import VQAModel
from vqa_scratch.nn.states import ImageEncoder
from vqa_scratch.storage import write_json, write_text
from vqa_scratch.systems.assembly import image_sizes
from vqa_scratch.systems.model_card import metadata
from vqa_scratch.systems.splits import SplitSystem
from vqa_scratch.weights.files import write_safetensors

README = """\
# {title}

{folders}
- `connector.safetensors`  what joins them (connector `{connector}`)

`image/preprocessor_config.json` says how an image becomes pixels. Run this in the folder to ask about one image. What
the decoder writes starts after the token {start} and ends at the token {end}.

```python
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer, {decoder}

{imports}

{load_image}
decoder = {decoder}.from_pretrained("decoder").eval()
connector = load_file("connector.safetensors")
words = AutoTokenizer.from_pretrained("decoder")


def linear(name, x):
    return x @ connector[name + ".weight"].T + connector[name + ".bias"]


pixels = ImageProcessor.from_pretrained("image")([load_image("picture.png")])
question = "{example}"{hint}
{question}
with torch.no_grad():
    image_states = {states}
{read}
    ids = torch.tensor([[{prompt}{start_id}]])
    first = ids.shape[1]
    for _ in range({most}):
        {step}
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        if ids[0, -1] == {end_id}:
            break
print(words.decode(ids[0, first:], skip_special_tokens=True).strip() or "(nothing)")
```
"""
LOAD_OWN = """\
# This image encoder has {part}, which {layout} has no place for: its weights are in image/model.safetensors
# under the names of vqa_scratch, its sizes in image/encoder.json.
image = image_encoder(read_json("image/encoder.json")).eval()
image.load_state_dict(load_file("image/model.safetensors"))"""
OWN_STATES = "image.states(pixels).tokens"
STEM_HINT = " (--stem linear trains one that fits)"
OWN = ["from vqa_scratch.storage import read_json", "from vqa_scratch.systems.assembly import image_encoder"]
TEXT = """\
text = AutoModel.from_pretrained("text").eval()
cut = {{"truncation": True, "max_length": {limit}, "return_tensors": "pt"}}
tokens = AutoTokenizer.from_pretrained("text")(question, **cut)
attention_mask = tokens["attention_mask"].float()
"""
TEXT_STATES = 'text_states = text(tokens["input_ids"], tokens["attention_mask"]).last_hidden_state\n'
PROMPT = 'prompt = words({space}question, add_special_tokens=False)["input_ids"][:{limit}]'
MEMORY = "logits = decoder(ids, encoder_hidden_states=memory, encoder_attention_mask=mask).logits"
GATED = "logits = decoder(ids).logits"
PREFIX = "logits = decoder(inputs_embeds=torch.cat([prefix, decoder.get_input_embeddings()(ids)], 1)).logits"
VILT_README = """\
# A ViLT that chooses its answer from a list

`id2label` names the answers in the order of the logits; each has a probability of its own, sigmoid(logit). Run this in
the folder to ask about one image.

```python
import torch
from transformers import AutoTokenizer

from vqa_scratch.data.images import ImageProcessor, load_image

{load}
question = "{example}"
cut = {{"truncation": True, "max_length": {limit}, "return_tensors": "pt"}}
words = AutoTokenizer.from_pretrained(".")(question, **cut)
pixels = ImageProcessor.from_pretrained(".")([load_image("picture.png")])
with torch.no_grad():
    logits = model(pixel_values=pixels, input_ids=words["input_ids"], attention_mask=words["attention_mask"])
for score, place in zip(*logits{of_output}[0].sigmoid().topk(3)):
    print(f"{{labels[int(place)]:20s}} {{score:.3f}}")
```
"""
LOAD_VILT = """\
from transformers import ViltForQuestionAnswering

model = ViltForQuestionAnswering.from_pretrained(".").eval()
labels = model.config.id2label
"""
CLIP_README = """\
# {title}

Run this in the folder to see how well some texts fit an image.

```python
import torch
from transformers import AutoTokenizer

from vqa_scratch.data.images import ImageProcessor, load_image

{load}
texts = ["a small red circle at the top left", "a large blue square at the bottom right"]
cut = {{"truncation": True, "max_length": {limit}, "padding": {padding}, "return_tensors": "pt"}}
words = AutoTokenizer.from_pretrained(".")(texts, **cut)
pixels = ImageProcessor.from_pretrained(".")([load_image("picture.png")])
with torch.no_grad():
    logits = model(pixel_values=pixels, input_ids=words["input_ids"]).logits_per_image[0]
for share, text in zip(logits.{shares}, texts):
    print(f"{{share:.3f}}  {{text}}")
```
"""
LOAD_CLIP = """\
from transformers import AutoModel

model = AutoModel.from_pretrained(".").eval()
"""
LOAD_OWN_WHOLE = """\
# A convolutional stem has no place in the layouts of transformers: weights and sizes go by names of vqa_scratch.
from safetensors.torch import load_file

from vqa_scratch.storage import read_json
from vqa_scratch.systems.{module} import model_of

model = model_of(read_json("model.json"), "model.json").eval()
model.load_state_dict(load_file("model.safetensors"))
"""


def tensors_of(module: nn.Module) -> dict[str, Any]:
    """The parameters of a module by name, for a file."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}


def _export_image(image: ImageEncoder, folder: Path) -> tuple[str, str, str, list[str], str | None]:
    """Write the image encoder. Returns what it is, how to load it, how to run it, imports, and a note or None."""
    if isinstance(image, PixelPatches):
        load = f"image = PixelPatches({image.config})  # no weights"
        imports = ["from vqa_scratch.models.patches import PixelPatches, PixelPatchesConfig"]
        return "how an image becomes pixels; there is no image encoder", load, OWN_STATES, imports, None
    if isinstance(image, ResNet) and isinstance(image.norm1, FrozenBatchNorm):
        image.save_pretrained(folder / "model.safetensors")
        load = 'image = ResNet.from_pretrained("image/model.safetensors")'
        kind, states = "a ResNet in torchvision's layout", "image(pixels).flatten(2).transpose(1, 2)"
        return kind, load, states, ["from vqa_scratch.models import ResNet"], None
    if isinstance(image, ViT) and not isinstance(image.patch_embed, ConvStem):
        image.save_pretrained(folder)
        load = 'image = AutoModel.from_pretrained("image").eval()'
        return image.config.to_hf()["architectures"][0], load, "image(pixels).last_hidden_state", [], None
    write_safetensors(folder / "model.safetensors", tensors_of(image))
    write_json(folder / "encoder.json", image_sizes(image))
    if isinstance(image, ResNet):
        kind, part, layout, hint = "a small ResNet", "group norm", "no released layout", ""
    else:
        kind, part, layout, hint = "a ViT", "a convolutional stem", "the ViT layout", STEM_HINT
    load, kind = LOAD_OWN.format(part=part, layout=layout), f"{kind} with {part}, under names of our own"
    why = f"the image encoder has {part}, which {layout} has no place for{hint}"
    return kind, load, OWN_STATES, OWN, why


def export_writer(system: SplitSystem[Any, VQAModel, Any], folder: Path) -> list[str]:
    """Export a system of encoder, connector and decoder. Returns a line on each part that no released layout fits.

    Raises UserError for a decoder that none fits.
    """
    model, tokenizers = system.model, system.tokenizers
    if not model.decoder.config.family.architecture:
        raise UserError(f"{system.folder} cannot be exported: no released layout is a GPT-2 with experts")
    kind, load, states, imports, note = _export_image(model.image, folder / "image")
    system.processor.save_pretrained(folder / "image")
    decoder, connector = model.decoder.config.family.architecture, system.sizes["connector"]["kind"]
    kinds = {"image": kind, "decoder": decoder}
    parts: dict[str, Released] = {"decoder": model.decoder}
    if model.text is not None:
        assert isinstance(model.text, Released), "what is heard has no layout"
        parts["text"] = model.text
        kinds["text"] = model.text.config.to_hf()["architectures"][0]
    gated = model.decoder.take_gated()  # they are no part of the decoder's layout
    own = [("", model.connector), *((f"gated.{number}.", layer) for number, layer in gated.items())]
    tensors = {start + name: tensor for start, part in own for name, tensor in tensors_of(part).items()}
    try:
        for name, part in parts.items():
            part.save_pretrained(folder / name)
            tokenizers.by_name[name].save(folder / name)
    finally:
        model.decoder.add_gated(gated)
    write_safetensors(folder / "connector.safetensors", tensors, {"connector": connector})
    write_json(folder / "connector.json", system.sizes["connector"])

    reads_text, token = model.text is not None, tokenizers.decoder.backend.id_to_token
    prompted = bool(tokenizers.prompt("a question"))
    asked = (TEXT if reads_text else "") + (PROMPT if prompted else "")
    space = '" " + ' if tokenizers.decoder.byte_level else ""
    if prompted and not system.example:
        asked += " if question else []"
    lines = [
        "from vqa_scratch.data.images import ImageProcessor, load_image",
        *imports,
        *model.connector.recipe_imports(),
    ]
    page = README.format(
        title="A visual question answering system in parts" if system.example else "A captioner in parts",
        folders="\n".join(f"- `{name}/`  {kind}" for name, kind in kinds.items()),
        connector=connector,
        start=f"`{token(tokenizers.start_id)}`",
        end=f"`{token(tokenizers.end_id)}`",
        decoder=decoder,
        imports="\n".join(sorted(lines)),
        load_image=load,
        example=system.example,
        hint="" if system.example else "  # a caption; a question if the run was trained on them too",
        question=asked.format(space=space, limit=tokenizers.max_question_tokens),
        states=states,
        read=indent((TEXT_STATES if reads_text else "") + model.connector.recipe(reads_text), "    "),
        prompt="*prompt, " if prompted else "",
        start_id=tokenizers.start_id,
        end_id=tokenizers.end_id,
        most=tokenizers.max_answer_tokens,
        step=GATED if gated else MEMORY if model.connector.uses_memory else PREFIX,
    )
    write_text(folder / "README.md", metadata(system, "vqa-scratch") + page)
    return [] if note is None else [f"{note}: {folder / 'image'} holds it under names of our own, see its README.md"]


def has_stem(system: SplitSystem) -> bool:
    """Whether convolutions turn pixels into tokens, for which no layout has a place."""
    return system.sizes["stem"] == "conv"


def export_whole(system: SplitSystem, folder: Path, layout: str, page: str) -> list[str]:
    """Export a model of one piece in its `layout`, or under our names if it has a convolutional stem; a line says so.

    `page` is the README.
    """
    system.tokenizers.by_name["text"].save(folder)
    system.processor.save_pretrained(folder)
    write_text(folder / "README.md", metadata(system, "vqa-scratch" if has_stem(system) else "transformers") + page)
    if not has_stem(system):
        system.model.save_pretrained(folder)
        return []
    write_safetensors(folder / "model.safetensors", tensors_of(system.model))
    write_json(folder / "model.json", system.sizes)
    return [
        f"the model has a convolutional stem, which {layout} has no place for{STEM_HINT}: {folder} holds it under "
        "names of our own, with its sizes in model.json"
    ]


def export_vilt(system: SplitSystem[Any, ViLTClassifier, Any], folder: Path) -> list[str]:
    """Export as ViltForQuestionAnswering."""
    load, of_output = LOAD_VILT, ".logits"
    if has_stem(system):
        load, of_output = LOAD_OWN_WHOLE.format(module="vilt") + "labels = model.labels\n", ""
    limit = system.tokenizers.max_question_tokens
    page = VILT_README.format(load=load, example=system.example, of_output=of_output, limit=limit)
    return export_whole(system, folder, "the ViLT layout", page)


def export_clip(system: SplitSystem[Any, CLIP, Any], folder: Path) -> list[str]:
    """Export as CLIPModel or SiglipModel."""
    model = system.model
    alone = model.logit_bias is not None  # each text is judged alone, and texts are padded to one length
    page = CLIP_README.format(
        title=f"A {'SigLIP' if alone else 'CLIP'}, which compares images with texts",
        load=LOAD_OWN_WHOLE.format(module="clip_models") if has_stem(system) else LOAD_CLIP,
        limit=model.text.longest,
        padding='"max_length"' if alone else True,
        shares="sigmoid()" if alone else "softmax(0)",
    )
    return export_whole(system, folder, model.config.family.architecture, page)
