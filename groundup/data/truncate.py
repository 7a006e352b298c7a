"""What of a conversation is kept when it is longer than a row? Turn by turn, some of the question and of the answer."""

from __future__ import annotations

from itertools import groupby

HEADER = 16  # a prompt that is cut keeps its last turn's header when that is at most this many tokens


def truncate_lengths(source: int, target: int, cutoff: int) -> tuple[int, int]:
    """(source, target) tokens kept of one turn so that they fit into cutoff, as LLaMA-Factory does it.

    The shorter side is kept whole when it takes less than half of the room; else both shrink in proportion.
    """
    if target * 2 < cutoff:
        kept = target
    elif source * 2 < cutoff:
        kept = min(target, cutoff - source)
    else:
        kept = min(target, cutoff * target // (source + target))
    return min(source, max(cutoff - kept, 0)), kept


def truncate_chat(ids: list[int], mask: list[int], max_len: int, eos_id: int | None) -> tuple[list[int], list[int]]:
    """A rendered conversation cut to max_len tokens, turn by turn; turns that find no room are dropped from the end.

    A turn is a run of untrained tokens (source) and the run of trained ones after it (target). Both are cut at their
    end, but a cut source keeps the header of the answer (from its last eos_id on), so the prompt stays well formed.
    """
    kept_ids: list[int] = []
    kept_mask: list[int] = []
    at = 0
    for source, target in _turns(mask):
        room = max_len - len(kept_ids)
        if room <= 0:
            break
        keep_source, keep_target = truncate_lengths(source, target, room)
        if target and not keep_target:
            break
        prompt, answer = ids[at : at + source], ids[at + source : at + source + keep_target]
        if keep_source < source:
            header = _header(prompt, eos_id) if target else []
            header = header if len(header) < keep_source else []
            prompt = prompt[: keep_source - len(header)] + header
        kept_ids += prompt + answer
        kept_mask += [0] * len(prompt) + [1] * len(answer)
        at += source + target
    return kept_ids, kept_mask


def last_answers(mask: list[int], count: int) -> list[int]:
    """The mask with only its last `count` answers: those before belong to the prompt."""
    starts = [i for i, trained in enumerate(mask) if trained and not (i and mask[i - 1])]
    begin = starts[-count] if 0 < count <= len(starts) else 0
    return [0] * begin + mask[begin:]


def truncate_pair(
    sides: list[tuple[list[int], list[int]]], max_len: int, eos_id: int | None
) -> list[tuple[list[int], list[int]]]:
    """Two (ids, mask) with one prompt, cut so that both have max_len tokens together: prompts by the same number of
    tokens (the header of the answer is kept), then the longer answer down to the shorter one, then both."""
    prompts = [mask.index(1) if 1 in mask else len(mask) for _, mask in sides]
    answers = [len(ids) - prompt for (ids, _), prompt in zip(sides, prompts, strict=True)]
    source, target = truncate_lengths(sum(prompts), sum(answers), max_len)
    shorter = min(*answers, target // 2)
    rooms = [min(answer, max(target // 2, target - shorter)) for answer in answers]
    cut = max(0, -(-(sum(prompts) - source) // 2))
    kept = []
    for (ids, mask), prompt, room in zip(sides, prompts, rooms, strict=True):
        keep = max(prompt - cut, 0)
        header = _header(ids[:prompt], eos_id) if keep < prompt else []
        header = header if len(header) < keep else []
        begin = ids[: keep - len(header)] + header
        kept.append((begin + ids[prompt : prompt + room], [0] * keep + mask[prompt : prompt + room]))
    return kept


def _turns(mask: list[int]) -> list[tuple[int, int]]:
    runs = [(trained, sum(1 for _ in run)) for trained, run in groupby(mask)]
    if runs and runs[0][0]:
        runs.insert(0, (0, 0))
    if len(runs) % 2:
        runs.append((1, 0))
    return [(runs[i][1], runs[i + 1][1]) for i in range(0, len(runs), 2)]


def _header(prompt: list[int], eos_id: int | None) -> list[int]:
    tail = prompt[-HEADER:]
    return tail[len(tail) - 1 - tail[::-1].index(eos_id) :] if eos_id in tail else []
