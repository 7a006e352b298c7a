"""What do all endpoints share? Models, settings and figures of the app, and how a request enters the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import Request

from groundup import __version__
from groundup.infer.params import SamplingParams
from groundup.infer.worker import Handle
from groundup.serve.api_errors import bad
from groundup.serve.api_metrics import Clock, Metrics
from groundup.serve.api_models import Models, Served, ServerSettings
from groundup.serve.api_prompt import Prompt

if TYPE_CHECKING:
    from groundup.infer.sequence import Request as EngineRequest

FINGERPRINT = f"groundup-{__version__}"


@dataclass(frozen=True)
class Context:
    models: Models
    settings: ServerSettings
    metrics: Metrics

    def clock(self, served: Served) -> Clock:
        return Clock(self.metrics, served.name)

    async def submit(
        self,
        served: Served,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        adapter: str | None = None,
        tenant: str | None = None,
        whole: bool = False,
    ) -> Handle:
        """Give prompts to the engine. Raises ApiError where they could never be taken, QueueFull where not now."""
        answers = len(prompts) * params.n
        if answers > served.worker.capacity:
            why = f"{len(prompts)} prompts with {params.n} answers each; this server takes {served.worker.capacity}"
            raise bad("prompt", f"prompt: {why} at once")
        most = served.worker.limits.max_total_tokens
        tokens = sum(len(prompt.ids) for prompt in prompts) + answers * params.max_tokens
        if most is not None and tokens > most:
            why = f"prompts and answers may come to {tokens} tokens; this server takes {most} in all"
            raise bad("max_tokens", f"max_tokens: {why}")
        return await served.worker.submit([prompt.ids for prompt in prompts], params, adapter, tenant, whole)


def context(request: Request) -> Context:
    """The context of the app that a request came to."""
    found = request.app.state.context
    assert isinstance(found, Context)
    return found


def usage(requests: Sequence[EngineRequest], tokens: int) -> dict[str, Any]:
    """What requests cost. tokens: of all their answers."""
    prompt = sum(len(request.prompt_ids) for request in requests)
    cached = sum(request.cached_tokens for request in requests)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": tokens,
        "total_tokens": prompt + tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
