"""Key maps of ViLT checkpoints; see `maps.py`."""

from vqa_scratch.weights.maps import BERT, VIT, Entry, KeyMap, linear, weight

# ViLT's words are embedded by BERT's names, all else goes by ViT's.
_VILT_BODY = (
    *(
        Entry(
            f"words.{entry.ours}",
            tuple(key.replace("embeddings", "embeddings.text_embeddings", 1) for key in entry.theirs),
        )
        for entry in BERT.body
        if not entry.ours.startswith("blocks.")
    ),
    *(Entry(f"tower.{entry.ours}", *entry[1:]) for entry in VIT.body),
    *weight("modality", "embeddings.token_type_embeddings"),
    *linear("pooler", "pooler.dense"),
)
_VILT_BUFFERS = ("embeddings.text_embeddings.position_ids", "embeddings.text_embeddings.token_type_ids")
VILT = KeyMap(
    prefix="vilt.",
    body=_VILT_BODY,
    dropped=_VILT_BUFFERS,
)
VILT_CLASSIFIER = KeyMap(
    prefix="vilt.",
    write_prefix=True,
    body=tuple(Entry(f"vilt.{entry.ours}", *entry[1:]) for entry in _VILT_BODY),
    head=(*linear("up", "classifier.0"), *linear("norm", "classifier.1"), *linear("out", "classifier.3")),
    dropped=_VILT_BUFFERS,
)
