"""Where does a step end? A solution in steps as ids, and the token of each step that is judged.

Every step is encoded on its own and ends in a line break; its last token is where it is judged. So what a step becomes
does not depend on the steps after it, and a solution can be judged while it is being written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from groundup.data.formats_chat import flag
from groundup.data.messages import RowError
from groundup.data.rows import Message, Prompt, Row, Stepwise, Tools, Unpaired
from groundup.errors import UserError

if TYPE_CHECKING:
    from groundup.tokenizer import Tokenizer

STEP_END = "\n"


def render_steps(
    tokenizer: Tokenizer, prompt: list[Message], steps: Sequence[str], tools: Tools = None
) -> tuple[list[int], list[int]]:
    """(ids, where each step's last token stands): the prompt up to where the assistant speaks, then the steps."""
    ids, ends = list(tokenizer.render(prompt, tools, add_generation_prompt=True).ids), []
    for step in steps:
        place = "after" if ids[-1] in tokenizer.plain.control.values() else "inside"
        ids += tokenizer.plain.encode(step.rstrip() + STEP_END, place).ids
        ends.append(len(ids) - 1)
    return ids, ends


def steps_of(answer: Message) -> list[str]:
    """The lines of an answer, thoughts first: what a process reward model judges of a finished text."""
    text = answer.get("reasoning_content", "") + STEP_END + answer["content"]
    return [line for line in text.split(STEP_END) if line.strip()]


def judgements(tokenizer: Tokenizer, row: Row, stepwise: bool) -> tuple[list[int], list[int], list[bool]] | None:
    """(ids, where a judgement stands, right or wrong); None: a row without any.

    stepwise: a Stepwise row's steps. Else whole answers, judged at their last token: Unpaired rows, Prompts that end in
    an answer and have a `label`, Stepwise rows (right where every step is).
    """
    if isinstance(row, Stepwise):
        ids, ends = render_steps(tokenizer, row.prompt, row.completions)
        if stepwise:
            return ids, ends, list(row.labels)
        answer: Message = {"role": "assistant", "content": STEP_END.join(row.completions)}
        ids = tokenizer.render([*row.prompt, answer]).ids
        return ids, [len(ids) - 1], [all(row.labels)]
    if stepwise:
        return None
    if isinstance(row, Unpaired):
        label = row.label
    elif isinstance(row, Prompt) and "label" in row.extra and row.messages[-1]["role"] == "assistant":
        try:
            label = flag(row.extra["label"], "label")
        except RowError as error:
            raise UserError("label", error.why, error.fix) from None
    else:
        return None
    ids = tokenizer.render(row.messages, row.tools).ids
    return ids, [len(ids) - 1], [label]
