"""The names of our config fields in the config.json of checkpoints, as data: {our field: their field}.

`maps.py` has the same for weights. `models/hf_config.py` uses both, to load and to save.
"""

_BLOCKS = {
    "dim": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "hidden": "intermediate_size",
    "activation": "hidden_act",
    "norm_eps": "layer_norm_eps",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "init_std": "initializer_range",
}
VIT = _BLOCKS | {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "channels": "num_channels",
    "qkv_bias": "qkv_bias",
}
DINOV2 = {ours: theirs for ours, theirs in VIT.items() if ours != "hidden"} | {
    "mlp_ratio": "mlp_ratio",
    "swiglu": "use_swiglu_ffn",
    "layer_scale": "layerscale_value",
}
DINOV2_WITH_REGISTERS = DINOV2 | {"registers": "num_register_tokens"}
VILT = VIT | {
    "vocab_size": "vocab_size",
    "max_positions": "max_position_embeddings",
    "token_types": "type_vocab_size",
    "modalities": "modality_type_vocab_size",
}
BLIP2_VISION = {ours: theirs for ours, theirs in VIT.items() if ours not in ("channels", "dropout")} | {
    "attention_dropout": "attention_dropout",
}
BERT = _BLOCKS | {
    "vocab_size": "vocab_size",
    "max_positions": "max_position_embeddings",
    "token_types": "type_vocab_size",
    "pad_id": "pad_token_id",
}
DISTILBERT = {
    "vocab_size": "vocab_size",
    "dim": "dim",
    "layers": "n_layers",
    "heads": "n_heads",
    "hidden": "hidden_dim",
    "max_positions": "max_position_embeddings",
    "activation": "activation",
    "dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "init_std": "initializer_range",
    "pad_id": "pad_token_id",
}
QFORMER = _BLOCKS | {"context_dim": "encoder_hidden_size", "cross_every": "cross_attention_frequency"}
GPT2 = {
    "vocab_size": "vocab_size",
    "max_positions": "n_positions",
    "dim": "n_embd",
    "layers": "n_layer",
    "heads": "n_head",
    "hidden": "n_inner",
    "activation": "activation_function",
    "norm_eps": "layer_norm_epsilon",
    "embedding_dropout": "embd_pdrop",
    "dropout": "resid_pdrop",
    "attention_dropout": "attn_pdrop",
    "init_std": "initializer_range",
    "add_cross_attention": "add_cross_attention",
    "scale_scores": "scale_attn_weights",
    "scale_by_layer": "scale_attn_by_inverse_layer_idx",
    "bos_id": "bos_token_id",
    "eos_id": "eos_token_id",
    "pad_id": "pad_token_id",
}
OPT = {
    "vocab_size": "vocab_size",
    "max_positions": "max_position_embeddings",
    "dim": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "hidden": "ffn_dim",
    "embedding_dim": "word_embed_proj_dim",
    "norm_first": "do_layer_norm_before",
    "activation": "activation_function",
    "dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "init_std": "init_std",
    "bos_id": "bos_token_id",
    "eos_id": "eos_token_id",
    "pad_id": "pad_token_id",
}
T5 = {
    "vocab_size": "vocab_size",
    "dim": "d_model",
    "head_dim": "d_kv",
    "hidden": "d_ff",
    "encoder_layers": "num_layers",
    "decoder_layers": "num_decoder_layers",
    "heads": "num_heads",
    "buckets": "relative_attention_num_buckets",
    "max_distance": "relative_attention_max_distance",
    "dropout": "dropout_rate",
    "norm_eps": "layer_norm_epsilon",
    "pad_id": "pad_token_id",
    "eos_id": "eos_token_id",
    "start_id": "decoder_start_token_id",
}
