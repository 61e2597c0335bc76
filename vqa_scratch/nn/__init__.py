"""The building blocks of all models: attention, its masks, caches and taps, and the layers around it."""

from vqa_scratch.nn.attention import MultiHeadAttention, attention
from vqa_scratch.nn.cache import DecoderCache, KVCache
from vqa_scratch.nn.layers import ACTIVATIONS, MLP
from vqa_scratch.nn.memory import KeyValue, Memory
from vqa_scratch.nn.scores import attention_weights
