"""How do several documents share a row of a model that knows nothing of it? They do not: each gets one of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch

Decode = Callable[[dict[str, torch.Tensor], torch.Tensor], torch.Tensor]


def starts_of(doc_ids_BT: torch.Tensor) -> torch.Tensor:
    """Booleans [B, T]: whether a token is the first of its document in its row."""
    starts_BT = torch.ones_like(doc_ids_BT, dtype=torch.bool)
    starts_BT[:, 1:] = doc_ids_BT[:, 1:] != doc_ids_BT[:, :-1]
    return starts_BT


def restarting(doc_ids_BT: torch.Tensor) -> torch.Tensor:
    """Positions [B, T] that start anew with each document."""
    places_T = torch.arange(doc_ids_BT.shape[1], device=doc_ids_BT.device)
    return places_T - torch.where(starts_of(doc_ids_BT), places_T, 0).cummax(1).values


def apart(
    decode: Decode, given: dict[str, torch.Tensor], position_ids_BT: torch.Tensor, doc_ids_BT: torch.Tensor
) -> torch.Tensor:
    """Hidden states [B, T, D] of packed rows, each document computed in a row of its own; 0 in the filler.

    A causal model does not see what fills a row up on its right. Documents of similar length (within a factor of 2) are
    computed together, so no more than half of what is computed is filler.
    """
    (name, packed), (rows, length) = next(iter(given.items())), doc_ids_BT.shape
    starts_N = starts_of(doc_ids_BT).flatten().nonzero().squeeze(1)
    sizes_S = torch.diff(starts_N, append=starts_N.new_tensor([rows * length]))
    wanted_S = doc_ids_BT.flatten()[starts_N] >= 0
    starts_N, sizes_S = starts_N[wanted_S], sizes_S[wanted_S]
    flat, positions_N = packed.flatten(0, 1), position_ids_BT.expand(rows, -1).flatten()
    classes_S = (sizes_S - 1).clamp(min=1).log2().floor()
    out_ND: torch.Tensor | None = None
    for each in classes_S.unique():
        starts_R, sizes_R = starts_N[classes_S == each], sizes_S[classes_S == each]
        within_L = torch.arange(int(sizes_R.max()), device=starts_R.device)
        real_RL = within_L < sizes_R[:, None]
        places_RL = (starts_R[:, None] + within_L).clamp(max=rows * length - 1)
        hidden_RLD = decode({name: flat[places_RL]}, positions_N[starts_R][:, None] + within_L)
        if out_ND is None:
            out_ND = hidden_RLD.new_zeros(rows * length, hidden_RLD.shape[-1])
        out_ND = out_ND.index_copy(0, places_RL[real_RL], hidden_RLD[real_RL])
    assert out_ND is not None
    return out_ND.unflatten(0, (rows, length))
