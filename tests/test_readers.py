"""One reader for every JSON file and one for every checkpoint: what they refuse, and that there are no others."""

import ast
import json
import logging
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vqa_scratch.command_line import errors_in_one_line
from vqa_scratch.data.answers import Answer
from vqa_scratch.data.images import ImageProcessor
from vqa_scratch.data.text import Tokenizer, train_bpe, train_wordpiece
from vqa_scratch.data.vqa_files import ReadReport
from vqa_scratch.errors import UserError, naming, some
from vqa_scratch.models import GPT2, OPT, T5, Bert, BertConfig, GPT2Config, OPTConfig, ResNet, T5Config, ViT, ViTConfig
from vqa_scratch.models.released import image_encoder
from vqa_scratch.models.resnet import ResNetConfig
from vqa_scratch.options import from_json
from vqa_scratch.storage import parse_json, read_json, read_object, typed
from vqa_scratch.study.opened import token_label
from vqa_scratch.systems.options import VQAOptions, read_command_line
from vqa_scratch.training.checkpoint import fitting, load_checkpoint
from vqa_scratch.training.progress import read_metrics
from vqa_scratch.weights import files

ROOT = Path(__file__).parent.parent
READERS = {  # what reads a file, and the one module that may call it
    "json.load": set(),
    "json.loads": {"storage.py", "weights/files.py", "data/text.py", "data/own.py", "study/report.py"},  # also of texts
    "torch.load": {"weights/files.py"},
    "load_file": set(),
    "safe_open": {"weights/files.py"},
}


def calls(path: Path) -> set[str]:
    found = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
    return found & READERS.keys()


def test_there_is_no_other_way_to_read_a_file():
    package = ROOT / "vqa_scratch"
    for path in [*package.rglob("*.py"), ROOT / "train.py", ROOT / "rlhf.py"]:
        for reader in calls(path):
            assert str(path.relative_to(package if package in path.parents else ROOT)) in READERS[reader], (
                path,
                reader,
            )


# ------------------------------------------------------------------------------------------------ messages


def test_a_message_is_one_line_of_300_characters():
    error = UserError("the path a\nb\r\u2028\x1b[31m\ud800 is " + "long " * 1_000 + "and ends here")
    line = str(error)
    assert len(line) == 300 and line.isprintable() and f"{error}" == line
    assert line.startswith(r"the path a\nb\r\u2028\x1b[31m\ud800 is long") and line.endswith("and ends here")
    assert str(UserError("an Umlaut: ä, and 日本")) == "an Umlaut: ä, and 日本"


def test_some_names():
    assert some("abc") == "a, b, c" and some("abcdefg") == "a, b, c, d, e and 2 more"
    assert some(["two\nlines.png", "ü"]) == r"two\nlines.png, ü"


def test_a_report_has_a_line_for_each_reason():
    report = ReadReport("val", "questions", {"questions": Path("a.json")}, 2)
    lines = str(report).count("\n")
    report.skip("the image is missing", Path("two\nlines.png"))
    assert r"(first: two\nlines.png)" in str(report) and str(report).count("\n") <= lines + 1
    assert some(map(str, range(2_000)), 1) == "0 and 1,999 more"


def test_the_place_is_named_once():
    for message, line in (("no width", "runs/a: no width"), ("runs/a has no width", "runs/a has no width")):
        with pytest.raises(UserError) as error, naming(Path("runs/a")):
            raise UserError(message)
        assert str(error.value) == line


# ------------------------------------------------------------------------------------------------ JSON


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": "\\ud800"}', r"file.json holds '\\ud800', half of a letter"),
        (b'{"\\udfff": 1}', "half of a letter"),
        (b"9" * 5_000, "is not valid JSON: Exceeds the limit"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": 1', r"is not valid JSON at line 1, column 8 \(character 7 of 7\)"),
        (b"\xff\xfe{}", r"is not UTF-8 text \(byte 0\)"),
        (b"", "is not valid JSON at line 1, column 1"),
        (b"[1]", "must hold a JSON object, not a list"),
    ],
)
def test_what_is_no_json_object(tmp_path, content, message):
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_object(tmp_path / "file.json")


def test_whole_letters_are_read(tmp_path):
    (tmp_path / "file.json").write_text(json.dumps({"a": "🙂 \\ud800"}))
    assert read_json(tmp_path / "file.json") == {"a": "🙂 \\ud800"}
    with pytest.raises(UserError, match="news, line 3 is not valid JSON"):
        parse_json("{", "news, line 3")


def test_what_the_system_says_is_passed_on(tmp_path):
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_json(tmp_path / "none")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_json(tmp_path)


def test_typed_values():
    entry = {"id": 3, "name": "x", "flag": True, "none": None}
    types = {"id": int, "name": int | str, "flag": bool, "none": str | None, "absent": list | None}
    assert typed("here", entry, types) == [3, "x", True, None, None]
    for types, message in (
        ({"flag": int}, "here: 'flag' is True, not int"),
        ({"flag": int | str}, "here: 'flag' is True, not int | str"),
        ({"id": float}, "here: 'id' is 3, not float"),
        ({"a": int, "b": int, "c": int | None}, "here has no 'a' and no 'b'"),
    ):
        with pytest.raises(UserError) as error:
            typed("here", entry, types)
        assert str(error.value) == message
    with pytest.raises(UserError, match="here is a list, not an object"):
        typed("here", [], {})


# ------------------------------------------------------------------------------------------------ checkpoints

TINY = {"dim": 8, "layers": 1, "heads": 2}
ENDS = {"bos_id": 1, "eos_id": 2}
MODELS = {
    "bert": lambda: Bert(BertConfig(vocab_size=9, hidden=8, max_positions=8, **TINY)),
    "vit": lambda: ViT(ViTConfig(image_size=8, patch_size=4, hidden=8, **TINY)),
    "gpt2": lambda: GPT2(GPT2Config(vocab_size=9, max_positions=8, **TINY, **ENDS)),
    "opt": lambda: OPT(OPTConfig(vocab_size=9, max_positions=8, hidden=8, **TINY, **ENDS)),
    "t5": lambda: T5(T5Config(9, 8, 4, 8, encoder_layers=1, decoder_layers=1, heads=2)),
}


@pytest.fixture(params=MODELS)
def model(request, tmp_path):
    made = MODELS[request.param]()
    made.save_pretrained(tmp_path / request.param)
    return made, tmp_path / request.param


def renamed(folder: Path, name) -> None:
    """The weights under other names."""
    tensors = load_file(folder / "model.safetensors")
    save_file({name(key): tensor for key, tensor in tensors.items()}, folder / "model.safetensors")


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    theirs = dict(other.named_parameters())
    return all(torch.equal(parameter, theirs[name]) for name, parameter in one.named_parameters())


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.model."])
def test_what_programs_wrap_around_a_model(model, wrapper):
    made, folder = model
    renamed(folder, lambda key: wrapper + key)
    assert same(made, type(made).from_pretrained(folder))


@pytest.mark.parametrize("inner", files.INNER)
def test_what_training_programs_save_beside_the_weights(model, inner, caplog):
    made, folder = model
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({"epoch": 3, "optimizer": {}, inner: tensors}, folder / "pytorch_model.bin")
    with caplog.at_level(logging.WARNING):
        assert same(made, type(made).from_pretrained(folder))
    assert f"pytorch_model.bin: {inner} is read, and not epoch, optimizer" in caplog.text


def test_heads_that_training_left(model, caplog):
    made, folder = model
    tensors = load_file(folder / "model.safetensors")
    left = ["classifier.weight", "v_head.summary.bias", "embeddings.mask_token", "score.weight"]
    save_file({**tensors, **{name: torch.ones(2) for name in left}}, folder / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        assert same(made, type(made).from_pretrained(folder))
    (line,) = caplog.messages
    assert str(folder) in line and all(name in line for name in left)


def test_layer_norms_of_older_files():
    for name in ("bert", "vit"):
        made = MODELS[name]()
        tensors = files_of(made)
        assert any("norm" in key.lower() and key.endswith(".weight") for key in tensors)
        old = {}
        for key, tensor in tensors.items():
            stem, _, end = key.rpartition(".")
            end = {"weight": "gamma", "bias": "beta"}[end] if "norm" in stem.lower() else end
            old[f"{stem}.{end}" if stem else key] = tensor
        assert same(made, type(made).from_checkpoint(made.to_hf(), old, "an old file"))


def files_of(model) -> dict[str, torch.Tensor]:
    from vqa_scratch.weights.convert import to_hf

    return to_hf(model, model.key_map)


@pytest.mark.parametrize(
    ("name", "today", "other"),
    [
        ("gpt2", "transformer.wte.weight", "lm_head.weight"),
        ("opt", "model.decoder.embed_tokens.weight", "lm_head.weight"),
        ("t5", "shared.weight", "encoder.embed_tokens.weight"),
    ],
)
def test_a_tied_tensor_under_its_other_name(name, today, other):
    made = MODELS[name]()
    tensors = files_of(made)
    tensors[other] = tensors.pop(today)
    assert same(made, type(made).from_checkpoint(made.to_hf(), tensors, "the file"))


def test_a_resnet_in_a_wrapper(tmp_path):
    made = ResNet(ResNetConfig("basic", (1, 1), (8, 16)))
    made.save_pretrained(tmp_path / "a.safetensors")
    weights = load_file(tmp_path / "a.safetensors")
    torch.save({"state_dict": {f"module.{key}": tensor for key, tensor in weights.items()}}, tmp_path / "b.pth")
    assert same(made, image_encoder(tmp_path / "b.pth"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers(model, value):
    made, folder = model
    tensors = load_file(folder / "model.safetensors")
    key = sorted(tensors)[-1]
    tensors[key].flatten()[-1] = value
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=f"{key} in .*{folder.name} holds NaN or infinite numbers"):
        type(made).from_pretrained(folder)
    torch.save(tensors, folder / "weights.bin")
    with pytest.raises(UserError, match="holds NaN or infinite numbers"):
        files.convert(folder / "weights.bin", folder / "out")


def test_what_does_not_fit_is_named_in_one_line(model):
    made, folder = model
    renamed(folder, lambda key: "other." + key)
    with pytest.raises(UserError) as error:
        type(made).from_pretrained(folder)
    line = str(error.value)
    assert str(folder) in line and " more" in line and "missing: " in line


@pytest.mark.parametrize("value", [None, [], {}, "7", True, float("nan"), -1, 10**30, 2.5])
def test_every_field_of_a_config_is_checked(model, value):
    """A value of another type or size is refused with its name, or is as good as absent."""
    made, folder = model
    config = json.loads((folder / "config.json").read_text())
    for field in config:
        (folder / "config.json").write_text(json.dumps(config | {field: value}))
        try:
            type(made).from_pretrained(folder)
        except UserError as error:
            assert str(folder) in str(error)


# ------------------------------------------------------------------------------------------------ options, sizes, texts


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": "many"}, "'steps' is 'many', not of type int"),
        ({"steps": True}, "'steps' is True, not of type int"),
        ({"steps": 10**30}, "'steps' is 1000000000000000000000000000000, not of type int"),
        ({"data": ["a"]}, r"'data' is \['a'\], not of type PosixPath|not of type Path"),
        ({"data": "a\0b"}, r"'data' is 'a\\x00b': a path has no NUL"),
        ({"compile": 1}, "'compile' is 1, not of type bool"),
        ({"learning_rate": "fast"}, "'learning_rate' is 'fast', not of type float"),
        ({"preset": "shapes", "width": 0}, "config.json: --width must be at least 1, not 0"),
    ],
)
def test_options_of_a_file(values, message):
    with pytest.raises(UserError, match=message):
        from_json(VQAOptions, values, "runs/a/config.json")
    assert from_json(VQAOptions, {"learning_rate": 1, "steps": 3}, "x").learning_rate == 1.0


def test_numbers_and_texts_that_no_option_takes():
    with pytest.raises(UserError, match="--eval-questions must be below 9007199254740992, not"):
        read_command_line(["--eval-questions", str(2**63)])
    with pytest.raises(UserError, match=r"--val-split must be text in UTF-8, not 'caf\\udce9'"):
        read_command_line(["--val-split", "caf\udce9"])
    with pytest.raises(UserError, match="holds a NUL"):
        read_command_line(["--data", "a\0b"])


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "error: not enough memory: make the batch, "),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0"), "memory (2.00 GiB at once)"),
        (RuntimeError("CPU: can't allocate memory: you tried to allocate 99 bytes."), "memory (99 bytes at once)"),
        (PermissionError(13, "Permission denied", "a\nb"), r"error: a\nb: Permission denied"),
    ],
)  # fmt: skip
def test_what_a_machine_lacks_is_one_line(error, line, capsys):
    with pytest.raises(SystemExit) as stop, errors_in_one_line():
        raise error
    said = capsys.readouterr().err
    assert stop.value.code == 2 and line in said and said.count("\n") == 1
    with pytest.raises(RuntimeError, match="a mistake"), errors_in_one_line():
        raise RuntimeError("a mistake of this project")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 10**6}, "size must hold whole numbers from 1 to 8,192, not 1000000"),
        ({"size": True}, "size must be a number, "),
        ({"do_center_crop": True}, "crop_size must be a number"),
        ({"image_mean": [0.5, "x", 0.5]}, "image_mean must be a usual number, not 'x'"),
        ({"image_std": [1, 2]}, r"image_std must be a number or three, not \[1, 2\]"),
        ({"rescale_factor": float("nan")}, "rescale_factor must be a usual number, not nan"),
        ({"resample": {}}, "resample must be one of Pillow's filters 0 to 5, not {}"),
    ],
)
def test_preprocessing_that_cannot_be_followed(tmp_path, changes, message):
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor"} | changes)
    )
    with pytest.raises(UserError, match=message) as error:
        ImageProcessor.from_pretrained(tmp_path)
    assert "preprocessor_config.json" in str(error.value)


def test_vocabularies():
    chinese = [chr(0x4E00 + i) for i in range(700)]
    words = train_wordpiece(chinese, 512)
    assert len(words) == 5 + 2 * 700 and not words.unknown("".join(chinese[::50]))
    with pytest.raises(UserError, match="the tokenizer has ids up to 1404, the decoder has rows for 512"):
        words.check_fits(512, "the decoder")


@pytest.mark.parametrize("where", ["vocabulary", "around"])
def test_an_id_far_beyond_the_table_is_refused_at_once(tmp_path, where):
    """The library lists every id up to the largest when it writes a tokenizer: two thousand million here."""
    train_bpe(["red"], 260).save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    own = content["model"]["vocab"]["r"]
    if where == "vocabulary":
        content["model"]["vocab"]["r"] = 2**31
    else:
        template = {"SpecialToken": {"id": "x", "type_id": 0}}
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [template, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [],
            "special_tokens": {"x": {"id": "x", "ids": [2**31], "tokens": ["<s>"]}},
        }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    began = time.process_time()
    words = Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="the tokenizer has ids up to 2147483648, the decoder has rows for 300"):
        words.check_fits(300, "the decoder")
    assert time.process_time() - began < 2  # it took a minute and 9 GB
    assert token_label(words, own) == (f"[unused {own}]" if where == "vocabulary" else "r")


def test_an_answer_has_a_probability():
    for value in (float("nan"), float("inf")):
        with pytest.raises(UserError, match=f"the probability {value}: its weights are damaged"):
            Answer("red", value)


def test_metrics_that_no_curve_can_show(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for row in ({"step": 1, "loss": "x"}, {"step": 1, "val": {"accuracy": []}}, {"step": None}, [1], {"loss": 1.0}):
        path.write_text(json.dumps({"step": 0, "loss": 1.0}) + "\n" + json.dumps(row) + "\n" + '{"step": 2}\n')
        with pytest.raises(UserError, match="metrics.jsonl, line 2 is no row of a log"):
            read_metrics(path)


def test_a_checkpoint_of_another_kind(tmp_path):
    path = tmp_path / "last.pt"
    torch.save({"model": [], "rng": {}}, path)
    with pytest.raises(UserError, match="last.pt: 'model' is .*, not dict"):
        load_checkpoint(path, {"model": dict})
    torch.save({"model": {"a": [torch.tensor([1.0, float("nan")])]}}, path)
    with pytest.raises(UserError, match="model.a.0 in .*last.pt holds NaN or infinite numbers"):
        load_checkpoint(path)
    with pytest.raises(UserError, match=r"last.pt does not fit this run \(KeyError: 'b'\)"), fitting("last.pt"):
        raise KeyError("b")
