"""GPTQ: round column by column, and let the columns not yet rounded make up for each one's error.

Frantar et al., «GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers», ICLR 2023. Columns
are taken in the order of falling importance, each keeping the scale of its own group, so no index of groups is stored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pennyweight.errors import StageError
from pennyweight.quantization.grid import Grid, QuantizedLinear

if TYPE_CHECKING:
    import torch

#: Columns whose errors reach the rest of the matrix in one product.
BLOCK = 32
#: Times that the dampening is raised tenfold before a Hessian is given up.
ATTEMPTS = 4


def solve(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    grid: Grid,
    dampening: float,
) -> QuantizedLinear:
    """The integers of a weight (out, in) whose inputs x have the second moments `hessian` = Σ x xᵀ, (in, in).

    Minimizes ‖(W − Ŵ) X‖² greedily. `scales` and `zeros` are (out, groups). `dampening` is the fraction of the mean
    diagonal added to it. Raises StageError for a Hessian that no dampening makes positive definite.
    """
    import torch

    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    factor = _inverse_factor(hessian[order][:, order], dampening)
    # One row a column of the matrix, so that each step reads and writes contiguous memory.
    columns = weight.float().T[order].contiguous()
    groups = order // grid.group_size
    steps, offsets = scales.T.contiguous()[groups], zeros.T.contiguous()[groups]
    integers = torch.empty_like(columns)
    errors = torch.empty_like(columns)
    diagonal = factor.diagonal().tolist()
    for start in range(0, len(columns), BLOCK):
        end = min(start + BLOCK, len(columns))
        for at in range(start, end):
            column, step, offset = columns[at], steps[at], offsets[at]
            torch.div(column, step, out=integers[at])
            integers[at].round_().add_(offset).clamp_(0, grid.top)
            torch.sub(integers[at], offset, out=errors[at])
            errors[at].mul_(step).sub_(column).div_(-diagonal[at])
            if at + 1 < end:
                columns[at + 1 : end].addr_(factor[at, at + 1 : end], errors[at], alpha=-1)
        if end < len(columns):
            columns[end:].addmm_(factor[start:end, end:].T, errors[start:end], alpha=-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return QuantizedLinear(integers[back].T.contiguous().to(torch.uint8), scales, zeros.to(torch.uint8), grid.bits)


def _inverse_factor(hessian: torch.Tensor, dampening: float) -> torch.Tensor:
    """Upper Cholesky factor of the dampened Hessian's inverse."""
    import torch

    hessian = hessian.float()
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    if not torch.isfinite(hessian).all() or mean <= 0:
        raise StageError("gptq: the calibration text gives no finite activations", "use other text, or method: rtn")
    for attempt in range(ATTEMPTS):
        dampened = hessian.clone()
        # An input that is always 0 gets the mean: its column can take any value.
        dampened.diagonal()[diagonal == 0] = mean
        dampened.diagonal().add_(dampening * 10**attempt * mean)
        lower, failed = torch.linalg.cholesky_ex(dampened)
        if failed:
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return upper
    raise StageError(
        "gptq: the inputs of a layer are too much alike for its Hessian to be inverted",
        "calibrate on more text, or raise `dampening`",
    )
