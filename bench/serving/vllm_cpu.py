"""vLLM's CPU build, its engine in the process: requests added, then step by step. Runs in an environment of its own."""

from __future__ import annotations

from typing import Any

from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.sampling_params import RequestOutputKind

from bench.serving.rounds import Server, Watch, run


class Vllm(Server):
    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        self.rounds = 0
        self.engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=spec["model"],
                dtype="float32",
                max_model_len=spec["context"],
                max_num_seqs=spec["requests"],
                enforce_eager=spec["eager"],
                disable_log_stats=True,
            )
        )

    def answer(self, prompts: list[list[int]], new: int, cache: bool, watch: Watch) -> None:
        self.rounds += 1
        places = {f"{self.rounds}-{place}": place for place in range(len(prompts))}
        params = SamplingParams(
            temperature=0, max_tokens=new, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        for name, place in places.items():
            self.engine.add_request(name, TokensPrompt(prompt_token_ids=prompts[place]), params)
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                if output.outputs and output.outputs[0].token_ids:
                    watch.came(places[output.request_id], list(output.outputs[0].token_ids))


if __name__ == "__main__":
    run(Vllm)
