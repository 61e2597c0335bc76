"""Image files of every kind, and preprocessing bit for bit like the reference processors."""

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from vqa_scratch.data.images import ImageProcessor, Images, load_image, to_rgb
from vqa_scratch.errors import UserError

REFERENCES = [
    ViTImageProcessorPil,
    DeiTImageProcessorPil,
    CLIPImageProcessorPil,
    BitImageProcessorPil,
    BlipImageProcessorPil,
    SiglipImageProcessorPil,
]
CONFIGS = [
    {},
    {"size": 37},
    {"size": {"height": 30, "width": 41}, "resample": 1},
    {"size": {"shortest_edge": 50}, "do_center_crop": True, "crop_size": 65},
    {"size": {"shortest_edge": 33}, "do_center_crop": True, "crop_size": {"height": 32, "width": 21}},
    {"do_resize": False, "do_center_crop": True, "crop_size": {"height": 31, "width": 62}},
    {"size": 20, "do_rescale": False},
    {"size": 20, "do_normalize": False},
    {"size": 20, "do_rescale": False, "do_normalize": False},
    {"size": 20, "image_mean": 0.3, "image_std": 0.7, "rescale_factor": 1 / 127.5, "resample": 0},
]
SIZES = [(1, 1), (64, 64), (97, 240), (241, 98), (30, 61), (31, 62), (2, 37)]  # (height, width)


def random_image(height, width, mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    if mode == "LAB":
        return Image.frombytes(mode, (width, height), pixels[..., :3].tobytes())
    if mode in ("RGBA", "CMYK"):
        return (
            Image.fromarray(pixels).convert("RGBA")
            if mode == "RGBA"
            else Image.frombytes(mode, (width, height), pixels)
        )
    return Image.fromarray(pixels[..., :3].copy()).convert(mode)


def reference(processor, image):
    return np.asarray(processor(image)["pixel_values"][0], dtype=np.float32)


# ------------------------------------------------------------------------------------------- preprocessing


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("cls", REFERENCES, ids=lambda cls: cls.__name__)
def test_equals_the_reference_bit_for_bit(cls, config):
    theirs = cls(**config)
    ours = ImageProcessor.from_hf(theirs.to_dict())
    # what a configuration leaves out means the same as what the reference writes out
    assert ours == ImageProcessor.from_hf({"image_processor_type": cls.__name__.removesuffix("Pil"), **config})
    for height, width in SIZES:
        image = random_image(height, width)
        result = ours(image)
        assert result.dtype == torch.float32
        expected = reference(theirs, image)
        assert result.shape == expected.shape
        assert np.array_equal(result.numpy(), expected), (height, width)  # difference exactly 0
        # a cache of bytes, normalised later, gives the same numbers
        cached = ours.to_uint8(image)
        assert cached.dtype == np.uint8 and cached.shape == (*expected.shape[1:], 3)
        assert torch.equal(ours.normalize(torch.from_numpy(cached.copy())), result)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "1", "P", "CMYK", "YCbCr", "HSV"])
@pytest.mark.parametrize("cls", [CLIPImageProcessorPil, BlipImageProcessorPil, SiglipImageProcessorPil])
def test_modes_are_converted_as_the_reference_does(cls, mode):
    image = random_image(45, 70, mode)
    ours = ImageProcessor.from_hf(cls().to_dict())
    assert np.array_equal(ours(image).numpy(), reference(cls(), image))


def test_transparent_palette_as_the_reference_does():
    image = random_image(45, 70, "P")
    image.info["transparency"] = 3
    ours = ImageProcessor.from_hf(CLIPImageProcessorPil().to_dict())
    assert np.array_equal(ours(image).numpy(), reference(CLIPImageProcessorPil(), image))


def test_dino_configuration_in_its_old_form():
    old = {
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "ViTFeatureExtractor",
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
        "size": 224,
    }
    theirs = ViTImageProcessorPil(**{key: value for key, value in old.items() if key != "feature_extractor_type"})
    ours = ImageProcessor.from_hf(old)
    assert ours.output_size == (224, 224)
    image = random_image(200, 333)
    assert np.array_equal(ours(image).numpy(), reference(theirs, image))


@pytest.mark.parametrize("cls", REFERENCES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_saved_configuration_is_read_by_both(tmp_path, cls, config):
    ours = ImageProcessor.from_hf(cls(**config).to_dict())
    ours.save_pretrained(tmp_path)
    assert ImageProcessor.from_pretrained(tmp_path) == ours
    image = random_image(45, 70, "RGBA")
    assert np.array_equal(reference(cls.from_pretrained(tmp_path), image), ours(image).numpy())


def test_batches():
    processor = ImageProcessor(size=(8, 6))
    images = [random_image(9, 9, seed=s) for s in range(3)]
    batch = processor(images)
    assert batch.shape == (3, 3, 8, 6)
    assert all(torch.equal(batch[i], processor(images[i])) for i in range(3))
    assert torch.equal(processor(np.asarray(images[0])), batch[0])
    assert torch.equal(processor.normalize(torch.from_numpy(processor.to_uint8(images))), batch)
    with pytest.raises(ValueError, match="all of one size"):
        ImageProcessor(size=8)([random_image(9, 12), random_image(9, 9)])
    with pytest.raises(ValueError, match="at least one image"):
        processor([])
    with pytest.raises(ValueError, match=r"uint8 \(H, W, 3\), not float64 \(4, 4, 3\)"):
        processor(np.zeros((4, 4, 3)))
    with pytest.raises(ValueError, match=r"not torch.float32"):
        processor.normalize(torch.zeros(4, 4, 3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_normalizing_on_the_device_changes_no_bit():
    processor = ImageProcessor.from_hf(CLIPImageProcessorPil().to_dict())
    pixels = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    assert torch.equal(processor.normalize(pixels.cuda()).cpu(), processor.normalize(pixels))


@pytest.mark.parametrize(
    "config, text",
    [
        (
            {"image_processor_type": "ViltImageProcessor"},
            "unknown image processor type 'ViltImageProcessor'; known are ViT",
        ),
        ({"size": 224}, "unknown image processor type None"),
        ({"image_processor_type": "ViTImageProcessor", "do_pad": True}, "asks for do_pad, which is not supported"),
        ({"image_processor_type": "ViTImageProcessor", "size": {"longest_edge": 9}}, "size must be"),
        (
            {"image_processor_type": "ViTImageProcessor", "size": {"height": 9, "width": 0}},
            "whole numbers from 1 to 8,192",
        ),
        ({"image_processor_type": "ViTImageProcessor", "size": "big"}, "size must be"),
        ({"image_processor_type": "ViTImageProcessor", "image_mean": [1, 2]}, "image_mean must be a number or three"),
        ({"image_processor_type": "ViTImageProcessor", "image_std": [1, 0, 1]}, "must not hold a zero"),
        ({"image_processor_type": "ViTImageProcessor", "resample": 9}, "filters 0 to 5"),
        ({"image_processor_type": "CLIPImageProcessor", "crop_size": {"shortest_edge": 9}}, "crop_size must be"),
    ],
)
def test_configurations_that_cannot_be_followed(config, text):
    with pytest.raises(UserError, match=text.replace("{", r"\{")):
        ImageProcessor.from_hf(config)


def test_unset_sides_of_a_size_are_as_absent():
    size = {"height": 9, "width": 8, "shortest_edge": None, "longest_edge": None}
    assert ImageProcessor.from_hf({"image_processor_type": "ViTImageProcessor", "size": size}).output_size == (9, 8)


def test_missing_configuration(tmp_path):
    with pytest.raises(UserError, match="has no preprocessor_config.json"):
        ImageProcessor.from_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("[]")
    with pytest.raises(UserError, match="preprocessor_config.json must hold a JSON object, not a list"):
        ImageProcessor.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="no folder .*absent$"):
        ImageProcessor.from_pretrained(tmp_path / "absent")


# ------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "mode, name",
    [
        ("RGB", "a.jpg"),
        ("RGB", "a.png"),
        ("RGB", "a.bmp"),
        ("RGB", "a.webp"),
        ("L", "a.jpg"),
        ("L", "a.png"),
        ("LA", "a.png"),
        ("RGBA", "a.png"),
        ("1", "a.png"),
        ("P", "a.png"),
        ("P", "a.gif"),
        ("CMYK", "a.jpg"),
        ("CMYK", "a.tiff"),
        ("LAB", "a.tiff"),
        ("YCbCr", "a.jpg"),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, mode, name):
    random_image(13, 7, mode).save(tmp_path / name)
    image = load_image(tmp_path / name)
    assert image.mode == "RGB" and image.size == (7, 13)
    image.tobytes()  # decoded, although the file is closed


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.array([[0, 128, 129, 257, 32767], [32768, 65406, 65407, 65408, 65535]], dtype=np.uint16)
    wanted = np.round(values / 65535 * 255).astype(np.uint8)
    for name in ("a.png", "a.tiff", "a.pgm"):
        Image.fromarray(values).save(tmp_path / name)
        pixels = np.asarray(load_image(tmp_path / name))
        assert pixels.shape == (2, 5, 3)
        assert np.array_equal(pixels[..., 0], wanted) and np.array_equal(pixels[..., 2], wanted), name
    big_endian = Image.frombytes("I;16B", (5, 2), values.astype(">u2").tobytes())
    assert np.array_equal(np.asarray(to_rgb(big_endian))[..., 1], wanted)


def test_what_the_system_refuses_is_not_called_damage(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", "a.png")

    (tmp_path / "a.png").write_bytes(b"x")
    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(UserError, match="a.png cannot be read: Permission denied$"):
        load_image(tmp_path / "a.png")


def test_transparency_is_laid_over_white(tmp_path):
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGBA", (2, 2), (255, 0, 0, 255)).save(tmp_path / "opaque.png")
    Image.new("LA", (2, 2), (0, 0)).save(tmp_path / "grey.png")
    assert load_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    assert load_image(tmp_path / "opaque.png").getpixel((0, 0)) == (255, 0, 0)
    assert load_image(tmp_path / "grey.png").getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 0, 0, 255])
    palette.save(tmp_path / "palette.png", transparency=1)
    assert load_image(tmp_path / "palette.png").getpixel((0, 0)) == (255, 255, 255)
    palette.save(tmp_path / "palette.gif")
    assert load_image(tmp_path / "palette.gif").getpixel((0, 0)) == (0, 0, 255)
    Image.new("RGB", (2, 2), (9, 9, 9)).save(tmp_path / "colour.png", transparency=(9, 9, 9))
    assert load_image(tmp_path / "colour.png").getpixel((0, 0)) == (255, 255, 255)


def test_photos_are_turned_upright_unless_they_are_read_as_stored(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # to be turned a quarter
    random_image(8, 16).save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg").size == (8, 16)
    assert load_image(tmp_path / "a.jpg", upright=False).size == (16, 8)
    paths, processor = [tmp_path / "a.jpg"], ImageProcessor(size=(4, 4))
    assert Images(paths, processor).digest() != Images(paths, processor, upright=False).digest()


def test_one_pixel(tmp_path):
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "a.png")
    pixels = ImageProcessor(size=(4, 4), mean=None, std=None)(load_image(tmp_path / "a.png"))
    assert torch.equal(pixels[:, 3, 3], torch.tensor([1, 2, 3], dtype=torch.float64).div(255).float())


def failure(path):
    with pytest.raises(UserError) as caught:
        load_image(path)
    text = str(caught.value)
    assert str(path) in text and "\n" not in text
    return text


def test_files_that_are_no_images(tmp_path):
    assert "not found" in failure(tmp_path / "absent.jpg")
    assert "is not a file" in failure(tmp_path)
    (tmp_path / "empty.jpg").touch()
    assert "is empty" in failure(tmp_path / "empty.jpg")
    (tmp_path / "text.jpg").write_text(json.dumps({"not": "an image"}))
    assert "is not an image" in failure(tmp_path / "text.jpg")
    Image.fromarray(np.zeros((3, 3), dtype=np.float32)).save(tmp_path / "float.tiff")
    assert "32-bit pixels (mode F)" in failure(tmp_path / "float.tiff")


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.gif", "a.bmp", "a.webp", "a.tiff"])
def test_truncated_files(tmp_path, name):
    random_image(64, 64).save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for share in (0.02, 0.5, 0.9):
        (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
        failure(tmp_path / name)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's remarks on broken TIFF tags
def test_random_damage_gives_an_image_or_an_error_line(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a.png", "a.jpg", "a.gif", "a.tiff"):
        random_image(24, 24).save(tmp_path / name)
        whole = np.frombuffer((tmp_path / name).read_bytes(), dtype=np.uint8)
        for _ in range(40):
            broken = whole.copy()
            broken[rng.integers(0, min(len(broken), 200), 4)] = rng.integers(0, 256, 4)
            (tmp_path / name).write_bytes(broken.tobytes())
            try:
                assert load_image(tmp_path / name).mode == "RGB"
            except UserError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize("limit", [99, 40])  # just over the limit, where Pillow warns, and over twice the limit
@pytest.mark.parametrize("action", ["error", "ignore"])
def test_enormous_images_name_their_size_and_the_limit(tmp_path, monkeypatch, limit, action):
    warnings.simplefilter(action)  # undone by pytest after the test
    Image.new("RGB", (10, 10)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert f"has 100 pixels, over the limit of {limit}" in failure(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert load_image(tmp_path / "a.png").size == (10, 10)
