"""Small random decoders in the released format, each with a tokenizer of its own, as `transformers` saves them."""

import json

import tokenizers
import transformers as hf
from helpers import saved
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

TEXTS = ["the red circle is above the small blue square", "a reader asks why the sky is dark at night"]
CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SIZES = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.2}


def _tokenizer(special, **roles):
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return hf.PreTrainedTokenizerFast(tokenizer_object=backend, **roles)


def gpt2_folder(folder, **sizes):
    """One special token, which begins, ends and pads; no chat template; more rows than tokens."""
    end = "<|endoftext|>"
    _tokenizer([end], bos_token=end, eos_token=end, pad_token=end).save_pretrained(folder)
    config = hf.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **SIZES | sizes)
    return saved(hf.GPT2LMHeadModel(config), folder)


def llama_folder(folder, template_in="chat_template.jinja"):
    """Two end tokens, of which the tokenizer names one; BOS before a text; a chat template; shared keys and values."""
    special = ["<s>", "</s>", "<|eot|>", "<|user|>", "<|assistant|>", "<|system|>"]
    tokenizer = _tokenizer(special, bos_token="<s>", eos_token="<|eot|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 48, "max_position_embeddings": 64}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES | sizes))
    model.generation_config.eos_token_id = [1, 2]
    model = saved(model, folder)
    if template_in == "chat_template.jinja":
        (folder / template_in).write_text(CHAT)
    else:
        config = json.loads((folder / template_in).read_text())
        named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHAT}]
        (folder / template_in).write_text(json.dumps(config | {"chat_template": named}))
    return model
