"""Llama, Qwen2 and Persimmon against the reference models, through files they saved and our loader read, and back."""

import pytest
import torch
import transformers as hf
from helpers import STD, assert_close, saved, text_batch

from vqa_scratch.models import Llama

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
no_grad = torch.no_grad()
SIZES = {
    "vocab_size": 60,
    "hidden_size": 64,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": STD,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 40, "rope_theta": 50.0}  # low, mixed and kept frequencies, all three
CASES = {
    "one head of keys": ("Llama", {"num_key_value_heads": 1}),
    "two heads of keys, tied": ("Llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "as many heads of keys": ("Llama", {"rms_norm_eps": 1e-3}),
    "heads of their own size": ("Llama", {"head_dim": 10, "num_key_value_heads": 2}),
    "all biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10_000.0}}),
    "Qwen2": ("Qwen2", {"num_key_value_heads": 2, "eos_token_id": [7, 9]}),
    "Persimmon": ("Persimmon", {}),
    "Persimmon without norms of q and k": ("Persimmon", {"qk_layernorm": False}),
}


def reference(folder, case):
    family, changes = CASES[case]
    config = getattr(hf, f"{family}Config")(**SIZES | changes)
    return saved(getattr(hf, f"{family}ForCausalLM")(config), folder)


@no_grad
@pytest.mark.parametrize("case", CASES)
def test_logits_and_back(tmp_path, case):
    theirs = reference(tmp_path / "theirs", case)
    model = Llama.from_pretrained(tmp_path / "theirs")
    ids, mask = text_batch()
    wanted = theirs(ids, attention_mask=mask).logits
    assert_close(model(ids, mask), wanted, where=mask)
    assert_close(model(ids), theirs(ids).logits)
    hidden = model.hidden(model.embed(ids), mask)
    assert_close(hidden @ model.head.T, wanted, where=mask)
    model.save_pretrained(tmp_path / "ours")
    back, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    assert_close(back.eval()(ids, attention_mask=mask).logits, wanted, where=mask)
    again = Llama.from_pretrained(tmp_path / "ours")
    assert again.config == model.config and torch.equal(again(ids, mask), model(ids, mask))
