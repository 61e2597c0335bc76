"""The metadata of an exported model: YAML before its README.md, by which the Hugging Face Hub lists and shows it."""

from vqa_scratch.storage import read_object, typed
from vqa_scratch.systems.base import System

SPLITS = ("train", "val", "test")  # another split is a file of the user, whose name stays here


def metadata(system: System, library: str) -> str:
    """The YAML block of a finished run: task, license, tags, and the final figure if there is a summary.json with it.

    It names neither folders nor files, so that a published page says nothing of the machine it comes from. The license
    is "other": what holds for the weights follows from the data and the released models they come from.
    """
    # Imported here: only an export needs it.
    from huggingface_hub import EvalResult, ModelCardData

    task, metric = system.published_as
    path = (system.folder or system.options.out) / "summary.json"
    kinds = {metric: float | int | None, "scored_by": str | None, "scored_split": str | None}
    value, name, split = typed(path, read_object(path) if path.is_file() else {}, kinds)
    own = system.options.data is not None
    result = EvalResult(
        task_type=task,
        dataset_type="own-data" if own else "vqa-scratch-scenes",
        dataset_name="the author's own data" if own else "built-in scenes of vqa_scratch",
        dataset_split=split if split in SPLITS else None,
        metric_type=metric,
        metric_name=name,
        metric_value=value,
    )
    card = ModelCardData(
        license="other",
        library_name=library,
        pipeline_tag=task,
        tags=["vqa-scratch", system.options.preset],
        metrics=[metric],
        model_name=f"vqa_scratch {system.options.preset}",
        eval_results=None if value is None else [result],
    )
    return f"---\n{card.to_yaml()}\n---\n\n"
