"""How good captions are: the objects they name, against those of the scene, and BLEU against the references.

An object counts as named if size, colour and shape are all right; two equal objects must be named twice. Precision is
the share of the named objects that are there, recall the share of the objects there that are named, both over all
images together.
"""

import re
from collections.abc import Mapping, Sequence

from vqa_scratch.data.descriptions import objects_named, objects_of, places_named, places_of
from vqa_scratch.data.scenes import Scene

_CHINESE = re.compile(r"[\u3400-\u9fff]")


def score_objects(captions: Mapping[int | str, str], scenes: Mapping[int | str, Scene]) -> dict[str, float | None]:
    """Captions by image id against the scenes of those images: shares from 0 to 1, None where the captions say nothing
    to take the share of."""
    hits = said = there = exact = placed = right = 0
    for image_id, caption in captions.items():
        named, objects = objects_named(caption), objects_of(scenes[image_id])
        hits, said, there = hits + (named & objects).total(), said + named.total(), there + objects.total()
        exact += named == objects
        places = places_named(caption)
        placed, right = placed + places.total(), right + (places & places_of(scenes[image_id])).total()
    if not captions:
        raise ValueError("no captions to score")
    return {
        "object_precision": hits / said if said else None,
        "object_recall": hits / there,
        "exact_share": exact / len(captions),  # of the images whose caption names every object and nothing else
        "places_share": right / placed if placed else None,  # of the objects named with a quarter of the image
    }


def corpus_bleu(captions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, str]:
    """(corpus BLEU from 0 to 100, the signature of how it was computed), by sacrebleu.

    references[i] are those of captions[i], any number. Chinese text is cut into characters, other text by the WMT's
    13a tokenizer. BLEU: Papineni et al. 2002; sacrebleu: Post 2018. Raises ValueError for a caption without reference.
    """
    from sacrebleu.metrics import BLEU  # imported here: it takes longer than all the rest of a command

    if not captions or len(captions) != len(references) or not all(references):
        raise ValueError("every caption needs at least one reference, and there must be captions")
    chinese = any(_CHINESE.search(text) for some in references for text in some)
    most = max(map(len, references))
    streams = [[some[i] if i < len(some) else None for some in references] for i in range(most)]
    metric = BLEU(tokenize="zh" if chinese else "13a")
    score = metric.corpus_score(list(captions), streams).score  # type: ignore[arg-type]  # None: no such reference
    return score, str(metric.get_signature())
