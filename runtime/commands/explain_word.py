"""`tune explain`: pages of the language's reference."""

from __future__ import annotations

from tunelang.dsl.messages.wording import nearest
from tunelang.dsl.reference import explain
from tunelang.runtime.commands.terminal import page, refuse


def explain_word(name: str | None, everything: bool) -> None:
    """Print the page of a word, without one the overview, or the whole reference."""
    if everything or name is None:
        page(explain.reference() if everything else explain.overview())
        return
    text = explain.explain(name)
    if text is None:
        near = nearest(name, explain.topics())
        hint = f"; did you mean `{near}`?" if near else "; `tune explain` lists what there is"
        refuse(f"nothing is called `{name}`{hint}")
    page(text)
