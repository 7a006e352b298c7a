"""ONNX Runtime GenAI on a static batch, its generator loop as its documentation has it. In an environment of its own.

`python -m bench.serving.onnx_genai build MODEL OUT PRECISION THREADS` makes the ONNX folder by its own builder.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og

from bench.serving.rounds import Server, Watch, run


class Onnx(Server):
    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        self.model = og.Model(spec["onnx"])

    def answer(self, prompts: list[list[int]], new: int, cache: bool, watch: Watch) -> None:
        length = len(prompts[0]) + new
        params = og.GeneratorParams(self.model)
        params.set_search_options(
            do_sample=False, batch_size=len(prompts), min_length=length, max_length=length  # min_length: no early end
        )  # fmt: skip
        generator = og.Generator(self.model, params)
        generator.append_tokens(np.array(prompts, dtype=np.int32))
        for _ in range(new):
            generator.generate_next_token()
            for row, token in enumerate(generator.get_next_tokens()):
                watch.came(row, [int(token)])


def build(model: str, out: str, precision: str, threads: str) -> None:
    """The builder's folder, with as many threads as everybody has."""
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    subprocess.run([*builder, "-i", model, "-o", out, "-p", precision, "-e", "cpu"], check=True, stdout=sys.stderr)
    path = Path(out) / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"]["decoder"].setdefault("session_options", {})["intra_op_num_threads"] = int(threads)
    path.write_text(json.dumps(config, indent=1))


if __name__ == "__main__":
    if sys.argv[1] == "build":
        build(*sys.argv[2:])
    else:
        run(Onnx)
