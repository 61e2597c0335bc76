"""The prompt that a checkpoint's chat template makes of a question about an image.

A template is a small Jinja program in the files of a checkpoint; as in `transformers`, it runs in a sandbox, which
keeps it from files and from changing what it is given.
"""

from collections.abc import Mapping
from pathlib import Path

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from vqa_scratch.errors import UserError
from vqa_scratch.storage import read_object, read_text, typed
from vqa_scratch.weights.hub import locate

# In the order in which they count. A tokenizer's own template does not: it knows no images.
FILES = ("chat_template.jinja", "chat_template.json", "processor_config.json")


def read_template(source: str | Path) -> str | None:
    """The chat template of a checkpoint folder or Hub id; None if it has none."""
    folder = locate(source, FILES, "the chat template")
    for name in FILES:
        path = folder / name
        if path.is_file():
            values = {"chat_template": read_text(path)} if path.suffix == ".jinja" else read_object(path)
            (template,) = typed(path, values, {"chat_template": str | None})
            if template is not None:
                return template
    return None


def ask_in_chat(template: str, question: str, special: Mapping[str, str]) -> str:
    """The text of a conversation of one question about one image, up to where the answer begins.

    `special` are the tokens by role, as in `Tokenizer`. Raises UserError if the template is broken.
    """

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    content = [{"type": "image"}, {"type": "text", "text": question}]
    tokens = {f"{role}_token": token for role, token in special.items()}
    messages = [{"role": "user", "content": content}]
    try:
        made = environment.from_string(template, {"raise_exception": refuse})
        return made.render(messages=messages, add_generation_prompt=True, **tokens)
    except Exception as error:  # a template may do anything that Python's types allow
        raise UserError(f"the chat template cannot be followed: {type(error).__name__}: {error}") from error
