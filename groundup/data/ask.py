"""What would another model say? Prompts to any OpenAI-compatible server, its answers as rows for SFT.

An answer is appended to the output the moment it is there, so a run that was killed goes on where it was: a prompt is
asked if no row of the output begins with it. At the end the rows are put in the order of the prompts.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Queue
from typing import IO, Any

from groundup.data.ask_wire import Failed, Fatal, Outcome, Rejected, Wire, as_request
from groundup.data.read import Reader
from groundup.data.rows import Chat, Message, Preference, Prompt, Text, Tools, as_prompt, message
from groundup.errors import UserError
from groundup.files import explain, write_atomic, write_json

GO_ON = "what was answered is kept; the same command goes on from there"


@dataclass(frozen=True)
class Asking:
    """What decides an answer, and must be the same when a run goes on. extra: further fields of the request's body."""

    model: str
    system: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def body(self, messages: list[Message], tools: Tools) -> dict[str, Any]:
        """The request: what is not set is left to the server."""
        names = ("temperature", "top_p", "max_tokens", "seed")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return as_request(messages, tools) | {"model": self.model, **given, **self.extra}


@dataclass(frozen=True)
class Question:
    """A prompt with the hash by which it is known."""

    key: str
    messages: list[Message]
    tools: Tools


def ask(
    files: Sequence[str | Path],
    output: str | Path,
    wire: Wire,
    asking: Asking,
    parallel: int = 8,
    limit: int | None = None,
    progress: Callable[[dict[str, int]], None] | None = None,
) -> dict[str, Any]:
    """Ask every prompt of the files once and append `{"messages", "tools"?}` rows to output (JSON lines).

    files: rows in any known format (of conversations all up to the last answer), .txt: a prompt a line. parallel:
    requests at a time. Answers that are empty or cut at max_tokens are no rows: they go to OUTPUT.rejected.jsonl with
    the reason, and are not asked again. Returns counts: prompts, duplicates, rows, asked, rejected, seconds.
    UserError: a server that refuses or is gone, prompts that got no answer after all tries; what was answered is kept.
    """
    output, began = Path(output), time.perf_counter()
    questions, duplicates = _questions(files, asking.system, limit)
    with _locked(output):
        _claim(output, asking)
        done, rejected = _keys_of(output, _row_key), _keys_of(_rejected(output), lambda row: row["prompt"])
        todo = [question for question in questions if question.key not in done | rejected]
        with _appending(output) as rows, _appending(_rejected(output)) as others:
            counts = _Counts(len(questions), len(questions) - len(todo), progress)
            _ask_all(todo, wire, asking, parallel, rows, others, counts)
        written = _in_order(output, questions)
    report: dict[str, Any] = {"prompts": len(questions), "duplicates": duplicates, "rows": written, "asked": len(todo)}
    turned_away = len(_keys_of(_rejected(output), lambda row: row["prompt"]) & {q.key for q in questions})
    report |= {"rejected": turned_away, "output": str(output), "seconds": round(time.perf_counter() - began, 1)}
    if counts.failed:
        first = counts.first_failure
        raise UserError(wire.url, f"{counts.failed} of {len(todo)} prompts got no answer ({first})", GO_ON)
    return report


class Told:
    """Says how it goes on stderr, every few seconds at most."""

    def __init__(self, seconds: float = 5.0) -> None:
        self.seconds, self.last = seconds, 0.0

    def __call__(self, counts: dict[str, int]) -> None:
        over = sum(counts[name] for name in ("done", "rejected", "failed")) >= counts["of"]
        if time.monotonic() - self.last < self.seconds and not over:
            return
        self.last = time.monotonic()
        more = "".join(f", {counts[name]} {name}" for name in ("rejected", "failed") if counts[name])
        print(f"{time.strftime('%H:%M:%S')} ask: {counts['done']} of {counts['of']} answered{more}", file=sys.stderr)


def json_object(where: str, text: str) -> dict[str, Any]:
    """UserError: the text is no JSON object."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(where, f"{text!r} is no JSON object", """write e.g. '{"top_k": 20}'""")
    return value


@dataclass
class _Counts:
    prompts: int
    done: int
    progress: Callable[[dict[str, int]], None] | None
    rejected: int = 0
    failed: int = 0
    failed_in_a_row: int = 0
    first_failure: str = ""

    def tell(self) -> None:
        if self.progress:
            done, other = {"done": self.done, "of": self.prompts}, {"rejected": self.rejected, "failed": self.failed}
            self.progress(done | other)


def _ask_all(
    todo: list[Question], wire: Wire, asking: Asking, parallel: int, rows: IO[str], others: IO[str], counts: _Counts
) -> None:
    """Daemon threads ask, this one writes: Ctrl-C waits for nobody."""
    work: Queue[Question] = Queue()
    results: Queue[tuple[Question, Outcome]] = Queue()
    for question in todo:
        work.put(question)

    def worker() -> None:
        with suppress(Empty):
            while not wire.stopped:
                question = work.get_nowait()
                try:
                    outcome = wire.ask(asking.body(question.messages, question.tools))
                except Exception as error:  # it must not be waited for for ever
                    outcome = Fatal(wire.url, f"{type(error).__name__}: {error}", "please report this")
                if isinstance(outcome, Fatal):
                    wire.stop()
                results.put((question, outcome))

    for _ in range(min(parallel, len(todo))):
        threading.Thread(target=worker, daemon=True).start()
    try:
        for _ in todo:
            _take(*results.get(), rows, others, counts, max(parallel, 4))
    finally:
        wire.stop()


def _take(question: Question, outcome: Outcome, rows: IO[str], others: IO[str], counts: _Counts, patience: int) -> None:
    """Write an outcome down. UserError where asking on makes no sense."""
    if isinstance(outcome, Fatal):
        raise UserError(outcome.where, outcome.why, f"{outcome.fix}; {GO_ON}")
    if isinstance(outcome, Failed):
        counts.failed, counts.failed_in_a_row = counts.failed + 1, counts.failed_in_a_row + 1
        counts.first_failure = counts.first_failure or outcome.why
        if counts.failed_in_a_row >= patience:
            raise UserError(outcome.where, f"{patience} prompts after another got no answer ({outcome.why})", GO_ON)
    elif isinstance(outcome, Rejected):
        counts.rejected, counts.failed_in_a_row = counts.rejected + 1, 0
        _append(others, {"prompt": question.key, "why": outcome.why, "messages": question.messages})
    else:
        counts.done, counts.failed_in_a_row = counts.done + 1, 0
        tools = {"tools": question.tools} if question.tools else {}
        _append(rows, {"messages": [*question.messages, outcome.message], **tools})
    counts.tell()


def _questions(files: Sequence[str | Path], system: str | None, limit: int | None) -> tuple[list[Question], int]:
    """The different prompts of the files in their order, and how many were there already."""
    found: dict[str, Question] = {}
    duplicates = 0
    for messages, tools in _prompts(files):
        if system and messages[0]["role"] != "system":
            messages = [message("system", system), *messages]
        key = _key(messages, tools)
        duplicates += key in found
        found.setdefault(key, Question(key, messages, tools))
        if limit and len(found) == limit:
            break
    return list(found.values()), duplicates


def _prompts(files: Sequence[str | Path]) -> Iterator[tuple[list[Message], Tools]]:
    for file in files:
        reader = Reader(f"{file}:line" if Path(file).suffix == ".txt" else file)
        for row in reader:
            if isinstance(row, Text):
                yield [message("user", row.text)], None
                continue
            if isinstance(row, Preference):
                asked = Prompt(row.prompt, tools=row.tools)
            elif isinstance(row, (Chat, Prompt)):
                asked = as_prompt(row) if isinstance(row, Chat) else row
            else:
                raise UserError(reader.where, f"{type(row).__name__} rows are no prompts", "give chats or prompts")
            if not asked.messages:
                raise UserError(reader.where, "asks nothing", "a row needs a user message")
            yield asked.messages, asked.tools


def _key(messages: list[Message], tools: Tools) -> str:
    text = json.dumps([messages, tools or None], ensure_ascii=False, sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _row_key(row: dict[str, Any]) -> str:
    return _key(row["messages"][:-1], row.get("tools"))


def _keys_of(path: Path, key: Callable[[dict[str, Any]], str]) -> set[str]:
    """Of all whole lines. A line that a kill has cut is taken off the file."""
    if not path.exists():
        return set()
    keys, whole = set(), 0
    with path.open("rb+") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            try:
                keys.add(key(json.loads(line)))
            except (ValueError, KeyError, TypeError, IndexError):
                fix = "choose another output: this one holds other rows"
                raise UserError(f"{path}:{number}", "is no answer that was asked for", fix) from None
        file.truncate(whole)
    return keys


def _in_order(output: Path, questions: Iterable[Question]) -> int:
    """Put the rows in the order of the prompts, rows of other prompts last. Returns how many there are."""
    lines = {_row_key(json.loads(line)): line for line in output.read_text(encoding="utf-8").splitlines(keepends=True)}
    ordered = [lines.pop(question.key) for question in questions if question.key in lines]
    write_atomic(output, "".join([*ordered, *lines.values()]))
    return len(ordered)


def _rejected(output: Path) -> Path:
    return output.with_name(output.name + ".rejected.jsonl")


def _claim(output: Path, asking: Asking) -> None:
    """UserError where the output was begun with another model or other settings."""
    about, mine = output.with_name(output.name + ".ask.json"), vars(asking)
    if not about.exists():
        if output.exists() and output.stat().st_size:
            raise UserError(output, "is there already, and was not written by ask", "choose another output")
        write_json(about, mine)
        return
    try:
        before = json.loads(about.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(about, "is not JSON any more", "choose another output") from None
    for name, value in mine.items():
        if before.get(name) != value:
            why = f"was begun with {name}={before.get(name)}, not {value}"
            raise UserError(output, why, "give the same settings, or choose another output")


@contextmanager
def _appending(path: Path) -> Iterator[IO[str]]:
    try:
        with path.open("a", encoding="utf-8") as file:
            yield file
    except OSError as error:
        raise explain(error, path) from error


def _append(file: IO[str], row: dict[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False) + "\n")
    file.flush()  # to the system: a killed process loses nothing


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """One asker an output; the kernel frees the lock of a process that died."""
    from filelock import FileLock, Timeout

    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(output.with_name(f".{output.name}.lock"), timeout=0):
            yield
    except Timeout:
        raise UserError(output, "another process is writing it", "wait for it, or choose another output") from None
