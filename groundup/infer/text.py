"""How do ids become text, piece by piece? No character is ever split, no stop string ever shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from groundup.tokenizer import StreamDecoder

if TYPE_CHECKING:
    from groundup.tokenizer import Tokenizer


class TextStream:
    """Feed ids, get text that is final.

    Held back: bytes of an unfinished UTF-8 character, and text that may turn out to begin a stop string. The pieces,
    with `flush()`, join to the text of the whole up to the first stop string. `stopped` is set when one was found,
    `stopped_by` says which.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.stop, self.stopped = tuple(stop), False
        self.stopped_by: str | None = None
        self._decoder, self._held = StreamDecoder(tokenizer), ""

    def add(self, token: int) -> str:
        return self._release(self._decoder.feed([token]))

    def flush(self) -> str:
        """What is still held when the answer ends; nothing after a stop string."""
        if self.stopped:
            return ""
        piece = self._release(self._decoder.finish())
        held, self._held = self._held, ""
        return piece + held

    def _release(self, text: str) -> str:
        text, self._held = self._held + text, ""
        found = [(at, s) for s in self.stop if (at := text.find(s)) >= 0]
        if found:
            at, self.stopped_by = min(found)
            self.stopped = True
            return text[:at]
        keep = max((partial_suffix(text, s) for s in self.stop), default=0)
        if keep:
            text, self._held = text[:-keep], text[-keep:]
        return text


def partial_suffix(text: str, target: str) -> int:
    """Length of the longest end of text that begins target without being all of it."""
    return next((n for n in range(min(len(text), len(target) - 1), 0, -1) if text.endswith(target[:n])), 0)
