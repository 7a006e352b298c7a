"""The one kind of error that a person, not a programmer, is meant to read."""

from __future__ import annotations


class UserError(Exception):
    """Something the user gave us cannot be used.

    where: the file (with its line), the recipe key or the option that is wrong.
    why: what is wrong with it, in the user's words.
    fix: what to do now.
    detail: lines that show it (a diff), printed below.
    The command line prints it as one line and exits with code 2; `--debug` adds the traceback.
    """

    def __init__(self, where: object, why: str, fix: str = "", detail: str = "") -> None:
        self.where, self.why, self.fix, self.detail = str(where), why, fix, detail
        super().__init__(str(self))

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str, str, str]]:
        return UserError, (self.where, self.why, self.fix, self.detail)  # a worker process raises it for its parent

    def __str__(self) -> str:
        text = f"{self.where}: {self.why}" + (f"; {self.fix}" if self.fix else "")
        return " ".join(text.split())  # one line, whatever the parts held
