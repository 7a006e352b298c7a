"""`groundup serve` with a cache of so many blocks and no more: `python -m bench.serving.small_server DIR PORT BLOCKS`.

A cache that is soon full makes answers push each other out, and memory as large at the beginning as at the end.
"""

from __future__ import annotations

import sys
from pathlib import Path

import uvicorn

from groundup.device import set_threads
from groundup.infer.engine import Engine, EngineSettings
from groundup.infer.params import params_from_dir
from groundup.infer.worker import Worker
from groundup.model.io import load_model
from groundup.serve.api import Server, create_app
from groundup.serve.api_models import Served, ServerSettings
from groundup.tokenizer import load_tokenizer


def main(folder: str, port: str, blocks: str) -> None:
    set_threads()
    tokenizer = load_tokenizer(folder)
    engine = Engine(load_model(folder), tokenizer, EngineSettings(num_blocks=int(blocks)))
    served = Served(Path(folder).resolve().name, Worker(engine), tokenizer, engine.context, params_from_dir(folder))
    app = create_app([served], ServerSettings())
    config = uvicorn.Config(app, "127.0.0.1", int(port), log_level="warning", timeout_graceful_shutdown=10)
    Server(config, [served], ServerSettings()).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
