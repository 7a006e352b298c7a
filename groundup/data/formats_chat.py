"""Parsers of training rows: documents, conversations, instructions, preferences, prompts."""

from __future__ import annotations

import re
from typing import Any

from groundup.data.messages import RowError, conversation, decoded, hh_turns, is_hh, tool_list, turns
from groundup.data.rows import (
    Chat,
    ImageChat,
    Message,
    Preference,
    Prompt,
    Row,
    Stepwise,
    Text,
    Tools,
    Unpaired,
    message,
)

# MiniMind's pretrain_hq.jsonl wrote the control tokens of its first tokenizers into the text itself.
_WRAPPERS = (("<|im_start|>", "<|im_end|>"), ("<s>", "</s>"))
# What of a chat row is no column of a grader's.
_CHAT_KEYS = (
    "conversations", "messages", "system", "tools", "gt", "images", "image", "image_bytes", "chosen", "rejected",
    "kto_tag", "label",
)  # fmt: skip


def text(row: dict[str, Any]) -> Row:
    """{"text"}: a document. Literal wrappers around it (legacy MiniMind) are taken off, one line a wrapped piece."""
    document = string(row, "text")
    bare = document.strip()
    for opening, closing in _WRAPPERS:
        if bare.startswith(opening) and bare.endswith(closing):
            inner = bare[len(opening) : -len(closing)]
            document = re.sub(rf"{re.escape(closing)}\s*{re.escape(opening)}", "\n", inner)
    if not document.strip():
        raise RowError("`text` is empty", "remove the row")
    return Text(document)


def chat(row: dict[str, Any]) -> Row:
    """{"conversations"} or {"messages"}, role/content or from/value: Chat, or what the other keys make of it.

    gt -> Prompt; chosen + rejected -> Preference; kto_tag or label -> Unpaired; images -> ImageChat.
    """
    key = "conversations" if "conversations" in row else "messages"
    messages, tools = conversation(row.get(key), key)
    tools = _tools(row) or tools
    if row.get("system"):
        messages = [message("system", string(row, "system")), *messages]
    if row.get("chosen") or row.get("rejected"):
        _no_images(row)
        return _preference(messages, answer(row, "chosen"), answer(row, "rejected"), tools)
    for key in ("kto_tag", "label"):
        if row.get(key) is not None and row[key] != "":
            _no_images(row)
            return _unpaired(messages, row[key], key, tools)
    extra = {name: value for name, value in row.items() if name not in _CHAT_KEYS}
    return _spoken(messages, tools, images(row), row.get("gt"), extra)


def alpaca(row: dict[str, Any]) -> Row:
    """{"instruction","input","output","system","history"}: the user says instruction + "\\n" + input.

    An instruction that is there and empty is the pretraining habit: input continued by output, one Text.
    """
    asked = [string(row, key) for key in ("instruction", "input") if row.get(key)]
    said = string(row, "output") if row.get("output") else ""
    paired = row.get("chosen") or row.get("rejected")
    history = decoded(row.get("history"), "history") or []
    habit = "instruction" in row and not row["instruction"]
    if habit and asked and said and not (paired or history or row.get("system")):
        return Text(asked[0] + said)
    messages = [message("system", string(row, "system"))] if row.get("system") else []
    for pair in history if isinstance(history, list) else [None]:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(half, str) for half in pair):
            raise RowError("`history` holds something else than pairs", 'write [["question", "answer"], ..]')
        messages += [message("user", pair[0]), message("assistant", pair[1])]
    if not asked:
        raise RowError("`instruction` and `input` are both empty", "remove the row")
    messages.append(message("user", "\n".join(asked)))
    tools = _tools(row)
    if paired:
        _no_images(row)
        return _preference(messages, answer(row, "chosen"), answer(row, "rejected"), tools)
    messages.append(message("assistant", said))
    if row.get("kto_tag") is not None and row["kto_tag"] != "":
        _no_images(row)
        return _unpaired(messages, row["kto_tag"], "kto_tag", tools)
    return _spoken(messages, tools, images(row), None)


def preference(row: dict[str, Any]) -> Row:
    """{"prompt","chosen","rejected"} of TRL and DeepSpeed-Chat, strings or messages.

    Without a prompt (MiniMind, hh-rlhf, TRL's implicit prompt) the prompt is the beginning that both share.
    """
    tools = _tools(row)
    if row.get("prompt"):
        asked = turns(row["prompt"], "prompt", "user")
        return _preference(asked, answer(row, "chosen"), answer(row, "rejected"), tools)
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if is_hh(chosen) and is_hh(rejected):
            return _preference([], hh_turns(chosen), hh_turns(rejected), tools)
        shared = _shared_words(chosen, rejected)
        asked = [message("user", chosen[:shared])] if shared else []
        good, poor = ([message("assistant", side[shared:])] for side in (chosen, rejected))
        return _preference(asked, good, poor, tools)
    (one, first), (two, second) = conversation(chosen, "chosen"), conversation(rejected, "rejected")
    return _preference([], one, two, tools or first or second)


def prompt_completion(row: dict[str, Any]) -> Row:
    """{"prompt","completion"}, strings or messages: one conversation."""
    key = "completion" if "completion" in row else "response"
    return _spoken(turns(row["prompt"], "prompt", "user") + answer(row, key), _tools(row), images(row), None)


def unpaired(row: dict[str, Any]) -> Row:
    """{"prompt","completion","label"}, strings or messages."""
    messages = turns(row["prompt"], "prompt", "user") + answer(row, "completion")
    return _unpaired(messages, row.get("label"), "label", _tools(row))


def prompt(row: dict[str, Any]) -> Row:
    """{"prompt"} alone. answer, solution, ground_truth or gt is what a grader compares with; the rest is extra."""
    messages = turns(row["prompt"], "prompt", "user")
    if not messages:
        raise RowError("`prompt` is empty", "remove the row")
    extra = {key: value for key, value in row.items() if key not in ("prompt", "tools")}
    key = next((key for key in ("answer", "solution", "ground_truth", "gt") if extra.get(key) is not None), None)
    return Prompt(messages, extra.pop(key) if key else None, extra, _tools(row))


def stepwise(row: dict[str, Any]) -> Row:
    """{"prompt","completions","labels"}: a label for every step."""
    steps, labels = row.get("completions"), row.get("labels")
    if not isinstance(steps, list) or not isinstance(labels, list) or len(steps) != len(labels) or not steps:
        raise RowError("`completions` and `labels` are not lists of one length", "give every step one label")
    words = [step if isinstance(step, str) else "\n".join(m["content"] for m in turns(step, "completions", "assistant"))
             for step in steps]  # fmt: skip
    return Stepwise(turns(row["prompt"], "prompt", "user"), words, [flag(label, "labels") for label in labels])


def _spoken(
    messages: list[Message], tools: Tools, pictures: list[str | bytes], gt: Any, extra: dict[str, Any] | None = None
) -> Row:
    """Chat or ImageChat; Prompt where the answer is left to the model: gt is given, it is empty, or nobody answers."""
    last = messages[-1] if messages else message("", "")
    unanswered = last["role"] == "assistant" and not (last["content"] or last.get("tool_calls"))
    if unanswered and not last.get("reasoning_content"):
        messages = messages[:-1]
    if not messages:
        raise RowError("the conversation is empty", "remove the row")
    marks = sum(one["content"].count("<image>") for one in messages) if pictures else 0
    if marks != len(pictures):
        raise RowError(f"{marks} `<image>` marks for {len(pictures)} images", "write one mark for each image")
    if pictures:
        return ImageChat(messages, pictures, tools)
    if gt not in (None, "", []):
        return Prompt(messages, gt, extra or {}, tools)
    if unanswered or not any(one["role"] == "assistant" for one in messages):
        return Prompt(messages, None, {}, tools)
    return Chat(messages, tools)


def _preference(prompt: list[Message], chosen: list[Message], rejected: list[Message], tools: Tools) -> Preference:
    """Takes the prompt off where chosen and rejected repeat it, and what both still share into the prompt."""
    if prompt and chosen[: len(prompt)] == prompt and rejected[: len(prompt)] == prompt:
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    if chosen == rejected:
        raise RowError("`chosen` equals `rejected`" if chosen else "`chosen` is empty", "remove the row")
    shared = 0
    while chosen[shared : shared + 1] == rejected[shared : shared + 1]:
        shared += 1
    prompt, chosen, rejected = prompt + chosen[:shared], chosen[shared:], rejected[shared:]
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if not side or side[0]["role"] != "assistant":
            raise RowError(f"`{name}` does not continue the prompt with an assistant turn", "remove the row")
    if not prompt:
        raise RowError("chosen and rejected share no prompt", "add a `prompt` key")
    return Preference(prompt, chosen, rejected, tools)


def _unpaired(messages: list[Message], label: Any, key: str, tools: Tools) -> Unpaired:
    if not messages or messages[-1]["role"] != "assistant":
        raise RowError("the last turn is not the assistant's", f"`{key}` judges an answer")
    return Unpaired(messages, flag(label, key), tools)


def answer(row: dict[str, Any], key: str) -> list[Message]:
    """Assistant's turns from a string (which hh-rlhf starts with a space) or messages; an empty one is an error."""
    value, asked = row.get(key), row.get("prompt")
    if isinstance(value, str) and isinstance(asked, str) and asked.rstrip().endswith("\n\nAssistant:"):
        value = f"\n\nAssistant:{value}"
    found = turns(value, key, "assistant")
    if not found:
        raise RowError(f"`{key}` is empty", "remove the row")
    return found


def images(row: dict[str, Any]) -> list[str | bytes]:
    """The row's pictures: `images`, `image` or `image_bytes`, one or a list, paths, bytes or {"bytes", "path"}."""
    value = next((row[key] for key in ("images", "image", "image_bytes") if row.get(key)), None)
    if value is None:
        return []
    found = []
    for item in value if isinstance(value, list) else [value]:
        picture = (item.get("bytes") or item.get("path")) if isinstance(item, dict) else item
        if not isinstance(picture, str | bytes):
            raise RowError("a picture is neither a path nor bytes", "give a path, or the file's bytes")
        found.append(picture)
    return found


def _no_images(row: dict[str, Any]) -> None:
    if images(row):
        raise RowError("pictures in a preference row", "preference rows are read without pictures: leave `images` out")


def _tools(row: dict[str, Any]) -> Tools:
    return tool_list(row["tools"]) if row.get("tools") else None


def _shared_words(one: str, two: str) -> int:
    """Length of the beginning that two strings share, cut back to a word's end as TRL's implicit prompts are."""
    length = next((n for n, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
    return length - 1 if length and one[length - 1] == " " else length


def string(row: dict[str, Any], key: str) -> str:
    """The row's string under `key`."""
    value = row.get(key)
    if not isinstance(value, str):
        raise RowError(f"`{key}` is not a string", "write it in quotes")
    return value


def flag(value: Any, key: str) -> bool:
    """A label as true or false; 1, 0 and the words are accepted."""
    known = {"true": True, "false": False, "1": True, "0": False}
    found = known.get(str(value).lower())
    if found is None:
        raise RowError(f"`{key}` is {value!r}", "write true or false")
    return found
