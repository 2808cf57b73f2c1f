"""Lion's step, piece by piece: what it makes meanwhile is as large as a piece, not as a weight."""

from collections.abc import Iterable

from lion_pytorch import Lion
from lion_pytorch.lion_pytorch import update_fn
from torch import Tensor

from snugtune.model.pieces import alongside


class LionInPieces(Lion):
    """lion_pytorch's, bit for bit."""

    def __init__(self, parameters: Iterable[Tensor], lr: float, betas: tuple[float, float], weight_decay: float):
        super().__init__(parameters, lr=lr, betas=betas, weight_decay=weight_decay)
        self.update_fn = _step


def _step(weight: Tensor, gradient: Tensor, momentum: Tensor, *settings: float) -> None:
    for pieces in alongside(weight, gradient, momentum):
        update_fn(*pieces, *settings)
