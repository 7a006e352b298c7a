"""AdamW whose moments leave the GPU while it has no room for them: paged memory (QLoRA, arXiv 2305.14314, section 3).

The moments lie in memory that the card and the host share; the driver moves their pages to whoever touches them. So a
long row that needs the card for a moment pushes them out, where it would have ended the run.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from groundup.errors import UserError

MOMENTS = {"state1": "exp_avg", "state2": "exp_avg_sq"}  # bitsandbytes' names and torch's


def paged_adamw(
    params: Iterable[Any], lr: float, betas: tuple[float, float], eps: float, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """bitsandbytes' paged AdamW with 32-bit moments; params as torch.optim takes them. UserError: no CUDA, or not
    installed. Its state_dict is that of torch.optim.AdamW: a run may go on with either."""
    groups = list(params)
    first = groups[0]["params"][0] if groups and isinstance(groups[0], dict) else groups[0]
    if first.device.type != "cuda":
        raise UserError("paged optimizer", f"pages are CUDA's, the weights are on {first.device}", "use adamw")
    return make_paged_adamw(groups, lr, betas, eps, weight_decay)


def make_paged_adamw(
    groups: list[Any], lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.Optimizer:
    """The optimizer itself; without CUDA its memory is ordinary memory."""
    try:
        from bitsandbytes.optim import PagedAdamW32bit
    except ImportError:
        raise UserError("paged optimizer", "needs bitsandbytes", "pip install bitsandbytes") from None

    class PagedAdamW(PagedAdamW32bit):  # type: ignore[misc,unused-ignore]
        def state_dict(self) -> dict[str, Any]:
            whole = torch.optim.Optimizer.state_dict(self)
            whole["state"] = {
                index: {
                    "step": torch.tensor(float(state["step"])),
                    **{theirs: state[ours] for ours, theirs in MOMENTS.items()},
                }
                for index, state in whole["state"].items()
            }
            return whole

        @torch.no_grad()
        def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
            """Into pages of its own: bitsandbytes' would put the moments on the card for good."""
            index = 0
            for at, (group, saved) in enumerate(zip(self.param_groups, state_dict["param_groups"], strict=True)):
                group.update({name: value for name, value in saved.items() if name != "params"})
                for place, p in enumerate(group["params"]):
                    found = state_dict["state"].get(index)
                    index += 1
                    if found is None:
                        continue
                    self.init_state(group, p, at, place)
                    state = self.state[p]
                    state["step"] = int(found["step"])
                    for ours, theirs in MOMENTS.items():
                        state[ours].copy_(found[theirs])

    return PagedAdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
