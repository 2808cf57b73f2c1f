"""The real model, loaded once, and one short run on it that parity, round trip and chat all look at."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from real.common import CONVERSATIONS, RUN, labelled, plan, train, write_data
from snugtune import tuned
from snugtune.model.base import Base, load_base
from snugtune.model.source import ModelSource, find_model
from snugtune.observer import RunResult


@pytest.fixture(scope="session")
def demo() -> ModelSource:
    return find_model("demo")


@pytest.fixture(scope="session")
def plain(demo: ModelSource) -> Callable[[torch.dtype], PreTrainedModel]:
    """Makes the same weights as transformers alone loads them."""
    return lambda dtype: AutoModelForCausalLM.from_pretrained(demo.location, dtype=dtype)


@pytest.fixture(scope="session")
def base(demo: ModelSource) -> Base:
    """Our fp32 base. Shared: every test detaches what it attached."""
    return load_base(demo, plan())


@pytest.fixture(scope="session")
def rows(base: Base) -> list[tuple[Tensor, Tensor]]:
    """(ids, labels) of every conversation."""
    return [labelled(c, base.tokenizer) for c in CONVERSATIONS]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """`RUN`, from YAML-like fields to an adapter folder."""
    folder = tmp_path_factory.mktemp("trained")
    data = write_data(folder / "data.jsonl")
    return train(**RUN, data=str(data), output=str(folder / "run"))


@pytest.fixture
def exact_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `snugtune.tuned.load` answer in fp32 where it would choose bf16: for comparisons to the last few bits."""
    monkeypatch.setattr(tuned, "plan_for_answers", lambda *_: (plan(), "as the test asks"))
