"""Every option of `train.py`, one sentence each, and the presets. A field is a flag: `data_dir` is `--data-dir`.

`RunConfig` holds what every system takes, `QuestionConfig` what those that answer questions take; a system's own class
adds the rest. So a flag that means nothing for a system is no flag of it, and giving it is an error.
"""

from vqa_scratch.config.caption import CaptionTrainConfig
from vqa_scratch.config.presets import PRESETS
from vqa_scratch.config.shared import QuestionConfig, RunConfig
from vqa_scratch.config.vilt import ViLTTrainConfig
from vqa_scratch.config.vqa import TrainConfig

__all__ = ["PRESETS", "CaptionTrainConfig", "QuestionConfig", "RunConfig", "TrainConfig", "ViLTTrainConfig"]
