"""Will it fit? The memory of a training step, part by part, before the run starts.

Weights, gradients and optimizer state are counted exactly. Activations are probed: a model of this width with one layer
and one with two run forward over a few tokens, and what autograd keeps is counted, so the estimate follows the code.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groundup.config import AdaptConfig, Recipe, load_recipe
from groundup.errors import UserError
from groundup.plan.machine import free_memory

if TYPE_CHECKING:
    import torch

    from groundup.model.config import ModelConfig
    from groundup.model.foreign_config import ForeignConfig

PROBE_LENGTHS = (64, 128, 192)  # tokens; whole blocks of the CPU's attention, whose cost grows by blocks
# What allocators lose between tensors: measured 1.1 to 1.4 with glibc (twice that with checkpointing, whose blocks
# come and go), little with CUDA's pools.
MARGIN = {"cpu": 1.4, "cuda": 1.1, "mps": 1.2}


def estimate(config: ModelConfig | ForeignConfig, recipe: Recipe, device: torch.device | str = "cpu") -> dict[str, int]:
    """Bytes of one training step: weights, gradients, optimizer, ema, reference, activations, logits, total (the peak).

    Gradients, optimizer and ema are those of what moves (recipe.adapt); frozen matrices are counted as they are kept.
    Rows are taken to hold one document each, which is the most that attention can keep; packed short ones keep less.
    logits: the chunk of the head with its gradients. The total is less than the sum: activations and all gradients are
    never there at once, unless gradients accumulate over several passes. Not counted: Python and torch themselves
    (about 0.4 GB), and what torch.compile takes while it compiles. UserError: recipe.adapt does not fit the model.
    """
    import torch

    from groundup.device import pick_dtype
    from groundup.model.flops import lowest_moving
    from groundup.ops.loss import default_chunk
    from groundup.optim.build import param_groups

    device, train = torch.device(device), recipe.train
    model = _adapted(_model(config, "meta"), recipe.adapt)
    groups = param_groups(model, muon=recipe.optim.name == "muon")
    numbers = {name: sum(p.numel() for p in group) for name, group in groups.items()}
    half = pick_dtype(train.dtype, device) != torch.float32
    weights, moving = _weight_bytes(model, recipe.adapt, half), 4 * sum(numbers.values())
    layer, trunk = (curve.bytes_of(train.batch_size, train.seq_len) for curve in _curves(config, recipe, device))
    tokens, depth = train.batch_size * train.seq_len, len(model.blocks) - lowest_moving(model)
    inputs = 4 * tokens * config.hidden_size  # what recomputing a layer starts from
    recomputed = layer if train.activation_checkpointing else 0
    chunk = min(tokens, default_chunk(torch.empty(config.vocab_size, 0, device=device)))
    head_weight: torch.Tensor = model.head_weight
    head = 4 * head_weight.numel() if head_weight.requires_grad else 0
    logits = 16 if half else 4 if device.type == "cpu" else 12
    logits += 16 if recipe.stage == "distill" else 0  # the teacher's, both softmaxes, their ratio
    parts = {
        "weights": weights,
        "gradients": moving,
        "optimizer": 4 * numbers["muon"] + 8 * (numbers["decay"] + numbers["plain"]),
        "ema": moving if train.ema else 0,
        "reference": _reference_bytes(model, recipe, half),
        "activations": trunk + depth * (inputs if recomputed else layer),
        # logits, turned in place into their gradient on a CPU, else with softmax and a copy; the gradients of hidden
        # states and head, the head's once more as it grows
        "logits": logits * chunk * config.vocab_size + inputs + 2 * head,
    }
    if recipe.stage == "ppo" and recipe.rl.value_model != "shared":  # a second model learns beside the policy
        parts |= {name: 2 * parts[name] for name in ("gradients", "optimizer", "ema", "activations")}
        parts["weights"], moving = weights + moving, 2 * moving
    kept = moving if train.accumulate > 1 else 0  # gradients of the passes before
    # Going back through a layer, the gradients of gate, up and their product are the widest to stand beside it.
    working = recomputed + 12 * tokens * config.intermediate_size + head
    passing = max(parts["activations"] + kept + max(parts["logits"], working), moving + layer)
    standing = sum(parts[part] for part in ("weights", "optimizer", "ema", "reference"))
    return parts | {"total": standing + passing}


def _model(config: ModelConfig | ForeignConfig, device: torch.device | str) -> Any:
    """A model of this shape, whoever computes it, with weights that say nothing."""
    import torch

    from groundup.model.config import ModelConfig
    from groundup.model.foreign import Foreign
    from groundup.model.transformer import Transformer

    if not isinstance(config, ModelConfig):
        changes = {"num_hidden_layers": config.num_hidden_layers, "vocab_size": config.vocab_size}
        return Foreign(config.build(device, **changes), config)
    with torch.device(device):
        return Transformer(config)


def _adapted(model: Any, settings: AdaptConfig) -> Any:
    """The model with the part that moves; how a frozen base is kept is reckoned, not done."""
    from groundup.adapt.build import adapt

    plain = settings.model_copy(update={"base": "full", "text": None, "init": "default"})
    adapted = adapt(model, plain, seed=0)
    return model if adapted is None else adapted.forward_model()


def _weight_bytes(model: Any, settings: AdaptConfig, half: bool) -> int:
    """Of all weights: fp32, but for the frozen matrices below an adapter, which are kept in fewer bits where products
    are of half precision or the recipe says so."""
    from torch import nn

    total = 4 * sum(p.numel() for p in model.parameters())
    if settings.method in ("full", "freeze"):
        return total
    scales = 1 / 64 + 4 / (64 * 256) if settings.double_quant else 4 / 64  # of NF4, for each number
    for layer in model.blocks.modules():
        if type(layer) is nn.Linear and not layer.weight.requires_grad:
            int8 = 1 + 4 / layer.in_features
            each = {"full": 2.0 if half else 4.0, "nf4": 0.5 + scales, "int8": int8}[settings.base]
            total -= round((4 - each) * layer.weight.numel())
    return total


def _reference_bytes(model: Any, recipe: Recipe, half: bool) -> int:
    """Of a frozen copy of what moves (train/reference.py): fp32, the blocks' matrices in the type of products. Of a
    teacher that runs beside (train/distill.py): all of it."""
    from torch import nn

    if recipe.stage == "distill":
        return _teacher_bytes(recipe, half)
    adapted = recipe.adapt.method not in ("full", "freeze")
    if recipe.stage in ("ppo", "grpo"):
        copied = recipe.rl.at(recipe.stage).beta and not adapted
    else:
        copied = recipe.stage == "preference" and recipe.preference.kept(recipe.adapt.method) == "copy"
    if not copied:
        return 0
    total = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    moving = [m.weight for m in model.blocks.modules() if type(m) is nn.Linear and m.weight.requires_grad]
    return total - (2 * sum(weight.numel() for weight in moving) if half else 0)


def _teacher_bytes(recipe: Recipe, half: bool) -> int:
    from groundup.model.config import num_parameters
    from groundup.model.hub import resolve
    from groundup.model.io import read_config

    if recipe.distill.teacher is None or recipe.distill.top_k:
        return 0
    folder = resolve(recipe.distill.teacher)
    files = sum(file.stat().st_size for file in folder.glob("*.safetensors"))  # of an adapter: what is known of it
    whole = (folder / "config.json").is_file()
    return (2 if half else 4) * num_parameters(read_config(folder)) if whole else files


class _Curve:
    """Bytes that autograd keeps for rows of T tokens: constant + rows * (linear * T + square * T^2)."""

    def __init__(self, lengths: Sequence[int], sizes: Sequence[float]) -> None:
        import numpy

        self.square, self.linear, self.constant = (float(c) for c in numpy.polyfit(lengths, sizes, 2))

    def bytes_of(self, rows: int, length: int) -> int:
        return round(self.constant + rows * length * (self.linear + self.square * length))


def _curves(config: ModelConfig | ForeignConfig, recipe: Recipe, device: torch.device) -> tuple[_Curve, _Curve]:
    """(one layer, what surrounds the layers) of this model in this recipe."""
    from groundup.model.config import ModelConfig

    changes: dict[str, Any] = {"num_hidden_layers": 1, "vocab_size": 64, "eos_token_id": None}
    if isinstance(config, ModelConfig):
        changes["rope_scaling"] = None
    else:
        changes |= {"bos_token_id": None, "pad_token_id": None}
    settings = recipe.adapt
    if settings.method == "freeze":  # a layer that moves keeps the most
        settings = settings.model_copy(update={"method": "full"})
    shape, told = replace(config, **changes), settings.model_dump_json()
    if isinstance(config, ModelConfig):
        return _probe(shape, device, recipe.train.dtype, told)
    try:
        return _probe(shape, device, recipe.train.dtype, told)
    except Exception:  # an architecture that cannot be had with one layer: what usual ones keep
        each = 4 * (14 * config.hidden_size + 5 * config.intermediate_size)
        rest = 8 * config.hidden_size
        return tuple(_Curve(PROBE_LENGTHS, [n * size for n in PROBE_LENGTHS]) for size in (each, rest))  # type: ignore


@functools.lru_cache(maxsize=16)
def _probe(
    shape: ModelConfig | ForeignConfig, device: torch.device, dtype_name: str, settings: str
) -> tuple[_Curve, _Curve]:
    """`_curves` of models of this shape, tuned as AdaptConfig's JSON says."""
    from groundup.device import pick_dtype

    dtype, adapt = pick_dtype(dtype_name, device), AdaptConfig.model_validate_json(settings)
    one, two = (
        [
            _saved_bytes(replace(shape, num_hidden_layers=depth), length, device, dtype, adapt)
            for length in PROBE_LENGTHS
        ]
        for depth in (1, 2)
    )
    layer = [b - a for a, b in zip(one, two, strict=True)]
    return _Curve(PROBE_LENGTHS, layer), _Curve(PROBE_LENGTHS, [a - c for a, c in zip(one, layer, strict=True)])


def _saved_bytes(
    config: ModelConfig | ForeignConfig, tokens: int, device: torch.device, dtype: torch.dtype, settings: AdaptConfig
) -> int:
    """Bytes that a forward pass over one packed row keeps for the backward pass, weights left out."""
    import torch

    from groundup.device import autocast

    with torch.random.fork_rng(devices=[]):  # whoever asks must not find other random numbers afterwards
        model = _model(config, device)
        if hasattr(model, "try_out"):
            model.eval().try_out()
        try:
            model = _adapted(model, settings)
        except UserError:  # names layers that so small a model has not
            model.requires_grad_(True)
    model.train()
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}  # holding the tensors: an address is not given out twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in known:
            kept.setdefault(address, tensor)
        return tensor

    places_BT = torch.arange(tokens, device=device)[None]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), autocast(device, dtype):
        model.hidden(places_BT % config.vocab_size, places_BT, torch.zeros_like(places_BT, dtype=torch.int32))
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def check_fits(
    config: ModelConfig | ForeignConfig, recipe: Recipe, device: torch.device | str = "cpu"
) -> dict[str, int]:
    """The estimate, where it fits into the free memory of the device; else UserError with settings that do fit."""
    import torch

    device = torch.device(device)
    needs, free = estimate(config, recipe, device), free_memory(device)
    if _taken(needs, device) <= free:
        return needs
    train = recipe.train
    why = (
        f"{train.batch_size} rows of {train.seq_len} tokens need about {_size(_taken(needs, device))}, "
        f"{device} has {_size(free)} free (weights, gradients and optimizer take {_size(_fixed(needs))})"
    )
    raise UserError("train.batch_size", why, suggest(config, recipe, device, free))


def suggest(config: ModelConfig | ForeignConfig, recipe: Recipe, device: torch.device | str, free: int) -> str:
    """The least change of the recipe that fits into `free` bytes, with the same rows in each optimizer step."""
    import torch

    device, tried, taken = torch.device(device), recipe, 0
    for tried, changes in _smaller(recipe):
        taken = _taken(estimate(config, tried, device), device)
        if taken <= free:
            return "use " + " ".join(changes)
    least = f"even {tried.train.batch_size} row of {tried.train.seq_len} tokens with activation checkpointing"
    return f"choose a smaller model: {least} needs {_size(taken)}"


def _smaller(recipe: Recipe) -> Iterator[tuple[Recipe, list[str]]]:
    """Ever smaller recipes, the cheapest changes first: fewer rows a pass, then recomputation, then shorter rows."""
    train = recipe.train
    rows = train.batch_size * train.accumulate
    sizes = [b for b in range(train.batch_size, 0, -1) if rows % b == 0]
    lengths = [length for length in (train.seq_len, train.seq_len // 2, train.seq_len // 4) if length >= 64]
    for length in lengths or [train.seq_len]:
        for recompute in (False, True) if not train.activation_checkpointing else (True,):
            for size in sizes:
                new: dict[str, Any] = {"batch_size": size, "accumulate": rows // size, "seq_len": length}
                new["activation_checkpointing"] = recompute
                changes = [f"train.{k}={str(v).lower()}" for k, v in new.items() if v != getattr(train, k)]
                yield recipe.model_copy(update={"train": train.model_copy(update=new)}), changes


def plan_recipe(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What a recipe needs on this machine: bytes by part, free bytes, whether it fits, and what to change if not."""
    from groundup.device import pick_device
    from groundup.model.config import num_parameters

    recipe = load_recipe(path, overrides)
    config, device = model_config(recipe), pick_device(recipe.train.device)
    needs, free = estimate(config, recipe, device), free_memory(device)
    taken = _taken(needs, device)
    return {
        "model": recipe.model,
        "parameters": num_parameters(config),
        "trained_parameters": needs["gradients"] // 4,
        "device": str(device),
        **{f"{part}_bytes": size for part, size in needs.items()},
        "free_bytes": free,
        "fits": taken <= free,
        "summary": f"needs about {_size(taken)}, {_size(free)} free",
        **({} if taken <= free else {"advice": suggest(config, recipe, device, free)}),
    }


def model_config(recipe: Recipe) -> ModelConfig | ForeignConfig:
    """The shape of a recipe's model: a folder's own, or a preset with the vocabulary of the recipe's tokenizer."""
    from groundup.model.hub import is_hub_name, resolve
    from groundup.model.io import read_config
    from groundup.model.presets import preset

    if Path(recipe.model).is_dir() or is_hub_name(recipe.model):
        return read_config(resolve(recipe.model))
    if recipe.tokenizer is None:
        return preset(recipe.model)
    from groundup.tokenizer import load_tokenizer

    return preset(recipe.model, load_tokenizer(recipe.tokenizer).vocab_size)


def _taken(needs: dict[str, int], device: torch.device) -> int:
    """What the process will take for tensors of this total."""
    return round(MARGIN.get(device.type, 1.2) * needs["total"])


def _fixed(needs: dict[str, int]) -> int:
    return sum(needs[part] for part in ("weights", "gradients", "optimizer", "ema", "reference"))


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
