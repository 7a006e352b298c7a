"""What has been said? A conversation: its turns, its settings, and its file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from groundup.errors import UserError
from groundup.infer.params import SamplingParams


@dataclass
class Conversation:
    """Turns of user and assistant, the system text, and how to answer.

    thinking: True asks for it, False forbids it, None leaves it to the model.
    show_thinking: print it as it comes instead of a folded line.
    """

    params: SamplingParams
    system: str | None = None
    thinking: bool | None = None
    show_thinking: bool = False
    turns: list[dict[str, Any]] = field(default_factory=list)

    @property
    def messages(self) -> list[dict[str, Any]]:
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.turns

    def undo(self) -> bool:
        """Take back the last question and what followed it; False when there is none."""
        asked = [i for i, turn in enumerate(self.turns) if turn["role"] == "user"]
        if not asked:
            return False
        del self.turns[asked[-1] :]
        return True

    def save(self, path: str | Path) -> None:
        """One JSON line {"messages": [...]}: also a row that SFT can train on. Written whole or not at all."""
        path = Path(path).expanduser()
        part = path.with_name(path.name + ".part")
        try:
            part.write_text(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n", encoding="utf-8")
            part.replace(path)
        except OSError as error:
            raise UserError(path, f"cannot be written ({error.strerror})", "choose another file") from None

    def load(self, path: str | Path) -> None:
        """Replace turns and system by those of the first row of a file; on a fault the conversation stays as it is."""
        path = Path(path).expanduser()
        try:
            with path.open(encoding="utf-8") as file:
                messages = json.loads(file.readline())["messages"]
            fine = all(isinstance(m["role"], str) and isinstance(m["content"], str) for m in messages)
        except OSError as error:
            raise UserError(path, f"cannot be read ({error.strerror})", "name a file made by /save") from None
        except (ValueError, KeyError, TypeError):
            fine = False
        if not fine:
            raise UserError(f"{path}:1", 'is not a row {"messages": [...]}', "name a file made by /save")
        system = [m["content"] for m in messages if m["role"] == "system"]
        self.system = system[0] if system else None
        self.turns = [m for m in messages if m["role"] != "system"]
