"""transformers' `generate` on a static batch, as its documentation says: fp32, SDPA, a streamer for the tokens.

All prompts are of one length, so nothing is padded. No token ends an answer: eos_token_id is None.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from bench.serving.rounds import Server, Watch, run


class Tell(BaseStreamer):
    """Called with the prompts first, then with one token of every row a step."""

    def __init__(self, watch: Watch) -> None:
        self.watch, self.prompts = watch, True

    def put(self, value: torch.Tensor) -> None:
        if not self.prompts:
            for row, token in enumerate(value.reshape(-1).tolist()):
                self.watch.came(row, [token])
        self.prompts = False

    def end(self) -> None:
        """Nothing is held back."""


class Transformers(Server):
    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        torch.set_num_threads(spec["threads"])
        self.model = AutoModelForCausalLM.from_pretrained(
            spec["model"], dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        habits = self.model.generation_config
        habits.eos_token_id, habits.do_sample = None, False
        habits.temperature = habits.top_p = habits.top_k = None
        if habits.pad_token_id is None:
            habits.pad_token_id = 0

    def answer(self, prompts: list[list[int]], new: int, cache: bool, watch: Watch) -> None:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, streamer=Tell(watch)
            )


if __name__ == "__main__":
    run(Transformers)
