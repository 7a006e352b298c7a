"""How is text tokenised once and never again? Into flat arrays on disk, found again by what they were made from.

A shard folder holds `tokens.bin` (every document end to end, 2 bytes a token while the ids fit), `mask.bin` (chat: 1
where the token is trained), `offsets.bin` (where each document begins, and the end), `bytes.bin` and `trained.bin` (per
document), `wanted.bin` (judged answers: 1 for good ones), and `meta.json`, written last. It is mapped, not read, so a
corpus larger than memory costs no memory; and it appears in one rename, so there is never half of one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from groundup.data.chunks import ByteRange, Chunk, Reading, Worker, chunks, identity
from groundup.data.encode import JUDGED, KINDS, MASKED, NAMED, UNITS, Encoded, Fault, Faults, encode_rows, token_dtype
from groundup.data.pool import map_in_order
from groundup.data.read import OnBad
from groundup.data.records import file_kind
from groundup.data.sources import open_source
from groundup.errors import UserError

if TYPE_CHECKING:
    from groundup.tokenizer import Tokenizer

VERSION = 4  # of what the folder holds and how it is made; part of its name
ALONE = 8 << 20  # bytes of files below which starting processes takes longer than the work
HASHED = 256 << 20  # files up to this size are known by all their bytes, larger ones by size, time and samples
MAX_DROPPED = 0.01
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

log = logging.getLogger(__name__)
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TokenShards:
    """Tokenised documents, mapped from disk. Document i is tokens[offsets[i] : offsets[i + 1]].

    tokens: uint16 or uint32. mask: uint8, 1 where trained (chat only, else None: all are). offsets: int64, one more
    than documents. bytes: int32, UTF-8 bytes of the document's trained text. trained: int32, its tokens that are
    targets. wanted: uint8, 1 where the document's answer is a good one (unpaired only, else None). meta: rows,
    bad_rows, dropped_rows, truncated_rows (in UNITS of the kind), documents, tokens, the first bad and dropped by name.
    """

    path: Path
    tokens: NDArray[Any]
    mask: NDArray[np.uint8] | None
    offsets: NDArray[np.int64]
    bytes: NDArray[np.int32]
    trained: NDArray[np.int32]
    meta: dict[str, Any]
    wanted: NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        """Documents."""
        return len(self.offsets) - 1

    @property
    def together(self) -> int:
        """Documents that belong together, side by side: the two of a pair, else 1."""
        return _together(self.meta["kind"])

    @property
    def judged(self) -> bool:
        """Whether the mask holds judgements, not what is trained."""
        return self.meta["kind"] in JUDGED

    @classmethod
    def open(cls, path: Path) -> TokenShards | None:
        """The folder's arrays; None where there is none, or it is not whole."""
        try:
            meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
            columns = {name: np.memmap(path / f"{name}.bin", dtype, "r") for name, dtype in meta["columns"].items()}
        except (OSError, ValueError, KeyError):
            return None
        sizes = dict.fromkeys(("bytes", "trained", "wanted"), meta["documents"]) | {"offsets": meta["documents"] + 1}
        if any(len(column) != sizes.get(name, meta["tokens"]) for name, column in columns.items()):
            return None
        plain: dict[str, Any] = {name: column.view(np.ndarray) for name, column in columns.items()}  # indexes faster
        return cls(path=path, meta=meta, mask=plain.pop("mask", None), **plain)


def tokenize_files(
    paths: Sequence[str | Path],
    tokenizer: Tokenizer,
    kind: str = "text",
    cache_dir: str | Path = "cache",
    workers: int | None = None,
    max_len: int | None = None,
    *,
    format: str | None = None,
    on_bad: OnBad = "raise",
    placeholders: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> TokenShards:
    """Documents of files (anything that read_rows takes) as mapped arrays, in the files' order, tokenised once.

    kind: "text" (documents; a conversation becomes the document that it renders to), "chat" (conversations, cut to
    max_len turn by turn), "preference" (pairs, cut to max_len together) or "unpaired" (judged answers, cut like chats),
    all three with the mask of trained tokens; "stepwise" or "outcome" (solutions and answers), whose mask says 1 where
    something wrong ends and 2 where something right does.
    workers: processes; default one a core; the result does not depend on it. on_bad: "raise" at the first bad row, or
    "count" them. progress: called with bytes done and in all.
    Safe to call in every rank at once: one builds, the others wait for it and map the same files.
    Errors, all UserError: whatever read_rows raises; no document at all; over 1 % of conversations that train nothing;
    a full disk (nothing is left behind then).
    """
    if kind not in KINDS:
        raise ValueError(f"kind is one of {KINDS}, not {kind!r}")
    readings = [Reading(str(path), format, on_bad, placeholders) for path in paths]
    folder = Path(cache_dir) / f"{kind}-{_key(readings, tokenizer, kind, max_len)}"
    shards = TokenShards.open(folder)
    if shards is None:
        with _locked(folder):
            shards = TokenShards.open(folder)  # another process may have built it while we waited
            if shards is None:
                workers = workers or _cores()
                encoded = _encoded(readings, tokenizer, kind, max_len, workers, progress)
                shards = _build(folder, encoded, kind, token_dtype(tokenizer.vocab_size), on_bad)
    _tell(shards.meta, paths)
    return shards


def _key(readings: list[Reading], tokenizer: Tokenizer, kind: str, max_len: int | None) -> str:
    """Hash of all that decides the arrays: what the files hold, the tokenizer, the options. Not where the files lie."""
    parts: list[Any] = [VERSION, kind, max_len, tokenizer.fingerprint(), tokenizer.bos_id, tokenizer.eos_id]
    for reading in readings:
        source = open_source(reading.path)
        parts += [reading.format, reading.on_bad, sorted((reading.placeholders or {}).items())]
        parts += [source.txt, identity(reading.path)]
        parts += [(file_kind(file), ".tsv" in file.suffixes, _content(file)) for file in source.files]
    return hashlib.blake2b(repr(parts).encode(), digest_size=10).hexdigest()


def _content(file: Path) -> str:
    stat = file.stat()
    digest = hashlib.blake2b(str(stat.st_size).encode(), digest_size=16)
    with file.open("rb") as stream:
        if stat.st_size <= HASHED:
            while block := stream.read(1 << 20):
                digest.update(block)
        else:
            digest.update(str(stat.st_mtime_ns).encode())
            for begin in np.linspace(0, stat.st_size - (1 << 16), 64).astype(int).tolist():
                stream.seek(begin)
                digest.update(stream.read(1 << 16))
    return digest.hexdigest()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One builder at a time. The kernel frees the lock of a process that died, so a lock is never stale.

    Where a file system has no locks every process builds: slower, not wrong, since the folder appears in one rename.
    """
    from filelock import FileLock, Timeout

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / f".{folder.name}.lock")
        try:
            lock.acquire(timeout=2)
        except Timeout:
            log.warning("waiting for another process that tokenises the same files into %s", folder)
            lock.acquire()
    except NotImplementedError:
        log.warning("%s has no file locks: every process tokenises for itself", folder.parent)
    except OSError as error:
        why = f"cannot be written ({error.strerror})"
        raise UserError(folder.parent, why, "give a cache folder that can be written") from error
    try:
        yield
    finally:
        lock.release()


def _encoded(
    readings: list[Reading],
    tokenizer: Tokenizer,
    kind: str,
    max_len: int | None,
    workers: int,
    progress: Progress | None,
) -> Generator[Encoded]:
    """Every chunk's arrays in order, faults named by file:line; the reader's own faults come last of a source."""
    total = sum(file.stat().st_size for reading in readings for file in open_source(reading.path).files)
    processes = 0 if workers == 1 or total < ALONE else workers
    done = 0
    for reading in readings:
        bad = Faults()
        sent: list[Chunk] = []
        tasks = _remembered(chunks(reading, bad), sent)
        file, before = Path(), 0  # lines of this file in the chunks before
        with closing(map_in_order(partial(Worker, reading, tokenizer, kind, max_len), tasks, processes)) as results:
            for result in results:
                chunk = sent.pop(0)
                if chunk.file != file:
                    file, before = chunk.file, 0
                for faults in (result.bad, result.dropped):
                    faults.first = [_named(fault, file, before) for fault in faults.first]
                before += result.lines
                yield result
                done += chunk.stop - chunk.start if isinstance(chunk, ByteRange) else chunk.size
                if progress:
                    progress(min(done, total), total)
        if bad.count:
            yield replace(encode_rows([], tokenizer, kind), bad=bad)
    if progress:
        progress(total, total)


def _remembered(tasks: Iterable[Chunk], sent: list[Chunk]) -> Iterator[Chunk]:
    for task in tasks:
        sent.append(task)
        yield task


def _named(fault: Fault, file: Path, before: int) -> Fault:
    return replace(fault, where=f"{file}:{before + fault.where}") if isinstance(fault.where, int) else fault


def _build(folder: Path, encoded: Generator[Encoded], kind: str, dtype: Any, on_bad: OnBad) -> TokenShards:
    """Write the arrays into a folder beside, and rename it when all is on disk."""
    for left in folder.parent.glob(f".{folder.name}.tmp-*"):
        shutil.rmtree(left, ignore_errors=True)  # of a builder that was killed: we hold its lock
    temporary = folder.parent / f".{folder.name}.tmp-{os.getpid()}"
    try:
        temporary.mkdir()
        meta = _write(temporary, encoded, kind, dtype, on_bad)
        with (temporary / "meta.json").open("w", encoding="utf-8") as stream:
            json.dump(meta, stream, ensure_ascii=False, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        if folder.exists() and TokenShards.open(folder) is None:
            shutil.rmtree(folder)
        try:
            temporary.replace(folder)
        except OSError:
            if TokenShards.open(folder) is None:  # else another process was first, where locks do not work
                raise
    except OSError as error:
        if error.errno not in FULL:
            raise
        why = f"no room left for the tokens ({error.strerror})"
        raise UserError(
            folder.parent, why, "free some space or give another cache folder; nothing was changed"
        ) from error
    finally:
        encoded.close()  # ends the workers now, also after Ctrl-C
        shutil.rmtree(temporary, ignore_errors=True)
    shards = TokenShards.open(folder)
    if shards is None:
        raise UserError(folder, "was written but cannot be read back", "check the disk, or give another cache folder")
    return shards


def _write(folder: Path, encoded: Iterator[Encoded], kind: str, dtype: Any, on_bad: OnBad) -> dict[str, Any]:
    """Append chunk after chunk; returns meta. Raises UserError for what the counts do not allow."""
    columns: dict[str, Any] = {"tokens": dtype, "offsets": np.int64, "bytes": np.int32, "trained": np.int32}
    columns |= {"mask": np.uint8} if kind in MASKED else {}
    columns |= {"wanted": np.uint8} if kind == "unpaired" else {}
    documents = tokens = truncated = context = 0
    bad, dropped = Faults(), Faults()
    with ExitStack() as stack:
        streams: dict[str, IO[bytes]] = {
            name: stack.enter_context((folder / f"{name}.bin").open("wb")) for name in columns
        }
        streams["offsets"].write(np.zeros(1, np.int64).tobytes())
        for part in encoded:
            if part.bad.count and on_bad == "raise":
                raise UserError(*astuple(part.bad.first[0]))
            offsets = tokens + np.cumsum(part.lengths)
            values = {"tokens": part.tokens, "offsets": offsets, "bytes": part.bytes, "trained": part.trained}
            if part.mask is not None:
                values["mask"] = part.mask
            if part.wanted is not None:
                values["wanted"] = part.wanted
            for name, value in values.items():
                streams[name].write(value.astype(columns[name], copy=False).tobytes())
            documents, tokens = documents + len(part.lengths), tokens + len(part.tokens)
            truncated, context = truncated + part.truncated, context + part.context
            for total, faults in ((bad, part.bad), (dropped, part.dropped)):
                total.count += faults.count
                total.first = (total.first + faults.first)[:NAMED]
        for stream in streams.values():
            stream.flush()
            os.fsync(stream.fileno())
    kept = documents // _together(kind)
    _check(kept, bad, dropped, UNITS[kind])
    return {
        "kind": kind,
        "rows": kept + bad.count + dropped.count,
        "documents": documents,
        "tokens": tokens,
        "bad_rows": bad.count,
        "dropped_rows": dropped.count,
        "truncated_rows": truncated,
        "context_answers": context,
        "bad": [asdict(fault) for fault in bad.first],
        "dropped": [asdict(fault) for fault in dropped.first],
        "columns": {name: np.dtype(column).name for name, column in columns.items()},
    }


def _together(kind: str) -> int:
    return 2 if kind == "preference" else 1


def _check(kept: int, bad: Faults, dropped: Faults, units: str) -> None:
    if dropped.count > MAX_DROPPED * (kept + dropped.count):
        first = dropped.first[0]
        share = f"{dropped.count} of {kept + dropped.count} {units} train nothing; the first is here"
        raise UserError(first.where, f"{share}: {first.why}", f"{first.fix}: mend the rows or raise seq_len")
    if not kept:
        first = bad.first[0] if bad.first else Fault("data", "holds no rows", "give a file with at least one row")
        raise UserError(first.where, f"no row can be used; the first: {first.why}", first.fix, first.detail)


def _tell(meta: dict[str, Any], paths: Sequence[str | Path]) -> None:
    """Nothing is silent: what was left out, with an example each."""
    units = UNITS[meta["kind"]]
    for name, what in (("bad", "bad rows left out"), ("dropped", f"{units} left out that train nothing")):
        if meta[f"{name}_rows"]:
            first = meta[name][0]
            log.warning("%d %s, the first at %s: %s", meta[f"{name}_rows"], what, first["where"], first["why"])
    if meta["truncated_rows"]:
        read = meta["rows"] - meta["bad_rows"]
        log.warning("%d of %d %s cut to a row (%s)", meta["truncated_rows"], read, units, ", ".join(map(str, paths)))
    if meta["context_answers"] and meta["kind"] == "chat":
        why = "the chat template rewrites them once the chat goes on"
        how = "groundup data inspect FILE --tokenizer DIR shows it"
        log.warning("%d answers are context alone, not trained: %s (%s)", meta["context_answers"], why, how)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
