"""SpeechT5 against `transformers`: random small checkpoints, saved and loaded through our loader, and invariants.

The pre-net's dropout is always on. Both sides draw it from a generator of the same seed, so it is the same.
"""

import json

import pytest
import torch
from helpers import assert_close, text_batch, use_backend
from safetensors.torch import load_file, save_file
from speecht5_helpers import recognizer, voice
from transformers import SpeechT5ForSpeechToText, SpeechT5ForTextToSpeech
from transformers.models.speecht5.modeling_speecht5 import shift_spectrograms_right

from vqa_scratch.errors import UserError
from vqa_scratch.generate import Conditioning, GenerationOptions, generate
from vqa_scratch.models import SpeechT5, SpeechT5Config, SpeechT5Recognizer
from vqa_scratch.models.speecht5 import PADDING, shifted_right
from vqa_scratch.nn.relative_keys import PassKeys, RelativeKeys
from vqa_scratch.training.spectrogram import guided_attention, spectrogram_loss

LENGTHS = (37, 20, 4)


@pytest.fixture(scope="module", params=[2, 3])
def pair(request, tmp_path_factory):
    """(theirs, ours, folder) for text to speech, with so many frames a step."""
    torch.manual_seed(request.param)
    folder = tmp_path_factory.mktemp("tts")
    return voice(folder, reduction_factor=request.param), SpeechT5.from_pretrained(folder), folder


@pytest.fixture(scope="module")
def ears(tmp_path_factory):
    """(theirs, ours, folder) for speech to text."""
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("asr")
    return recognizer(folder, conv_bias=True), SpeechT5Recognizer.from_pretrained(folder), folder


def batch(reduction: int):
    """Ids with their mask, frames padded with -100 in whole steps, and speakers."""
    torch.manual_seed(5)
    ids, mask = text_batch(30, LENGTHS, pad=1)
    frames = torch.randn(3, 8 * reduction, 12)
    for row, steps in enumerate((8, 5, 1)):
        frames[row, steps * reduction :] = PADDING
    return ids, mask, frames, torch.randn(3, 8)


def seeded(seed: int) -> torch.Generator:
    torch.manual_seed(seed)  # theirs
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------ text to speech


def test_spectrogram_and_stop(pair):
    """Before and after the post-net, at all frames: padded ones too, since the post-net mixes neighbours."""
    theirs, ours, _ = pair
    ids, mask, frames, speaker = batch(ours.config.reduction)
    own = seeded(1)
    with torch.no_grad():
        found = ours(ids, mask, frames, speaker, generator=own)
        inputs, _ = shift_spectrograms_right(frames, ours.config.reduction)
        assert torch.equal(shifted_right(frames, ours.config.reduction), inputs)
        given = {"input_values": ids, "attention_mask": mask, "speaker_embeddings": speaker}
        states = theirs.speecht5(**given, decoder_input_values=inputs)[0]
        wanted = theirs.speech_decoder_postnet(states)
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other)


def test_frame_mask_and_no_speaker(pair):
    theirs, ours, _ = pair
    ids, mask, frames, _ = batch(ours.config.reduction)
    real = frames[..., 0] != PADDING
    real[1, int(real[1].sum()) - 1] = False  # the last frame of a step, which hides the step
    own = seeded(2)
    with torch.no_grad():
        found = ours(ids, mask, frames, frame_mask=real, generator=own).after
        given = {"input_ids": ids, "attention_mask": mask, "labels": frames, "decoder_attention_mask": real.long()}
        assert_close(found, theirs(**given).spectrogram)


def test_loss_and_gradients(pair):
    """With guided attention and without; gradients as large as 1 add up a thousand rounded numbers."""
    theirs, ours, _ = pair
    ids, mask, frames, speaker = batch(ours.config.reduction)
    for guided in (False, True):
        theirs.config.use_guided_attention_loss = guided
        object.__setattr__(ours.config, "guided", guided)
        seeded(4)
        loss = sum(spectrogram_loss(ours, ids, mask, frames, speaker))
        loss.backward()
        seeded(4)
        given = {"input_ids": ids, "attention_mask": mask, "labels": frames, "speaker_embeddings": speaker}
        wanted = theirs(**given).loss
        wanted.backward()
        torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-5)
        layer = theirs.speecht5.encoder.wrapped_encoder
        decoder = theirs.speecht5.decoder
        pairs = (
            (ours.encoder.keys.table.weight, layer.embed_positions.pe_k.weight),
            (ours.blocks[0].cross.q.weight, decoder.wrapped_decoder.layers[0].encoder_attn.q_proj.weight),
            (ours.prenet.layers[0].weight, decoder.prenet.layers[0].weight),
            (ours.text_positions.alpha, theirs.speecht5.encoder.prenet.encode_positions.alpha),
        )
        for one, other in pairs:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)
        ours.zero_grad(), theirs.zero_grad()


STOP = {2: 1.4225, 3: 1.87}  # sums of probabilities at which the rows of these random models end at different steps


def test_speaking_is_theirs(pair):
    """A batch with padding, whose rows end at different steps, one of them because it may not go on."""
    theirs, ours, _ = pair
    ids, mask, _, speaker = batch(ours.config.reduction)
    options = {"threshold": STOP[ours.config.reduction], "maxlenratio": 1.5}
    own = seeded(7)
    spoken = ours.speak(ids, speaker, generator=own, threshold=options["threshold"], most=1.5)
    frames, lengths = theirs.generate(ids, mask, speaker, return_output_lengths=True, **options)
    assert [len(row.mel) for row in spoken] == lengths and len(set(lengths)) > 1
    assert {row.stopped for row in spoken} == {True, False}
    for row, mel, length in zip(spoken, frames, lengths, strict=True):
        assert_close(row.mel, mel[:length], tolerance=2e-5)  # a frame is made of the rounded ones before it


def test_one_speaker_for_all_and_another_shape(pair):
    _, ours, _ = pair
    ids, mask, _, speaker = batch(2)
    one = ours.speak(ids, speaker[:1], mask, generator=seeded(1), most=0.5)
    same = ours.speak(ids, speaker[:1].expand(3, -1), mask, generator=seeded(1), most=0.5)
    assert all(torch.equal(a.mel, b.mel) for a, b in zip(one, same, strict=True))
    for wrong in (speaker[0], speaker[:2], speaker[:, :7]):
        with pytest.raises(ValueError, match=r"speaker must be \(1 or 3, 8\)"):
            ours.speak(ids, wrong, mask)


def test_the_limit_is_that_of_the_positions(pair):
    """`transformers` fails on the step after the last of its table."""
    _, ours, _ = pair
    ids, mask, _, speaker = batch(2)
    seen = []
    (spoken,) = ours.speak(ids[:1], speaker[:1], threshold=9.0, generator=seeded(1), progress=seen.append)
    assert len(spoken.mel) == 90 * ours.config.reduction == seen[-1] and not spoken.stopped


def test_dropout_is_on_and_shared(pair):
    _, ours, _ = pair
    frames = torch.randn(1, 6, 12).expand(4, -1, -1)
    found = ours.prenet(frames, generator=seeded(1))
    assert all(torch.equal(found[0], row) for row in found)
    assert torch.equal(found, ours.prenet(frames, generator=seeded(1)))
    assert not torch.equal(found, ours.prenet(frames, generator=seeded(2)))
    torch.testing.assert_close(ours.prenet(frames[:, 5:], generator=seeded(1), first=5), found[:, 5:])


def test_export_loads_in_transformers(pair, ears, tmp_path):
    for (theirs, ours, _), kind in ((pair, SpeechT5ForTextToSpeech), (ears, SpeechT5ForSpeechToText)):
        ours.save_pretrained(tmp_path / kind.__name__)
        again, report = kind.from_pretrained(tmp_path / kind.__name__, output_loading_info=True)
        assert not report["unexpected_keys"] and not report["mismatched_keys"]
        assert all("num_batches_tracked" in key for key in report["missing_keys"]), report["missing_keys"]
        own, other = theirs.state_dict(), again.state_dict()
        assert all(torch.equal(own[name], other[name]) for name in own if "num_batches" not in name)
        assert type(ours).from_pretrained(tmp_path / kind.__name__).config == ours.config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("speecht5.decoder.prenet.encode_positions.alpha"), "missing: speecht5.decoder.prenet.enc"),
        (lambda t: t.update(extra=torch.zeros(1)), "unexpected: extra"),
        (lambda t: t.update({"speech_decoder_postnet.prob_out.bias": torch.zeros(9)}), "prob_out.bias is (9,), should"),
    ],
)
def test_strict(pair, tmp_path, change, message):
    _, _, folder = pair
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(UserError) as error:
        SpeechT5.from_pretrained(tmp_path)
    assert message in str(error.value)


def test_what_a_config_may_not_ask_for(pair, ears, tmp_path):
    _, _, folder = pair
    config = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"scale_embedding": True}, "scale_embedding = True; here it can only be False"),
        ({"feat_extract_norm": "layer"}, "feat_extract_norm"),
        ({"conv_dim": [16, 0]}, "conv_dim must list whole numbers from 1"),
        ({"conv_dim": [16, 16]}, "must be of one length"),
        ({"hidden_size": 33}, "does not divide"),
        ({"eos_token_id": 99}, "a special token is not among the 30"),
    ):
        with pytest.raises(UserError, match=message):
            SpeechT5Config.from_hf(config | change)
    with pytest.raises(UserError, match="holds a SpeechT5ForTextToSpeech, not a SpeechT5ForSpeechToText"):
        SpeechT5Recognizer.from_pretrained(folder)
    with pytest.raises(ValueError, match="41 positions, but the table serves 40"):
        pair[1].encode(torch.full((1, 41), 5))
    with pytest.raises(ValueError, match="7 frames are no whole steps of 2"):
        shifted_right(torch.zeros(1, 7, 12), 2)


# ------------------------------------------------------------------------------------------------ speech to text


def sounds():
    torch.manual_seed(6)
    waves, mask = torch.randn(3, 700), torch.zeros(3, 700, dtype=torch.long)
    for row, length in enumerate((700, 433, 60)):
        mask[row, :length] = 1
    return waves * mask, mask, torch.randint(4, 30, (3, 12))


def test_logits(ears):
    theirs, ours, _ = ears
    waves, mask, ids = sounds()
    with torch.no_grad():
        for given in (None, mask):
            wanted = theirs(waves, given, decoder_input_ids=ids).logits
            assert_close(ours(waves, ids, given), wanted)


def test_files_of_old_releases(pair, ears, tmp_path):
    """Weight norm as it was spelled before torch 2.0, tables that were saved, and what only masked training needs."""
    _, ours, folder = ears
    tensors = load_file(folder / "model.safetensors")
    tensors["speecht5.encoder.prenet.masked_spec_embed"] = torch.zeros(32)
    tensors["speecht5.decoder.prenet.embed_positions.weights"] = torch.zeros(9, 32)
    for new, old in (("original0", "weight_g"), ("original1", "weight_v")):
        name = f"speecht5.encoder.prenet.pos_conv_embed.conv.parametrizations.weight.{new}"
        tensors[name.replace(f"parametrizations.weight.{new}", old)] = tensors.pop(name)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    again = SpeechT5Recognizer.from_pretrained(tmp_path)
    waves, _, ids = sounds()
    assert torch.equal(again(waves, ids), ours(waves, ids))
    tables = {f"speecht5.{part}.prenet.encode_positions.pe": torch.zeros(1, 9, 32) for part in ("encoder", "decoder")}
    SpeechT5.from_checkpoint(
        json.loads((pair[2] / "config.json").read_text()), load_file(pair[2] / "model.safetensors") | tables, "x"
    )


def test_greedy_tokens(ears):
    theirs, ours, _ = ears
    waves, mask, _ = sounds()
    with torch.no_grad():
        options = GenerationOptions(14, ours.config.eos_id)
        start = torch.full((3, 1), ours.config.start_id)
        given = Conditioning(ours.encode(waves, mask))
        found = generate(ours.decoder, start, None, given, options=options, fill=ours.config.pad_id).ids
        wanted = theirs.generate(waves, attention_mask=mask, max_new_tokens=14, do_sample=False, num_beams=1)[:, 1:]
    assert torch.equal(found[:, : wanted.shape[1]], wanted) and wanted[1].unique().numel() > 1 < len(
        {*wanted[:, -1].tolist()}
    )


def test_waves_too_short_or_too_long(ears):
    _, ours, _ = ears
    with pytest.raises(ValueError, match="0 to 0 states of a wave, not from 1 to 90"):
        ours.encode(torch.zeros(1, 20))
    with pytest.raises(ValueError, match="not from 1 to 90"):
        ours.encode(torch.zeros(1, 4_000))


# ------------------------------------------------------------------------------------------------ parts


@pytest.mark.parametrize("backend", ["fused", "products", "explicit"])
def test_relative_keys_by_the_definition(monkeypatch, backend):
    """(s q_i) . (k_j + p[clip(i - j)]), each score alone, in attention without values: the output is the weights."""
    from vqa_scratch.nn.attention import MultiHeadAttention

    torch.manual_seed(8)
    use_backend(monkeypatch, backend)
    attention, keys = MultiHeadAttention(8, 2), RelativeKeys(3, 4)
    x, mask = torch.randn(2, 9, 8), torch.arange(9) < torch.tensor([[9], [5]])
    with torch.no_grad():
        keys.table.weight.mul_(2)
        q, k, v = attention.qkv(x).view(2, 9, 3, 2, 4).permute(2, 0, 3, 1, 4)
        scores = torch.full((2, 2, 9, 9), -torch.inf)
        for i in range(9):
            for j in range(9):
                vector = keys.table.weight[min(max(i - j, -3), 2) + 3]
                scores[:, :, i, j] = (4**-0.5 * q[:, :, i] * (k[:, :, j] + vector)).sum(-1)
        scores.masked_fill_(~mask[:, None, None], -torch.inf)
        wanted = attention.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(attention(x, bias=PassKeys(keys, 9, mask)), wanted)
    attention(x, bias=PassKeys(keys, 9, mask)).square().sum().backward()
    assert (keys.table.weight.grad.abs().sum(1) > 0).all()


def test_guided_attention_by_hand():
    """Two steps, three tokens, the last a padded one: n/N = 0, 1/2 and t/T = 0, 1/2."""
    weights = torch.tensor([[[[0.2, 0.8, 9.0], [0.6, 0.4, 9.0]]]])
    steps, tokens = torch.tensor([[True, True]]), torch.tensor([[True, True, False]])
    off = 1 - torch.exp(torch.tensor(-(0.5**2) / (2 * 0.4**2)))
    torch.testing.assert_close(guided_attention(weights, steps, tokens, 0.4), (0.8 + 0.6) * off / 4)


def test_two_sentences_are_learned():
    """Training steps on two texts, until the model says each back in its length."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 12, "dim": 32, "encoder_layers": 1, "encoder_heads": 2, "encoder_hidden": 64, "mels": 6}
    sizes |= {"decoder_layers": 1, "decoder_heads": 2, "decoder_hidden": 64, "postnet_units": 16, "prenet_units": 32}
    sizes |= dict.fromkeys(("dropout", "attention_dropout", "position_dropout", "postnet_dropout"), 0.0)
    model = SpeechT5(SpeechT5Config(**sizes, postnet_layers=2, speaker_dim=4, max_distance=8, max_speech=50))
    ids, mask = torch.tensor([[4, 5, 6, 7, 2], [8, 9, 2, 1, 1]]), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    frames, speaker = torch.randn(2, 8, 6), torch.randn(1, 4).expand(2, -1)
    frames[1, 6:] = PADDING
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    parts = []
    for _ in range(75):
        parts.append(spectrogram_loss(model, ids, mask, frames, speaker))
        optimizer.zero_grad()
        sum(parts[-1]).backward()
        optimizer.step()
    first, last = parts[0], parts[-1]
    assert last.frames < first.frames / 2 and last.stop < first.stop / 10 and last.attention < first.attention / 5
    spoken = model.eval().speak(ids, speaker, mask, generator=torch.Generator().manual_seed(0))
    assert [len(row.mel) for row in spoken] == [8, 6]
    assert (spoken[0].mel - frames[0]).abs().mean() < frames[0].abs().mean() / 2
