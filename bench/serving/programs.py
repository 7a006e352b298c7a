"""Which servers can run here, and what each needs of a model folder: GGUF files, an ONNX folder, its environment."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.measure import Program, ProgramFailed
from bench.peers.environments import python_of
from bench.serving.commands import command, groundup
from bench.serving.options import FP32, PROGRAMS, Options
from bench.serving.prompts import weights

GGUF = {"llamacpp-f32": "f32", "llamacpp-q8": "q8_0"}
MEGABYTE = 2**20


class Missing(Exception):
    """This program cannot run here; the text says why."""


class Programs:
    """The programs of one model folder. Files that they need are made once, in the work folder."""

    def __init__(self, folder: Path, options: Options, say: Callable[[str], None]) -> None:
        self.folder, self.options, self.say = folder.resolve(), options, say
        self.made = options.work / f"for-{folder.resolve().parent.name}-{folder.name}"
        self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.parameters, self.matrices = weights(folder)
        self.missing: dict[str, str] = {}

    def start(self, names: tuple[str, ...], requests: int, context: int, warmup: dict[str, Any]) -> list[Program]:
        """Those of the names that run, started and warm; `missing` says why the others do not."""
        running = []
        for name in names:
            try:
                running.append(self.program(name, requests, context, warmup).start())
            except (Missing, ProgramFailed) as why:
                if self.missing.get(name) != str(why):
                    self.say(f"  {name}: {why}")
                self.missing[name] = str(why)
        return running

    def program(self, name: str, requests: int, context: int, warmup: dict[str, Any]) -> Program:
        """One program, not yet started. context: tokens of a request, prompt and answer."""
        spec = {
            "model": str(self.folder),
            "threads": self.options.threads,
            "requests": requests,
            "context": context,
            "warmup": warmup,
            "quantize": None,
            "eager": self.options.eager,
        }
        python, env = sys.executable, {"OMP_NUM_THREADS": str(self.options.threads)}
        if name.startswith("ours"):
            quantize = None if name in FP32 else "int8"
            spec |= {"quantize": quantize, "weights_mb": self.weights_mb(quantize)}
        elif name in GGUF:
            spec["gguf"] = str(self.gguf(GGUF[name]))
        elif name == "onnx":
            python = self.environment("onnx")
            spec["onnx"] = str(self.onnx(python, "fp32"))
        elif name == "vllm":
            python = self.environment("vllm")
            gigabytes = max(1, -(-requests * context * self.kv_bytes() // 2**30))
            env |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": str(gigabytes),
                    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
                    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}  # fmt: skip
        return Program(name, f"bench.serving.{PROGRAMS[name]}", spec, python, env)

    def kv_bytes(self) -> int:
        """Of one token, in fp32."""
        c = self.config
        head_dim = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
        return 2 * c["num_hidden_layers"] * c["num_key_value_heads"] * head_dim * 4

    def weights_mb(self, quantize: str | None) -> float:
        """Weights as they are computed with. int8: a byte for each of a matrix; looking up a token stays fp32."""
        if quantize is None:
            return 4 * self.parameters / MEGABYTE
        table = self.config["vocab_size"] * self.config["hidden_size"]
        head = table if self.config.get("tie_word_embeddings") else 0  # a quantised copy of the tied table
        bytes_ = (self.matrices - table + head) + 4 * (self.parameters - self.matrices + table)
        return bytes_ / MEGABYTE

    def environment(self, name: str) -> str:
        python = python_of(name)
        if python is None:
            raise Missing(f"not installed (python -m bench.peers install {name})")
        return python

    def gguf(self, quant: str) -> Path:
        """Our own export of the folder."""
        if importlib.util.find_spec("xllamacpp") is None:
            raise Missing("not installed (pip install xllamacpp)")
        path = self.made / f"{quant}.gguf"
        if not path.exists():
            self.say(f"  exporting {self.folder.name} to GGUF, {quant}")
            path.parent.mkdir(parents=True, exist_ok=True)
            groundup("export", self.folder, "--to", "gguf", "--quant", quant, "--output", path)
        return path

    def onnx(self, python: str, precision: str) -> Path:
        """The folder that ONNX Runtime GenAI's own builder makes."""
        folder = self.made / f"onnx-{precision}-{self.options.threads}"
        if not (folder / "genai_config.json").exists():
            self.say(f"  building {self.folder.name} for ONNX Runtime GenAI, {precision}")
            folder.mkdir(parents=True, exist_ok=True)
            line = [python, "-m", "bench.serving.onnx_genai", "build", str(self.folder), str(folder), precision]
            command([*line, str(self.options.threads)], "onnx builder")
        return folder
