"""The names of our config fields in the config.json of checkpoints, as data: {our field: their field}.

Most layouts use the same names, so each says which usual fields it has, and which it calls otherwise. `maps.py` has the
same for weights. `models/hf_config.py` uses both, to load and to save.
"""


def _pairs(text: str) -> dict[str, str]:
    """From "ours=theirs ..."."""
    return dict(pair.split("=") for pair in text.split())


_USUAL = _pairs(
    """dim=hidden_size layers=num_hidden_layers heads=num_attention_heads hidden=intermediate_size activation=hidden_act
    norm_eps=layer_norm_eps dropout=hidden_dropout_prob attention_dropout=attention_probs_dropout_prob
    init_std=initializer_range image_size=image_size patch_size=patch_size channels=num_channels qkv_bias=qkv_bias
    vocab_size=vocab_size max_positions=max_position_embeddings token_types=type_vocab_size
    bos_id=bos_token_id eos_id=eos_token_id pad_id=pad_token_id"""
)
_BLOCKS = "dim layers heads activation norm_eps attention_dropout init_std"


def _names(usual: str, own: str = "") -> dict[str, str]:
    """`usual` lists our fields that have their usual name; `own` are pairs of our fields and another name."""
    return {ours: _USUAL[ours] for ours in usual.split()} | _pairs(own)


VIT = _names(f"{_BLOCKS} hidden dropout image_size patch_size channels qkv_bias")
DINOV2 = _names(
    f"{_BLOCKS} dropout image_size patch_size channels qkv_bias",
    "mlp_ratio=mlp_ratio swiglu=use_swiglu_ffn layer_scale=layerscale_value",
)
DINOV2_WITH_REGISTERS = DINOV2 | {"registers": "num_register_tokens"}
VILT = VIT | _names("vocab_size max_positions token_types", "modalities=modality_type_vocab_size")
BLIP2_VISION = _names(
    "dim layers heads hidden activation norm_eps init_std image_size patch_size qkv_bias",
    "attention_dropout=attention_dropout",
)
_CLIP_BLOCKS = "dim layers heads hidden activation norm_eps"
_CLIP_DROPOUT = "attention_dropout=attention_dropout"
CLIP_VISION = _names(f"{_CLIP_BLOCKS} image_size patch_size channels", _CLIP_DROPOUT)
CLIP_TEXT = _names(f"{_CLIP_BLOCKS} vocab_size max_positions eos_id", _CLIP_DROPOUT)
BERT = _names(f"{_BLOCKS} hidden dropout vocab_size max_positions token_types pad_id")
DISTILBERT = _names(
    "vocab_size max_positions init_std pad_id",
    """dim=dim layers=n_layers heads=n_heads hidden=hidden_dim activation=activation dropout=dropout
    attention_dropout=attention_dropout""",
)
QFORMER = _names(f"{_BLOCKS} hidden dropout", "context_dim=encoder_hidden_size cross_every=cross_attention_frequency")
GPT2 = _names(
    "vocab_size init_std bos_id eos_id pad_id",
    """max_positions=n_positions dim=n_embd layers=n_layer heads=n_head hidden=n_inner activation=activation_function
    norm_eps=layer_norm_epsilon embedding_dropout=embd_pdrop dropout=resid_pdrop attention_dropout=attn_pdrop
    add_cross_attention=add_cross_attention scale_scores=scale_attn_weights
    scale_by_layer=scale_attn_by_inverse_layer_idx""",
)
OPT = _names(
    "vocab_size max_positions dim layers heads bos_id eos_id pad_id",
    """hidden=ffn_dim embedding_dim=word_embed_proj_dim norm_first=do_layer_norm_before activation=activation_function
    dropout=dropout attention_dropout=attention_dropout init_std=init_std""",
)
QWEN2 = _names(
    "vocab_size max_positions dim layers heads hidden activation init_std bos_id eos_id pad_id",
    """kv_heads=num_key_value_heads head_dim=head_dim norm_eps=rms_norm_eps attention_dropout=attention_dropout
    tied=tie_word_embeddings""",
)
LLAMA = QWEN2 | _pairs("qkv_bias=attention_bias out_bias=attention_bias mlp_bias=mlp_bias")
MIXTRAL, QWEN2_MOE = QWEN2, QWEN2 | _pairs("qkv_bias=qkv_bias")
OLMOE = QWEN2 | _pairs("qkv_bias=attention_bias out_bias=attention_bias clip=clip_qkv")
del OLMOE["head_dim"]
MIXTRAL_EXPERTS = _pairs("experts=num_local_experts per_token=num_experts_per_tok hidden=intermediate_size")
OLMOE_EXPERTS = MIXTRAL_EXPERTS | _pairs("experts=num_experts renormalise=norm_topk_prob")
GPT2_EXPERTS = _pairs(
    "experts=num_experts per_token=num_experts_per_tok hidden=moe_intermediate_size biased=router_bias"
)
QWEN2_MOE_EXPERTS = OLMOE_EXPERTS | _pairs(
    "hidden=moe_intermediate_size shared_hidden=shared_expert_intermediate_size every=decoder_sparse_step"
)
PERSIMMON = _names(
    "vocab_size max_positions dim layers heads hidden activation norm_eps init_std bos_id eos_id pad_id",
    """dropout=hidden_dropout attention_dropout=attention_dropout qk_norm=qk_layernorm tied=tie_word_embeddings""",
)
T5 = _names(
    "vocab_size eos_id pad_id",
    """dim=d_model head_dim=d_kv hidden=d_ff encoder_layers=num_layers decoder_layers=num_decoder_layers heads=num_heads
    buckets=relative_attention_num_buckets max_distance=relative_attention_max_distance dropout=dropout_rate
    norm_eps=layer_norm_epsilon start_id=decoder_start_token_id""",
)
WHISPER = _names(
    "vocab_size bos_id eos_id pad_id",
    """mels=num_mel_bins source_positions=max_source_positions max_positions=max_target_positions dim=d_model
    encoder_layers=encoder_layers encoder_heads=encoder_attention_heads encoder_hidden=encoder_ffn_dim
    decoder_layers=decoder_layers decoder_heads=decoder_attention_heads decoder_hidden=decoder_ffn_dim
    activation=activation_function dropout=dropout attention_dropout=attention_dropout init_std=init_std
    start_id=decoder_start_token_id""",
)
SPEECHT5 = _names(
    "vocab_size dim activation norm_eps init_std pad_id eos_id",
    """start_id=decoder_start_token_id dropout=hidden_dropout attention_dropout=attention_dropout
    position_dropout=positional_dropout encoder_layers=encoder_layers encoder_heads=encoder_attention_heads
    encoder_hidden=encoder_ffn_dim decoder_layers=decoder_layers decoder_heads=decoder_attention_heads
    decoder_hidden=decoder_ffn_dim max_distance=encoder_max_relative_position max_text=max_text_positions
    max_speech=max_speech_positions mels=num_mel_bins reduction=reduction_factor
    prenet_layers=speech_decoder_prenet_layers prenet_units=speech_decoder_prenet_units
    prenet_dropout=speech_decoder_prenet_dropout speaker_dim=speaker_embedding_dim
    postnet_layers=speech_decoder_postnet_layers
    postnet_units=speech_decoder_postnet_units postnet_kernel=speech_decoder_postnet_kernel
    postnet_dropout=speech_decoder_postnet_dropout guided=use_guided_attention_loss
    guided_heads=guided_attention_loss_num_heads guided_sigma=guided_attention_loss_sigma
    guided_scale=guided_attention_loss_scale wave_bias=conv_bias wave_activation=feat_extract_activation
    place_kernel=num_conv_pos_embeddings place_groups=num_conv_pos_embedding_groups""",
)
HIFIGAN = _pairs(
    """mels=model_in_dim rate=sampling_rate channels=upsample_initial_channel slope=leaky_relu_slope
    normalize=normalize_before init_std=initializer_range"""
)
