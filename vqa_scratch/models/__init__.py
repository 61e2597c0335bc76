"""The models, one family a file."""

from vqa_scratch.models.bert import Bert, BertConfig
from vqa_scratch.models.blip2 import Blip2, Blip2Config
from vqa_scratch.models.classifier import TextClassifier
from vqa_scratch.models.clip import CLIP, CLIPConfig
from vqa_scratch.models.clip_text import CLIPText, CLIPTextConfig
from vqa_scratch.models.fuyu import Fuyu, FuyuConfig
from vqa_scratch.models.gpt2 import GPT2, GPT2Config
from vqa_scratch.models.hifigan import HifiGAN, HifiGANConfig
from vqa_scratch.models.idefics import Idefics, IdeficsConfig
from vqa_scratch.models.llama import Llama, LlamaConfig
from vqa_scratch.models.llava import Llava, LlavaConfig
from vqa_scratch.models.opt import OPT, OPTConfig
from vqa_scratch.models.qformer import QFormer, QFormerConfig
from vqa_scratch.models.resnet import ResNet, ResNetConfig
from vqa_scratch.models.speecht5 import SpeechT5
from vqa_scratch.models.speecht5_asr import SpeechT5Recognizer
from vqa_scratch.models.speecht5_parts import SpeechT5Config
from vqa_scratch.models.t5 import T5, T5Config
from vqa_scratch.models.vilt import ViLT, ViLTClassifier, ViLTConfig
from vqa_scratch.models.vit import ConvStem, ViT, ViTConfig
from vqa_scratch.models.vqa import VQAModel
from vqa_scratch.models.whisper import Whisper, WhisperConfig
