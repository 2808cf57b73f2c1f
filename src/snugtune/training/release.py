"""The optimizer's step in backward: each weight steps as soon as its gradient is whole, and the gradient is gone.

What is learned is, to the last bit, what one step after backward learns. But whether all gradients are finite is known at the
end alone. A loss that is not finite shows in the first gradient that comes: then no weight has stepped, and the step is skipped
as a whole, as ever. A gradient that stops being finite further down finds others stepped, and there is no way back.
"""

import torch
from torch import Tensor, nn

from snugtune.methods.full import FullAttached
from snugtune.optim import norms_in_pieces


class StepInBackward:
    """A job's optimizer steps weight by weight, on the gradients that its base gives in backward."""

    def __init__(self, attached: FullAttached, optimizer: torch.optim.Optimizer):
        self.attached, self.optimizer = attached, optimizer
        self.norms: dict[nn.Parameter, Tensor] = {}  # of each gradient's pieces
        self.stepped, self.broken = 0, False
        attached.release_gradients(self._take)

    @property
    def half_done(self) -> bool:
        """Whether weights have stepped: this step can neither be skipped nor begin anew."""
        return self.stepped > 0

    def begin(self, lr: float) -> None:
        """A step begins, at this rate."""
        self.norms.clear()
        self.stepped, self.broken = 0, False
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def end(self) -> Tensor:
        """Backward is through. Returns the norm of all gradients; where that is not finite, see `half_done`."""
        released = self.attached.released
        assert released is not None
        released.end()
        return torch.linalg.vector_norm(torch.cat([self.norms[weight] for weight in self.attached.parameters()]))

    def _take(self, weight: nn.Parameter) -> None:
        assert weight.grad is not None
        self.norms[weight] = norms_in_pieces(weight.grad)
        self.broken = self.broken or not bool(self.norms[weight].isfinite().all())
        if not self.broken:
            self.stepped += 1
            self.optimizer.step()  # no other weight has a gradient now
