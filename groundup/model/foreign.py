"""What if the architecture is not ours? transformers computes it, behind Transformer's face: every stage works with it.

Nothing is taken on trust. A model that was just loaded is tried on a few tokens: that its hidden states times the head
are its own logits, that no token sees a later one, and how it can be given several documents in one row.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from groundup.errors import UserError
from groundup.model.cache import Cache
from groundup.model.foreign_attention import attend_through, close, shape_of_attention
from groundup.model.foreign_config import ForeignConfig
from groundup.model.foreign_rows import apart, restarting
from groundup.ops.attention import visible

TRIAL = (5, 3)  # tokens of the documents on which a model is tried
WHOLE = 8  # a head with a bias is filled up to a multiple of so many inputs: kernels want them
HALF = (torch.bfloat16, torch.float16)


class Foreign(nn.Module):
    """A causal model of transformers. Its modules are ours under their own names, so a state dict is a stock one.

    inner: transformers' model; decoder: the part of it that reads text. packing: how documents share a row
    (`_try_packing`). servable: whether its attention can be computed over a Cache. notes: what a person should know.
    """

    inner: Any
    decoder: Any
    blocks: nn.ModuleList

    def __init__(self, inner: Any, config: ForeignConfig, where: object = "model") -> None:
        super().__init__()
        # `inner` is no child of ours: we share its children instead, whichever of the two one is replaced in
        self._modules, self._parameters, self._buffers = inner._modules, inner._parameters, inner._buffers
        decoder, head = inner.get_decoder(), inner.get_output_embeddings()
        decoder = inner.model if decoder is inner else decoder  # Llama 4 does not know its own
        if type(head) is not nn.Linear:
            raise UserError(where, f"{config.model_type} has no plain matrix as its head", "use another architecture")
        layers = _layers(decoder, config.num_hidden_layers, where)
        self.__dict__.update(inner=inner, decoder=decoder, blocks=layers)  # registered where they are
        self.config = replace(config, vocab_size=head.out_features)
        self.soft_prefix: Any = None  # soft prompts are for models of ours
        self.notes: list[str] = []
        self.where, self.scale = where, 1.0
        self.packing, self.servable = "apart", False
        self._takes_positions = "position_ids" in inspect.signature(decoder.forward).parameters

    @property
    def head_weight(self) -> torch.Tensor:
        """[V, D]. Of a head with a bias: the bias is one more input, which `hidden` sets to 1."""
        head = self.inner.get_output_embeddings()
        if head.bias is None:
            return head.weight
        filler_VE = head.weight.new_zeros(len(head.weight), _filler(head.in_features))
        return torch.cat([head.weight, head.bias[:, None], filler_VE], 1)

    def hidden(
        self,
        input_ids_BT: torch.Tensor,
        position_ids_BT: torch.Tensor | None = None,
        doc_ids_BT: torch.Tensor | None = None,
        cache: Cache | None = None,
        seen: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """What the head multiplies, [B, T, D]. Arguments as Transformer.hidden; positions start anew with each
        document where none are given. seen: transformers' hidden states, the last of them normalised mostly."""
        return self._through({"input_ids": input_ids_BT}, position_ids_BT, doc_ids_BT, cache, seen)

    def run(
        self,
        x_BTD: torch.Tensor,
        position_ids_BT: torch.Tensor | None = None,
        doc_ids_BT: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """`hidden`, from embeddings."""
        return self._through({"inputs_embeds": x_BTD}, position_ids_BT, doc_ids_BT, cache)

    def forward(
        self,
        input_ids_BT: torch.Tensor,
        position_ids_BT: torch.Tensor | None = None,
        doc_ids_BT: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """Logits [B, T, V]. Arguments as `hidden`."""
        return F.linear(self.hidden(input_ids_BT, position_ids_BT, doc_ids_BT, cache), self.head_weight)

    def train(self, mode: bool = True) -> Foreign:
        self.inner.train(mode)
        self.training = mode
        return self

    def _through(
        self,
        given: dict[str, torch.Tensor],
        position_ids_BT: torch.Tensor | None,
        doc_ids_BT: torch.Tensor | None,
        cache: Cache | None,
        seen: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        if cache is not None:
            return self._cached(given, position_ids_BT, cache)
        if doc_ids_BT is None:
            return self._for_head(self._decode(given, position_ids_BT, seen))
        if position_ids_BT is None:
            position_ids_BT = restarting(doc_ids_BT)
        if self.packing == "apart":
            return self._for_head(apart(self._decode, given, position_ids_BT, doc_ids_BT))
        mask = self._mask(doc_ids_BT, next(iter(given.values()))) if self.packing == "mask" else None
        return self._for_head(self._decode(given, position_ids_BT, seen, attention_mask=mask))

    def _mask(self, doc_ids_BT: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """Who sees whom, [B, 1, T, T]: booleans, or for plain attention in Python what is added to its scores."""
        mask_B1TT = visible(doc_ids_BT)
        if self.decoder.config._attn_implementation != "eager":
            return mask_B1TT
        dtype = given.dtype if given.is_floating_point() else self.inner.dtype
        return torch.where(mask_B1TT, 0.0, torch.finfo(dtype).min).to(dtype)

    def _cached(
        self, given: dict[str, torch.Tensor], position_ids_BT: torch.Tensor | None, cache: Cache
    ) -> torch.Tensor:
        new = next(iter(given.values())).shape[1]
        cached_positions_BT, mask = cache.start(new)
        positions_BT = cached_positions_BT if position_ids_BT is None else position_ids_BT
        with attend_through(cache, mask, self.decoder.config):
            hidden_BTD = self._decode(given, positions_BT)
        cache.advance(new)
        return self._for_head(hidden_BTD)

    def _decode(
        self,
        given: dict[str, torch.Tensor],
        position_ids_BT: torch.Tensor | None,
        seen: list[torch.Tensor] | None = None,
        **more: Any,
    ) -> torch.Tensor:
        if position_ids_BT is not None and self._takes_positions:
            more["position_ids"] = position_ids_BT
        if seen is not None:
            more["output_hidden_states"] = True
        out = self.decoder(**given, use_cache=False, **more)
        if seen is not None:
            seen += out.hidden_states
        return out[0]

    def _for_head(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        head = self.inner.get_output_embeddings()
        if head.bias is not None:
            one_BT1 = hidden_BTD.new_ones(*hidden_BTD.shape[:-1], 1)
            hidden_BTD = F.pad(torch.cat([hidden_BTD, one_BT1], -1), (0, _filler(head.in_features)))
        return hidden_BTD if self.scale == 1.0 else hidden_BTD * self.scale

    @torch.no_grad()
    def try_out(self) -> Foreign:
        """Find out how this model wants to be used. UserError: it is no causal language model, or its logits are not
        hidden states times a matrix."""
        head, vocab = self.head_weight, self.config.vocab_size
        ids_1T = (7 * torch.arange(sum(TRIAL), device=head.device) + 3)[None] % vocab
        try:
            hidden_1TD = self.hidden(ids_1T)
            own_1TV = self.inner(input_ids=ids_1T, use_cache=False).logits
        except Exception as error:  # a model that wants more than text
            raise UserError(self.where, f"cannot be run on text alone ({error})", "use another model") from error
        if not close(hidden_1TD[:, : TRIAL[0]], self.hidden(ids_1T[:, : TRIAL[0]])):
            why = f"{self.config.model_type} lets tokens see later ones"
            raise UserError(self.where, why, "use a causal language model")
        self.scale = self._find_scale(hidden_1TD, head, own_1TV)
        self.packing = self._try_packing(ids_1T)
        found = shape_of_attention(self, ids_1T)
        self.servable = found is not None
        if found is not None:
            self.config = replace(self.config, num_key_value_heads=found[0], head_dim=found[1])
        if self.packing == "apart":
            self.notes.append("each document in a row of its own")
        if not self.servable:
            self.notes.append("answers slowly, without a cache")
        return self

    def _find_scale(self, hidden_1TD: torch.Tensor, head: torch.Tensor, own_1TV: torch.Tensor) -> float:
        """What the model multiplies its logits by (Cohere, Granite). UserError: it does something else to them."""
        if hidden_1TD.shape[-1] == head.shape[1]:
            ours = F.linear(hidden_1TD, head).double()
            if close(ours, own_1TV):
                return 1.0
            scale = float(f"{float((ours * own_1TV.double()).sum() / ours.square().sum()):.6g}")
            if close(ours * scale, own_1TV):
                return scale
        why = f"the logits of {self.config.model_type} are not its hidden states times its head"
        raise UserError(self.where, why, "use another architecture")

    def _try_packing(self, ids_1T: torch.Tensor) -> str:
        """The first way in which documents that share a row are computed as alone.

        positions: transformers finds them by positions that start anew. mask: it is told who sees whom; not where it
        has other masks of its own. apart: each gets a row of its own, filled up on the right.
        """
        doc_ids_1T = torch.repeat_interleave(torch.tensor(TRIAL, device=ids_1T.device))[None]
        alone = torch.cat([self.hidden(part) for part in ids_1T.split(TRIAL, 1)], 1)
        if close(self.hidden(ids_1T), alone):  # they do not listen to one another at all: nothing can be found out
            return "apart"
        ways = ["positions"] if _windowed(self.decoder.config) else ["positions", "mask"]
        for way in ways:
            self.packing = way
            try:
                together = self.hidden(ids_1T, None, doc_ids_1T)
            except (TypeError, ValueError, RuntimeError, AttributeError):  # it does not know the argument, or the shape
                continue
            if close(together, alone):
                return way
        return "apart"


def load_foreign(directory: str | Path, device: torch.device, dtype: torch.dtype | None) -> Foreign:
    """The model of a stock folder whose architecture is not ours, from its safetensors, in eval mode.

    UserError: what is wrong with the folder, and why this architecture cannot be used.
    """
    from transformers import AutoModelForCausalLM

    config = ForeignConfig.from_dir(directory)
    stored = getattr(torch, str(config.stock.dtype).removeprefix("torch."), None)
    if dtype is None and device.type == "cpu" and stored in (*HALF, torch.float64, None):
        dtype = torch.float32  # half precision is many times slower there without special units
    with quiet():
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(directory), dtype=dtype or "auto", local_files_only=True, trust_remote_code=False,
                use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True,
            )  # fmt: skip
        except Exception as error:  # a damaged file, a config that its own class refuses: many kinds
            raise UserError(directory, f"transformers cannot load it ({error})", "fetch the model again") from error
    inner, found = loaded
    wrong = sorted(found["mismatched_keys"])
    if wrong:
        name, shape, expected = wrong[0]
        why = f"{name} is {tuple(shape)}, config.json says {tuple(expected)}"
        raise UserError(directory, why, "fetch the model again")
    missing = sorted(found["missing_keys"])
    if missing:
        raise UserError(directory, f"{len(missing)} tensors are missing, first {missing[0]}", "fetch the model again")
    model = Foreign(inner.to(device).requires_grad_(True).eval(), config, directory).try_out()
    unused = sorted(found["unexpected_keys"])
    if unused:
        model.notes.append(f"{len(unused)} tensors of the folder are not used, first {unused[0]}")
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and reports: what is wrong is said in our words."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def _layers(decoder: nn.Module, count: int, where: object) -> nn.ModuleList:
    """The blocks: the outermost list of as many modules as the config has layers."""
    for part in decoder.modules():
        if isinstance(part, nn.ModuleList) and len(part) == count:
            return part
    raise UserError(where, f"{type(decoder).__name__} keeps its {count} layers in no list", "use another architecture")


def _filler(width: int) -> int:
    return -(width + 1) % WHOLE


def _windowed(config: Any) -> bool:
    """Whether some layer sees less than all that came before."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return kinds != {"full_attention"} or bool(getattr(config, "sliding_window", None))
