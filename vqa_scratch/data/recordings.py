"""Reads a user's own recordings with their transcripts: a table, a folder with one, or sound files beside text files.

A table has a column for the file of a recording and one for what is said in it, and may have columns of speakers and
splits. In a folder without a table `a.txt` holds what is said in `a.wav`. Where nothing names the splits, a tenth of
the recordings is for val and a tenth for test; if speakers are named, of the speakers.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from vqa_scratch.audio.features import HOP, RATE
from vqa_scratch.audio.reading import read_audio
from vqa_scratch.data.own import cell_text, columns_of, find_named, find_tables, names_of, places_of, rows_in, shares_of
from vqa_scratch.data.spoken import Utterance, letters_of, mel_of, states_needed
from vqa_scratch.data.vqa_files import ReadReport
from vqa_scratch.errors import UserError
from vqa_scratch.storage import read_text

COLUMNS = {
    "recording": "audio audio_path audio_file recording sound wav clip file_name filename file path",
    "transcript": "transcript transcription text sentence normalized_text words",
    "speaker": "speaker speaker_id client_id",
    "split": "split subset partition",
}
SOUNDS = (".wav", ".flac", ".ogg", ".mp3", ".aiff")
RECORDED = "recorded"  # the kind of such utterances


class Listed(NamedTuple):
    """A recording, before it is read."""

    where: str  # for messages
    name: str
    file: Path | None
    text: str


@dataclass
class RecordingsReport(ReadReport):
    """What was read of a split of recordings."""

    frames: int = 0  # of 10 ms

    @property
    def about(self) -> str:
        return f"{self.frames / 100:,.0f} s of sound"


def list_recordings(source: Path, split: str) -> tuple[Path, list[Listed]]:
    """(the file or folder that names them, the recordings of a split). Raises UserError if there are none."""
    if not source.exists():
        raise UserError(f"{source} not found: there is no such file or folder")
    found = find_tables(source, split)
    if found is None:
        return _beside_texts(source, split)
    rows, where = rows_in(found[0])
    columns = columns_of(found[0][0], list(rows[0][2]), COLUMNS, ("recording", "transcript"))
    by = next(name for name in ("speaker", "recording") if name in columns)
    shared = (row.get(columns[by]) for _, _, row in rows)
    listed = []
    for place in places_of(found[1], rows, where, columns.get("split"), shared, f"{by}s"):
        path, at, row = rows[place]
        name, text = (cell_text(at, columns[part], row.get(columns[part])) for part in ("recording", "transcript"))
        listed.append(Listed(at, name, find_named(path.parent, name, "audio", SOUNDS) if name else None, text))
    return found[0][0], listed


def _beside_texts(folder: Path, split: str) -> tuple[Path, list[Listed]]:
    """The sound files below a folder, or below that of the split, with the text file beside each."""
    places = [folder / name for name in names_of(split) if (folder / name).is_dir()]
    files = sorted(path for path in (places or [folder])[0].rglob("*") if path.suffix.lower() in SOUNDS)
    if not any(file.with_suffix(".txt").is_file() for file in files):
        kinds = ", ".join(SOUNDS)
        raise UserError(
            f"{folder} holds no recordings of split {split}: neither a table nor sound files ({kinds}) with texts"
        )
    if not places and split != "all":
        chosen = shares_of(split, files, str(folder), "recordings")
        files = [file for file in files if file in chosen]
    texts = [(file, file.with_suffix(".txt")) for file in files]
    found = [(file, read_text(text).strip() if text.is_file() else "") for file, text in texts]
    return folder, [Listed(str(file), str(file.relative_to(folder)), file, text) for file, text in found]


def read_recordings(source: Path, split: str, frames: int) -> list[Utterance]:
    """The utterances of a split that fit into a window of so many frames and that CTC can align with their sound.

    Prints what is left out, and why. Raises UserError if nothing is left.
    """
    origin, listed = list_recordings(source, split)
    report = RecordingsReport(split, "recordings", {"table" if origin.is_file() else "folder": origin}, len(listed))
    kept = list(_read(listed, frames, report))
    report.kept, report.frames = len(kept), sum(len(one.mel) for one in kept)
    report.check_left()
    print(report)
    return kept


def _read(listed: list[Listed], frames: int, report: RecordingsReport) -> Iterator[Utterance]:
    seen: Counter[str] = Counter()
    for where, name, file, text in listed:
        seen[name] += 1
        if seen[name] > 1:
            report.skip("the recording occurred before", f"{where}: {name}")
            continue
        if file is None:
            report.skip("the recording is missing", f"{where}: {name or 'no name'}")
            continue
        if not text:
            report.skip("the transcript is empty", where)
            continue
        try:
            letters = letters_of(text)
        except UserError as error:
            report.skip("the transcript cannot be spelled", f"{where}: {error}")
            continue
        try:
            wave = read_audio(file)
        except UserError as error:
            report.skip("the recording cannot be read", error)
            continue
        if len(wave) < HOP:
            report.skip("the recording is shorter than a frame of 10 ms", f"{file}: {len(wave)} samples")
            continue
        length, needed = len(wave) // HOP, states_needed(letters)
        if length > frames:
            report.skip(f"longer than --window {frames // 100} s", f"{file}: {len(wave) / RATE:.1f} s")
        elif needed > -(-length // 2):
            why = f"{file}: {len(wave) / RATE:.2f} s have {-(-length // 2)} states of 20 ms, its letters need {needed}"
            report.skip("the transcript is longer than CTC can align with its sound", why)
        else:
            yield Utterance(name, text, mel_of(wave), RECORDED)
