"""Where are the rows? A path is a file, `FILE.txt:line`, or `DIR:NAME` with LLaMA-Factory's dataset_info.json."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groundup.data.messages import ROLES, RowError
from groundup.errors import UserError

_ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
_SAME = ("system", "tools", "history", "images", "chosen", "rejected", "kto_tag")
_TAGS = {  # LLaMA-Factory's name of a tag, what it is by default, and the role that it means
    "user_tag": ("human", "user"), "assistant_tag": ("gpt", "assistant"), "system_tag": ("system", "system"),
    "observation_tag": ("observation", "tool"), "function_tag": ("function_call", "function_call"),
}  # fmt: skip


@dataclass(frozen=True)
class Opened:
    """files: what to read, in order. convert: brings a raw row to the standard keys. txt: "file" or "line"."""

    files: tuple[Path, ...]
    convert: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    txt: str = "file"

    @property
    def path(self) -> Path:
        """The only file, or the first one."""
        return self.files[0]


def open_source(path: str | Path) -> Opened:
    """What a path given by a person stands for. UserError where it is missing, empty, or an unexplained folder."""
    whole = Path(path)
    base, colon, name = str(path).rpartition(":")
    try:
        if whole.is_dir():
            return _folder(whole, "")
        if not whole.exists() and colon and Path(base).is_dir():
            return _folder(Path(base), name)
        if not whole.exists() and name in ("line", "file") and Path(base).is_file():
            return Opened((_file(Path(base)),), txt=name)
        return Opened((_file(whole),))
    except OSError as error:
        raise UserError(path, f"cannot be opened ({error.strerror})", "check the name and the permissions") from error


def _file(path: Path) -> Path:
    if not path.exists():
        names = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, 3)
        fix = f"did you mean {', '.join(near)}?" if near else f"there are {len(names)} files in {path.parent}"
        raise UserError(path, "no such file", fix if path.parent.is_dir() else f"there is no folder {path.parent}")
    if not path.is_file():
        raise UserError(path, "is no regular file", "give a file of rows")
    if path.stat().st_size == 0:
        raise UserError(path, "the file is empty", "give a file with at least one row")
    return path


def _folder(folder: Path, name: str) -> Opened:
    """One entry of the folder's dataset_info.json."""
    index = folder / "dataset_info.json"
    if not index.is_file():
        files = sorted(one.name for one in folder.iterdir() if one.is_file())[:3]
        fix = f"name a file in it, like {', '.join(files)}" if files else "name a file"
        raise UserError(folder, "is a directory without dataset_info.json", fix)
    try:
        entries = json.loads(index.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UserError(index, f"broken JSON ({error})", "repair it") from error
    if not isinstance(entries, dict) or not all(isinstance(one, dict) for one in entries.values()):
        raise UserError(index, "must map names to objects", 'like {"mine": {"file_name": "mine.jsonl"}}')
    if not name and len(entries) == 1:
        name = next(iter(entries))
    if name not in entries:
        near = difflib.get_close_matches(name, entries, 3) or list(entries)[:8]
        why = f"has no entry {name!r}" if name else f"has {len(entries)} entries"
        raise UserError(index, why, f"write {folder}:NAME with one of {', '.join(near)}")
    return _entry(index, name, entries[name])


def _entry(index: Path, name: str, entry: dict[str, Any]) -> Opened:
    if "file_name" not in entry:
        keys = ", ".join(entry) or "no keys"
        raise UserError(index, f"{name} has {keys} and no file_name", "download the set and name its file")
    target = index.parent / str(entry["file_name"])
    files = tuple(sorted(one for one in target.iterdir() if one.is_file())) if target.is_dir() else (target,)
    if not files:
        raise UserError(target, "is an empty folder", f"put the files of {name} there")
    formatting = entry.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt", "openai"):
        raise UserError(index, f"{name} has the formatting {formatting!r}", "use alpaca, sharegpt or openai")
    columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
    ranking = bool(entry.get("ranking"))

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        made = _alpaca(row, columns) if formatting == "alpaca" else _sharegpt(row, columns, tags)
        if ranking and not (made.get("chosen") and made.get("rejected")):
            raise RowError("a ranking set's row without chosen and rejected", "map both under columns")
        return made

    return Opened(tuple(_file(one) for one in files), convert if columns or tags or ranking else None)


def _alpaca(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """The row under our keys. Columns that map the prompt alone make a document, as in LLaMA-Factory's c4_demo."""
    if not columns:
        return row
    if "prompt" in columns and not columns.keys() & {"response", "chosen", "kto_tag"}:
        return {"text": _taken(row, columns, "prompt")}
    made = {_ALPACA.get(name, name): row.get(column) for name, column in columns.items() if name in (*_ALPACA, *_SAME)}
    made["instruction"] = _taken(row, columns, "prompt") if "prompt" in columns else row.get("instruction")
    return made if "output" in made or "chosen" in made else made | {"output": row.get("output")}


def _sharegpt(row: dict[str, Any], columns: dict[str, str], tags: dict[str, str]) -> dict[str, Any]:
    names = {"messages": "conversations", **columns}
    made = {name: row.get(column) for name, column in names.items() if name in _SAME}
    made["conversations"] = _taken(row, names, "messages")
    if not columns:
        made |= {name: row[name] for name in _SAME if name in row}
    if tags:
        for key in ("conversations", "chosen", "rejected"):
            made[key] = _retagged(made.get(key), tags)
    return made


def _retagged(value: Any, tags: dict[str, str]) -> Any:
    """Messages under other tags, as role + content; what has no such tag is left for the parser to name."""
    if isinstance(value, list):
        return [_retagged(one, tags) for one in value]
    role_tag, content_tag = tags.get("role_tag", "from"), tags.get("content_tag", "value")
    if not isinstance(value, dict) or role_tag not in value:
        return value
    roles = {tags.get(name, default): role for name, (default, role) in _TAGS.items()}
    role = value[role_tag]
    rest = {key: one for key, one in value.items() if key not in (role_tag, content_tag)}
    return {"role": roles.get(role, ROLES.get(role, role)), "content": value.get(content_tag), **rest}


def _taken(row: dict[str, Any], columns: dict[str, str], name: str) -> Any:
    column = columns[name]
    if column not in row:
        raise RowError(f"no key {column!r} for {name}; found {', '.join(row)}", "correct columns in dataset_info.json")
    return row[column]
