"""A job: one named training and where it stands."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snugtune.config import JobConfig
from snugtune.data.mix import step_indices, total_steps
from snugtune.data.pack import cut_step
from snugtune.errors import InputError, OutOfMemoryError, SnugtuneError, StopRequestedError, UnreadableError
from snugtune.methods import METHODS, Attached
from snugtune.methods.full import FullAttached
from snugtune.model.base import Base
from snugtune.objectives import objective_of
from snugtune.optim import learning_rate
from snugtune.training.examples import JobData
from snugtune.training.metrics import StepMetrics
from snugtune.training.recut import is_out_of_memory
from snugtune.training.release import StepInBackward
from snugtune.training.stored import Below
from snugtune.types import FULL_FORWARD, HEAD_ROWS, Chunk, Plan

_COUNTERS = (
    "step", "served", "skipped_in_a_row", "seen_tokens", "seen_label_tokens", "untuned", "to_beat", "stale",
    "failure", "diverged",
)  # fmt: skip


@dataclass(frozen=True)
class Best:
    """The evaluation with the lowest held-out loss so far."""

    step: int
    eval_loss: float


@dataclass
class Job:
    """Config, data, method at work, optimizer, progress. `step` counts completed optimizer steps.

    What step k trains on is a pure function of (config, data, k), so progress is one number.
    """

    config: JobConfig
    data: JobData
    attached: Attached
    optimizer: torch.optim.Optimizer
    capacity: int  # tokens of a chunk; 0: one sequence a chunk
    head_rows: int = HEAD_ROWS  # rows of logits alive at once
    scaler: torch.amp.GradScaler | None = None  # fp16 only
    in_backward: StepInBackward | None = None  # where gradients are not kept
    step: int = 0
    served: float = 0.0  # virtual tokens of its whole steps: tokens / weight, from where it joined
    skipped_in_a_row: int = 0
    seen_tokens: int = 0
    seen_label_tokens: int = 0
    untuned: float | None = None  # held-out loss before training
    best: Best | None = None
    to_beat: float | None = None  # the held-out loss that patience is measured from
    stale: int = 0  # evaluations since then
    failure: str | None = None  # why it was given up
    diverged: bool = False  # that was since its gradient stayed non-finite
    error: Exception | None = None  # what broke it else, while this process lasts
    paused: bool = False  # it stands as it is, and takes no part
    at_rest: Path | None = None  # the file that holds its weights and its optimizer's state meanwhile
    total: int = field(init=False)  # optimizer steps; 0: as many as are asked for

    def __post_init__(self) -> None:
        c = self.config
        self.total = c.steps or 0 if self.by_hand else total_steps(len(self.data.train), c.batch_size, c.epochs, c.steps)
        self.objective = objective_of(c.objective)
        self._unscaled = False  # the scaler is in the middle of an optimizer step
        self._outline: dict[str, dict[str, Any]] = {}  # of a job at rest: what its optimizer remembers, but for the tensors

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def by_hand(self) -> bool:
        """Whether it has no data: it takes no part in scheduled steps, somebody gives it its examples."""
        return not self.data.train

    @property
    def finished(self) -> bool:
        return self.step >= self.total > 0

    @property
    def ended(self) -> bool:
        return self.finished or self.stopped_early or self.failure is not None

    @property
    def active(self) -> bool:
        """Whether it has steps to do that can be scheduled."""
        return not (self.paused or self.by_hand or self.ended)

    @property
    def stopped_early(self) -> bool:
        """Whether the held-out loss has not improved for as long as the config has patience."""
        stopping = self.config.early_stopping
        return stopping is not None and self.stale >= stopping.patience

    def judge(self, metrics: StepMetrics) -> bool:
        """Take note of an evaluation. Returns whether it is the best so far; step 0, before training, does not count."""
        if metrics.step == 0:
            self.untuned = metrics.eval_loss
        if metrics.step == 0 or metrics.eval_tokens is None:
            return False
        eval_loss = math.inf if metrics.eval_loss is None else metrics.eval_loss
        stopping = self.config.early_stopping
        least = 0.0 if stopping is None else stopping.min_delta
        self.stale += 1
        if eval_loss < (math.inf if self.to_beat is None else self.to_beat - least):
            self.to_beat, self.stale = eval_loss, 0
        better = eval_loss < (math.inf if self.best is None else self.best.eval_loss)
        if better:
            self.best = Best(metrics.step, eval_loss)
        return better

    def samples_due(self, step: int) -> bool:
        """Whether the job answers its prompts after this step: at the start, at the end, and every so many steps."""
        every = self.config.samples.every
        return bool(self.data.prompts) and (step == 0 or self.ended or (every is not None and step % every == 0))

    @property
    def epoch(self) -> float:
        """Passes over the training data so far."""
        seen = self.step * self.config.batch_size
        if self.config.steps is None:
            seen = min(seen, round(len(self.data.train) * (self.config.epochs or 1)))
        return seen / len(self.data.train)

    def lr(self) -> float:
        """The rate of the step to come."""
        return learning_rate(self.config.schedule, self.config.optimizer.lr, self.step, self.total)

    def begin_step(self) -> None:
        """Let train what trains in the step to come; gradients of zeros, or what takes them as they are made."""
        self._turn_to(self.step)
        self.attached.zero_grad()
        if self.in_backward is not None:
            self.in_backward.begin(self.lr())

    def _turn_to(self, step: int) -> None:
        """What the optimizer remembers of weights that no longer train is forgotten."""
        if self.attached.turn_to(step):
            weights = stepped(self.attached, self.config)
            self.optimizer.param_groups[0]["params"] = weights
            kept = {id(weight) for weight in weights}
            for weight in [weight for weight in self.optimizer.state if id(weight) not in kept]:
                del self.optimizer.state[weight]

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss times the scale that keeps small gradients within fp16's range.

        An earlier step that was broken off after `unscale` did not happen; torch's scaler has no word for that, but a new one.
        """
        if self.scaler is None:
            return loss
        if self._unscaled:
            anew = torch.amp.GradScaler(loss.device.type)
            anew.load_state_dict(self.scaler.state_dict())
            self.scaler, self._unscaled = anew, False
        return self.scaler.scale(loss)

    def unscale(self) -> None:
        """Take the scale out of the gradient, before it is clipped. Raises `RuntimeError` for one that has none any more."""
        if self.scaler is not None:
            self._unscaled = True
            self.scaler.unscale_(self.optimizer)

    def rescale(self) -> None:
        """After the optimizer's step: the scale comes down after an overflow, and goes up after many steps without."""
        if self.scaler is not None:
            self.scaler.update()
            self._unscaled = False

    def chunks(self) -> list[Chunk]:
        """The step to come, cut by this job and its plan alone."""
        c = self.config
        indices = step_indices(self.step, len(self.data.train), c.batch_size, c.epochs, c.steps, c.seed)
        return cut_step([self.data.train[i] for i in indices], self.capacity, self.name, self.step, c.seed)

    def evaluation_chunks(self) -> list[Chunk]:
        return cut_step(self.data.held_out, self.capacity, self.name, 0, self.config.seed) if self.data.held_out else []

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain numbers that bring this job back exactly where it stands. Not of a job at rest."""
        return self.tensors(), self.numbers()

    def tensors(self) -> dict[str, Tensor]:
        """What is large of the state: weights, and what the optimizer remembers. Not of a job at rest."""
        assert self.at_rest is None
        tensors = {f"weights.{k}": v for k, v in self.attached.state().items()}
        for index, entry in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": v for k, v in entry.items() if isinstance(v, Tensor)}
        return tensors

    def numbers(self) -> dict[str, Any]:
        """The rest of the state."""
        numbers = {name: getattr(self, name) for name in _COUNTERS}
        numbers["best"] = None if self.best is None else asdict(self.best)
        numbers["scaler"] = None if self.scaler is None else self.scaler.state_dict()
        return numbers | {"optimizer": self._outline or self._optimizer_outline(), "data": self.data.fingerprint}

    def _optimizer_outline(self) -> dict[str, dict[str, Any]]:
        """Of each weight what the optimizer counts in Python numbers, and the shapes of the tensors it remembers."""
        outline: dict[str, dict[str, Any]] = {}
        for index, entry in self.optimizer.state_dict()["state"].items():
            shapes = {k: list(v.shape) for k, v in entry.items() if isinstance(v, Tensor)}
            outline[str(index)] = {"numbers": {k: v for k, v in entry.items() if k not in shapes}, "tensors": shapes}
        return outline

    def rest(self, file: Path) -> None:
        """Let go of weights and optimizer state, which are in `file`, until `wake`. Only between two steps."""
        self._outline = self._optimizer_outline()
        self.at_rest = file
        self._let_go()

    def _let_go(self) -> None:
        self.attached.release()
        self.optimizer.state.clear()
        self.optimizer.param_groups[0]["params"] = []  # those that look at matrices hold views of the weights

    def wake(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `rest`, from what is in its file, read for this job alone. It is at rest still where that raises."""
        assert self.at_rest is not None
        try:
            self._load_tensors(tensors, self._outline, owned=True)
        except BaseException:
            self._let_go()
            raise
        self.at_rest, self._outline = None, {}

    def _load_tensors(self, tensors: Mapping[str, Tensor], outline: Mapping[str, Any], owned: bool = False) -> None:
        named = {f"optimizer.{index}.{k}" for index, entry in outline.items() for k in entry["tensors"]}
        if named != {key for key in tensors if key.startswith("optimizer.")}:
            raise ValueError("the optimizer's state is not that of its weights")
        state: dict[int, dict[str, Any]] = {}
        for index, entry in outline.items():
            large = {name: tensors[f"optimizer.{index}.{name}"] for name in entry["tensors"]}
            if any(list(tensor.shape) != entry["tensors"][name] for name, tensor in large.items()):
                raise ValueError("the optimizer's state has other shapes than it should")
            kept = large if owned else {name: tensor.clone() for name, tensor in large.items()}  # whoever gave them keeps theirs
            state[int(index)] = {**entry["numbers"], **kept}
        self.attached.load_state(Below(tensors, "weights."))
        if self.at_rest is not None:
            self.optimizer.param_groups[0]["params"] = stepped(self.attached, self.config)
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})

    def load_state(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """The inverse of `state`. Not of a job at rest."""
        assert self.at_rest is None
        self._turn_to(max(0, numbers["step"] - 1))  # the next turn begins with the step to come
        self._load_tensors(tensors, numbers["optimizer"])
        for name in _COUNTERS:
            setattr(self, name, numbers[name])
        self.best = None if numbers["best"] is None else Best(**numbers["best"])
        if self.scaler is not None and numbers["scaler"]:
            self.scaler.load_state_dict(numbers["scaler"])


@dataclass(frozen=True)
class Ended:
    """What is left of a job that has left its run: how it stood, and nothing that takes memory."""

    config: JobConfig
    step: int
    total: int
    failure: str | None = None
    diverged: bool = False
    untuned: float | None = None
    best: Best | None = None
    largest_weight: float = 0.0  # absolute

    @property
    def name(self) -> str:
        return self.config.name

    def numbers(self) -> dict[str, Any]:
        """All but the config, as plain numbers."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("config", "best")}
        return plain | {"best": None if self.best is None else asdict(self.best)}

    @classmethod
    def of(cls, job: Job) -> "Ended":
        largest = largest_weight(job.attached)
        return cls(job.config, job.step, job.total, job.failure, job.diverged, job.untuned, job.best, largest)


def largest_weight(attached: Attached) -> float:
    """The largest absolute value among trained weights; not a number where one of them is none."""
    norms = [float(torch.linalg.vector_norm(p.detach(), float("inf"))) for p in attached.parameters() if p.numel()]
    return float(torch.tensor([0.0, *norms]).max())


Guard = Callable[[Job], AbstractContextManager[None]]
"""What becomes of an exception in a job's own part of the work."""


@contextmanager
def quarantine(job: Job) -> Iterator[None]:
    """Whatever goes wrong inside the block is trouble of this job alone: it is given up, its neighbours go on.

    What all jobs share is nobody's own: the base's disk, the memory, and the user's wish to stop.
    """
    try:
        yield
    except (StopRequestedError, UnreadableError, OutOfMemoryError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        job.error, job.diverged = error, False
        told = str(error) if isinstance(error, SnugtuneError) else f"{type(error).__name__}: {error}"
        job.failure = f"job '{job.name}': {told}"


def start_job(base: Base, config: JobConfig, data: JobData, plan: Plan) -> Job:
    """Attach the job's method to the base and set up its optimizer, at step 0. Raises `InputError`."""
    check_fits(base, config, data)
    if plan.gradients == "released" and not base.packable and config.batch_size > 1:
        raise InputError(
            f"plan.gradients: released needs a step to be one forward, but sequences of '{base.name}' cannot share one; "
            "set batch_size: 1, or gradients: kept"
        )
    return new_job(base, config, data, plan)


def new_job(base: Base, config: JobConfig, data: JobData, plan: Plan) -> Job:
    """The same without a look at the data."""
    attached = METHODS[type(config.method)].attach(base, config.name, config.method, config.seed)
    attached.drop_grad()  # until its turn comes
    optimizer = config.optimizer.build(stepped(attached, config), plan.optimizer_state, config.seed)
    in_backward = None
    if plan.gradients == "released":
        assert isinstance(attached, FullAttached), "the plan has seen to that"
        in_backward = StepInBackward(attached, optimizer)
    return Job(
        config=config,
        data=data,
        attached=attached,
        optimizer=optimizer,
        capacity=capacity_of(config, plan) if base.packable else 0,
        head_rows=plan.head_rows,
        scaler=torch.amp.GradScaler(plan.device) if plan.compute == "fp16" else None,
        in_backward=in_backward,
    )


def capacity_of(config: JobConfig, plan: Plan) -> int:
    """Tokens of a chunk, where sequences share a row: a matter of the job and its plan alone."""
    return (plan.micro_batch or max(1, FULL_FORWARD // config.max_seq_len)) * config.max_seq_len


def chunk_tokens(config: JobConfig, data: JobData, plan: Plan) -> float:
    """Tokens that a chunk of the job usually has."""
    mean = data.tokens / len(data.train)
    return min(capacity_of(config, plan), config.batch_size * mean)


def stepped(attached: Attached, config: JobConfig) -> Sequence[Tensor]:
    """The weights as the optimizer is given them."""
    return attached.matrices() if config.optimizer.by_matrix else attached.parameters()


def length_remark(base: Base, config: JobConfig, data: JobData) -> str | None:
    """What to say of a `max_seq_len` beyond the length that the base was made for."""
    made_for = base.context_length
    if made_for is None or config.max_seq_len <= made_for:
        return None
    longer = sum(len(example.tokens) > made_for for example in (*data.train, *data.held_out))
    what = f"{longer:,} examples are longer, and it does badly there" if longer else "no example is longer"
    return f"max_seq_len {config.max_seq_len} is beyond the {made_for} tokens that '{base.name}' was made for; {what}"


def check_fits(base: Base, config: JobConfig, data: JobData) -> None:
    """Refuse tokens and lengths that the base has no embedding for. Raises `InputError`."""
    wordy = next((p for p in data.prompts if len(p.tokens) >= (base.max_positions or math.inf)), None)
    if wordy is not None:
        raise InputError(
            f"samples: a prompt has {len(wordy.tokens)} tokens, but '{base.name}' has {base.max_positions} positions, "
            f"which hold the answer too ({wordy.text[:40]!r})"
        )
    examples = (*data.train, *data.held_out)
    if not examples:
        return
    longest = max(examples, key=lambda e: len(e.tokens))
    if base.max_positions is not None and len(longest.tokens) > base.max_positions:
        raise InputError(
            f"max_seq_len: {longest.source} has {len(longest.tokens)} tokens, but '{base.name}' has {base.max_positions} "
            f"positions; set max_seq_len to at most {base.max_positions}"
        )
    highest = max(examples, key=lambda e: int(e.tokens.max()))
    if int(highest.tokens.max()) >= base.vocab_size:
        raise InputError(
            f"model: the tokenizer of '{base.name}' gives token {int(highest.tokens.max())} ({highest.source}), "
            f"but the model has embeddings for {base.vocab_size}"
        )
