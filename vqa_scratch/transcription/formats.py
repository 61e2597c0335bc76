"""Writes a transcript down: plain text, the subtitle formats SubRip (srt) and WebVTT (vtt), or JSON with everything."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from vqa_scratch.transcription.transcriber import Segment

FORMATS = ("txt", "srt", "vtt", "json")


def clock(seconds: float, point: str) -> str:
    """hours:minutes:seconds, with a `point` before the thousandths."""
    whole, thousandths = divmod(round(seconds * 1000), 1000)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}{point}{thousandths:03d}"


def cues(segments: Iterable[Segment]) -> Iterator[tuple[float, float, str]]:
    """(start, end, text) of each word, of a segment without words of the whole."""
    for segment in segments:
        if segment.words is None:
            yield segment.start, segment.end, segment.text.strip()
        else:
            yield from ((word.start, word.end, word.text.strip()) for word in segment.words)


def lines(segments: Iterable[Segment], format: str) -> Iterator[str]:
    """The lines of txt, srt or vtt, as the segments come."""
    if format == "vtt":
        yield "WEBVTT\n"
    for number, (start, end, text) in enumerate(cues(segments), 1):
        if format == "srt":
            yield f"{number}\n{clock(start, ',')} --> {clock(end, ',')}\n{text.replace('-->', '->')}\n"
        else:
            yield f"{clock(start, '.')} --> {clock(end, '.')}\n{text.replace('-->', '->')}\n"


def as_json(segments: list[Segment], **about: Any) -> str:
    """All that is known of the segments."""
    text = "".join(segment.text for segment in segments).strip()
    return json.dumps({"text": text, **about, "segments": [asdict(segment) for segment in segments]}, indent=2, ensure_ascii=False)
