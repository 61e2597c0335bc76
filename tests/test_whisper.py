"""Whisper against the reference: logits, gradients, tokens; its three layouts, there and back; what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers as hf
from helpers import assert_close
from run_helpers import command
from safetensors.torch import load_file
from speech_helpers import FRAMES, MELS, ctranslate2_file, openai_file, raw, reference, sound, tokenizer
from transformers.generation.logits_process import WhisperTimeStampLogitsProcessor
from transformers.models.whisper.modeling_whisper import sinusoids as reference_sinusoids

from vqa_scratch.errors import UserError
from vqa_scratch.generate import Conditioning, GenerationOptions, generate
from vqa_scratch.generate.timestamps import Timestamps
from vqa_scratch.models import Whisper, WhisperConfig
from vqa_scratch.models.whisper import sinusoids
from vqa_scratch.nn.memory import Memory
from vqa_scratch.weights.convert import load_into
from vqa_scratch.weights.files import read_checkpoint


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(the reference, ours of the same weights, their folder)."""
    folder = tmp_path_factory.mktemp("whisper")
    theirs = reference(folder)
    return theirs, Whisper.from_pretrained(folder), folder


def text(model: hf.WhisperForConditionalGeneration, rows: int = 2) -> torch.Tensor:
    return torch.randint(5, 250, (rows, 47), generator=torch.Generator().manual_seed(2))


def test_logits_and_gradients(both):
    theirs, ours, _ = both
    features, ids = sound().requires_grad_(), text(both[0])
    expected = theirs(features, decoder_input_ids=ids).logits
    (wanted,) = torch.autograd.grad(expected.square().mean(), features)
    logits = ours(features, ids)
    (gradient,) = torch.autograd.grad(logits.square().mean(), features)
    assert_close(logits, expected)
    assert (gradient - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_gradients_of_the_weights(both):
    theirs, ours, _ = both
    features, ids = sound(), text(both[0])
    for model in (theirs, ours):
        model.zero_grad()
    theirs(features, decoder_input_ids=ids).logits.square().mean().backward()
    ours(features, ids).square().mean().backward()
    pairs = [
        (ours.encoder.conv1.weight, theirs.model.encoder.conv1.weight),
        (ours.decoder.tokens.weight, theirs.model.decoder.embed_tokens.weight),
        (ours.decoder.blocks[1].cross.q.weight, theirs.model.decoder.layers[1].encoder_attn.q_proj.weight),
        (ours.decoder.blocks[0].cross.kv.weight[16:], theirs.model.decoder.layers[0].encoder_attn.v_proj.weight),
    ]
    grads = [ours.decoder.blocks[0].cross.kv.weight.grad[16:] if o is pairs[3][0] else o.grad for o, _ in pairs]
    for own, (_, other) in zip(grads, pairs, strict=True):
        assert (own - other.grad).abs().max() < 1e-5 * other.grad.abs().max()
    # A bias of keys changes nothing, so its gradient is rounding.
    bias = ours.encoder.blocks[0].attn.qkv.bias.grad
    assert bias[16:32].abs().max() < 1e-5 * bias.abs().max()


def test_in_two_cached_chunks(both):
    theirs, ours, _ = both
    features, ids = sound(), text(both[0])
    memory, cache = [Memory(ours.encode(features))], ours.decoder.new_cache()
    with torch.no_grad():
        parts = [
            ours.decoder(ids[:, :30], memory=memory, cache=cache),
            ours.decoder(ids[:, 30:], memory=memory, cache=cache),
        ]
        assert_close(torch.cat(parts, 1), theirs(features, decoder_input_ids=ids).logits)


def test_a_key_bias_is_read_as_zero_and_changes_nothing(both):
    _, ours, folder = both
    again = Whisper.from_pretrained(folder)
    with torch.no_grad():
        for module in again.modules():
            if hasattr(module, "qkv"):
                assert not module.qkv.bias[16:32].any()
                module.qkv.bias[16:32] = torch.randn(16)
            if hasattr(module, "kv"):
                assert not module.kv.bias[:16].any()
                module.kv.bias[:16] = torch.randn(16)
    features, ids = sound(), text(both[0])
    assert_close(again(features, ids), ours(features, ids))
    load_into(again, read_checkpoint(folder)[1], again.key_map)  # over those biases
    assert same(again, ours)


# ------------------------------------------------------------------------------------------------ layouts


def test_what_is_saved_loads_in_the_reference(both, tmp_path):
    theirs, ours, folder = both
    ours.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    again, report = hf.WhisperForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = text(theirs)
    assert torch.equal(
        again.eval()(sound(), decoder_input_ids=ids).logits, theirs(sound(), decoder_input_ids=ids).logits
    )


def same(one: Whisper, other: Whisper) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == there and torch.equal(a, b) for (name, a), (there, b) in pairs)


def test_openais_layout(tmp_path):
    theirs = reference(tmp_path, encoder_ffn_dim=64, decoder_ffn_dim=64)
    ours = Whisper.from_pretrained(tmp_path)
    alone = tmp_path / "alone"
    alone.mkdir()
    openai_file(theirs, alone / "small.pt")
    assert same(Whisper.from_pretrained(alone / "small.pt"), ours) and same(Whisper.from_pretrained(alone), ours)
    openai_file(theirs, alone / "small.pt", torch.float16)  # as released
    assert_close(Whisper.from_pretrained(alone).decoder.tokens.weight, ours.decoder.tokens.weight, tolerance=1e-3)


def test_ctranslate2s_layout(both, tmp_path):
    _, ours, _ = both
    ctranslate2_file(ours, tmp_path / "model.bin")
    found = Whisper.from_pretrained(tmp_path)
    assert same(found, ours) and found.config.decoder_heads == 4 and found.config.encoder_heads == 2
    ctranslate2_file(ours, tmp_path / "model.bin", np.float16)
    assert_close(Whisper.from_pretrained(tmp_path).decoder.tokens.weight, ours.decoder.tokens.weight, tolerance=1e-3)


def test_broken_checkpoints(both, tmp_path):
    theirs, ours, folder = both

    def refused(line: str) -> None:
        with pytest.raises(UserError, match=line):
            Whisper.from_pretrained(tmp_path)

    refused("holds no Whisper")
    path = tmp_path / "model.bin"
    ctranslate2_file(ours, path)
    whole = path.read_bytes()
    for length in (0, 3, 20, 60, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:length])
        refused("model.bin (ends after|is version)")
    path.write_bytes(whole.replace(b"WhisperSpec", b"Transformer"))
    refused("is a Transformer of CTranslate2")
    path.write_bytes(whole[:-2] + b"s\0")  # the last name of the last alias
    refused("another name of .* which it does not hold")
    ctranslate2_file(ours, path, np.int8)
    refused("is quantised")
    path.unlink()
    torch.save({"dims": {"n_mels": "8"}, "model_state_dict": {}}, tmp_path / "a.pt")
    refused("'n_vocab'")
    torch.save(dict(theirs.state_dict()), tmp_path / "a.pt")
    refused("OpenAI's layout of a Whisper, has no 'dims'")
    torch.save({}, tmp_path / "b.pt")
    refused("a.pt, b.pt: give one of them")
    shutil.copy(folder / "model.safetensors", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "wav2vec2"}))
    refused("holds a model of type 'wav2vec2', not a whisper")
    (tmp_path / "config.json").write_text(json.dumps(config | {"scale_embedding": True}))
    refused("scale_embedding")
    (tmp_path / "config.json").write_text(json.dumps(config | {"d_model": 15}))
    refused("does not divide into")


def test_features_of_another_shape(both):
    for shape in ((1, MELS + 1, FRAMES), (1, MELS, FRAMES - 2), (MELS, FRAMES)):
        with pytest.raises(UserError, match=rf"\(windows, {MELS} mels, {FRAMES} frames\)"):
            both[1].encode(torch.zeros(shape))


def test_convert_writes_the_layout_of_the_reference(both, tmp_path, capsys):
    theirs, ours, folder = both
    ctranslate2_file(ours, tmp_path / "model.bin")
    for name in ("tokenizer.json", "generation_config.json"):
        shutil.copy(folder / name, tmp_path)
    command("convert", tmp_path, tmp_path / "out")
    assert "written to" in capsys.readouterr().out
    again = hf.WhisperForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    assert again.generation_config.alignment_heads == [[0, 1], [1, 2]]
    assert hf.AutoTokenizer.from_pretrained(tmp_path / "out")(" even").input_ids == tokenizer()(" even").input_ids
    ids = text(theirs)
    assert torch.equal(again(sound(), decoder_input_ids=ids).logits, theirs(sound(), decoder_input_ids=ids).logits)


# ------------------------------------------------------------------------------------------------ tokens


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("times", [False, True])
def test_tokens_equal_those_of_the_reference(both, times, beams):
    """In double precision, so that no rounding decides; with the lists and the rules of generation_config.json."""
    theirs, ours, _ = (both[0].double(), both[1].double(), None)
    try:
        features, said = sound(5).double(), theirs.generation_config
        expected = raw(theirs, features, return_timestamps=times, num_beams=beams, max_new_tokens=30)
        start = [theirs.config.decoder_start_token_id] + [said.no_timestamps_token_id] * (not times)
        rules = {"no_timestamps_token_id": said.no_timestamps_token_id, "max_initial_timestamp_index": 50}
        options = GenerationOptions(
            30,
            said.eos_token_id,
            num_beams=beams,
            suppress_tokens=tuple(said.suppress_tokens),
            begin_suppress_tokens=tuple(said.begin_suppress_tokens),
            **(rules if times else {}),
        )
        given = Conditioning([Memory(ours.encode(features))])
        made = generate(ours.decoder, torch.tensor([start] * 5), None, given, options=options, fill=said.eos_token_id)
        rows = [[index for index in row if index != said.eos_token_id] for row in made.ids.tolist()]
        assert rows == expected and len({tuple(row) for row in rows}) > 1
    finally:
        both[0].float(), both[1].float()


def test_rules_of_timestamps_equal_the_reference():
    """On random scores, along random rows that keep the rules, in batches that lose and reorder rows."""
    end, no_times, size = 20, 24, 40
    said = hf.GenerationConfig(eos_token_id=end)
    said.no_timestamps_token_id, said.max_initial_timestamp_index = no_times, 5
    theirs = WhisperTimeStampLogitsProcessor(said, begin_index=2)
    options = GenerationOptions(9, end, no_timestamps_token_id=no_times, max_initial_timestamp_index=5)
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(64, 2, dtype=torch.long)
    ours = Timestamps.of(options, ids)
    for made in range(14):
        scores = torch.randn(len(ids), size, generator=generator) * 3
        expected, found = theirs(ids, scores), ours(scores, made)
        assert torch.equal(found, expected), made
        token = torch.multinomial(found.softmax(-1), 1, generator=generator)[:, 0]
        ids = torch.cat([ids, token[:, None]], 1)
        ours.add(token)
        rows = torch.randperm(len(ids), generator=generator)[: len(ids) - 1]
        ids = ids[rows]
        ours.keep(rows)
    assert (ids[:, 2:] > no_times).float().mean() > 0.2


def test_options_of_timestamps():
    with pytest.raises(UserError, match="give eos_id"):
        GenerationOptions(4, None, no_timestamps_token_id=9)
    with pytest.raises(UserError, match="give no_timestamps_token_id"):
        GenerationOptions(4, 1, max_initial_timestamp_index=9)
    for name in ("begin_suppress_tokens", "suppress_tokens"):
        with pytest.raises(UserError, match="a barred token is 12"):
            GenerationOptions(4, 1, **{name: (12,)}).check_vocabulary(10)
    with pytest.raises(UserError, match="the token before all times is 12"):
        GenerationOptions(4, 1, no_timestamps_token_id=12).check_vocabulary(10)


def test_the_table_of_sines():
    assert_close(sinusoids(50, 16), reference_sinusoids(50, 16))
    assert torch.equal(Whisper(WhisperConfig(vocab_size=9, encoder_layers=1)).encoder.positions, sinusoids(1500, 384))


def test_a_config_is_written_as_it_was_read():
    config = WhisperConfig(decoder_layers=2, mels=128)
    assert WhisperConfig.from_hf(config.to_hf()) == config
    theirs = hf.WhisperConfig(**config.to_hf())
    assert (theirs.num_mel_bins, theirs.decoder_layers, theirs.encoder_layers) == (128, 2, 4)
