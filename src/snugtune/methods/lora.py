"""LoRA: low-rank updates next to frozen linears, for any number of jobs on one base.

Source: Hu et al. 2021 (arXiv 2106.09685). The config, the initial values, the choice of targets and the file format are
PEFT's, so that adapters travel both ways; PEFT itself is met where folders are (`adapter_folder.py`). Adapters are fp32 and
are computed with in the base's dtype.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from snugtune.errors import InputError
from snugtune.methods.adapter_folder import PREFIX, Factors, read_adapter, write_adapter
from snugtune.model.base import Base
from snugtune.model.frozen import FrozenLinear
from snugtune.model.routed import Slot
from snugtune.schema import Config

if TYPE_CHECKING:
    from peft import LoraConfig as PeftLoraConfig


class LoraConfig(Config):
    """Train low-rank updates of the base's linears; the base stays as it is."""

    type: Literal["lora"] = "lora"
    r: int = Field(default=8, ge=1, le=2**16, description="rank of the updates")
    lora_alpha: float = Field(default=16, gt=0, description="the update is scaled by lora_alpha / r")
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout on the input of the update, while training")
    target_modules: str | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        default="all-linear", description="'all-linear', a list of module name endings, or a regular expression over full names"
    )
    use_rslora: bool = Field(default=False, description="scale by lora_alpha / sqrt(r) instead (rank-stabilised LoRA)")
    init_lora_weights: Literal["default", "gaussian", "orthogonal"] = Field(
        default="default", description="initial values, as PEFT's"
    )

    @model_validator(mode="after")
    def _even_where_needed(self) -> "LoraConfig":
        if self.init_lora_weights == "orthogonal" and self.r % 2:
            raise ValueError(f"r: orthogonal initial values need an even rank (got {self.r})")
        return self

    def to_peft(self, targets: list[str], fan_in_fan_out: bool = False) -> "PeftLoraConfig":
        """The same settings in PEFT's words; `targets` are module names or endings."""
        from peft import LoraConfig as PeftLoraConfig

        return PeftLoraConfig(
            r=self.r,
            lora_alpha=self.lora_alpha,  # pyright: ignore[reportArgumentType]
            lora_dropout=self.lora_dropout,
            target_modules=targets,
            use_rslora=self.use_rslora,
            init_lora_weights=True if self.init_lora_weights == "default" else self.init_lora_weights,
            fan_in_fan_out=fan_in_fan_out,
            task_type="CAUSAL_LM",
        )


class LoraAttached:
    """One job's factors at its sites, in one flat fp32 buffer (one optimizer call a step)."""

    def __init__(
        self,
        base: Base,
        job: str,
        dropout: float,
        to_peft: Callable[[], "PeftLoraConfig"],
        total: int,
        factors: Iterable[tuple[str, Factors]],
    ):
        """`factors` are taken over one by one, `total` numbers in all: they need not be there at the same time.

        `to_peft` makes the config that `save` writes.
        """
        self.base, self.job, self.dropout, self.to_peft, self.total = base, job, dropout, to_peft, total
        self.flat = nn.Parameter(self._buffer())
        self.sites: list[str] = []
        self.ranks: list[int] = []
        self.scales: list[float] = []
        at = 0
        for name, (a, b, scale) in factors:
            for factor in (a, b):
                self.flat.detach()[at : at + factor.numel()].view(factor.shape).copy_(factor)
                at += factor.numel()
            self.sites.append(name)
            self.ranks.append(len(a))
            self.scales.append(scale)
        self._fill_slots()
        self.zero_grad()

    def _buffer(self) -> Tensor:
        return torch.empty(self.total, dtype=torch.float32, device=self.base.device)

    def _fill_slots(self) -> None:
        """Let every site look at its part of the flat buffer."""
        rest = self.flat.detach()
        for name, rank, scale in zip(self.sites, self.ranks, self.scales, strict=True):
            site = self.base.site(name)
            a, b, rest = rest.split([rank * site.in_features, site.out_features * rank, len(rest) - rank * sum(site.shape)])
            a, b = a.view(rank, -1).requires_grad_(), b.view(-1, rank).requires_grad_()
            site.slots[self.job] = Slot(a, b, scale, self.dropout)

    def parameters(self) -> list[nn.Parameter]:
        return [self.flat]

    def matrices(self) -> list[Tensor]:
        slots = [self.base.site(name).slots[self.job] for name in self.sites]
        return [factor for slot in slots for factor in (slot.a, slot.b)]

    def turn_to(self, step: int) -> bool:
        return False

    def zero_grad(self) -> None:
        if self.flat.grad is not None:
            self.flat.grad.zero_()
            return
        self.flat.grad = self.base.spare.take(self.total, self.flat.device)
        at = 0
        for factor in self.matrices():  # backward accumulates straight into the flat buffer
            factor.grad = self.flat.grad[at : at + factor.numel()].view(factor.shape)
            at += factor.numel()

    def drop_grad(self) -> None:
        """Of many jobs only those in the middle of a step have gradients."""
        if self.flat.grad is None:
            return
        for factor in self.matrices():
            factor.grad = None
        self.base.spare.give(self.flat.grad)
        self.flat.grad = None

    def publish(self) -> None:
        """Nothing to bring anywhere: the sites look at the flat buffer itself."""

    def state(self) -> dict[str, Tensor]:
        return {"flat": self.flat.detach()}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        released = len(self.flat) < self.total
        if released:
            self.flat.data = self._buffer()  # the optimizer knows it by its identity
        self.flat.detach().copy_(tensors["flat"])
        if released:
            self._fill_slots()
            self.base.router.absent.discard(self.job)

    def release(self) -> None:
        self.drop_grad()
        self.detach()
        self.flat.data = self.flat.data.new_empty(0)
        self.base.router.absent.add(self.job)

    def tensors(self) -> dict[str, Tensor]:
        """The factors under PEFT's names."""
        named: dict[str, Tensor] = {}
        for name in self.sites:
            slot = self.base.site(name).slots[self.job]
            named[f"{PREFIX}{name}.lora_A.weight"] = slot.a.detach()
            named[f"{PREFIX}{name}.lora_B.weight"] = slot.b.detach()
        return named

    def save(self, folder: Path) -> None:
        """PEFT's adapter folder, and a stamp with the base's fingerprint."""
        write_adapter(folder, self.to_peft(), self.tensors(), self.base.name, self.base.fingerprint, self.job)

    def detach(self) -> None:
        for name in self.sites:
            self.base.site(name).slots.pop(self.job, None)
        self.base.router.absent.discard(self.job)


class Lora:
    """The method: attach fresh factors, or those of an adapter folder."""

    routable: ClassVar[bool] = True
    artefacts: ClassVar[str] = "adapters"

    def numbers(self, base: Base, config: LoraConfig) -> int:
        return _numbers(base, _select(base, config.target_modules), config.r)

    def even(self, config: LoraConfig) -> bool:
        targets = config.target_modules
        named = targets if isinstance(targets, str) else " ".join(targets)
        return not re.search(r"[0-9]|\\d", named)  # a block is meant by its number

    def attach(self, base: Base, job: str, config: LoraConfig, seed: int) -> LoraAttached:
        """Fresh factors; equal to those of `get_peft_model` after `torch.manual_seed(seed)` on an fp32 base."""
        names = _select(base, config.target_modules)
        transposed = base.conv1d_names.intersection(names)
        endings = _shortest(names, [n for n, _ in base.model.named_modules()])
        to_peft = partial(config.to_peft, endings, fan_in_fan_out=bool(transposed))
        base.freeze()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            factors = ((name, _initial(base, name, config)) for name in names)
            return LoraAttached(base, job, config.lora_dropout, to_peft, _numbers(base, names, config.r), factors)

    def load(self, base: Base, job: str, folder: Path) -> LoraAttached:
        """The factors of a PEFT adapter folder, whatever `read_adapter` accepts."""
        layers = {name: base.model.get_submodule(name) for name in base.linear_names}
        config, factors = read_adapter(folder, layers, base.name, base.fingerprint)
        base.freeze()
        total = sum(a.numel() + b.numel() for a, b, _ in factors.values())
        return LoraAttached(base, job, float(config.lora_dropout), lambda: config, total, factors.items())


def _numbers(base: Base, names: Iterable[str], rank: int) -> int:
    """Of A and B together."""
    return sum(rank * sum(FrozenLinear.shape_of(base.model.get_submodule(name))) for name in names)


def _select(base: Base, targets: str | tuple[str, ...]) -> tuple[str, ...]:
    """The linears that `target_modules` means, in the model's order. Every entry must match something."""
    if targets == "all-linear":
        names = base.adaptable()
        if not names:
            raise InputError(f"method.target_modules: '{base.name}' has no linear layer that LoRA can adapt")
        return names
    wanted = [targets] if isinstance(targets, str) else list(targets)
    chosen: set[str] = set()
    for target in wanted:
        try:
            found = {n for n in base.linear_names if _means(target, n, regular=isinstance(targets, str))}
        except re.error as error:
            raise InputError(f"method.target_modules: '{target}' is not a regular expression: {error}") from error
        refused = next((f"{n}: {why}" for n in sorted(found) if (why := base.refuses(n))), None)
        if refused is not None:
            raise InputError(f"method.target_modules: '{target}' means layers that cannot be adapted ({refused})")
        if not found:
            endings = sorted({n.rpartition(".")[2] for n in base.linear_names})
            raise InputError(f"method.target_modules: '{target}' matches no linear of '{base.name}'; it has {', '.join(endings)}")
        chosen |= found
    return tuple(n for n in base.linear_names if n in chosen)


def _means(target: str, name: str, regular: bool) -> bool:
    """Whether a target means the module `name`, as in PEFT: a regular expression over all of it, or its last parts."""
    return bool(re.fullmatch(target, name)) if regular else f".{name}".endswith(f".{target}")


def _shortest(names: tuple[str, ...], modules: Sequence[str]) -> list[str]:
    """Name endings that mean exactly `names` among all `modules`; the full names where endings would mean more.

    Not among the linears alone: the ending of `ffn.0` is that of the block `h.0` too, which PEFT cannot adapt.
    """
    endings = sorted({n.rpartition(".")[2] for n in names})
    meant = [n for n in modules if n.rpartition(".")[2] in endings]
    return endings if set(meant) == set(names) else list(names)


def _initial(base: Base, name: str, config: LoraConfig) -> Factors:
    """A, B and scale as PEFT makes them: its draws, in its order."""
    width_out, width_in = FrozenLinear.shape_of(base.model.get_submodule(name))
    r, scale = config.r, config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    a, b = (nn.Linear(*widths, bias=False).weight.detach() for widths in ((width_in, r), (r, width_out)))
    if config.init_lora_weights == "orthogonal":  # rows of one half each of an orthogonal matrix: B A = 0
        q = torch.linalg.qr(torch.randn(r, r)).Q
        a = torch.randn(width_in, r // 2).mm(q[0::2]).t() / 10.0
        b = torch.randn(r // 2, width_out).t().mm(q[1::2]) / 10.0
        return a, b, scale
    if config.init_lora_weights == "gaussian":
        nn.init.normal_(a, std=1 / r)
    else:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    return a, b.zero_(), scale
