"""How do I talk to it here? The chat in a terminal, and the same through a pipe."""

from __future__ import annotations

import dataclasses
import os
import sys
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from groundup.errors import UserError
from groundup.infer.params import params_from_dir
from groundup.infer.thinking import ThinkSplitter
from groundup.serve.commands import Leave, run_command
from groundup.serve.conversation import Conversation
from groundup.serve.script import load_pair, run_generate

if TYPE_CHECKING:
    from groundup.infer.engine import Engine

__all__ = ["run_chat", "run_generate"]

DIM, PLAIN, CLEAR_LINE = "\x1b[2m", "\x1b[0m", "\r\x1b[K"


class Screen:
    """Where answers and notices go: both to the terminal, notices dim; through a pipe notices go to stderr."""

    def __init__(self, out: TextIO, err: TextIO, tty: bool) -> None:
        self.out, self.tty = out, tty
        self.notices = out if tty else err
        self.color = tty and "NO_COLOR" not in os.environ

    def dim(self, text: str) -> str:
        return f"{DIM}{text}{PLAIN}" if self.color else text

    def notice(self, text: str) -> None:
        print(self.dim(text), file=self.notices, flush=True)

    def write(self, text: str) -> None:
        self.out.write(_printable(text))
        self.out.flush()


def _printable(text: str) -> str:
    """Without the control characters that could move the cursor or recolour the terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs"))


class _Answer:
    """Prints one answer as it comes, folding the thinking, and keeps both texts."""

    def __init__(self, screen: Screen, thinking: bool, show: bool) -> None:
        self.screen, self.show = screen, show
        self.splitter = ThinkSplitter(thinking)
        self.reasoning, self.content = "", ""
        self._folded = False

    def feed(self, parts: list[tuple[bool, str]]) -> None:
        for inside, text in parts:
            if inside:
                self._think(text)
            else:
                self._unfold()
                self.content += text
                self.screen.write(text)

    def _think(self, text: str) -> None:
        self.reasoning += text
        if self.show:
            self.screen.notices.write(self.screen.dim(_printable(text)))
            self.screen.notices.flush()
        elif not self._folded and self.screen.tty:
            self.screen.out.write(self.screen.dim("thinking..."))
            self.screen.out.flush()
        self._folded = True

    def _unfold(self) -> None:
        if not self._folded:
            return
        self._folded = False
        if self.show:
            print("\n", file=self.screen.notices, flush=True)
        elif self.screen.tty:
            self.screen.out.write(CLEAR_LINE)
            self.screen.notice(f"thought for {len(self.reasoning)} characters (/think shows them)")

    def end(self) -> None:
        self.feed(self.splitter.flush())
        self._unfold()
        self.screen.write("\n")


def answer(engine: Engine, chat: Conversation, question: str, screen: Screen) -> None:
    """Put the question, print the answer as it comes, and keep both. Ctrl-C keeps the part that was said.

    Raises UserError when the conversation fills the model's context; the question is then not kept.
    """
    from groundup.infer.generate import stream

    chat.turns.append({"role": "user", "content": question})
    try:
        prompt = engine.tokenizer.render(chat.messages, add_generation_prompt=True, enable_thinking=chat.thinking).ids
        context = engine.context
        if len(prompt) >= context:
            why = f"{len(prompt)} tokens do not fit in the model's context of {context}"
            raise UserError("conversation", why, "/undo takes back a question, /reset starts anew")
    except Exception:
        chat.turns.pop()
        raise
    room = min(chat.params.max_tokens, context - len(prompt))
    pieces = stream(engine, prompt, dataclasses.replace(chat.params, max_tokens=room))
    out = _Answer(screen, thinking=chat.thinking is True, show=chat.show_thinking)
    interrupted = False
    try:
        for piece in pieces:
            out.feed(out.splitter.feed(piece))
    except KeyboardInterrupt:
        interrupted = True
        pieces.close()
    out.end()
    if out.content or out.reasoning:
        turn = {"role": "assistant", "content": out.content}
        chat.turns.append(turn | ({"reasoning_content": out.reasoning} if out.reasoning else {}))
    else:
        chat.turns.pop()
    if interrupted:
        screen.notice("(stopped)")
    elif pieces.completion is not None and pieces.completion.finish_reason == "length":
        full = room < chat.params.max_tokens
        screen.notice(
            f"(the model's context of {context} tokens is full: /reset starts anew)"
            if full
            else f"(cut at {room} tokens)"
        )


def _read_line(tty: bool) -> str | None:
    """The next line, None at the end. A line that ends in a backslash goes on in the next."""
    lines: list[str] = []
    while True:
        try:
            line = input("> " if not lines else ". ") if tty else sys.stdin.readline()
        except EOFError:
            line = ""
            if not lines:
                return None
        if not tty and not line:
            return "\n".join(lines) if lines else None
        line = line.rstrip("\r\n")
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line[:-1])


def run_chat(
    path: str | Path,
    *,
    system: str | None = None,
    think: bool | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    max_tokens: int | None = None,
    seed: int | None = None,
    quantize: str | None = None,
    device: str = "auto",
) -> None:
    """Chat with the model in a folder until /exit or Ctrl-D. Settings not given come from generation_config.json.

    With stdin piped each line is a turn: answers go to stdout, one after the other, notices to stderr.
    Raises UserError when the folder cannot be loaded.
    """
    params = params_from_dir(
        path,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        max_tokens=max_tokens or 1024,
        seed=seed,
    )
    from groundup.infer.engine import Engine, EngineSettings

    engine = Engine(*load_pair(path, device), EngineSettings(quantize=quantize))
    tty = sys.stdin.isatty() and sys.stdout.isatty()
    for name in ("stdin", "stdout"):  # a stray byte in a script must not end the program
        reconfigure = getattr(getattr(sys, name), "reconfigure", None)
        if reconfigure:
            reconfigure(errors="replace")
    if tty:
        import readline  # noqa: F401  editing and history of input()
    screen = Screen(sys.stdout, sys.stderr, tty)
    chat = Conversation(params, system=system, thinking=think)
    if tty:
        screen.notice(f"{path}: context of {engine.context} tokens. /help lists the commands.")
    chat_loop(engine, chat, screen)


def chat_loop(engine: Engine, chat: Conversation, screen: Screen) -> None:
    """Read, answer, print, until the end of input. Faults of one turn are said in one line and the chat goes on."""
    while True:
        try:
            line = _read_line(screen.tty)
            if line is None:
                break
            if line.startswith("/"):
                screen.notice(run_command(line, chat))
            elif line.strip():
                answer(engine, chat, line, screen)
        except Leave:
            return
        except UserError as error:
            screen.notice(str(error))
        except KeyboardInterrupt:
            if not screen.tty:
                raise
            screen.notice("\n(Ctrl-D or /exit leaves)")
    if screen.tty:
        screen.write("\n")
