"""Clipping of gradients by their common norm (Pascanu et al. 2013, arXiv 1211.5063)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

_PIECE = 1 << 16  # elements


def norms_in_pieces(gradient: Tensor) -> Tensor:
    """The norms of a gradient's small pieces, [pieces]. The norm of those of all gradients is what `clip_grad_norm` gives."""
    return torch.stack([torch.linalg.vector_norm(piece) for piece in gradient.flatten().split(_PIECE)])


def clip_grad_norm(parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
    """Scale the gradients so that their common L2 norm is at most `limit`. Returns the norm before, a scalar tensor.

    The norm is that of the norms of small pieces: over one tensor of 5 million numbers torch's fp32 norm on CPU loses the
    small ones against its running sum, 2e-4 of the whole; in pieces 1e-6.
    """
    with torch.no_grad():
        gradients = [p.grad.flatten() for p in parameters if p.grad is not None]
        norm = get_total_norm([piece for gradient in gradients for piece in gradient.split(_PIECE)])
        clip_grads_with_norm_(parameters, limit, norm)
    return norm
