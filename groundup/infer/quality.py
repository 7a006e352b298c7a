"""What does quantising cost in quality? The same tokens through both models, and how far their forecasts part."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import nn

from groundup.data.batch import Batch
from groundup.infer.linear import Product, head_scheme, make_linear
from groundup.model.transformer import Transformer

Logits = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class QuantizedLinear(nn.Module):
    """nn.Linear by make_linear: any leading axes."""

    def __init__(self, layer: nn.Linear, scheme: str | None) -> None:
        super().__init__()
        self.product = make_linear(layer.weight.detach(), layer.bias, scheme)

    def forward(self, x_D: torch.Tensor) -> torch.Tensor:
        return self.product(x_D.flatten(0, -2)).unflatten(0, x_D.shape[:-1])


class Quantized(nn.Module):
    """A model whose matrices, the head too, are quantised; embeddings and norms are shared with the one given."""

    def __init__(self, model: Transformer, scheme: str | None) -> None:
        super().__init__()
        shared: dict[int, object] = {id(p): p for p in model.parameters()}
        self.model = copy.deepcopy(model, shared)
        self.head = make_linear(model.head_weight.detach(), None, head_scheme(scheme))
        for part in [part for block in self.model.blocks for part in block.modules()]:
            for name, layer in list(part.named_children()):
                if type(layer) is nn.Linear:
                    setattr(part, name, QuantizedLinear(layer, scheme))

    def forward(
        self, input_ids_BT: torch.Tensor, position_ids_BT: torch.Tensor, doc_ids_BT: torch.Tensor
    ) -> torch.Tensor:
        """Logits [B, T, V]."""
        hidden_BTD = self.model.hidden(input_ids_BT, position_ids_BT, doc_ids_BT)
        return self.head(hidden_BTD.flatten(0, 1)).unflatten(0, hidden_BTD.shape[:2])

    @property
    def products(self) -> list[Product]:
        """Every quantised matrix, the head last."""
        layers = [part for part in self.model.modules() if isinstance(part, QuantizedLinear)]
        return [*(layer.product for layer in layers), self.head]

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices, the head among them."""
        return sum(product.nbytes for product in self.products)


@torch.no_grad()
def quality(model: Logits, quantized: Logits, batches: Iterable[Batch], text_bytes: int) -> dict[str, float]:
    """{"kl", "top1_agreement", "bits_per_byte_delta"} of a quantised model, over all positions with a label.

    kl: mean KL(model || quantized) of the next token's distribution, nats; 0 says that nothing is lost. top1_agreement:
    share of positions where both put the same token first. bits_per_byte_delta: what the text costs more (below 0:
    less). text_bytes: UTF-8 bytes of the labels' text, PackedDataset.bytes. Both models map (input_ids, position_ids,
    doc_ids), [B, T], to logits.
    """
    kl = agreed = nats = 0.0
    count = 0
    for batch in batches:
        for b in range(len(batch.labels_BT)):  # a row at a time: logits are large
            row = slice(b, b + 1)
            inputs = batch.input_ids_BT[row], batch.position_ids_BT[row], batch.doc_ids_BT[row]
            kept_T = batch.labels_BT[b] != -100
            ours_NV, theirs_NV = (F.log_softmax(m(*inputs)[0, kept_T].float(), 1) for m in (model, quantized))
            labels_N1 = batch.labels_BT[b, kept_T][:, None]
            kl += F.kl_div(theirs_NV, ours_NV, reduction="sum", log_target=True).item()
            agreed += (ours_NV.argmax(1) == theirs_NV.argmax(1)).sum().item()
            nats += (ours_NV.gather(1, labels_N1) - theirs_NV.gather(1, labels_N1)).sum().item()
            count += len(labels_N1)
    return {
        "kl": kl / count,
        "top1_agreement": agreed / count,
        "bits_per_byte_delta": nats / math.log(2) / text_bytes,
    }
