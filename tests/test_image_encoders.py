"""Image encoders by model type: parity with the references through saved files, and where their tokens look."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as hf
from helpers import STD, assert_close, centre, saved
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil

from vqa_scratch.connectors import CONNECTORS, connect, connector_class
from vqa_scratch.data.images import ImageProcessor
from vqa_scratch.errors import UserError
from vqa_scratch.models import GPT2, Bert, BertConfig, ConvStem, GPT2Config, ResNet, ResNetConfig, ViT, ViTConfig
from vqa_scratch.models.released import image_encoder, text_encoder
from vqa_scratch.models.vit import resize_positions
from vqa_scratch.models.vqa import VQAModel
from vqa_scratch.nn.states import Places
from vqa_scratch.systems.assembly import assemble, sizes_of
from vqa_scratch.weights.files import write_safetensors

no_grad = torch.no_grad()

# --- parity -----------------------------------------------------------------------------------------------------------

_SIZES = {
    "hidden_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 24,
    "patch_size": 6,
    "initializer_range": STD,
}
FAMILIES = {  # name: (model class, config class, more fields, prefix tokens)
    "deit": (hf.DeiTModel, hf.DeiTConfig, {"intermediate_size": 50}, 2),
    "dinov2": (hf.Dinov2Model, hf.Dinov2Config, {"mlp_ratio": 2}, 1),
    "dinov2, giant": (hf.Dinov2Model, hf.Dinov2Config, {"use_swiglu_ffn": True, "layerscale_value": 0.5}, 1),
    "registers": (hf.Dinov2WithRegistersModel, hf.Dinov2WithRegistersConfig, {"mlp_ratio": 2}, 5),
    "registers, giant, no bias": (
        hf.Dinov2WithRegistersModel,
        hf.Dinov2WithRegistersConfig,
        {"num_register_tokens": 3, "use_swiglu_ffn": True, "qkv_bias": False},
        4,
    ),
    "clip": (hf.CLIPVisionModel, hf.CLIPVisionConfig, {"intermediate_size": 50}, 1),
    "siglip": (hf.SiglipVisionModel, hf.SiglipVisionConfig, {"intermediate_size": 50}, 0),
}


def reference(name, folder, **changes):
    """A saved model of the reference; its tables start at zero, which would hide them, so they are drawn too."""
    kind, config, fields, _ = FAMILIES[name]
    model = kind(config(**_SIZES | fields | changes))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "token" in key or "position" in key or "class_embedding" in key:
                parameter.normal_(std=0.5)
    return saved(model, folder)


@no_grad
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_and_back(tmp_path, name):
    """Images of the table's size, larger, smaller and not square; and our export in `transformers`."""
    theirs, prefix = reference(name, tmp_path / "theirs"), FAMILIES[name][3]
    ours = image_encoder(tmp_path / "theirs")
    assert isinstance(ours, ViT) and ours.prefix_tokens == prefix and ours.dim == 36
    ours.save_pretrained(tmp_path / "ours")
    back, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["unexpected_keys"]
    heads = ("pooler", "post_layernorm", "head.")
    assert all(key.startswith(heads) or key.endswith("mask_token") for key in info["missing_keys"])
    assert ViT.from_pretrained(tmp_path / "ours").config == ours.config
    for height, width in ((24, 24), (36, 36), (12, 12), (18, 48), (6, 30), (12, 48)):
        pixels = torch.randn(2, 3, height, width)
        asked = {} if "dino" in name or "registers" in name else {"interpolate_pos_encoding": True}
        resized = asked if (height, width) != (24, 24) else {}
        expected = theirs(pixels, **resized).last_hidden_state
        assert_close(ours(pixels), expected)
        states = ours.states(pixels)
        assert states.mask is None and states.prefix_tokens == prefix
        assert states.places == Places((height // 6, width // 6), 3.0, 6)
        assert states.tokens.shape == expected.shape == (2, prefix + height * width // 36, 36)
    assert_close(back.eval()(torch.ones(1, 3, 24, 24)).last_hidden_state, ours(torch.ones(1, 3, 24, 24)))


@no_grad
@pytest.mark.parametrize("name", ["dinov2", "registers"])
def test_a_table_for_518_pixels_serves_224(tmp_path, name):
    """The released DINOv2s have 37 x 37 positions and are mostly used at 16 x 16."""
    theirs = reference(name, tmp_path, image_size=74, patch_size=2)
    pixels = torch.randn(1, 3, 32, 32)
    assert_close(image_encoder(tmp_path)(pixels), theirs(pixels).last_hidden_state)


@no_grad
def test_registers_smooth_their_positions_and_others_do_not():
    """A checkerboard of positions, halved: smoothing averages it, plain interpolation does not."""
    table = ((torch.arange(6)[:, None] + torch.arange(6)) % 2).float().view(1, 36, 1)
    smooth = resize_positions(table, (6, 6), (3, 3), antialias=True)
    assert smooth[0, 4, 0] == pytest.approx(0.5, abs=1e-3)
    table = torch.randn(1, 2 + 24, 5)
    assert resize_positions(table, (4, 6), (4, 6)) is table
    resized = resize_positions(table, (4, 6), (8, 3))
    assert resized.shape == (1, 2 + 24, 5) and torch.equal(resized[:, :2], table[:, :2])
    flat = resize_positions(torch.ones(1, 24, 5), (4, 6), (2, 9))  # no prefix rows; a constant stays constant
    torch.testing.assert_close(flat, torch.ones(1, 18, 5))


@no_grad
@pytest.mark.parametrize("kind", [(hf.ViTModel, hf.ViTConfig), (hf.DeiTModel, hf.DeiTConfig)])
def test_a_table_that_is_not_square(tmp_path, kind):
    model, config = kind
    theirs = saved(model(config(**_SIZES | {"intermediate_size": 50, "image_size": (12, 30)})), tmp_path)
    ours = image_encoder(tmp_path)
    assert ours.config.grid == (2, 5)
    pixels = torch.randn(2, 3, 12, 30)
    assert_close(ours(pixels), theirs(pixels).last_hidden_state)
    assert ours(torch.randn(1, 3, 24, 30)).shape[1] == ours.prefix_tokens + 20
    ours.save_pretrained(tmp_path / "ours")
    assert torch.equal(image_encoder(tmp_path / "ours")(pixels), ours(pixels))


@no_grad
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (hf.DeiTForImageClassificationWithTeacher, {"intermediate_size": 50}),
        (hf.DeiTForImageClassification, {"intermediate_size": 50}),
        (hf.Dinov2ForImageClassification, {}),
        (hf.Dinov2WithRegistersForImageClassification, {}),
    ],
)
def test_heads_of_classifiers_are_read_past(tmp_path, kind, fields):
    theirs = saved(kind(kind.config_class(**_SIZES | fields)), tmp_path)
    pixels = torch.randn(2, 3, 24, 24)
    assert_close(image_encoder(tmp_path)(pixels), theirs.base_model(pixels).last_hidden_state)


# --- the table --------------------------------------------------------------------------------------------------------


@no_grad
def test_encoders_open_by_their_model_type(tmp_path):
    vit = ViT(ViTConfig(image_size=16, patch_size=8, dim=8, layers=1, heads=2, hidden=8))
    vit.save_pretrained(tmp_path / "vit")
    assert image_encoder(str(tmp_path / "vit")).config == vit.config
    bert = Bert(BertConfig("roberta", 20, 8, 1, 2, 8, 16, 1, pad_id=1)).eval()
    bert.save_pretrained(tmp_path / "bert")
    words = text_encoder(tmp_path / "bert")
    assert isinstance(words, Bert) and words.config == bert.config and words.dim == 8
    ids, mask = torch.tensor([[5, 6, 1]]), torch.tensor([[1, 1, 0]])
    states = words.states(ids, mask)
    assert torch.equal(states.tokens, bert(ids, mask)) and states.mask.tolist() == [[True, True, False]]
    assert words.states(ids).mask is None and states.places.grid == (0, 0) and states.prefix_tokens == 3
    net = ResNet(ResNetConfig("basic", (1, 1), (16, 16)))
    net.save_pretrained(tmp_path / "net.safetensors")
    map_states = image_encoder(tmp_path / "net.safetensors").states(torch.randn(2, 3, 24, 43))
    assert map_states.places == Places((3, 6), 0.5, 8) and map_states.tokens.shape == (2, 18, 16)
    assert map_states.prefix_tokens == net.prefix_tokens == 0 and net.dim == 16
    with pytest.raises(
        UserError,
        match="type 'roberta'; image encoders are vit, deit, dinov2, .*, siglip_vision_model, clip, siglip$",
    ):
        image_encoder(tmp_path / "bert")
    with pytest.raises(UserError, match="type 'vit'; text encoders are bert, distilbert, roberta$"):
        text_encoder(tmp_path / "vit")


def test_the_map_is_the_rows_of_the_states():
    net = ResNet(ResNetConfig("basic", (1, 1), (16, 16))).eval()
    pixels = torch.randn(1, 3, 32, 48)
    grid, tokens = net(pixels), net.states(pixels).tokens
    assert torch.equal(tokens[0, 1 * 6 + 4], grid[0, :, 1, 4])


def test_files_and_configs_that_do_not_fit_are_named(tmp_path):
    theirs = reference("dinov2", tmp_path)
    config = theirs.config.to_dict()
    with pytest.raises(UserError, match="drop_path_rate = 0.1; here it can only be 0.0"):
        ViTConfig.from_hf(config | {"drop_path_rate": 0.1})
    with pytest.raises(UserError, match="layout must be one of vit, deit, .*, siglip_vision_model, got 'swin'"):
        ViTConfig(layout="swin")
    with pytest.raises(UserError, match=r"image size \(24, 25\) is not a multiple of the patch size 6"):
        ViTConfig.from_hf(config | {"image_size": [24, 25]})
    with pytest.raises(UserError, match=r"patch_size must be a whole number from 1 to .*, not \[6, 3\]"):
        ViTConfig.from_hf(config | {"patch_size": [6, 3]})
    write_safetensors(tmp_path / "model.safetensors", {"embeddings.register_tokens": torch.zeros(1, 4, 36)})
    with pytest.raises(
        UserError, match="does not fit ViT: missing: embeddings.cls_token, .*unexpected: .*register_tokens"
    ):
        image_encoder(tmp_path)


# --- preprocessing ----------------------------------------------------------------------------------------------------

_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 3}
PREPROCESSING = {  # the files beside facebook/dinov2-base and facebook/deit-base-distilled-patch16-224
    "dinov2": (
        BitImageProcessorPil,
        _IMAGENET
        | {
            "image_processor_type": "BitImageProcessor",
            "do_resize": True,
            "size": {"shortest_edge": 256},
            "do_center_crop": True,
            "crop_size": {"height": 224, "width": 224},
            "do_rescale": True,
            "rescale_factor": 0.00392156862745098,
            "do_normalize": True,
            "do_convert_rgb": True,
        },
    ),
    "deit": (
        DeiTImageProcessorPil,
        _IMAGENET
        | {
            "feature_extractor_type": "DeiTFeatureExtractor",
            "do_resize": True,
            "size": 256,
            "do_center_crop": True,
            "crop_size": 224,
            "do_normalize": True,
        },
    ),
}


@pytest.mark.parametrize("name", PREPROCESSING)
def test_released_preprocessing(tmp_path, name):
    kind, config = PREPROCESSING[name]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    ours = ImageProcessor.from_pretrained(tmp_path)
    assert ours.output_size == (224, 224) and ours.mean == (0.485, 0.456, 0.406)
    assert ours.size == (256 if name == "dinov2" else (256, 256))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 420, 3), dtype=np.uint8))
    theirs = kind(**{key: value for key, value in config.items() if not key.endswith("_type")})
    assert np.array_equal(ours(image).numpy(), np.asarray(theirs(image)["pixel_values"][0], dtype=np.float32))


# --- as the image encoder of a VQA model ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", [kind for kind in CONNECTORS if not connector_class(kind).reads_pixels])
def test_every_family_feeds_a_vqa_model(tmp_path, name, kind):
    """Through every connector, at the size of its table and at another; and it is built again from its sizes."""
    reference(name, tmp_path)
    image = image_encoder(tmp_path)
    text = Bert(BertConfig("distilbert", 20, 8, 1, 2, 8, 16, 0)) if connector_class(kind).reads_text else None
    decoder = GPT2(GPT2Config(20, 64, 16, 1, 2, add_cross_attention=connector_class(kind).needs_cross_attention()))
    grid = image.places(24, 24).grid
    sizes = connector_class(kind).sizes_for(grid, SimpleNamespace(queries=3, heads=2, query_tiles=True))
    model = VQAModel(image, text, connect({"kind": kind, **sizes}, image, text, decoder), decoder).eval()
    ids = torch.tensor([[3, 4, 5]])
    for name, gate in decoder.named_parameters():
        if name.endswith("_gate"):  # closed at first, so that no gradient would reach the image
            torch.nn.init.ones_(gate)
    for size in ((24, 24), (12, 30)):
        pixels = torch.randn(1, 3, *size)
        out = model(pixels, ids, None, torch.tensor([[1, 7]]), torch.tensor([[7, 2]]))
        out.loss.backward()
        assert torch.isfinite(out.logits).all() and image.positions.grad.abs().max() > 0
    again = assemble(sizes_of(model))
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


# --- where a token looks ----------------------------------------------------------------------------------------------


def centre_of_gradient(net, pixels, token):
    """(y, x) of the mean |gradient| of one token's first channels with respect to the pixels (B, C, H, W)."""
    pixels = pixels.requires_grad_()
    out = token(net(pixels))  # (B, D)
    rows = [torch.autograd.grad(out[:, i].sum(), pixels, retain_graph=True)[0] for i in range(min(8, out.shape[1]))]
    weight = torch.stack(rows).abs().sum((0, 1, 2)).double()  # (H, W)
    height, width = weight.shape
    y, x = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    return torch.stack([weight.sum(1) @ y.double(), weight.sum(0) @ x.double()]) / weight.sum()


def vit_like(patch=8, stem=False, **fields):
    def build():
        config = ViTConfig(image_size=patch * 4, patch_size=patch, dim=32, layers=1, heads=2, hidden=8, **fields)
        return ViT(config, ConvStem(3, 32, patch) if stem else None)

    return build


def resnet(block, *depths):
    return lambda: ResNet(ResNetConfig(block, depths, (16,) * len(depths)))


ENCODERS = {
    **{f"linear patches of {p}": vit_like(p) for p in (4, 8, 16)},
    **{f"convolutional stem, patches of {p}": vit_like(p, stem=True) for p in (4, 8, 16)},
    "deit": vit_like(layout="deit"),
    "dinov2": vit_like(14, layout="dinov2", layer_scale=1.0),
    "dinov2 with registers": vit_like(14, layout="dinov2_with_registers", layer_scale=1.0, registers=4),
    "resnet, basic": resnet("basic", 1, 1),
    "resnet, bottleneck": resnet("bottleneck", 1, 1),
    "resnet, three stages": resnet("bottleneck", 1, 1, 1),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_a_token_is_where_its_gradient_is(name):
    """Before attention mixes them: what a token is made of is centred, within half a pixel, on its place.

    Averaged over a few random nets and images, since the gradient of one is as uneven as its weights.
    """
    build = ENCODERS[name]
    stride = build().places(112, 112).stride
    size = (12 * stride, 14 * stride) if "resnet" in name else (4 * stride, 6 * stride)
    places = build().places(*size)
    row, column = places.grid[0] // 2, places.grid[1] // 2
    index = row * places.grid[1] + column
    found = []
    for seed in range(10):
        torch.manual_seed(seed)
        encoder, pixels = build(), torch.randn(4, 3, *size)
        net = encoder if isinstance(encoder, ResNet) else encoder.patch_embed
        found.append(centre_of_gradient(net, pixels, lambda x: x[..., row, column] if x.ndim == 4 else x[:, index]))
    y, x = torch.stack(found).mean(0).tolist()
    assert (y, x) == pytest.approx(centre(places, row, column), abs=0.5)


def test_the_default_stem_looks_at_the_corner_of_its_patch():
    """What was drawn half a patch off: token (4, 4) of 64 pixels is about pixel 32, whose middle is 32.5, not 36."""
    assert centre(vit_like(8, stem=True)().places(64, 64), 4, 4) == (32.5, 32.5)
    assert centre(vit_like(8)().places(64, 64), 4, 4) == (36, 36)
    assert centre(ResNet(ResNetConfig("basic", (1, 1), (16, 16))).places(64, 64), 4, 4) == (32.5, 32.5)
