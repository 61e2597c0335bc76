"""Checkpoint files: nothing but tensors is read, what is broken is named, nothing half-written is left."""

import hashlib
import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vqa_scratch.errors import UserError, note
from vqa_scratch.models import GPT2, T5, Bert, BertConfig, GPT2Config, T5Config, ViT, ViTConfig
from vqa_scratch.weights import files

CONFIG = BertConfig("bert", 20, 8, 2, 2, 12, 16)


@pytest.fixture
def folder(tmp_path):
    """A small BERT on disk."""
    Bert(CONFIG).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def shard(folder, suffix, save):
    """Turn the folder's file into two shards with an index; returns the shard names."""
    tensors = load_file(folder / "model.safetensors")
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    places = {key: names[i % 2] for i, key in enumerate(tensors)}
    for name in names:
        save({key: tensors[key] for key in places if places[key] == name}, folder / name)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "model.safetensors").unlink()
    return names


@pytest.mark.parametrize("model", [Bert(CONFIG), ViT(ViTConfig(8, 4, 3, 8, 1, 2, 12)), GPT2(GPT2Config(9, 8, 8, 1, 2))])
def test_what_is_saved_is_read_back_exactly(tmp_path, model):
    model.save_pretrained(tmp_path / "new" / "folder")
    again = type(model).from_pretrained(str(tmp_path / "new" / "folder"))
    assert again.config == model.config
    assert not again.training
    for (name, ours), (_, theirs) in zip(again.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(("suffix", "save"), [("safetensors", save_file), ("bin", torch.save)])
def test_shards(folder, suffix, save):
    whole = load_file(folder / "model.safetensors")
    names = shard(folder, suffix, save)
    _, tensors = files.read_checkpoint(folder)
    assert tensors.keys() == whole.keys() and all(torch.equal(tensors[key], whole[key]) for key in whole)
    (folder / names[1]).unlink()
    with pytest.raises(UserError, match=f"bert is not a whole checkpoint: it lacks {names[1]}, which .*json lists"):
        Bert.from_pretrained(folder)


def test_every_broken_shard_is_named_in_one_error(folder):
    """One absent and one cut short, as an interrupted download leaves a folder."""
    gone, short = shard(folder, "safetensors", save_file)
    (folder / gone).unlink()
    whole = (folder / short).read_bytes()
    (folder / short).write_bytes(whole[:-40])
    with pytest.raises(UserError, match=f"it lacks {gone}, which model.safetensors.index.json lists; dow") as error:
        Bert.from_pretrained(folder)
    found = f"{short} is not a whole safetensors file ({len(whole) - 40:,} of {len(whole):,} bytes, as an interrupted"
    assert found in error.value.args[0] and "copy or download it again" in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_shard_indices(folder):
    names = shard(folder, "safetensors", save_file)
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": places | {"ghost": names[0]}}))
    with pytest.raises(UserError, match=r"promises ghost \(should be in model-00001-of-.*\), but no shard"):
        files.read_checkpoint(folder)
    index.write_text(json.dumps({"weight_map": places | {"ghost": "../bert/" + names[0]}}))
    with pytest.raises(UserError, match=r"lacks \.\./bert/model-00001"):
        files.read_checkpoint(folder)
    index.write_text("[]")
    with pytest.raises(UserError, match="index.json is a list, not an object"):
        files.read_checkpoint(folder)


def as_pickle(folder, content):
    (folder / "model.safetensors").unlink(missing_ok=True)
    torch.save(content, folder / "pytorch_model.bin")


def test_pickle_of_tensors_is_read(folder):
    whole = load_file(folder / "model.safetensors")
    as_pickle(folder, whole)
    _, tensors = files.read_checkpoint(folder)
    assert all(torch.equal(tensors[key], whole[key]) for key in whole)
    Bert.from_pretrained(folder)


class Harmful:
    """Unpickling this runs a command."""

    def __reduce__(self):
        return (os.mkdir, ("harm",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": torch.ones(1), "b": Harmful()}, "holds more than tensors .* refused, since it could run code"),
        ({"a": torch.ones(1), "epoch": 3}, "must hold tensors only, but 'epoch' is a int"),
        ({"weights": {"a": torch.ones(1)}}, "must hold tensors only, but 'weights' is a dict"),
        ({3: torch.ones(1)}, "must hold tensors only, but 3 is a Tensor"),
        ([torch.ones(1)], "must hold a dictionary of tensors, not a list"),
    ],
)
def test_pickle_of_anything_else_is_refused(folder, content, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    as_pickle(folder, content)
    with pytest.raises(UserError, match=message):
        files.read_checkpoint(folder)
    assert not Path("harm").exists()


def test_old_torch_may_not_read_pickles(folder, monkeypatch):
    as_pickle(folder, {"a": torch.ones(1)})
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.5.1"))
    with pytest.raises(UserError, match="needs torch 2.6 or later, this is 2.5.1"):
        files.read_checkpoint(folder)


@pytest.mark.parametrize("keep", [0, 3, 100, 0.5, -1])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_files_cut_short_are_named(folder, name, keep):
    if name == "pytorch_model.bin":
        as_pickle(folder, load_file(folder / "model.safetensors"))
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(UserError, match=f"{name} (is not a whole|holds more than tensors)") as error:
        files.read_checkpoint(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_garbage_is_named(folder, name):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(bytes(range(256)) * 9)
    with pytest.raises(UserError, match=f"{name} (is not a whole|holds more than tensors)") as error:
        files.read_checkpoint(folder)
    assert "\n" not in str(error.value)


def test_folders_that_are_not_checkpoints(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="bert holds no weights: expected model.safetensors, "):
        Bert.from_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is not valid JSON at line 1, column 2 .*: "):
        Bert.from_pretrained(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(UserError, match="config.json must hold a JSON object, not a list"):
        Bert.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="bert holds no config.json"):
        Bert.from_pretrained(folder)
    for absent in (tmp_path / "absent", "./absent", "a/b/c", "absent/", "~/surely absent"):
        with pytest.raises(UserError, match=f"^no folder {re.escape(str(absent))}$"):
            Bert.from_pretrained(absent)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is a file; give the folder that holds config.json"):
        Bert.from_pretrained(tmp_path / "file")


def test_wrong_kind_of_checkpoint(folder):
    with pytest.raises(UserError, match="a model of type 'bert', expected vit, deit, dinov2, dinov2_with_registers"):
        ViT.from_pretrained(folder)


def test_the_hub_is_asked_only_for_ids_and_only_for_what_is_needed(folder, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot_download(repo_id, allow_patterns):
        asked.append((repo_id, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    Bert.from_pretrained(folder)
    assert not asked
    Bert.from_pretrained("someone/bert-tiny.v2")
    always = ["config.json", "generation_config.json"]
    assert asked == [("someone/bert-tiny.v2", [*always, "*.safetensors", "*.safetensors.index.json"])]
    as_pickle(folder, load_file(folder / "model.safetensors"))
    Bert.from_pretrained("bert")
    assert asked[1:] == [
        ("bert", [*always, "*.safetensors", "*.safetensors.index.json"]),
        ("bert", ["config.json", "pytorch_model.bin*", "pytorch_model-*.bin"]),
    ]


def test_hub_out_of_reach(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="^no folder someone/model here, and the Hub cannot be reached") as error:
        Bert.from_pretrained("someone/model")
    assert "\n" not in str(error.value)

    def refuse(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=r"the Hub cannot be reached \(ConnectionError: no route\)"):
        Bert.from_pretrained("someone/model")


def test_an_interrupted_download_is_named(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    for error, message in [
        (RuntimeError("peer closed\nsecond line"), r"was interrupted \(RuntimeError: peer closed\); start it again"),
        (LocalEntryNotFoundError("The snapshot is incomplete: a.bin"), "not whole in the cache: .*incomplete: a.bin"),
    ]:

        def stop(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", stop)
        with pytest.raises(UserError, match=message) as caught:
            Bert.from_pretrained("someone/model")
        assert "someone/model" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="^no folder someone/model$"):  # a path is never asked of the Hub
        Bert.from_pretrained(Path("someone/model"))


# --- writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error")])
def test_a_write_that_fails_leaves_the_last_good_file(folder, monkeypatch, error):
    before = (folder / "model.safetensors").read_bytes()

    def half(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr(files, "save_file", half)
    with pytest.raises(
        UserError, match="cannot write .*model.safetensors: (No space|I/O error).*; what was there before"
    ):
        Bert(CONFIG).save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]


def test_convert_keeps_tensors_and_separates_them(tmp_path):
    base = torch.randn(6, 4)
    tensors = {"a": base, "tied": base, "slice": base[:2], "turned": base.T, "id": torch.arange(3)}
    source = tmp_path / "pytorch_model.bin"
    torch.save(tensors, source)
    (tmp_path / "out").mkdir()
    for out, file in (
        (tmp_path / "out", "out/model.safetensors"),
        (tmp_path / "x" / "y.safetensors", "x/y.safetensors"),
    ):
        count, digest = files.convert(source, out)
        assert (count, digest) == (5, hashlib.sha256(source.read_bytes()).hexdigest())
        written = load_file(tmp_path / file)
        assert written.keys() == tensors.keys()
        assert all(torch.equal(written[key], tensors[key]) for key in tensors)
        with files.safe_open(tmp_path / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt", "source_sha256": digest}
    torch.save({"a": 1}, source)
    with pytest.raises(UserError, match="must hold tensors only, but 'a' is a int"):
        files.convert(source, tmp_path / "out")
    with pytest.raises(UserError, match="cannot read .*absent.bin: No such file"):
        files.convert(tmp_path / "absent.bin", tmp_path / "out")


def test_generation_config_comes_before_config_as_in_the_reference(tmp_path, capsys):
    from transformers import T5ForConditionalGeneration

    T5(
        T5Config(vocab_size=20, dim=8, head_dim=4, hidden=8, heads=2, encoder_layers=1, decoder_layers=1)
    ).save_pretrained(tmp_path)
    wanted = {"eos_token_id": 7, "decoder_start_token_id": 3, "pad_token_id": 0}
    (tmp_path / "generation_config.json").write_text(json.dumps(wanted))
    note.cache_clear()
    ours, theirs = T5.from_pretrained(tmp_path), T5ForConditionalGeneration.from_pretrained(tmp_path).generation_config
    assert (ours.config.eos_id, ours.config.start_id) == (theirs.eos_token_id, theirs.decoder_start_token_id) == (7, 3)
    said = capsys.readouterr().err
    assert f"note: eos_token_id is 1 in {tmp_path / 'config.json'}, 7 in generation_config.json, which counts" in said
    assert "pad_token_id" not in said
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4, 1]}')
    theirs = T5ForConditionalGeneration.from_pretrained(tmp_path).generation_config
    assert T5.from_pretrained(tmp_path).config.eos_id == tuple(theirs.eos_token_id) == (4, 1)
    assert "eos_token_id is 1 in" in capsys.readouterr().err
    (tmp_path / "generation_config.json").write_text('{"pad_token_id": [4, 1]}')
    with pytest.raises(UserError, match=r"pad_token_id must be a whole number .*, not \[4, 1\]"):
        T5.from_pretrained(tmp_path)
