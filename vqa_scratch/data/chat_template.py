"""The prompt that a checkpoint's chat template makes of a conversation, or of a question about an image.

A template is a small Jinja program in the files of a checkpoint; as in `transformers`, it runs in a sandbox, which
keeps it from files and from changing what it is given.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from vqa_scratch.errors import UserError
from vqa_scratch.storage import read_object, read_text, typed
from vqa_scratch.weights.hub import locate

# In the order in which they count. Of a checkpoint with images the tokenizer's own template does not: it knows none.
FILES = ("chat_template.jinja", "chat_template.json", "processor_config.json")
OF_TEXT = ("chat_template.jinja", "tokenizer_config.json")


def read_template(source: str | Path, files: Sequence[str] = FILES) -> str | None:
    """The chat template of a checkpoint folder or Hub id; None if it has none. Of several it is the default one."""
    folder = locate(source, files, "the chat template")
    for name in files:
        path = folder / name
        if path.is_file():
            values = {"chat_template": read_text(path)} if path.suffix == ".jinja" else read_object(path)
            (template,) = typed(path, values, {"chat_template": str | list | None})
            if isinstance(template, list):
                named = (typed(path, entry, {"name": str, "template": str}) for entry in template)
                template = dict(named).get("default")
            if template is not None:
                return template
    return None


def ask_in_chat(template: str, question: str, special: Mapping[str, str]) -> str:
    """`render` of one question about one image."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return render(template, [{"role": "user", "content": content}], special)


def render(template: str, messages: Sequence[Mapping[str, Any]], special: Mapping[str, str]) -> str:
    """The text of a conversation, up to where the answer begins.

    `special` are the tokens by role, as in `Tokenizer`. A template is not told the date: what it writes is the same on
    another day. Raises UserError if the template is broken.
    """

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    tokens = {f"{role}_token": token for role, token in special.items()}
    try:
        made = environment.from_string(template, {"raise_exception": refuse})
        return made.render(messages=messages, add_generation_prompt=True, **tokens)
    except Exception as error:  # a template may do anything that Python's types allow
        raise UserError(f"the chat template cannot be followed: {type(error).__name__}: {error}") from error
