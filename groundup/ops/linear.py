"""x @ w^T + b, whose rows do not know of each other: a row's result is the same bits alone and among five hundred.

Libraries choose another order of summation for another number of rows, and an answer then depends, in its last bits, on
who else is asking. csrc/decode.c sums every row in one order, as fast as theirs, and faster for 3 to 16 rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from groundup.ops.native import native, pointer


def linear(x_ND: torch.Tensor, weight_ED: torch.Tensor, bias_E: torch.Tensor | None = None) -> torch.Tensor:
    """[N, E]. fp32 on a CPU with a C compiler: independent of the other rows; else torch's own. No gradients."""
    library = native("decode") if x_ND.device.type == "cpu" and x_ND.dtype == weight_ED.dtype == torch.float32 else None
    if library is None:
        return F.linear(x_ND, weight_ED, bias_E)
    x_ND, out_NE = x_ND.contiguous(), x_ND.new_empty(len(x_ND), len(weight_ED))
    library.linear(*map(pointer, (x_ND, weight_ED, bias_E, out_NE)), *x_ND.shape, len(weight_ED))
    return out_NE
