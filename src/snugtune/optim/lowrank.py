"""AdamW with moments of low rank: GaLore (Zhao et al. 2024, arXiv 2403.03507) and APOLLO (Zhu et al. 2024, arXiv 2412.05270).

Ours, since the libraries do not do here: the state of galore-torch and pytorch-optimizer holds Python objects, which no
checkpoint of tensors takes; pytorch-optimizer's APOLLO draws from the global generator, and scales the projected gradient where
the paper scales the gradient itself; apollo-torch may not be used commercially (CC BY-NC).

Shapes: a matrix is looked at as [L, S], L its longer side, S its shorter; r rank. Projection P [S, r], moments [L, r].
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from snugtune.data.pack import derive_seed

GROWTH = 1.01
"""How much longer than the last a matrix' update of APOLLO's may be (Fira's limiter, Chen et al. 2024, arXiv 2410.01623)."""
_PIECE = 1024  # rows in fp64 at a time


class LowRank(torch.optim.Optimizer):
    """AdamW that remembers of a matrix' gradient G its moments in r dimensions alone, those of G P.

    Weights that are no matrix, and matrices with a side of no more than r, are stepped by AdamW as ever. An update is as long as
    AdamW's where `scale` is None: P leaves r of S numbers of a row, so it is multiplied by sqrt(S / r).
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        rank: int,
        update_every: int,
        scale: float | None,
    ):
        moments = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(parameters, moments | {"rank": rank, "update_every": update_every, "scale": scale})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert closure is None, "the loss is not evaluated here"
        for group in self.param_groups:
            for index, weight in enumerate(group["params"]):
                if weight.grad is not None:
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    if weight.dim() == 2 and min(weight.shape) > group["rank"]:
                        tall = weight.shape[0] >= weight.shape[1]
                        flat, gradient = (weight, weight.grad) if tall else (weight.t(), weight.grad.t())
                        self._step_matrix(index, flat, gradient, self.state[weight], group)
                    else:
                        weight.sub_(_direction(weight.grad, self.state[weight], group), alpha=group["lr"])

    def _step_matrix(self, index: int, weight: Tensor, gradient: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> None:
        """One matrix, [L, S] like its gradient, in place; `index` is where it stands among the weights."""
        raise NotImplementedError


class GaLore(LowRank):
    """P: the r right singular vectors of G with the largest values, every `update_every` steps anew. State: P and the moments.

    The update is N P^T, N what AdamW makes of G P.
    """

    def _step_matrix(self, index: int, weight: Tensor, gradient: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> None:
        if state.get("step", 0) % group["update_every"] == 0 and bool(gradient.any()):
            state["projection"] = top_directions(gradient, group["rank"])
        if "projection" not in state:
            return  # there was no gradient yet (LoRA's A has none at first): whatever P were, it would stay for long
        projection = state["projection"]
        direction = _direction(gradient @ projection, state, group)
        weight.addmm_(direction, projection.t(), alpha=-group["lr"] * _scale(weight, group))


class Apollo(LowRank):
    """P: normal numbers of variance 1 / r, every `update_every` steps others, drawn anew for each use and never kept.

    The update is G itself, each of its L rows times |N| / |G P| of that row; `whole`: one factor for all, which is APOLLO-Mini
    with r = 1. State: the moments and one number.
    """

    def __init__(self, parameters: Iterable[Tensor], seed: int, whole: bool, **settings: Any):
        super().__init__(parameters, **settings)
        self.seed, self.whole = seed, whole

    def _step_matrix(self, index: int, weight: Tensor, gradient: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> None:
        drawn = derive_seed(self.seed, index, state.get("step", 0) // group["update_every"])
        generator = torch.Generator(weight.device).manual_seed(drawn)
        shape = (weight.shape[1], group["rank"])
        projected = gradient @ torch.randn(shape, generator=generator, device=weight.device).div_(math.sqrt(group["rank"]))
        direction = _direction(projected, state, group)
        dim = None if self.whole else 1
        factor = _norm(direction, dim) / _norm(projected, dim).clamp_min(torch.finfo(torch.float32).tiny)  # [L, 1] or [1, 1]
        length = (factor * _norm(gradient, 1)).norm()
        before = state.get("length", torch.zeros_like(length))
        # No limit after an update of length 0: one that is LoRA's A's first would keep it from ever moving.
        shorter = torch.where((before > 0) & (length > GROWTH * before), GROWTH * before / length, torch.ones_like(length))
        state["length"] = length * shorter
        weight.addcmul_(gradient, factor * shorter, value=-group["lr"] * _scale(weight, group))


def top_directions(gradient: Tensor, rank: int) -> Tensor:
    """The right singular vectors of [L, S] that have the largest values, [S, r], of the largest first.

    Found as eigenvectors of G^T G, summed in fp64 over some rows at a time: with L much above S that is less work than an SVD,
    and nothing as large as G is made.
    """
    gram = torch.zeros(gradient.shape[1], gradient.shape[1], dtype=torch.float64, device=gradient.device)
    for rows in gradient.split(_PIECE):
        wide = rows.double()
        gram.addmm_(wide.t(), wide)
    return torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1).float().contiguous()


def _direction(gradient: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> Tensor:
    """Adam's (Kingma and Ba 2014, arXiv 1412.6980): the corrected first moment over the root of the second. Counts the step."""
    if "exp_avg" not in state:
        state |= {"step": 0, "exp_avg": torch.zeros_like(gradient), "exp_avg_sq": torch.zeros_like(gradient)}
    state["step"] += 1
    first, second = group["betas"]
    state["exp_avg"].lerp_(gradient, 1 - first)
    state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
    root = (state["exp_avg_sq"] / (1 - second ** state["step"])).sqrt_().add_(group["eps"])
    return torch.div(state["exp_avg"], root, out=root).div_(1 - first ** state["step"])


def _norm(matrix: Tensor, dim: int | None) -> Tensor:
    """Of each row, [L, 1], or of all, [1, 1]."""
    return torch.linalg.vector_norm(matrix, dim=dim, keepdim=True)


def _scale(weight: Tensor, group: Mapping[str, Any]) -> float:
    return math.sqrt(min(weight.shape) / group["rank"]) if group["scale"] is None else group["scale"]
