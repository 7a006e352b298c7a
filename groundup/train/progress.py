"""How is it going? One living line in a terminal, plain lines elsewhere, always on stderr."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

Figures = dict[str, Any]


class Progress:
    """What a person sees of a run, and the hook that a program gets.

    name: the stage. hook: called with the figures of every logged line. Silent where `on` is False (other ranks).
    """

    def __init__(self, name: str, steps: int, on: bool = True, hook: Callable[[Figures], None] | None = None) -> None:
        self.name, self.steps, self.on, self.hook = name, steps, on, hook
        self.console = Console(stderr=True, highlight=False)
        self.live: Live | None = None
        self.pace: float | None = None  # seconds a step, smoothed

    def __enter__(self) -> Progress:
        if self.on and self.console.is_terminal:
            self.live = Live(console=self.console, refresh_per_second=4, transient=True)
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()
            self.live = None

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.on:
            self.console.print(f"{time.strftime('%H:%M:%S')} {self.name}: {text}", markup=False, soft_wrap=True)

    def tick(self, step: int, seconds: float, figures: Figures) -> None:
        """After every step: its seconds, loss and speed."""
        self.pace = seconds if self.pace is None else 0.95 * self.pace + 0.05 * seconds
        if self.live:
            self.live.update(Text(f"{self.name} {bar(step / self.steps)} {self.line(step, figures)}", no_wrap=True))

    def log(self, figures: Figures) -> None:
        """At every line of metrics.jsonl. The living line shows those of training already."""
        if self.hook:
            self.hook(figures)
        step = figures["step"]
        if "val_loss" in figures:
            held_out = (f"{k.replace('_', ' ')} {v:.4f}" for k, v in figures.items() if isinstance(v, float))
            self.say(f"step {step}/{self.steps}  held out: {'  '.join(held_out)}")
        elif not self.live:
            self.say(self.line(step, figures))

    def line(self, step: int, figures: Figures) -> str:
        rate = f"  lr {figures['lr']:.2e}" if "lr" in figures else ""
        rate += f"  reward {figures['reward']:.3f}" if "reward" in figures else ""
        return (
            f"step {step}/{self.steps}  loss {figures['loss']:.4f}{rate}  {figures['tokens_per_second']:,.0f} tokens/s"
            f"  {100 * figures['share_of_peak']:.0f}% of peak  {clock(self.left(step))} left"
        )

    def left(self, step: int) -> float:
        """Seconds to the end at the present pace."""
        return (self.pace or 0.0) * (self.steps - step)


def bar(share: float, width: int = 20) -> str:
    return "━" * round(share * width) + "╌" * (width - round(share * width))


def clock(seconds: float) -> str:
    """1:05:09, or 05:09 under an hour."""
    hours, rest = divmod(int(seconds + 0.5), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60:02}:{rest % 60:02}"
