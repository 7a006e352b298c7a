"""What if the prompt is learnt, not written? n virtual tokens before every document, and the model stays as it is.

| method | learns | paper (arXiv) |
|---|---|---|
| prompt | n embeddings | 2104.08691 |
| p_tuning | a network that makes n embeddings | 2103.10385 |
| prefix | a network that makes the keys and values that every layer has of n tokens | 2101.00190 |
| p_tuning_v2 | those keys and values themselves | 2110.07602 |

All of them end as a prefix of keys and values (model/prefix.py): embeddings are run through the model to get it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from groundup.adapt.adapted import Adapted
from groundup.adapt.soft_encoders import PrefixEncoder, PromptEncoder, Table
from groundup.config import AdaptConfig
from groundup.errors import UserError
from groundup.model.cache import Cache
from groundup.model.config import ModelConfig
from groundup.model.prefix import Prefixed, SoftPrefix, record
from groundup.model.transformer import Transformer

if TYPE_CHECKING:
    from groundup.tokenizer import Tokenizer

PEFT_TYPES = {
    "prompt": "PROMPT_TUNING", "p_tuning": "P_TUNING", "prefix": "PREFIX_TUNING", "p_tuning_v2": "PREFIX_TUNING",
}  # fmt: skip
SAVED = "prompt_embeddings"  # the one tensor of PEFT's files


def soft_prompt(model: nn.Module, config: AdaptConfig, seed: int, tokenizer: Tokenizer | None = None) -> SoftPrompt:
    """A fresh soft prompt before `model`, the same for the same seed. tokenizer: for config.text.

    UserError: a model that runs through transformers, a text that is empty or wanted for another method, no room for so
    many tokens.
    """
    base = _native(model, f"adapt.method={config.method}")
    _check(base.config, config)
    ids_n = _words(base, config, seed, tokenizer)
    width = config.width or _token_dim(base.config, config.method)
    with torch.random.fork_rng(devices=[]):  # the modules start as torch starts them, which is how PEFT's do
        torch.manual_seed(seed)
        encoder = _encoder(base, config, width, ids_n)
    return SoftPrompt(base, encoder.to(base.head_weight.device), _settings(base.config, config, width))


def load_soft(model: nn.Module, settings: dict[str, Any], tensors: dict[str, Tensor]) -> SoftPrompt:
    """The soft prompt of a PEFT folder before `model`. UserError: it was made for another model."""
    base = _native(model, f"peft_type={settings['peft_type']}")
    if settings.get("num_transformer_submodules") not in (None, 1):
        raise UserError("adapter_config.json", "is of an encoder with a decoder", "use an adapter of a causal model")
    n, heads = settings.get("num_virtual_tokens"), settings.get("num_attention_heads")
    if not isinstance(n, int) or n < 1:
        raise UserError("adapter_config.json", f"num_virtual_tokens is {n!r}", "save the adapter again with PEFT")
    prefix = settings["peft_type"] == "PREFIX_TUNING"
    if prefix and heads not in (None, base.config.num_key_value_heads):
        why = f"has {heads} key heads, this model {base.config.num_key_value_heads}"
        raise UserError("adapter_config.json", why, "use an adapter of this model")
    device = base.head_weight.device
    adapted = SoftPrompt(base, Table(torch.zeros(n, _columns(base.config, prefix), device=device)), settings)
    adapted.load(tensors)
    return adapted


class SoftPrompt(Adapted):
    """A model with virtual tokens before every document."""

    model: Transformer

    def __init__(self, model: Transformer, encoder: nn.Module, settings: dict[str, Any]) -> None:
        super().__init__(model.requires_grad_(False))
        self.peft_type = settings["peft_type"]
        self._settings = {name: value for name, value in settings.items() if name != "base_model_name_or_path"}
        self._prompted = SoftPrompted(model, encoder, layered=self.peft_type == "PREFIX_TUNING")
        self._attached: SoftPrefix | None = None

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        return {SAVED: self._prompted.encoder().detach().clone()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """The finished table takes the place of what made it, and moves itself from here on."""
        odd, found = sorted(tensors.keys() - {SAVED}), tensors.get(SAVED)
        if odd or found is None:
            why = f"holds {odd[0]}, which no soft prompt has" if odd else f"holds no {SAVED}"
            raise UserError("adapter_model.safetensors", why, "save the adapter again with PEFT")
        shape = (self._settings["num_virtual_tokens"], _columns(self.model.config, self._prompted.layered))
        if tuple(found.shape) != shape:
            why = f"is {tuple(found.shape)}, this model takes {shape}"
            raise UserError(SAVED, why, "use an adapter of this model")
        self._prompted.encoder = Table(found).to(self.model.head_weight.device)

    def settings(self) -> dict[str, Any]:
        return dict(self._settings)

    @torch.no_grad()
    def merge(self) -> None:
        """Give the model the prompt as its `soft_prefix`, for answering and measuring. After more steps, once more."""
        if self.model.soft_prefix is not None and self.model.soft_prefix is not self._attached:
            raise UserError("merge", "the model has a soft prompt already", "use one of them")
        prefix = [(keys.detach().clone(), values.detach().clone()) for keys, values in self._prompted.prefix()]
        self.model.soft_prefix = self._attached = prefix

    def forward_model(self) -> SoftPrompted:
        return self._prompted


class SoftPrompted(nn.Module):
    """A model behind its prompt, with Transformer's face: what stages train.

    encoder: gives the table, [n, D] embeddings, or [n, L * 2 * K * d] keys and values where `layered`.
    """

    def __init__(self, model: Transformer, encoder: nn.Module, layered: bool) -> None:
        super().__init__()
        self.model, self.encoder, self.layered = model, encoder, layered

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.blocks

    @property
    def head_weight(self) -> Tensor:
        return self.model.head_weight

    def prefix(self) -> SoftPrefix:
        """As the prompt stands now, differentiable."""
        table = self.encoder().to(self.model.model.embed_tokens.weight.dtype)
        if not self.layered:
            return record(self.model, table)
        c = self.config
        table_nL2Kd = table.view(len(table), c.num_hidden_layers, 2, c.num_key_value_heads, c.head_dim)
        return [(pair_n2Kd[:, 0], pair_n2Kd[:, 1]) for pair_n2Kd in table_nL2Kd.unbind(1)]

    def hidden(
        self,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor | None = None,
        doc_ids_BT: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """As Transformer.hidden; a cache must hold the prompt already. The prompt is computed once for the batch."""
        if cache is not None:
            return self.model.hidden(input_ids_BT, position_ids_BT, doc_ids_BT, cache)
        rows = Prefixed(self.prefix(), input_ids_BT, position_ids_BT, doc_ids_BT)
        return self.model.hidden(input_ids_BT, cache=rows)

    def forward(
        self,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor | None = None,
        doc_ids_BT: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Logits [B, T, V]. Arguments as `hidden`."""
        hidden_BTD = self.hidden(input_ids_BT, position_ids_BT, doc_ids_BT, cache)
        return nn.functional.linear(hidden_BTD, self.head_weight)


def _native(model: nn.Module, where: str) -> Transformer:
    if isinstance(model, Transformer):
        return model
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    fix = "use lora, ia3, bottleneck, freeze or full with this one"
    raise UserError(where, f"a soft prompt needs a model that we compute ourselves, not {kind}", fix)


def _check(model: ModelConfig, config: AdaptConfig) -> None:
    if config.text is not None and config.method != "prompt":
        raise UserError("adapt.text", f"{config.method} does not start from words", "use adapt.method=prompt")
    if config.save:
        raise UserError("adapt.save", "a soft prompt changes no module", "use lora, or leave adapt.save out")
    if config.tokens >= model.max_position_embeddings - 1:
        why = f"{config.tokens} leave no room in the model's context of {model.max_position_embeddings}"
        raise UserError("adapt.tokens", why, "use fewer")


def _words(model: Transformer, config: AdaptConfig, seed: int, tokenizer: Tokenizer | None) -> Tensor:
    """n token ids to start from: those of the text, over and over, or any."""
    if config.text is None:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(model.config.vocab_size, (config.tokens,), generator=generator)
    if tokenizer is None:
        raise UserError("adapt.text", "needs a tokenizer to read it", "leave it out, or use a model with a tokenizer")
    ids = tokenizer.encode(config.text)
    if not ids:
        raise UserError("adapt.text", "is empty", "give the words to start from, or leave it out")
    return torch.tensor((ids * -(-config.tokens // len(ids)))[: config.tokens])


@torch.no_grad()
def _encoder(model: Transformer, config: AdaptConfig, width: int, ids_n: Tensor) -> nn.Module:
    """What is trained. Prompts, and prefixes without a network, start from what the model makes of real words, which
    trains better than noise (2104.08691 section 3.2, 2101.00190 section 7.4)."""
    size = _token_dim(model.config, config.method)
    if config.method == "p_tuning":
        return PromptEncoder(config.tokens, size, width)
    if config.method == "prefix":
        return PrefixEncoder(config.tokens, size, width, model.config.num_hidden_layers)
    words_nD = model.model.embed_tokens.weight[ids_n.to(model.head_weight.device)]
    if config.method == "prompt":
        return Table(words_nD)
    pairs_nL2Kd = torch.stack([torch.stack(pair, 1) for pair in record(model, words_nD)], 1)
    return Table(pairs_nL2Kd.flatten(1))


def _token_dim(model: ModelConfig, method: str) -> int:
    """What PEFT calls token_dim: the width of an embedding, or of a layer's keys."""
    layered = PEFT_TYPES[method] == "PREFIX_TUNING"
    return model.num_key_value_heads * model.head_dim if layered else model.hidden_size


def _columns(model: ModelConfig, layered: bool) -> int:
    """Width of the finished table."""
    return model.num_hidden_layers * 2 * model.num_key_value_heads * model.head_dim if layered else model.hidden_size


def _settings(model: ModelConfig, config: AdaptConfig, width: int) -> dict[str, Any]:
    """adapter_config.json as PEFT writes it."""
    kind = PEFT_TYPES[config.method]
    own: dict[str, dict[str, Any]] = {
        # How it began is over: PEFT would ask for the tokenizer of a text.
        "PROMPT_TUNING": {"prompt_tuning_init": "RANDOM"},
        "P_TUNING": {
            "encoder_reparameterization_type": "MLP", "encoder_hidden_size": width,
            "encoder_num_layers": 2, "encoder_dropout": 0.0,
        },
        "PREFIX_TUNING": {"encoder_hidden_size": width, "prefix_projection": config.method == "prefix"},
    }  # fmt: skip
    heads = model.num_key_value_heads if kind == "PREFIX_TUNING" else model.num_attention_heads
    return {
        "peft_type": kind,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "num_virtual_tokens": config.tokens,
        "token_dim": _token_dim(model, config.method),
        "num_transformer_submodules": 1,
        "num_attention_heads": heads,
        "num_layers": model.num_hidden_layers,
        **own[kind],
    }
