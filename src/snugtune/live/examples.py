"""Examples that come from Python, and losses on the log probabilities of their scored tokens.

Shapes: n scored tokens of a chunk, n_i of example i.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from snugtune.config import JobConfig
from snugtune.errors import InputError
from snugtune.model.base import Base
from snugtune.training.examples import JobData
from snugtune.training.job import check_fits
from snugtune.types import Chunk, Example

CustomLoss = Callable[[Sequence[Tensor], Sequence[Example]], Tensor]
"""From the log probabilities of each example's scored tokens, [n_i] each, and the examples, to a scalar loss."""


def listed(given: Any, what: str) -> list[Any]:
    """A list of things, which a text or a mapping is not."""
    if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Sequence):
        raise InputError(f"{what}: expected a list, found {type(given).__name__}")
    return list(given)


def check_examples(base: Base, config: JobConfig, examples: Sequence[Any]) -> None:
    """Raises `InputError` for what `Job.examples` would not have made."""
    if not examples:
        raise InputError("examples: none are given")
    for number, example in enumerate(examples):
        problem = _problem(example, config.max_seq_len)
        if problem is not None:
            raise InputError(f"examples: example {number} {problem}")
    check_fits(base, config, JobData(tuple(examples)))


def _problem(example: Any, most: int) -> str | None:
    if not isinstance(example, Example):
        return f"is a {type(example).__name__}, no Example; job.examples() makes them of records"
    tokens, weights = example.tokens, example.weights
    if tokens.dtype != torch.int64 or weights.dtype != torch.float32 or tokens.dim() != 1 or tokens.shape != weights.shape:
        return "needs tokens (int64 [L]) and weights (float32 [L]) of one length"
    if not len(tokens) or int(tokens.min()) < 0 or not weights.isfinite().all():
        return "needs tokens of at least 0, and finite weights"
    if float(weights[0]) or not weights.any():
        return "needs a token to score, and weight 0 for its first, which nothing predicts"
    return f"has {len(tokens)} tokens, more than max_seq_len {most}" if len(tokens) > most else None


def by_example(groups: Sequence[Sequence[int]], chunks: Sequence[Chunk], values: Sequence[Tensor]) -> list[Tensor]:
    """Values of chunks' scored tokens [n], by example: [n_i] each. `groups`: the examples in each chunk."""
    found: dict[int, Tensor] = {}
    for group, chunk, scored in zip(groups, chunks, values, strict=True):
        owners = torch.arange(len(group)).repeat_interleave(torch.tensor(chunk.lengths))[chunk.rows]
        found |= dict(zip(group, scored.split(owners.bincount(minlength=len(group)).tolist()), strict=True))
    return [found[index] for index in range(len(found))]


def slopes(fn: CustomLoss, logprobs: Sequence[Tensor], examples: Sequence[Example]) -> tuple[float, list[Tensor]]:
    """The loss that `fn` gives, and its gradient with respect to each of `logprobs`."""
    leaves = [values.detach().clone().requires_grad_() for values in logprobs]
    with torch.enable_grad():
        loss = fn(leaves, examples)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise InputError("forward_backward_custom: the loss must be a scalar tensor that is computed from the logprobs")
        return float(loss.detach()), list(torch.autograd.grad(loss.squeeze(), leaves, materialize_grads=True))
