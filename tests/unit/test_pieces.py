"""Work in pieces: views of all of it, each once."""

import pytest
import torch
from lion_pytorch import Lion
from torch import Tensor, nn

from snugtune.memory.trace import Ledger
from snugtune.methods.full import _collect_into
from snugtune.model.pieces import PIECE, alongside
from snugtune.optim import LionConfig

SHAPES = [(), (3,), (PIECE,), (2 * PIECE + 3,), (700, 801), (5, PIECE + 1), (2, 300, 901)]


def _drawn(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pieces_are_views_that_cover_all_once(shape: tuple[int, ...], turned: bool) -> None:
    count, other = torch.zeros(shape), _drawn(shape, 0)
    given = (count.t(), other.t()) if turned and len(shape) == 2 else (count, other)
    for one, piece in alongside(*given):
        assert one.numel() <= PIECE and one.shape == piece.shape
        one.add_(1)
        piece.mul_(2)
    assert torch.equal(count, torch.ones(shape)) and torch.equal(other, 2 * _drawn(shape, 0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lion_in_pieces_is_lion(shape: tuple[int, ...]) -> None:
    ours, theirs = (nn.Parameter(_drawn(shape, 0)) for _ in range(2))
    optimizers = LionConfig(lr=0.01, weight_decay=0.1).build([ours]), Lion([theirs], lr=0.01, weight_decay=0.1)
    for step in range(3):
        ours.grad, theirs.grad = _drawn(shape, step + 1), _drawn(shape, step + 1)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(ours.detach(), theirs.detach())
    assert torch.equal(optimizers[0].state[ours]["exp_avg"], optimizers[1].state[theirs]["exp_avg"])


def test_lions_step_makes_what_is_predicted() -> None:
    weight = nn.Parameter(_drawn((700, 801), 0))
    weight.grad = _drawn((700, 801), 1)
    optimizer = LionConfig().build([weight])
    optimizer.step()
    with Ledger([weight, weight.grad, optimizer.state[weight]["exp_avg"]]) as ledger:
        optimizer.step()
    predicted = LionConfig().update_bytes(weight.shape)
    assert 0.99 * predicted <= ledger.peaks["body"]["body"] <= predicted < 4 * weight.numel()


@pytest.mark.parametrize("shape", [(3,), (700, 801), (2, 300, 901)], ids=str)
def test_narrow_gradients_add_up_in_fp32(shape: tuple[int, ...]) -> None:
    weight, master = nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)), nn.Parameter(torch.zeros(shape))
    collect, parts = _collect_into(master), [_drawn(shape, seed, torch.bfloat16) for seed in range(3)]
    for part in parts:
        weight.grad = part.clone()
        collect(weight)
        assert weight.grad is None
    assert master.grad is not None and torch.equal(master.grad, parts[0].float() + parts[1].float() + parts[2].float())
