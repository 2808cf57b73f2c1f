"""Full fine-tuning: every weight of the base trains.

In bf16 or fp16 the optimizer works on fp32 master weights; gradients leave the base as soon as they are made and
accumulate in fp32 (mixed-precision training, Micikevicius et al. 2017, arXiv 1710.03740).
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from snugtune.model.base import Base
from snugtune.model.pieces import alongside
from snugtune.schema import Config


class FullConfig(Config):
    """Train every weight of the base."""

    type: Literal["full"] = "full"


class FullAttached:
    """The masters of the weights that train (the weights themselves where they are fp32) and the way back into the base.

    `names`: which weights; None: all. The others are frozen.
    """

    def __init__(self, base: Base, job: str, names: Collection[str] | None = None):
        self.base, self.job = base, job
        base.model.requires_grad_(False)
        self.weights: dict[str, nn.Parameter] = {}
        self.masters: dict[str, nn.Parameter] = {}
        self.hooks: dict[str, Any] = {}
        self.released: Released | None = None
        self.train_only({n for n, _ in base.model.named_parameters()} if names is None else names)

    def train_only(self, names: Collection[str]) -> None:
        """Let these weights train and no others. One that trained and does not any more stays as the base computes with it."""
        before = self.masters
        for name in [name for name in self.weights if name not in names]:
            self._freeze(name)
        weights = self.base.model.named_parameters()  # tied weights appear once
        self.weights, self.masters = {n: w for n, w in weights if n in names}, {}
        for name, weight in self.weights.items():
            if name in before:
                self.masters[name] = before[name]
                continue
            weight.requires_grad_()
            self.masters[name] = weight if weight.dtype == torch.float32 else nn.Parameter(weight.detach().float())
            self._hook(name)

    def _hook(self, name: str) -> None:
        """Have backward bring the weight's gradient to where it belongs; into an fp32 weight it goes by itself."""
        weight, master = self.weights[name], self.masters[name]
        if self.released is not None:
            self.hooks[name] = weight.register_post_accumulate_grad_hook(partial(self.released.arrive, name))
        elif master is not weight:
            self.hooks[name] = weight.register_post_accumulate_grad_hook(_collect_into(master))

    def _freeze(self, name: str) -> None:
        self._unhook(name)
        self.weights[name].requires_grad_(False)
        self.weights[name].grad = None

    def _unhook(self, name: str) -> None:
        if name in self.hooks:
            self.hooks.pop(name).remove()

    def turn_to(self, step: int) -> bool:
        return False

    def parameters(self) -> list[nn.Parameter]:
        return list(self.masters.values())

    def matrices(self) -> list[Tensor]:
        return list(self.masters.values())

    def release_gradients(self, step: Callable[[nn.Parameter], None]) -> None:
        """From now on keep no gradients: as soon as a weight has its own, in backward, `step` is to step its master on it."""
        self.released = Released(self, step)
        for name in self.weights:
            self._unhook(name)
            self._hook(name)

    def zero_grad(self) -> None:
        if self.released is not None:
            self.released.begin()
            return
        for name, master in self.masters.items():
            if master is not self.weights[name]:
                self.weights[name].grad = None  # of a step that broke off before it was collected
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            else:
                master.grad.zero_()

    def drop_grad(self) -> None:
        """They stay: as large as the model, they take long to make. Where they are released there are none."""
        if self.released is not None:
            self.released.held.clear()

    def publish(self) -> None:
        for name in self.masters:
            self.publish_one(name)

    def publish_one(self, name: str) -> None:
        weight, master = self.weights[name], self.masters[name]
        if master is not weight:
            with torch.no_grad():
                weight.copy_(master)

    def state(self) -> dict[str, Tensor]:
        return {name: master.detach() for name, master in self.masters.items()}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(tensors[name])
        self.publish()

    def release(self) -> None:
        raise NotImplementedError("the base itself is what trains")

    def save(self, folder: Path) -> None:
        """A transformers model folder (safetensors) in the base's dtype, with its tokenizer."""
        self.base.model.save_pretrained(folder)
        self.base.tokenizer.save_pretrained(folder)

    def detach(self) -> None:
        for name in self.weights:
            self._freeze(name)


class Released:
    """Gradients that are not kept (LOMO, Lv et al. 2023, arXiv 2306.09782, with any optimizer): whose have come in a step.

    The head goes backward by itself, before the body: a weight of both (tied embeddings) has its gradient in two parts, and
    what the first one gave is held until the second comes.
    """

    def __init__(self, attached: FullAttached, step: Callable[[nn.Parameter], None]):
        self.attached, self.step = attached, step
        base = attached.base
        ends = set() if base.head.project is None else {id(p) for p in base.head.project.parameters()}
        body = set() if base.body is None else {id(p) for p in base.body.parameters()}
        self.of_both = ends & body
        self.held: dict[str, Tensor] = {}
        self.due: dict[str, int] = {}  # parts that are still to come

    def begin(self) -> None:
        """A step begins."""
        self.held.clear()
        self.due = {name: 2 if id(weight) in self.of_both else 1 for name, weight in self.attached.weights.items()}

    def arrive(self, name: str, weight: Tensor) -> None:
        """A part of a weight's gradient has been made. Raises `RuntimeError` after the last: the weight has made its step."""
        assert weight.grad is not None
        gradient, weight.grad = weight.grad.float(), None
        if not self.due.get(name):
            raise RuntimeError(f"a gradient of {name} came after its step; set plan.gradients: kept")
        if name in self.held:
            gradient = self.held.pop(name).add_(gradient)
        self.due[name] -= 1
        if self.due[name]:
            self.held[name] = gradient
        else:
            self._hand_over(name, gradient)

    def end(self) -> None:
        """Backward is through: weights that it did not reach step on what they have, if only zeros."""
        for name in [name for name, due in self.due.items() if due]:
            self.due[name] = 0
            held = self.held.pop(name, None)
            self._hand_over(name, torch.zeros_like(self.attached.masters[name]) if held is None else held)

    def _hand_over(self, name: str, gradient: Tensor) -> None:
        master = self.attached.masters[name]
        master.grad = gradient
        try:
            self.step(master)
        finally:
            master.grad = None
        self.attached.publish_one(name)


def _collect_into(master: nn.Parameter) -> Any:
    def collect(weight: Tensor) -> None:
        assert weight.grad is not None
        if master.grad is None:
            master.grad = weight.grad.float()
        else:
            for sum_, part in alongside(master.grad, weight.grad):  # torch makes fp32 of all that it is given before it adds
                sum_.add_(part)
        weight.grad = None

    return collect


class Full:
    """The method. One job per run: the whole base is that job's."""

    routable: ClassVar[bool] = False
    artefacts: ClassVar[str] = "models"

    def numbers(self, base: Base, config: FullConfig) -> int:
        return base.model.num_parameters()

    def even(self, config: FullConfig) -> bool:
        return True

    def attach(self, base: Base, job: str, config: FullConfig, seed: int) -> FullAttached:
        return FullAttached(base, job)
