"""How a step is cut changes nothing but rounding: every cut gives the gradients of each sequence trained by itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from conftest import lora_gradients, peft_twin, relative, shake
from real.common import IGNORE, accumulate, lora, mean_nll_one_by_one, one_job, peft_gradients, plan, whole
from snugtune.model.base import Base
from snugtune.types import Recompute

pytestmark = pytest.mark.real

Rows = Sequence[tuple[Tensor, Tensor]]
Graded = tuple[float, Tensor]
"""(loss, all gradients as one vector) of a step."""


@dataclass(frozen=True)
class Cut:
    """A plan's knobs, and how many chunks they make of the eight sequences."""

    chunks: int
    micro_batch: int
    max_seq_len: int = 50
    recompute: Recompute = "none"


ALONE = Cut(8, 1)
CUTS = {
    "by length": Cut(6, 1, max_seq_len=64),
    "several": Cut(2, 4),
    "one row": Cut(1, 8),
    "one row, recomputed": Cut(1, 8, recompute="blocks"),
}


@pytest.fixture(scope="module")
def peft(base: Base, plain: Callable[[torch.dtype], PreTrainedModel]) -> Callable[[Rows], Graded]:
    """The truth: PEFT over the same weights and factors, one sequence at a time."""
    with one_job(base, plan(), [(torch.arange(3), torch.arange(3))]) as (_, job):
        shake(lora(job), size=0.005)
        twin = peft_twin(plain(torch.float32), lora(job)).train()

    def graded(batch: Rows) -> Graded:
        twin.zero_grad()
        total = 0.0
        for part in mean_nll_one_by_one(twin, batch):
            part.backward()
            total += part.item()
        return total, whole(peft_gradients(twin))

    return graded


def ours(base: Base, batch: Rows, cut: Cut) -> Graded:
    with one_job(base, plan("fp32", cut.micro_batch, cut.recompute), batch, max_seq_len=cut.max_seq_len) as (trainer, job):
        shake(lora(job), size=0.005)
        assert len(job.chunks()) == cut.chunks
        return accumulate(trainer, job), whole(lora_gradients(lora(job)))


def agree(got: Graded, wanted: Graded, tolerance: float) -> None:
    assert got[0] == pytest.approx(wanted[0], rel=tolerance)
    assert relative(got[1], wanted[1]) <= tolerance


@pytest.fixture(scope="module")
def alone(base: Base, rows: Rows) -> Graded:
    return ours(base, rows[-8:], ALONE)


def test_sequences_one_by_one_equal_peft(rows: Rows, alone: Graded, peft: Callable[[Rows], Graded]) -> None:
    agree(alone, peft(rows[-8:]), 2e-5)


@pytest.mark.parametrize("name", CUTS)
def test_every_cut_gives_the_same_update(name: str, base: Base, rows: Rows, alone: Graded) -> None:
    agree(ours(base, rows[-8:], CUTS[name]), alone, 1e-5)


@pytest.mark.parametrize("cut", [Cut(2, 1, max_seq_len=47), Cut(1, 4)], ids=["in a chunk of its own", "among others"])
def test_a_sequence_of_one_token_changes_nothing(cut: Cut, base: Base, rows: Rows, peft: Callable[[Rows], Graded]) -> None:
    """It has nothing to predict, so the truth does not even hold it."""
    lonely = (torch.tensor([198]), torch.tensor([IGNORE]))
    agree(ours(base, [rows[11], lonely], cut), peft([rows[11]]), 2e-5)


@pytest.mark.parametrize("length", [2, 5, 15, 16, 47], ids=lambda n: f"{n} tokens")
def test_a_batch_of_one_sequence(length: int, base: Base, rows: Rows, peft: Callable[[Rows], Graded]) -> None:
    """Rows shorter than 16 tokens are filled up with a sequence that nobody scores."""
    ids = rows[11][0][:length]
    labels = torch.cat([torch.full((length // 2,), IGNORE), ids[length // 2 :]])
    agree(ours(base, [(ids, labels)], Cut(1, 1)), peft([(ids, labels)]), 2e-5)
