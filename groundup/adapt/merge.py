"""How does a base take adapters in? Matrix by matrix, summed in fp32, rounded once; and what comes out is checked."""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from groundup.adapt.folder import SOFT, base_of, is_adapter, load_adapter, read_config
from groundup.adapt.layers import AdaptedLayers, Part, add_change
from groundup.adapt.targets import inside
from groundup.errors import UserError
from groundup.files import explain
from groundup.model.config import read_json
from groundup.model.hub import resolve
from groundup.model.io import load_model, save_model

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TOKENIZER = "tokenizer.json"
# What a model folder has beside weights and config.json. The first line may also come from the adapter's folder.
TOKENIZER_FILES = (
    TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
)  # fmt: skip
OTHER_FILES = ("generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*")
TRIED = 32  # tokens on which the merged model must say what base and adapter say together
EXACT = 1e-3  # the most by which its logits may differ there, in fp32, of the largest logit


class Together(Part):
    """A layer with several adapters' parts, each with its share."""

    def __init__(self, base: nn.Module, parts: Sequence[tuple[float, Part]]) -> None:
        super().__init__()
        self.base, self.shares = base, [share for share, _ in parts]
        self.parts = nn.ModuleList(part for _, part in parts)

    def forward(self, x_D: Tensor) -> Tensor:
        y_E = self.base(x_D)
        return y_E + sum(share * (part(x_D) - y_E) for share, part in zip(self.shares, self.parts, strict=True))

    def saved(self) -> dict[str, Tensor]:
        return {}

    def change(self, weight_ED: Tensor, bias_E: Tensor | None) -> tuple[Tensor, Tensor | None]:
        changes = [part.change(weight_ED, bias_E) for part in self.parts if isinstance(part, Part)]
        weighed = list(zip(self.shares, changes, strict=True))
        biases = [share * change_E for share, (_, change_E) in weighed if change_E is not None]
        total_ED = torch.stack([share * change_ED for share, (change_ED, _) in weighed]).sum(0)
        return total_ED, torch.stack(biases).sum(0) if biases else None


def merge(base: str | Path, adapters: Sequence[tuple[str | Path, float]], output: str | Path) -> dict[str, Any]:
    """Write the folder of a plain model that does what `base` does with these adapters, each with its weight.

    Weights are kept in the types that the base's files have; tokenizer files are copied. The logits of base with
    adapters, of the merged model and of the folder that was written are compared on a few tokens. Memory: the model in
    fp32, and what the adapters hold. UserError: what cannot be merged, or does not fit.
    """
    base, output = resolve(base), Path(output)
    kinds = [_refuse(base, Path(path)) for path, _ in adapters]
    if not adapters:
        raise UserError("merge", "no adapter is named", "name the folders of one or several")
    if len(kinds) > 1 and set(kinds) != {"LORA"}:
        why = f"{', '.join(kinds)} do not add up: only LoRAs do"
        raise UserError("merge", why, "merge one, then the next into what came out")
    if output.exists():
        raise UserError(output, "exists already", "choose another --output, or remove it first")
    model = load_model(base)
    together = _take(model, adapters)
    wanted = _logits(model)
    _put_in(model, together)
    report = {
        "output": str(output),
        "adapters": [{"path": str(path), "weight": weight} for path, weight in adapters],
        "layers": len(together),
        "max_difference": _differ(wanted, _logits(model), exact=True),
        "dtype": str(_as_stored(model, base)).removeprefix("torch."),
        "vocab_size": model.config.vocab_size,
    }
    with _staged(output) as folder:
        save_model(model, folder)
        _copy_files(base, [Path(path) for path, _ in adapters], folder)
        exact = all(parameter.dtype == torch.float32 for parameter in model.parameters())
        del model, together  # before what was written is loaded
        report["max_difference_as_stored"] = _differ(wanted, _logits(load_model(folder)), exact)
    return report


def _refuse(base: Path, adapter: Path) -> str:
    """The adapter's type. UserError: it, or this base, cannot be merged."""
    kind = str(read_config(adapter).get("peft_type"))
    if kind in SOFT:
        why = "is a soft prompt: tokens before the text, which no matrix can take in"
        raise UserError(adapter, why, "use it beside its base, or train a LoRA (adapt.method=lora), which merges")
    if kind == "BOTTLENECK":
        why = "is a bottleneck: not linear, so no matrix can take it in"
        raise UserError(adapter, why, "use it beside its base, or train a LoRA (adapt.method=lora), which merges")
    if is_adapter(base):
        raise UserError(base, "is an adapter, not a model", f"name its base: {base_of(base)}")
    if read_json(base).get("quantization_config"):
        why = "its weights are quantised: rounded again they would lose what was learnt"
        raise UserError(base, why, "merge into the unquantised base")
    return kind


def _take(model: nn.Module, adapters: Sequence[tuple[str | Path, float]]) -> dict[str, Together]:
    """All adapters on the model at once. Modules that were trained whole are the model's from now on."""
    found: dict[str, list[tuple[float, Part]]] = {}
    whole: Path | None = None
    for path, weight in adapters:
        if not math.isfinite(weight):
            raise UserError(path, f"{weight} is no weight", "write a number such as 0.5")
        adapted = load_adapter(model, path)
        assert isinstance(adapted, AdaptedLayers)  # _refuse let nothing else through
        adapted.release()
        if adapted.whole.modules:
            if weight != 1.0 or whole is not None:
                names = ", ".join(adapted.whole.modules)
                why = f"holds {names} whole, which is neither weighed nor summed"
                raise UserError(path, why, "merge it alone and with weight 1")
            whole = Path(path)
        for name, part in adapted.parts.items():
            found.setdefault(name, []).append((weight, part))
    layers = dict(inside(model).named_modules())
    together = {path: Together(layers[path], parts).eval() for path, parts in found.items()}
    for path, part in together.items():
        AdaptedLayers.put(model, path, part)
    return together


def _put_in(model: nn.Module, together: dict[str, Together]) -> None:
    """The plain layers again, each with what stood in its place."""
    for path, part in together.items():
        add_change(part)
        AdaptedLayers.put(model, path, part.base)


def _logits(model: Any) -> Tensor:
    """On a few tokens, always the same."""
    vocab, context = model.config.vocab_size, model.config.max_position_embeddings
    ids_1T = torch.randint(vocab, (1, min(TRIED, context)), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits_1TV: Tensor = model(ids_1T).float()
    return logits_1TV


def _differ(wanted: Tensor, found: Tensor, exact: bool) -> float:
    """The largest difference of logits. UserError: where it is more than rounding, or no number."""
    difference = (wanted - found).abs().max().item()
    limit = EXACT * max(1.0, wanted.abs().max().item()) if exact else sys.float_info.max
    if not difference <= limit:
        why = f"base and adapter give other logits than the merged model, by {difference:.2g}"
        raise UserError("merge", why, "nothing was written; please report the adapter's adapter_config.json")
    return difference


def _as_stored(model: nn.Module, base: Path) -> torch.dtype:
    """Round every tensor to the type that the base's files have for it; returns the one that most have."""
    kept: dict[str, torch.dtype] = {}
    for path in base.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        kept |= {name: DTYPES[kind] for name, kind in kinds.items() if kind in DTYPES}
    common = Counter(kept.values()).most_common(1)[0][0] if kept else torch.float32
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(kept.get(name, common))
    return common


@contextmanager
def _staged(output: Path) -> Iterator[Path]:
    """A path beside `output`, which takes its name when the block ends well; else nothing is left."""
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(output)
    except OSError as error:
        raise explain(error, output) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _copy_files(base: Path, adapters: Sequence[Path], folder: Path) -> None:
    """The tokenizer, of the first adapter that has one or else the base's, and what else belongs to a model."""
    tokenizer = next((path for path in adapters if (path / TOKENIZER).is_file()), base)
    for source, names in ((tokenizer, TOKENIZER_FILES), (base, OTHER_FILES)):
        for path in (path for name in names for path in source.glob(name)):
            shutil.copyfile(path, folder / path.name)
