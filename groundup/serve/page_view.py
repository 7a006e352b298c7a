"""How is a turn drawn? The question as a bubble, every answer in its column, redrawn while it comes."""

from __future__ import annotations

import re

import streamlit as st

from groundup.serve.page_chat import Answer, Turn
from groundup.serve.page_text import Say, say_fault

# A picture named in an answer would make the browser fetch whatever address the model wrote: it becomes a link.
_PICTURE = re.compile(r"!(\[[^\]\n]*\]\()")


def as_markdown(text: str) -> str:
    """A model's text for st.markdown (which already escapes HTML)."""
    return _PICTURE.sub(r"\1", text)


def draw_turn(turn: Turn, number: int, say: Say) -> list[AnswerView]:
    """Draw a turn; the views redraw its answers."""
    right = st.container(horizontal_alignment="right")
    with right.container(key=f"said-{number}", width="content"):
        for picture in turn.pictures:
            st.image(picture.data, width=240)
        if turn.text:
            st.text(turn.text)
    if len(turn.answers) == 1:
        return [AnswerView(turn.answers[0], say, f"{number}-0")]
    views = []
    for column, (place, answer) in enumerate(zip(st.columns(len(turn.answers)), turn.answers, strict=True)):
        with place:
            views.append(AnswerView(answer, say, f"{number}-{column}"))
    return views


class AnswerView:
    """One answer on the page: thinking (open while it comes, then folded), text, tool calls, a line of figures."""

    def __init__(self, answer: Answer, say: Say, key: str) -> None:
        self._answer, self._say, self._key = answer, say, key
        self._folded: bool | None = None
        self._calls_drawn = ""
        with st.container(key=f"answer-{key}"):
            st.caption(answer.model)
            self._thinking, self._text, self._calls, self._status = st.empty(), st.empty(), st.empty(), st.empty()
        self.draw()

    def draw(self) -> None:
        """Bring the page up to date; the status is always written, which is where a rerun can break in."""
        answer = self._answer
        done = answer.done  # read first: what came before it is drawn below
        if answer.reasoning:
            self._draw_thinking(done)
        if answer.content:
            self._text.markdown(as_markdown(answer.content))
        if answer.calls:
            self._draw_calls()
        if not done:
            started = answer.reasoning or answer.content or answer.calls
            self._status.caption(self._say("writing" if started else "waiting"))
        elif answer.fault is not None:
            self._status.error(say_fault(self._say, answer.fault), icon=":material/error:")
        else:
            figures = self._figures()
            self._status.caption(figures) if figures else self._status.empty()

    def _draw_thinking(self, done: bool) -> None:
        folded = bool(done or self._answer.useful)
        if folded != self._folded:  # made anew only when it folds, so that the person may open and close it
            seconds = self._answer.thought_seconds
            label = self._say("thought", seconds=seconds) if folded else self._say("thinking_now")
            self._folded = folded
            key = f"thinking-{self._key}-{'folded' if folded else 'open'}"
            self._thought = self._thinking.expander(label, expanded=not folded, key=key).empty()
            self._thought.markdown(as_markdown(self._answer.reasoning))
        elif not folded:
            self._thought.markdown(as_markdown(self._answer.reasoning))

    def _draw_calls(self) -> None:
        calls = [(call.name, call.pretty) for call in self._answer.calls]
        if repr(calls) == self._calls_drawn:
            return
        self._calls_drawn = repr(calls)
        with self._calls.container():
            for name, arguments in calls:
                st.markdown(f":material/build: `{name.replace('`', '')}`")
                st.code(arguments, language="json", wrap_lines=True)

    def _figures(self) -> str:
        """How it ended, where that is worth saying, and how fast it was."""
        answer, parts = self._answer, []
        if answer.finish_reason in ("stopped", "length", "content_filter"):
            parts.append(self._say(answer.finish_reason))
        if answer.tokens:
            rate = answer.tokens / max(answer.seconds, 1e-3)
            parts.append(self._say("figures", tokens=answer.tokens, seconds=answer.seconds, rate=rate))
        return " · ".join(parts)
