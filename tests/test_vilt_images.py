"""ViLT's preprocessing against the reference processor, on images of every proportion."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.vilt.image_processing_pil_vilt import ViltImageProcessorPil

from vqa_scratch.data.image_files import pad
from vqa_scratch.data.images import ImageProcessor, Images
from vqa_scratch.data.vilt_images import ViltImageProcessor, read_processor
from vqa_scratch.errors import UserError

# What the released preprocessor_config.json says.
RELEASED = {
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "ViltFeatureExtractor",
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
    "size": 384,
    "size_divisor": 32,
}


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def ours(processor: ViltImageProcessor, images: list[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
    pixels, mask = pad([processor.to_uint8(image) for image in images])
    mask = torch.from_numpy(mask)
    return processor.normalize(pixels) * mask[:, None], mask


@pytest.mark.parametrize(
    "sizes",
    [[(640, 480)], [(480, 640)], [(500, 375), (333, 500), (50, 40)], [(900, 250), (384, 384)], [(31, 47), (47, 31)]],
    ids=str,
)
@pytest.mark.parametrize("short, divisor", [(384, 32), (64, 16), (50, 7)])
def test_equals_the_reference(sizes, short, divisor):
    """Pixels and mask, bit for bit."""
    theirs = ViltImageProcessorPil(size={"shortest_edge": short}, size_divisor=divisor)
    processor = ViltImageProcessor.from_hf(
        json.loads(theirs.to_json_string()) | {"image_processor_type": "ViltImageProcessor"}
    )
    images = [picture(*size, seed=i) for i, size in enumerate(sizes)]
    wanted = theirs(images, return_tensors="pt")
    pixels, mask = ours(processor, images)
    assert torch.equal(mask, wanted["pixel_mask"].bool())
    assert torch.equal(pixels, wanted["pixel_values"])


def test_targets_equal_the_reference_wherever_it_has_one():
    """Every proportion up to the point where the reference makes an image of no height."""
    from transformers.models.vilt.image_processing_pil_vilt import get_resize_output_image_size

    processor = ViltImageProcessor()
    for width in (*range(1, 60, 7), 100, 333, 640, 1333, 4000):
        for height in (*range(1, 60, 7), 480, 1000, 3000):
            wanted = get_resize_output_image_size(
                np.empty((3, height, width)), 384, int(1333 / 800 * 384), 32, input_data_format="channels_first"
            )
            found = processor.target(width, height)[::-1]
            assert found == tuple(max(side, 32) for side in wanted), (width, height)


@pytest.mark.parametrize("size", [(1, 300), (300, 1), (10, 500), (500, 10), (1, 1), (2, 3)])
def test_long_and_tiny_images_keep_a_patch(size):
    """The reference fails on these; here the shorter side is stretched to one patch."""
    pixels, mask = ours(ViltImageProcessor(), [picture(*size)])
    height, width = pixels.shape[2:]
    assert min(height, width) >= 32 and max(height, width) <= 640 and height % 32 == width % 32 == 0 and mask.all()
    assert (height > width) == (size[1] > size[0]) or height == width


def test_the_released_file_is_read_and_written(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(RELEASED))
    processor = ViltImageProcessor.from_pretrained(tmp_path)
    assert processor == ViltImageProcessor()
    processor.save_pretrained(tmp_path / "again")
    assert read_processor(tmp_path / "again") == processor
    theirs = ViltImageProcessorPil.from_pretrained(tmp_path / "again")
    image = picture(500, 300)
    assert torch.equal(ours(processor, [image])[0], theirs(image, return_tensors="pt")["pixel_values"])
    ImageProcessor(size=(64, 64)).save_pretrained(tmp_path / "plain")
    assert read_processor(tmp_path / "plain") == ImageProcessor(size=(64, 64))


def test_images_of_many_sizes_are_padded(tmp_path):
    paths = []
    for i, size in enumerate([(64, 32), (32, 64), (40, 40)]):
        paths.append(tmp_path / f"{i}.png")
        picture(*size, seed=i).save(paths[-1])
    processor = ViltImageProcessor(size=32, divisor=16)
    images = Images(paths, processor)
    pixels, mask = images.load([2, 0])
    assert pixels.shape == (2, 32, 48, 3) and mask.sum((1, 2)).tolist() == [32 * 32, 16 * 48]
    assert not pixels[0, :, 32:].any()
    with pytest.raises(UserError, match="--no-image-cache"):
        images.cache_in(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feature_extractor_type": "ViTFeatureExtractor"}, "not by ViTFeatureExtractor"),
        ({"do_resize": False}, "without do_resize"),
        ({"size": {"height": 384, "width": 384}}, "shortest edge of 32 pixels"),
        ({"size": 16}, "shortest edge of 32 pixels"),
        ({"do_flip": True}, "do_flip"),
    ],
)
def test_what_cannot_be_followed_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        ViltImageProcessor.from_hf(RELEASED | changes)
