"""A small Whisper that the reference saved, its tokenizer, and the same weights in the other two layouts."""

import struct
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers as hf
from helpers import saved

from vqa_scratch.data.text import train_bpe
from vqa_scratch.models import Whisper
from vqa_scratch.weights.convert import to_hf
from vqa_scratch.weights.maps_whisper import WHISPER_CTRANSLATE2

FRAMES, MELS = 100, 8  # of a window, one second
LANGUAGES = ("en", "de", "ja")
SPEECH = [" He might even have been made amiable.", " Front, center."]


def tokenizer() -> hf.PreTrainedTokenizerFast:
    """Bytes and a few words, then Whisper's special tokens in their order, and 51 times."""
    own = train_bpe(SPEECH, 300).backend
    names = ["<|endoftext|>", "<|startoftranscript|>", *(f"<|{name}|>" for name in LANGUAGES)]
    names += "<|translate|> <|transcribe|> <|startoflm|> <|startofprev|> <|nospeech|> <|notimestamps|>".split()
    own.add_special_tokens(names)
    own.add_tokens([tokenizers.AddedToken(f"<|{i * 0.02:.2f}|>") for i in range(51)])
    return hf.PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


def reference(folder: Path, *, multilingual: bool = False, **sizes) -> hf.WhisperForConditionalGeneration:
    """One whose encoder and decoder differ in every size; with its tokenizer and generation_config.json in `folder`."""
    words = tokenizer()
    number = words.convert_tokens_to_ids
    end, start = number("<|endoftext|>"), number("<|startoftranscript|>")
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "decoder_start_token_id": start}
    own = {
        "vocab_size": len(words),
        "num_mel_bins": MELS,
        "max_source_positions": FRAMES // 2,
        "max_target_positions": 48,
        "d_model": 16,
        "encoder_layers": 3,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 40,
        "init_std": 0.2,
    }
    model = hf.WhisperForConditionalGeneration(hf.WhisperConfig(**own | ids | sizes))
    with torch.no_grad():
        model.model.decoder.embed_positions.weight.mul_(6)  # else it says one word again and again
    said = model.generation_config
    said.suppress_tokens, said.begin_suppress_tokens = [3, 40, 41, number("<|transcribe|>")], [number("Ġ"), end]
    said.no_timestamps_token_id, said.max_initial_timestamp_index = number("<|notimestamps|>"), 50
    said.prev_sot_token_id, said.is_multilingual = number("<|startofprev|>"), multilingual
    if multilingual:
        said.lang_to_id = {f"<|{name}|>": number(f"<|{name}|>") for name in LANGUAGES}
        said.task_to_id = {name: number(f"<|{name}|>") for name in ("translate", "transcribe")}
    said.alignment_heads = [[0, 1], [1, 2]]
    said.max_length, said._from_model_config = 48, False  # which would drop what only Whisper has
    words.save_pretrained(folder)
    return saved(model, folder)


def raw(model: hf.WhisperForConditionalGeneration, features: torch.Tensor, **how) -> list[list[int]]:
    """All new tokens that the reference writes for each window, without the end token: no seeking, nothing cut off."""
    how |= {"do_sample": False, "force_unique_generate_call": True, "return_segments": True}
    found, end = model.generate(features, **how)["segments"], model.generation_config.eos_token_id
    rows = (segments[0]["result"][segments[0]["idxs"][0] :].tolist() for segments in found)
    return [[index for index in row if index != end] for row in rows]


def sound(windows: int = 2) -> torch.Tensor:
    """Features (windows, MELS, FRAMES), uneven enough to be told apart."""
    return torch.randn(windows, MELS, FRAMES, generator=torch.Generator().manual_seed(1))


OPENAI = {  # what OpenAI calls the parts of `transformers`
    "layers": "blocks",
    "self_attn_layer_norm": "attn_ln",
    "encoder_attn_layer_norm": "cross_attn_ln",
    "self_attn": "attn",
    "encoder_attn": "cross_attn",
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "out_proj": "out",
    "final_layer_norm": "mlp_ln",
    "fc1": "mlp.0",
    "fc2": "mlp.2",
    "embed_tokens": "token_embedding",
}


def openai_file(model: hf.WhisperForConditionalGeneration, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """The weights as OpenAI's .pt; a Whisper of theirs has MLPs of four times the width."""
    tensors = {}
    for key, tensor in model.model.state_dict().items():
        side, *rest = [OPENAI.get(word, word) for word in key.split(".")]
        name = ".".join([side, *rest]).replace("embed_positions.weight", "positional_embedding")
        name = name.replace("layer_norm", "ln_post" if side == "encoder" else "ln")
        tensors[name] = tensor.to(dtype)
    c = model.config
    dims = {
        "n_mels": c.num_mel_bins,
        "n_audio_ctx": c.max_source_positions,
        "n_audio_state": c.d_model,
        "n_audio_head": c.encoder_attention_heads,
        "n_audio_layer": c.encoder_layers,
        "n_vocab": c.vocab_size,
        "n_text_ctx": c.max_target_positions,
        "n_text_state": c.d_model,
        "n_text_head": c.decoder_attention_heads,
        "n_text_layer": c.decoder_layers,
    }
    torch.save({"dims": dims, "model_state_dict": tensors}, path)


def ctranslate2_file(model: Whisper, path: Path, dtype: type = np.float32) -> None:
    """The weights as a model.bin of version 6, with the numbers beside the weights that CTranslate2 writes."""

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    tensors = {name: tensor.numpy().astype(dtype) for name, tensor in to_hf(model, WHISPER_CTRANSLATE2).items()}
    tensors["encoder/num_heads"] = np.array(model.config.encoder_heads, np.int16)
    tensors["decoder/num_heads"] = np.array(model.config.decoder_heads, np.int16)
    tensors["decoder/pre_norm"] = np.array(1, np.int8)
    kinds = [np.dtype(kind) for kind in (np.float32, np.int8, np.int16, np.int32, np.float16)]
    content = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(tensors))
    for name, values in tensors.items():
        content += text(name) + struct.pack(f"<B{values.ndim}I", values.ndim, *values.shape)
        content += struct.pack("<BI", kinds.index(values.dtype), values.nbytes) + values.tobytes()
    content += struct.pack("<I", 1) + text("decoder/projection/weight") + text("decoder/embeddings/weight")
    path.write_bytes(content)
