"""Named chat templates, and the rendering of Jinja templates in a sandbox.

The named ones follow the forms that their models were published with; `markers` are the special
tokens that they write.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from typing_extensions import override

from tunelang.dsl.diagnostics.tune_error import FailureText
from tunelang.dsl.messages import run_failures
from tunelang.runtime.data.examples import Message
from tunelang.runtime.data.row_errors import RowError


@dataclass(frozen=True)
class ChatTemplate:
    """Jinja source of a template, and the special tokens that it needs."""

    source: str
    markers: tuple[str, ...] = ()


_CHATML = """\
{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""

_LLAMA3 = """\
{{- bos_token -}}
{%- for m in messages -%}
{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif -%}
"""

# Gemma has no system turn: what it says opens the first user turn.
_GEMMA = """\
{{- bos_token -}}
{%- set ns = namespace(lead='') -%}
{%- for m in messages -%}
{%- if m.role == 'system' -%}
{%- set ns.lead = m.content | trim + '\\n\\n' -%}
{%- else -%}
{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
{{- ns.lead + m.content | trim + '<end_of_turn>\\n' }}
{%- set ns.lead = '' -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""

_PLAIN = """\
{%- for m in messages -%}
{{ m.content + (eos_token if m.role == 'assistant' else '\\n') }}
{%- endfor -%}
"""

NAMED = {
    "chatml": ChatTemplate(_CHATML, ("<|im_start|>", "<|im_end|>")),
    "llama3": ChatTemplate(_LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "gemma": ChatTemplate(_GEMMA, ("<start_of_turn>", "<end_of_turn>")),
    "plain": ChatTemplate(_PLAIN),
}


def chat_template(chat: str | None, published: str | None = None) -> ChatTemplate:
    """Return the template that the attribute `chat` names or states in Jinja.

    Without it, the one that was published with the tokenizer; without either, plain text.
    """
    if chat is not None:
        return NAMED.get(chat) or ChatTemplate(chat)
    return ChatTemplate(published) if published is not None else NAMED["plain"]


class ChatError(RowError):
    """A conversation cannot be turned into ids and a mask. A chat template that fails on one row
    fails on many, so that these rows are not dropped.
    """

    droppable = False


@dataclass(eq=False)
class TemplateFailedError(ChatError):
    """A Jinja template does not parse or raises: `reason`, `source`, and `line` if known."""

    reason: str
    source: str
    line: int | None

    @override
    def text(self, stage: str) -> FailureText:
        return run_failures.template_failed(self.reason, self.line)


def render_template(
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    generate: bool,
    start: str,
    end: str,
) -> str:
    """Return the text of a conversation; with `generate`, up to where the model's next turn begins.

    `start` and `end` are what the template knows as `bos_token` and `eos_token`.
    Raises `TemplateFailedError`.
    """
    conversation = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return _compiled(template.source).render(
            messages=conversation, add_generation_prompt=generate, bos_token=start, eos_token=end
        )
    except jinja2.TemplateError as error:
        reason = error.message or type(error).__name__
        raise TemplateFailedError(reason, template.source, getattr(error, "lineno", None)) from None
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        raise TemplateFailedError(str(error), template.source, None) from None


_GENERATION = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")


@lru_cache(maxsize=64)
def _compiled(source: str) -> jinja2.Template:
    """Return a template with the settings and functions that published chat templates count on."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _json
    environment.globals["raise_exception"] = _raise
    # Marks of the answers' places (transformers' `generation` tag) are not needed: see `chat.py`.
    source = _GENERATION.sub(lambda m: f"{m[1]}{'endif' if m[2] else 'if true'}{m[3]}", source)
    # The date would make the tokens of a data set depend on the day, so `strftime_now` is left out.
    return environment.from_string(source)


def _json(value: object, indent: int | None = None) -> str:
    # Jinja's own filter escapes < and > for HTML.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
