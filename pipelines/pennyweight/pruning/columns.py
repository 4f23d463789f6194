"""Which inputs of a linear layer to give up, so that those that stay can make up for them best."""

from __future__ import annotations

import torch

#: Share of the groups that go between two looks at what the rest can still make up for, where there are hundreds.
AT_ONCE = 0.01


def without_inputs(
    weight: torch.Tensor, moment: torch.Tensor, keep: int, together: int = 1, dampening: float = 0.01
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inputs that stay, int64 (keep · together,), and the weight for them, float32 (out, keep · together).

    `weight` is (out, in), `moment` Σ x xᵀ of its inputs (in, in); `together` neighbouring inputs stay or go as one, and
    `keep` such groups stay. `dampening` times the moment's mean diagonal is added to it.

    Group by group goes the one whose loss moves the output least after the others have taken over what they can:
    tr W_g (H⁻¹_gg)⁻¹ W_gᵀ, with H the moment of those that are left (Kurtić et al., 2023: ZipLM; after Hassibi and
    Stork, 1993). What stays is the solution of least squares for the whole layer's output.
    """
    moment = moment.double() + dampening * moment.diagonal().mean().double() * torch.eye(len(moment)).to(moment.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    left = weight.double().clone()
    groups = torch.arange(weight.shape[1], device=weight.device).view(-1, together)
    alive = torch.ones(len(groups), dtype=torch.bool, device=weight.device)
    while (surplus := int(alive.sum()) - keep) > 0:
        losses = _losses(left, inverse, groups).masked_fill(~alive, torch.inf)
        gone = losses.topk(min(surplus, max(1, int(AT_ONCE * len(groups)))), largest=False).indices
        alive[gone] = False
        _give_up(left, inverse, groups[gone].flatten())
    kept = groups[alive].flatten()
    return kept, left[:, kept].float()


def _losses(weight: torch.Tensor, inverse: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """What giving up each group costs, (groups,). Those that are gone already have nothing left to invert."""
    within = inverse[groups.unsqueeze(2), groups.unsqueeze(1)]  # (groups, together, together)
    columns = weight.T[groups]  # (groups, together, out)
    if groups.shape[1] == 1:
        return columns.square().sum((1, 2)) / within.flatten().clamp(min=1e-300)
    gone = within.diagonal(dim1=1, dim2=2).sum(1) <= 0
    within = torch.where(gone[:, None, None], torch.eye(groups.shape[1]).to(within), within)
    return (columns * torch.linalg.solve(within, columns)).sum((1, 2))


def _give_up(weight: torch.Tensor, inverse: torch.Tensor, gone: torch.Tensor) -> None:
    """Take inputs out of the inverse, and let the others take over what they did, in place."""
    shares = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
    weight -= weight[:, gone] @ shares
    inverse -= inverse[:, gone] @ shares
    weight[:, gone] = 0
    inverse[gone] = 0
    inverse[:, gone] = 0
