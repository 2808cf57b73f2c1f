"""Stand-ins for operators on the meta device give what torch's own give."""

from typing import Any

import pytest
import torch
from torch import Tensor

from snugtune.memory.operators import GIVEN

aten = torch.ops.aten


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


A, T, ROW, COLUMN = meta(6, 8), meta(8, 6).t(), meta(8), meta(6, 1)
HALF, BYTES, MASK, NUMBER = (meta(6, 8, dtype=d) for d in (torch.bfloat16, torch.int8, torch.bool, torch.int64))
SCALAR, WIDE_SCALAR = meta(), meta(dtype=torch.float64)
PAIRS = [
    *(
        (A, A),
        (A, T),
        (T, T),
        (A, ROW),
        (ROW, A),
        (A, COLUMN),
        (COLUMN, A),
        (COLUMN, ROW),
        (A, SCALAR),
        (SCALAR, A),
        (SCALAR, SCALAR),
    ),
    *(
        (HALF, A),
        (A, HALF),
        (BYTES, COLUMN),
        (A, MASK),
        (NUMBER, NUMBER),
        (NUMBER, SCALAR),
        (HALF, WIDE_SCALAR),
        (A, 2),
        (A, 0.5),
    ),
    *((NUMBER, 0.5), (HALF[:, :3], HALF[:, :3]), (meta(2, 6, 8), COLUMN), (meta(1, 8), COLUMN)),
]
CALLS: list[tuple[Any, tuple[Any, ...]]] = [
    *((operator, pair) for operator in (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor) for pair in PAIRS),
    *((operator, (x,)) for operator in (aten.neg.default, aten.rsqrt.default, aten.exp.default) for x in (A, T, HALF, NUMBER)),
    *((aten.pow.Tensor_Scalar, (x, 2)) for x in (A, HALF, NUMBER)),
    *((aten.logsumexp.default, (x, [-1], keep)) for x in (A, HALF) for keep in (True, False)),
    *((aten._log_softmax.default, (x, -1, wide)) for x, wide in ((A, False), (HALF, False))),
    (aten._softmax_backward_data.default, (A, A, -1, torch.float32)),
    (aten._softmax_backward_data.default, (HALF, HALF, -1, torch.bfloat16)),
    *((operator, (A, A)) for operator in (aten.mul_.Tensor, aten.add_.Tensor, aten.sub_.Tensor)),
    (aten.exp_.default, (A,)),
    (aten.addcmul_.default, (A, A, ROW)),
    (aten.addmm_.default, (A, meta(6, 4), meta(4, 8))),
    (aten.masked_fill_.Scalar, (A, MASK, 0.0)),
]


@pytest.mark.parametrize(("operator", "args"), CALLS, ids=lambda v: str(v) if not isinstance(v, tuple) else "")
def test_a_stand_in_gives_what_the_operator_gives(operator: Any, args: tuple[Any, ...]) -> None:
    ours, theirs = GIVEN[operator](*args), operator(*args)
    assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
    assert ours.untyped_storage().nbytes() == theirs.untyped_storage().nbytes()
    in_place = [arg is theirs for arg in args]
    assert [arg is ours for arg in args] == in_place


def test_every_stand_in_is_held_against_its_operator() -> None:
    """But the product of groups, which torch refuses: see the mixtures' traces."""
    assert {operator for operator, _ in CALLS} == set(GIVEN) - {aten._grouped_mm.default}
