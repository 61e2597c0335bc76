"""The released layouts of the ViT family: what differs between its members, and how their checkpoints are laid out."""

from dataclasses import dataclass

from vqa_scratch.models.hf_config import Layout
from vqa_scratch.weights import fields, maps, maps_clip

_DINO_DEFAULTS = {"norm_eps": 1e-6, "mlp_ratio": 4, "layer_scale": 1.0}
_NO_DROP_PATH = {"drop_path_rate": 0.0}  # stochastic depth, which no released DINOv2 asks for


@dataclass(frozen=True, eq=False)
class ViTLayout(Layout):
    """What differs between the members of the family."""

    tokens: tuple[str, ...] = ("cls_token",)  # learned tokens before the patches; they have positions
    antialias: bool = False  # whether positions are smoothed when resized to fewer patches
    patch_bias: bool = True  # whether the linear map of patches has a bias
    norms: tuple[bool, bool] = (False, True)  # whether there is a norm before the first block, and after the last


LAYOUTS = {
    "vit": ViTLayout("ViTModel", fields.VIT, maps.VIT),
    "deit": ViTLayout("DeiTModel", fields.VIT, maps.DEIT, tokens=("cls_token", "distillation_token")),
    "dinov2": ViTLayout("Dinov2Model", fields.DINOV2, maps.DINOV2, _DINO_DEFAULTS | {"patch_size": 14}, _NO_DROP_PATH),
    "dinov2_with_registers": ViTLayout(
        "Dinov2WithRegistersModel",
        fields.DINOV2_WITH_REGISTERS,
        maps.DINOV2_WITH_REGISTERS,
        _DINO_DEFAULTS | {"registers": 4},
        _NO_DROP_PATH,
        antialias=True,
    ),
    "clip_vision_model": ViTLayout(
        "CLIPVisionModel",
        fields.CLIP_VISION,
        maps_clip.CLIP_VISION,
        {"patch_size": 32, "activation": "quick_gelu", "norm_eps": 1e-5},
        patch_bias=False,
        norms=(True, False),  # the reference norms the class token alone, on its way to the projection
    ),
    "siglip_vision_model": ViTLayout(
        "SiglipVisionModel",
        fields.CLIP_VISION,
        maps_clip.SIGLIP_VISION,
        {"activation": "gelu_pytorch_tanh", "norm_eps": 1e-6},
        tokens=(),
    ),
}
