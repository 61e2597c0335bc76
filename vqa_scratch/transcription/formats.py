"""Writes a transcript down: lines of text, the subtitle formats SubRip (srt) and WebVTT (vtt), or all of it as JSON."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict

from vqa_scratch.transcription.transcriber import Segment


def clock(seconds: float, point: str) -> str:
    """hours:minutes:seconds, with a `point` before the thousandths."""
    whole, thousandths = divmod(round(seconds * 1000), 1000)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}{point}{thousandths:03d}"


def cues(segments: Iterable[Segment]) -> Iterator[tuple[float, float, str]]:
    """(start, end, text) of each word, or of a segment without words."""
    for segment in segments:
        for cue in [segment] if segment.words is None else segment.words:
            yield cue.start, cue.end, cue.text.strip()


def written(segments: Iterable[Segment], kind: str) -> Iterator[str]:
    """The transcript in pieces, as the segments come; JSON in one piece at the end. In txt words have their times."""
    if kind == "json":
        found = list(segments)
        text = "".join(segment.text for segment in found).strip()
        yield json.dumps({"text": text, "segments": [asdict(one) for one in found]}, indent=2, ensure_ascii=False)
        return
    if kind == "vtt":
        yield "WEBVTT\n"
    if kind == "txt":
        for segment in segments:
            words = segment.words or []
            yield "\n".join([segment.text.strip(), *(f"{w.start:10.2f}{w.end:10.2f} {w.text}" for w in words)])
        return
    for number, (start, end, text) in enumerate(cues(segments), 1):
        times = " --> ".join(clock(at, "," if kind == "srt" else ".") for at in (start, end))
        text = text.replace("-->", "->")  # which would begin a cue
        yield f"{number}\n{times}\n{text}\n" if kind == "srt" else f"{times}\n{text}\n"
