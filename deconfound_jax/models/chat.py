"""Chat templates: messages -> the text that a published model was trained to continue.

    render(template, [{"role": "user", "content": "Name a sea."}], add_generation_prompt=True)

A template is a program that came with a file of weights, so it runs in jinja2's sandbox: it sees the messages and a
few functions, changes nothing, and reaches no attribute that leads into Python.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any


def render(
    template: str, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False, *,
    bos_token: str = "", eos_token: str = "",
) -> str:  # fmt: skip
    """Fills a chat template. What messages say is not escaped: a mark spelled out in one is a mark.

    Args:
      template: jinja2's source, as in tokenizer_config.json, chat_template.jinja or a GGUF file.
      messages: each with "role" and "content".
      add_generation_prompt: whether the text ends with the opening of the assistant's answer.
      bos_token, eos_token: the marks' spelling; some templates write them.

    Returns:
      The text; encode it with `marks=True`.

    Raises:
      ValueError where the template is broken, refuses the messages, or reaches for what the sandbox forbids.
    """
    if wrong := [i for i, message in enumerate(messages) if not {"role", "content"} <= set(message)]:
        raise ValueError(f"messages: expected 'role' and 'content' in each, got {sorted(messages[wrong[0]])}")
    try:
        return _compiled(template).render(
            messages=[dict(message) for message in messages], add_generation_prompt=add_generation_prompt,
            bos_token=bos_token, eos_token=eos_token,
        )  # fmt: skip
    except Exception as error:  # a template is a program: it may fail in any way
        raise ValueError(f"chat_template: {error} ({type(error).__name__})") from error


@functools.lru_cache(maxsize=16)
def _compiled(template: str):
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    def tojson(value, indent: int | None = None) -> str:
        # jinja2's own escapes for HTML, which these texts are not.
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)
