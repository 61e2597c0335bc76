"""Key maps of SpeechT5, of text to speech and of speech to text, and of its vocoder, HiFi-GAN."""

from vqa_scratch.weights.maps import BLOCK, SELF_ATTENTION, Entry, KeyMap, batch_norm, each, linear, nested, weight

_LAYER = "layers.{}."


def _block(attention: str, norm: str) -> tuple[Entry, ...]:
    """What blocks of encoder and decoder have in common; the two call their self-attention and its norm otherwise."""
    mlp = "mlp.up=intermediate_dense mlp.down=output_dense"
    return (
        *each(linear, BLOCK, _LAYER, SELF_ATTENTION.replace("self_attn", attention)),
        *each(linear, BLOCK, _LAYER, f"norm1={norm} norm2=final_layer_norm"),
        *each(linear, BLOCK, f"{_LAYER}feed_forward.", mlp),
    )


_IN, _OUT, _POSTNET = "speecht5.encoder.prenet", "speecht5.decoder.prenet", "speech_decoder_postnet"
_PLACES = f"{_IN}.pos_conv_embed.conv"
_ENCODER = nested(
    "encoder.",
    (
        *linear("norm", "layer_norm"),
        *weight("keys.table", "embed_positions.pe_k"),
        *_block("attention", "layer_norm"),
    ),
    "speecht5.encoder.wrapped_encoder.",
)
_DECODER = nested(
    "",
    (
        *_block("self_attn", "self_attn_layer_norm"),
        *each(linear, f"{BLOCK}cross.", f"{_LAYER}encoder_attn.", "q=q_proj kv=k_proj+v_proj out=out_proj"),
        *linear("blocks.{}.norm_cross", f"{_LAYER}encoder_attn_layer_norm"),
    ),
    "speecht5.decoder.wrapped_decoder.",
)
TEXT_TO_SPEECH = KeyMap(
    body=(
        *_ENCODER,
        *_DECODER,
        *weight("tokens", f"{_IN}.embed_tokens"),
        Entry("text_positions.alpha", (f"{_IN}.encode_positions.alpha",)),
        *each(linear, "prenet.", f"{_OUT}.", "layers.{}=layers.{} out=final_layer speaker=speaker_embeds_layer"),
        Entry("prenet.positions.alpha", (f"{_OUT}.encode_positions.alpha",)),
        *each(linear, "", f"{_POSTNET}.", "to_frames=feat_out to_stop=prob_out"),
        *weight("postnet.convs.{}", f"{_POSTNET}.layers.{{}}.conv"),
        *batch_norm("postnet.norms.{}", f"{_POSTNET}.layers.{{}}.batch_norm"),
    ),
    # Tables that old releases saved with the weights, and a count that nothing reads.
    dropped=(
        *(f"{prenet}.encode_positions.pe" for prenet in (_IN, _OUT)),
        f"{_POSTNET}.layers.{{}}.batch_norm.num_batches_tracked",
    ),
)
SPEECH_TO_TEXT = KeyMap(
    body=(
        *_ENCODER,
        *nested("decoder.", _DECODER),
        *linear("wave.convs.{}", f"{_IN}.feature_encoder.conv_layers.{{}}.conv"),
        *linear("wave.first_norm", f"{_IN}.feature_encoder.conv_layers.0.layer_norm"),
        *each(linear, "wave.", f"{_IN}.feature_projection.", "norm=layer_norm out=projection"),
        *(
            Entry(f"wave.places.{name}", (f"{_PLACES}.{name}",))
            for name in ("bias", "parametrizations.weight.original0", "parametrizations.weight.original1")
        ),
        *weight("decoder.tokens", f"{_OUT}.embed_tokens"),
    ),
    # What only training that masks the input needs, and tables that old releases saved with the weights.
    dropped=(
        f"{_IN}.masked_spec_embed",
        f"{_IN}.pos_sinusoidal_embed.weights",
        f"{_OUT}.embed_positions.weights",
    ),
    tied={"text_decoder_postnet.lm_head.weight": f"{_OUT}.embed_tokens.weight"},
    # How weight norm was spelled before torch 2.0.
    spellings=tuple(
        (f"{_PLACES}.{old}$".replace(".", r"\."), f"{_PLACES}.parametrizations.weight.{new}")
        for old, new in (("weight_g", "original0"), ("weight_v", "original1"))
    ),
)
HIFIGAN = KeyMap(
    body=(
        *each(linear, "", "", "first=conv_pre ups.{}=upsampler.{} last=conv_post"),
        *each(linear, BLOCK, "resblocks.{}.", "dilated.{}=convs1.{} plain.{}=convs2.{}"),
        Entry("mean", ("mean",)),
        Entry("scale", ("scale",)),
    ),
)
