"""How a step is cut changes nothing but rounding: every cut gives the gradients of each sequence trained by itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from conftest import lora_gradients, peft_twin, relative, shake
from real.common import accumulate, lora, mean_nll_one_by_one, one_job, peft_gradients, plan, whole
from snugtune.model.base import Base
from snugtune.types import Recompute

pytestmark = pytest.mark.real

Rows = Sequence[tuple[Tensor, Tensor]]
IGNORED = torch.tensor([-100])


@dataclass(frozen=True)
class Cut:
    """A plan's knobs, and how many chunks they make of the eight sequences."""

    chunks: int
    micro_batch: int
    max_seq_len: int = 40
    recompute: Recompute = "none"


CUTS = {
    "each sequence alone": Cut(8, 1),
    "several chunks": Cut(2, 4),
    "all in one row": Cut(1, 8),
    "all in one row, recomputed": Cut(1, 8, recompute="blocks"),
    "another length": Cut(4, 1, max_seq_len=64),
}


@pytest.fixture(scope="module")
def batch(rows: Rows) -> Rows:
    return rows[-8:]


def gradient(base: Base, batch: Rows, cut: Cut) -> tuple[float, Tensor]:
    """(loss, all gradients as one vector) of a step over `batch`."""
    with one_job(base, plan("fp32", cut.micro_batch, cut.recompute), batch, max_seq_len=cut.max_seq_len) as (trainer, job):
        shake(lora(job), size=0.02)
        assert len(job.chunks()) == cut.chunks
        return accumulate(trainer, job), whole(lora_gradients(lora(job)))


def truth(base: Base, model: PreTrainedModel, batch: Rows) -> tuple[float, Tensor]:
    """The same from PEFT, one unpadded sequence at a time."""
    with one_job(base, plan(), batch) as (_, job):
        shake(lora(job), size=0.02)
        twin = peft_twin(model, lora(job)).train()
    total = 0.0
    for part in mean_nll_one_by_one(twin, batch):
        part.backward()
        total += float(part)
    return total, whole(peft_gradients(twin))


@pytest.fixture(scope="module")
def separate(base: Base, plain: Callable[[torch.dtype], PreTrainedModel], batch: Rows) -> tuple[float, Tensor]:
    return truth(base, plain(torch.float32), batch)


@pytest.mark.parametrize("name", CUTS)
def test_every_cut_gives_the_gradient_of_separate_sequences(
    name: str, base: Base, batch: Rows, separate: tuple[float, Tensor]
) -> None:
    loss, ours = gradient(base, batch, CUTS[name])
    assert loss == pytest.approx(separate[0], rel=1e-6)
    assert relative(ours, separate[1]) <= 1e-5
