"""The options of the single-stream system."""

from dataclasses import dataclass
from pathlib import Path

from vqa_scratch.config.shared import QuestionConfig
from vqa_scratch.errors import UserError
from vqa_scratch.options import option


@dataclass(frozen=True)
class ViLTTrainConfig(QuestionConfig):
    """The single-stream system that chooses its answer from a list: a small one of its own, or a released ViLT."""

    preset: str = option("vilt", "Which system to train.", ("vilt", "vilt-b32"))
    out: Path = option(Path("runs/vilt"), "Folder of the run.")
    min_answer_count: int = option(9, "An answer is in the list if it is the majority's to so many questions.")

    # ------------------------------------------------------------------------------------------------ model
    model: str = option("", "ViLT checkpoint to start from: folder or Hub id; empty for random weights.")
    image_size: int = option(64, "Pixels a side that images are resized to (random weights).")
    patch_size: int = option(16, "Pixels a side of a patch (random weights).")
    width: int = option(128, "Width (random weights).")
    heads: int = option(4, "Attention heads (random weights).")
    layers: int = option(4, "Layers (random weights).")
    stem: str = option(
        "conv", "How pixels become patch tokens (random weights): convolutions, or one linear map.", ("conv", "linear")
    )

    positive = (*QuestionConfig.positive, *"min_answer_count image_size patch_size width heads layers".split())

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset == "vilt-b32" and self.data is None and not self.resume:
            raise UserError("--preset vilt-b32 needs --data, the folder with the VQA v2 files")

    def unread(self) -> dict[str, str]:
        if not self.model:
            return {}
        why = f"--model {self.model}, which has sizes of its own"
        return dict.fromkeys("image_size patch_size width heads layers stem".split(), why)
