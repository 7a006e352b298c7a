"""groundup's engine in the process: all requests added, then step by step until none is left."""

from __future__ import annotations

from typing import Any

from bench.serving.rounds import Server, Watch, run
from groundup.device import set_threads
from groundup.infer.engine import Engine, EngineSettings
from groundup.infer.params import SamplingParams
from groundup.model.io import load_model
from groundup.tokenizer import load_tokenizer

MEGABYTE = 2**20


class Ours(Server):
    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        set_threads(spec["threads"])
        model = load_model(spec["model"])
        self.config = model.config
        size = EngineSettings.block_size
        blocks = spec["requests"] * (-(-spec["context"] // size) + 1)  # as much cache as the peers get
        settings = EngineSettings(quantize=spec["quantize"], num_blocks=blocks)
        self.block_size = size
        self.engine = Engine(model, load_tokenizer(spec["model"]), settings)
        self.most_blocks = 0

    def answer(self, prompts: list[list[int]], new: int, cache: bool, watch: Watch) -> None:
        params = SamplingParams(max_tokens=new, ignore_eos=True)
        places = {id(self.engine.add(prompt, params)): place for place, prompt in enumerate(prompts)}
        while self.engine.has_work:
            for delta in self.engine.step():
                if delta.ids:
                    watch.came(places[id(delta.request)], delta.ids)
            self.most_blocks = max(self.most_blocks, self.engine.stats()["blocks_used"])

    def extra(self) -> dict[str, Any]:
        """Memory that the blocks in use and the weights at their number type account for."""
        c = self.config
        token = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * 4
        blocks = self.most_blocks * self.block_size * token / MEGABYTE
        return {"blocks_mb": blocks, "weights_mb": self.spec["weights_mb"]}


if __name__ == "__main__":
    run(Ours)
