"""The towers, one file each."""

from vqa_scratch.models.bert import Bert, BertConfig
from vqa_scratch.models.gpt2 import GPT2, GPT2Config
from vqa_scratch.models.vit import ViT, ViTConfig

__all__ = ["GPT2", "Bert", "BertConfig", "GPT2Config", "ViT", "ViTConfig"]
