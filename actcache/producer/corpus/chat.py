"""Conversations to text, as a tokenizer's chat template writes them."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from actcache.errors import NotFoundError, UsageError

OWN = "tokenizer"


def find_template(tokenizer: PreTrainedTokenizerBase, chosen: str) -> str:
    """A chat template's text.

    Args:
        tokenizer: whose templates these are.
        chosen: "tokenizer" for its own, the name of one of several it has, or the path of a file.

    Raises:
        UsageError: it has none of that name. NotFoundError: no such file.
    """
    own: Any = tokenizer.chat_template
    if chosen == OWN and isinstance(own, str):
        return own
    if isinstance(own, dict) and (chosen in own or (chosen == OWN and "default" in own)):
        return own["default" if chosen == OWN else chosen]
    if "/" in chosen or "." in chosen:
        try:
            return Path(chosen).expanduser().read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise NotFoundError(f"chat template {chosen}: no such file") from error
    has = (
        f"the templates {', '.join(sorted(own))}"
        if isinstance(own, dict)
        else "one, its own"
        if own
        else "none"
    )
    raise UsageError(
        f"chat template {chosen!r}: tokenizer {tokenizer.name_or_path!r} has {has}; give 'tokenizer' for its own, the name of "
        f"one it has, or the path of a .jinja file"
    )


def template_digest(template: str) -> str:
    """Sha256 of a template's text."""
    return hashlib.sha256(template.encode()).hexdigest()


def make_renderer(tokenizer: PreTrainedTokenizerBase, template: str) -> Callable[[Any], str]:
    """A function from messages to text; it raises ValueError where the template refuses them."""

    def render(messages: Any) -> str:
        try:
            text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise ValueError(str(error) or type(error).__name__) from error
        assert isinstance(text, str)
        return text

    return render
