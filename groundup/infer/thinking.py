"""Which part of an answer is thinking? Splits streamed text at <think> and </think>."""

from __future__ import annotations

from groundup.infer.text import partial_suffix

OPEN, CLOSE = "<think>", "</think>"


class ThinkSplitter:
    """Feed pieces of text, get (is_thinking, piece) pairs without the marks; a mark may arrive in parts.

    thinking: whether the prompt already opened the thinking. The line breaks around the marks, which the template
    adds, are taken off: after <think>, before and after </think>.
    """

    def __init__(self, thinking: bool = False) -> None:
        self.thinking = thinking
        self._held = ""
        self._trim = thinking  # drop line breaks until the first other character

    def feed(self, piece: str) -> list[tuple[bool, str]]:
        out: list[tuple[bool, str]] = []
        text = self._held + piece
        while True:
            mark = CLOSE if self.thinking else OPEN
            at = text.find(mark)
            if at < 0:
                break
            body = text[:at].rstrip("\n") if self.thinking else text[:at]
            self._emit(out, body)
            self.thinking, self._trim = not self.thinking, True
            text = text[at + len(mark) :]
        keep = partial_suffix(text, CLOSE if self.thinking else OPEN)
        body = text[: len(text) - keep]
        if self.thinking:  # a line break may be the one before </think>
            body = body.rstrip("\n")
        self._held = text[len(body) :]
        self._emit(out, body)
        return out

    def flush(self) -> list[tuple[bool, str]]:
        """What is still held when the answer ends."""
        out: list[tuple[bool, str]] = []
        self._emit(out, self._held)
        self._held = ""
        return out

    def _emit(self, out: list[tuple[bool, str]], text: str) -> None:
        if self._trim:
            text = text.lstrip("\n")
        if text:
            self._trim = False
            out.append((self.thinking, text))


def split_thinking(text: str, thinking: bool = False) -> tuple[str, str]:
    """(reasoning, answer) of a whole text."""
    splitter = ThinkSplitter(thinking)
    parts = splitter.feed(text) + splitter.flush()
    return "".join(t for inside, t in parts if inside), "".join(t for inside, t in parts if not inside)
