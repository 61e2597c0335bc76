"""The three towers of a run in the layout that `transformers` loads, and what joins them beside it."""

from pathlib import Path

from vqa_scratch.models.vit import ConvStem
from vqa_scratch.run import Run
from vqa_scratch.storage import write_json, write_text
from vqa_scratch.weights.files import write_safetensors

LOAD_IMAGE = """\
image = ViTModel.from_pretrained("image", add_pooling_layer=False).eval()"""
LOAD_OWN_IMAGE = """\
# This image tower cuts pixels into tokens by convolutions, which the ViT layout of transformers has no place for: its
# weights are in image/model.safetensors under the names of vqa_scratch, its sizes in image/tower.json.
values = json.loads(Path("image/tower.json").read_text())
config = ViTConfig.from_hf(values["image"])
image = ViT(config, patch_embed=ConvStem(config.channels, config.dim, config.patch_size)).eval()
image.load_state_dict(load_file("image/model.safetensors"))"""
IMPORT_OWN = """\
import json
from pathlib import Path

from vqa_scratch.models import ConvStem, ViT, ViTConfig
"""
FUSE = {
    "tokens": """\
# Every image token and every question token is a key of the decoder's cross-attention, marked by its modality; image
# tokens are told their places once more.
pictures = linear("image_projection", image_states) + fusion["places"] + fusion["modality"][0]
words = linear("text_projection", text_states) + fusion["modality"][1]
memory = torch.cat([pictures, words], 1)
mask = torch.cat([torch.ones(pictures.shape[:2]), attention_mask], 1)""",
    "mean": """\
# The mean of the image tokens and the mean of the question tokens are averaged into one key.
pictures = linear("image_projection", image_states).mean(1)
words = linear("text_projection", text_states)
words = (words * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)
memory = ((pictures + words) / 2)[:, None]
mask = torch.ones(memory.shape[:2])""",
}
README = """\
# A visual question answering system in three towers

- `image/`  {image_kind}; `preprocessor_config.json` says how an image becomes pixels
- `text/`  {text_kind} with its tokenizer
- `decoder/`  GPT2LMHeadModel with cross-attention, with its tokenizer
- `fusion.safetensors`  what joins them (fusion `{fusion}`): {joins}

Run this in the folder to ask about one image. The answer starts after the token {bos} and ends at the token {eos}.

```python
{own}import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, GPT2LMHeadModel{vit_import}

{load_image}
text = AutoModel.from_pretrained("text").eval()
decoder = GPT2LMHeadModel.from_pretrained("decoder").eval()
fusion = load_file("fusion.safetensors")
processor = AutoImageProcessor.from_pretrained("image")
tokenizers = {{name: AutoTokenizer.from_pretrained(name) for name in ("text", "decoder")}}


def linear(name, x):
    return x @ fusion[name + ".weight"].T + fusion[name + ".bias"]


pixels = processor(Image.open("picture.png").convert("RGB"), return_tensors="pt")["pixel_values"]
question = tokenizers["text"]("what color is the square?", return_tensors="pt")
attention_mask = question["attention_mask"].float()
with torch.no_grad():
    image_states = image(pixels){states}
    text_states = text(question["input_ids"], question["attention_mask"]).last_hidden_state
    {fuse}
    ids = torch.tensor([[{bos_id}]])
    for _ in range({max_answer_tokens}):
        logits = decoder(ids, encoder_hidden_states=memory, encoder_attention_mask=mask).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        if ids[0, -1] == {eos_id}:
            break
print(tokenizers["decoder"].decode(ids[0, 1:], skip_special_tokens=True).strip())
```
{prompt}"""
PROMPT = """
This system was trained with the question as a prompt: put the decoder's tokens of the question, with a space before
it, ahead of the first token in `ids`.
"""


def readme(run: Run) -> str:
    """The page that says how to load the parts and put them together."""
    own = isinstance(run.model.image.patch_embed, ConvStem)
    decoder, config = run.encoder.decoder, run.model.text.config.to_hf()
    first, *_, last = run.encoder.answer("yes")
    return README.format(
        image_kind="a ViT with a convolutional stem, under names of our own" if own else "ViTModel",
        text_kind=config["architectures"][0],
        fusion=run.model.fusion,
        joins=", ".join(f"`{name}`" for name in fusion_tensors(run)),
        bos=f"`{decoder.backend.id_to_token(first)}`",
        eos=f"`{decoder.backend.id_to_token(last)}`",
        own=IMPORT_OWN if own else "",
        vit_import="" if own else ", ViTModel",
        load_image=LOAD_OWN_IMAGE if own else LOAD_IMAGE,
        states="" if own else ".last_hidden_state",
        fuse=FUSE[run.model.fusion].replace("\n", "\n    "),
        bos_id=first,
        eos_id=last,
        max_answer_tokens=run.encoder.max_answer_tokens,
        prompt=PROMPT if run.encoder.question_prompt else "",
    )


def fusion_tensors(run: Run) -> dict:
    """Projections and modality embedding: everything that belongs to no tower."""
    towers = ("image.", "text.", "decoder.")
    state = run.model.state_dict()
    return {name: t.detach().cpu().contiguous() for name, t in state.items() if not name.startswith(towers)}


def export_run(run: Run, folder: Path) -> list[str]:
    """Write all parts below `folder`; returns one line for each thing that could not be written in that layout."""
    notes = []
    image = folder / "image"
    image.mkdir(parents=True, exist_ok=True)
    if isinstance(run.model.image.patch_embed, ConvStem):
        tensors = {name: t.detach().cpu().contiguous() for name, t in run.model.image.state_dict().items()}
        write_safetensors(image / "model.safetensors", tensors)
        values = run.model.config.to_json()
        write_json(image / "tower.json", {"image": values["image"], "stem": values["stem"]})
        notes.append(
            f"the image tower has a convolutional stem, which the ViT layout has no place for: {image} holds it under "
            f"names of our own, and {folder / 'README.md'} shows how to load it (--stem linear trains one that fits)"
        )
    else:
        run.model.image.save_pretrained(image)
    run.processor.save_pretrained(image)
    for name, tower, tokenizer in (
        ("text", run.model.text, run.encoder.text),
        ("decoder", run.model.decoder, run.encoder.decoder),
    ):
        tower.save_pretrained(folder / name)
        tokenizer.save(folder / name)
    write_safetensors(folder / "fusion.safetensors", fusion_tensors(run), {"fusion": run.model.fusion})
    write_text(folder / "README.md", readme(run))
    return notes
