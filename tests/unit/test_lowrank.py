"""GaLore and APOLLO: the papers' formulas in fp64 and by SVD, what is kept, what is drawn, what is left to AdamW."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import relative
from snugtune.data.pack import derive_seed
from snugtune.optim import ApolloConfig, GaloreConfig
from snugtune.optim.lowrank import GROWTH, top_directions

SHAPES = [(40, 12), (12, 40), (12, 12)]
LR, BETAS, EPS, DECAY = 1e-2, (0.8, 0.9), 1e-6, 0.1
COMMON: dict[str, Any] = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY, "rank": 3, "update_every": 2}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradient(shape: tuple[int, int], step: int) -> Tensor:
    """Of falling singular values, as gradients have them: then the directions of the largest are sharp."""
    u, _, vh = torch.linalg.svd(noise(*shape, seed=step), full_matrices=False)
    return u @ torch.diag(0.5 ** torch.arange(min(shape))) @ vh * (1 + step)


class Adam:
    """Moments in fp64; gives Adam's direction."""

    def __init__(self) -> None:
        self.m: Any = 0.0
        self.v: Any = 0.0
        self.t = 0

    def __call__(self, g: Tensor) -> Tensor:
        self.t += 1
        self.m = BETAS[0] * self.m + (1 - BETAS[0]) * g
        self.v = BETAS[1] * self.v + (1 - BETAS[1]) * g**2
        return self.m / (1 - BETAS[0] ** self.t) / ((self.v / (1 - BETAS[1] ** self.t)).sqrt() + EPS)


def stepped(config: GaloreConfig | ApolloConfig, shape: tuple[int, int], steps: int, seed: int = 0) -> list[Tensor]:
    """The weight after each step; it is the second of two."""
    weight = nn.Parameter(noise(*shape, seed=99))
    optimizer, seen = config.build([nn.Parameter(torch.ones(3)), weight], seed=seed), []
    for step in range(steps):
        weight.grad = gradient(shape, step)
        optimizer.step()
        seen.append(weight.detach().clone())
    return seen


@pytest.mark.parametrize("scale", [None, 0.25])
@pytest.mark.parametrize("shape", SHAPES)
def test_galore_is_adam_in_the_svds_directions(shape: tuple[int, int], scale: float | None) -> None:
    adam, weight, p = Adam(), noise(*shape, seed=99).double(), torch.empty(0)
    factor = math.sqrt(12 / 3) if scale is None else scale
    for step, ours in enumerate(stepped(GaloreConfig(**COMMON, scale=scale), shape, 5)):
        g = gradient(shape, step).double()
        g = g if shape[0] >= shape[1] else g.T
        if step % 2 == 0:
            p = torch.linalg.svd(g)[2][:3].T
            p = p * torch.sign((top_directions(g.float(), 3).double() * p).sum(0))  # a direction has two signs
        update = factor * adam(g @ p) @ p.T
        weight = weight * (1 - LR * DECAY) - LR * (update if shape[0] >= shape[1] else update.T)
        assert relative(ours - noise(*shape, seed=99), weight - noise(*shape, seed=99)) <= 1e-4, step


@pytest.mark.parametrize("scaling", ["channel", "tensor"])
@pytest.mark.parametrize("shape", SHAPES)
def test_apollo_scales_the_gradient_itself(shape: tuple[int, int], scaling: Any) -> None:
    """By the paper's algorithm 1, with the norm-growth limiter, which these growing gradients meet."""
    rank, seed = (3, 7) if scaling == "channel" else (1, 6)
    config = ApolloConfig(**COMMON | {"rank": rank}, scaling=scaling)
    adam, weight, before, limited = Adam(), noise(*shape, seed=99).double(), 0.0, 0
    for step, ours in enumerate(stepped(config, shape, 5, seed)):
        g = gradient(shape, step).double()
        g = g if shape[0] >= shape[1] else g.T
        p = torch.randn((12, rank), generator=torch.Generator().manual_seed(derive_seed(seed, 1, step // 2))) / rank**0.5
        r = g @ p.double()
        n = adam(r)
        update = g * (n.norm(dim=1, keepdim=True) / r.norm(dim=1, keepdim=True) if scaling == "channel" else n.norm() / r.norm())
        if before and float(update.norm()) > GROWTH * before:
            update, limited = update * GROWTH * before / update.norm(), limited + 1
        before = float(update.norm())
        update = math.sqrt(12 / rank) * update
        weight = weight * (1 - LR * DECAY) - LR * (update if shape[0] >= shape[1] else update.T)
        assert relative(ours - noise(*shape, seed=99), weight - noise(*shape, seed=99)) <= 1e-4, step
    assert 0 < limited < 4, "the limiter was not tried, or nothing else"


@pytest.mark.parametrize("kind", [GaloreConfig, ApolloConfig])
def test_an_update_is_about_as_long_as_adamws(kind: Any) -> None:
    """So that AdamW's learning rate fits: on noise, where no direction is special, at several ranks."""
    for rank in (16, 32):
        weight, other = nn.Parameter(torch.zeros(256, 64)), nn.Parameter(torch.zeros(256, 64))
        weight.grad = other.grad = noise(256, 64)
        kind(rank=rank, lr=1.0).build([weight]).step()
        torch.optim.AdamW([other], lr=1.0, weight_decay=0.0).step()
        assert float(weight.norm() / other.norm()) == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("kind", [GaloreConfig, ApolloConfig])
@pytest.mark.parametrize("shape", [(50,), (3, 50), (50, 3), (2, 8, 8)], ids=str)
def test_what_is_no_large_matrix_is_left_to_adamw(kind: Any, shape: tuple[int, ...]) -> None:
    weight, other = nn.Parameter(noise(*shape)), nn.Parameter(noise(*shape))
    ours = kind(**COMMON).build([weight])
    theirs = torch.optim.AdamW([other], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    for step in range(4):
        weight.grad = other.grad = noise(*shape, seed=step)
        ours.step()
        theirs.step()
    torch.testing.assert_close(weight, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("config", "numbers"),
    [
        (GaloreConfig(rank=4), 4 * (2 * 40 + 12)),
        (ApolloConfig(rank=4), 2 * 4 * 40 + 1),
        (ApolloConfig(rank=1, scaling="tensor"), 81),
    ],
    ids=["galore", "apollo", "mini"],
)
def test_what_is_kept_of_a_matrix(config: Any, numbers: int) -> None:
    """And it is tensors and plain numbers alone, which a checkpoint takes."""
    for shape in ((40, 12), (12, 40)):
        weight = nn.Parameter(noise(*shape))
        weight.grad = noise(*shape, seed=1)
        optimizer = config.build([weight])
        optimizer.step()
        kept = optimizer.state_dict()["state"][0]
        assert sum(v.numel() for v in kept.values() if isinstance(v, Tensor)) == numbers
        assert all(isinstance(v, Tensor | int) for v in kept.values())


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("config", [GaloreConfig(**COMMON), ApolloConfig(**COMMON)], ids=["galore", "apollo"])
def test_state_goes_on_bit_for_bit(config: Any, at: int) -> None:
    """In the middle of a period, before the step that ends it, and after."""
    weight = nn.Parameter(noise(40, 12))
    optimizer = config.build([weight], seed=3)
    for step in range(6):
        if step == at:
            weight = nn.Parameter(weight.detach().clone())
            state, optimizer = optimizer.state_dict(), config.build([weight], seed=3)
            optimizer.load_state_dict(state)
        weight.grad = gradient((40, 12), step)
        optimizer.step()
    truth, other = config.build([nn.Parameter(noise(40, 12))], seed=3), noise(0)
    for step in range(6):
        (other,) = truth.param_groups[0]["params"]
        other.grad = gradient((40, 12), step)
        truth.step()
    assert torch.equal(weight, other)


def test_draws_are_the_jobs_own() -> None:
    """Neither read from the global generator nor written to it; another seed and another weight draw others."""
    config, before = ApolloConfig(**COMMON), torch.get_rng_state()
    first = stepped(config, (40, 12), 2, seed=1)[-1]
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(stepped(config, (40, 12), 2, seed=1)[-1], first)
    assert not torch.equal(stepped(config, (40, 12), 2, seed=2)[-1], first)
    pair = [nn.Parameter(torch.zeros(40, 12)) for _ in range(2)]
    for weight in pair:
        weight.grad = gradient((40, 12), 0)
    config.build(pair).step()
    assert not torch.equal(*pair)


@pytest.mark.parametrize("config", [GaloreConfig(**COMMON), ApolloConfig(**COMMON)], ids=["galore", "apollo"])
def test_a_weight_whose_first_gradient_is_zero_moves_later(config: Any) -> None:
    """As LoRA's A, beside a B of zeros: no directions that nothing chose, no limit that nothing can grow out of."""
    weight = nn.Parameter(torch.zeros(40, 12))
    optimizer = config.build([weight])
    for step in range(3):
        weight.grad = gradient((40, 12), step) * float(step > 0)
        optimizer.step()
        assert (float(weight.detach().norm()) > LR * 5) == (step > 0)
