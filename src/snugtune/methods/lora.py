"""LoRA: low-rank updates next to frozen linears, for any number of jobs on one base.

Source: Hu et al. 2021 (arXiv 2106.09685). The config, the initial values, the choice of targets and the file format are
PEFT's, so that adapters travel both ways. Adapters are fp32 and are computed with in the base's dtype.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from peft import LoraConfig as PeftLoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from pydantic import Field, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from snugtune.errors import InputError
from snugtune.files import read_json
from snugtune.model.base import Base
from snugtune.model.frozen import FrozenLinear
from snugtune.model.routed import Slot
from snugtune.schema import Config

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
STAMP_FILE = "snugtune.json"
UNSTAMPED = "adapter: it does not say which weights it was trained on; it was matched by its names and shapes alone"
_PREFIX = "base_model.model."
_FACTOR_ENDINGS = (".lora_A.weight", ".lora_B.weight")
_KEPT_BASE = ".base_layer.weight"
_UNSUPPORTED = ("use_dora", "lora_bias", "modules_to_save", "layer_replication", "trainable_token_indices",
                "alora_invocation_tokens", "use_bdlora", "kasa_config", "arrow_config", "target_parameters")  # fmt: skip
_PLAIN_INITS = frozenset({"gaussian", "orthogonal", "eva"})

Factors = tuple[Tensor, Tensor, float]
"""One site's A [r, in], B [out, r] and scale."""


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

    def to_peft(self, targets: list[str] | None = None) -> PeftLoraConfig:
        """The same settings in PEFT's words; `targets` are module names or endings."""
        return PeftLoraConfig(
            r=self.r,
            lora_alpha=self.lora_alpha,  # pyright: ignore[reportArgumentType]
            lora_dropout=self.lora_dropout,
            target_modules=targets if targets is not None else _peft_targets(self.target_modules),
            use_rslora=self.use_rslora,
            init_lora_weights=True if self.init_lora_weights == "default" else self.init_lora_weights,
            task_type="CAUSAL_LM",
        )


class LoraAttached:
    """One job's factors at its sites, in one flat fp32 buffer (one optimizer call a step)."""

    def __init__(self, base: Base, job: str, config: PeftLoraConfig, total: int, factors: Iterable[tuple[str, Factors]]):
        """`factors` are taken over one by one, `total` numbers in all: they need not be there at the same time."""
        self.base, self.job, self.config, self.total = base, job, config, total
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
        rest, dropout = self.flat.detach(), float(self.config.lora_dropout)
        for name, rank, scale in zip(self.sites, self.ranks, self.scales, strict=True):
            site = self.base.site(name)
            a, b, rest = rest.split([rank * site.in_features, site.out_features * rank, len(rest) - rank * sum(site.shape)])
            a, b = a.view(rank, -1).requires_grad_(), b.view(-1, rank).requires_grad_()
            site.slots[self.job] = Slot(a, b, scale, dropout)

    def parameters(self) -> list[nn.Parameter]:
        return [self.flat]

    def matrices(self) -> list[Tensor]:
        slots = [self.base.site(name).slots[self.job] for name in self.sites]
        return [factor for slot in slots for factor in (slot.a, slot.b)]

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

    def load_state(self, tensors: dict[str, Tensor]) -> None:
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
            named[f"{_PREFIX}{name}.lora_A.weight"] = slot.a.detach()
            named[f"{_PREFIX}{name}.lora_B.weight"] = slot.b.detach()
        return named

    def save(self, folder: Path) -> None:
        """PEFT's adapter folder, and a stamp with the base's fingerprint."""
        config = replace(self.config, base_model_name_or_path=self.base.name, inference_mode=True)
        config.save_pretrained(str(folder))
        tensors = {k: v.contiguous().cpu() for k, v in self.tensors().items()}
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        stamp = {"base": self.base.name, "base_fingerprint": self.base.fingerprint, "job": self.job}
        (folder / STAMP_FILE).write_text(json.dumps(stamp, indent=2) + "\n")

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

    def attach(self, base: Base, job: str, config: LoraConfig, seed: int) -> LoraAttached:
        """Fresh factors; equal to those of `get_peft_model` after `torch.manual_seed(seed)` on an fp32 base."""
        names = _select(base, config.target_modules)
        transposed = base.conv1d_names.intersection(names)
        peft_config = config.to_peft(_shortest(names, [n for n, _ in base.model.named_modules()]))
        peft_config.fan_in_fan_out = bool(transposed)
        base.freeze()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            total = _numbers(base, names, peft_config.r)
            factors = ((name, _initial(base, name, peft_config)) for name in names)
            return LoraAttached(base, job, peft_config, total, factors)

    def load(self, base: Base, job: str, folder: Path) -> LoraAttached:
        """The factors of a PEFT adapter folder, whatever `read_adapter` accepts."""
        layers = {name: base.model.get_submodule(name) for name in base.linear_names}
        config, factors = read_adapter(folder, layers, base.name, base.fingerprint)
        base.freeze()
        total = sum(a.numel() + b.numel() for a, b, _ in factors.values())
        return LoraAttached(base, job, config, total, factors.items())


def _numbers(base: Base, names: Iterable[str], rank: int) -> int:
    """Of A and B together."""
    return sum(rank * sum(FrozenLinear.shape_of(base.model.get_submodule(name))) for name in names)


def _peft_targets(targets: str | tuple[str, ...]) -> str | list[str]:
    return targets if isinstance(targets, str) else list(targets)


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
        probe = PeftLoraConfig(target_modules=target if isinstance(targets, str) else [target])
        try:
            found = {n for n in base.linear_names if check_target_module_exists(probe, n)}
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


def _shortest(names: tuple[str, ...], modules: Sequence[str]) -> list[str]:
    """Name endings that mean exactly `names` among all `modules`; the full names where endings would mean more.

    Not among the linears alone: the ending of `ffn.0` is that of the block `h.0` too, which PEFT cannot adapt.
    """
    endings = sorted({n.rpartition(".")[2] for n in names})
    meant = [n for n in modules if n.rpartition(".")[2] in endings]
    return endings if set(meant) == set(names) else list(names)


def _initial(base: Base, name: str, config: PeftLoraConfig) -> Factors:
    """A, B and scale as PEFT makes them, from a throwaway PEFT layer over a weightless fp32 linear."""
    site = base.model.get_submodule(name)
    assert isinstance(site.in_features, int) and isinstance(site.out_features, int)
    stub = nn.Linear(site.in_features, site.out_features, bias=False, device="meta")
    stub.weight = nn.Parameter(torch.zeros(1).expand(site.out_features, site.in_features), requires_grad=False)
    layer = PeftLinear(stub, "default", config, r=config.r, lora_alpha=config.lora_alpha)  # pyright: ignore[reportCallIssue]
    a, b = (half.get_parameter("default.weight") for half in (layer.lora_A, layer.lora_B))
    return a.detach(), b.detach(), float(layer.scaling["default"])


def read_adapter(
    folder: Path, layers: Mapping[str, nn.Module], base_name: str, fingerprint: str
) -> tuple[PeftLoraConfig, dict[str, Factors]]:
    """A PEFT adapter folder's config and factors for the linears `layers` of a base, in their order.

    Raises `InputError` for another base's (by stamp, else by names and shapes), unknown keys, and features that LoRA here
    lacks.
    """
    config, tensors = _read_files(folder)
    _check_stamp(folder, base_name, fingerprint)
    _check_base_weights(folder, layers, base_name, tensors)
    found = {k.removeprefix(_PREFIX).rpartition(".lora_")[0] for k in tensors if k.endswith(_FACTOR_ENDINGS)}
    if not found:
        raise InputError(f"{folder / WEIGHTS_FILE} holds no LoRA weights")
    unknown = sorted(found - layers.keys())
    if unknown:
        raise InputError(f"{folder}: '{base_name}' has no linear '{unknown[0]}' ({len(unknown)} such names); wrong base?")
    return config, {name: _matched(folder, base_name, name, layers[name], config, tensors) for name in layers if name in found}


def _read_files(folder: Path) -> tuple[PeftLoraConfig, dict[str, Tensor]]:
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise InputError(f"{folder} is not a PEFT adapter folder (no {file})")
    raw = read_json(folder / CONFIG_FILE)
    if raw.get("peft_type") != "LORA":
        raise InputError(f"{folder / CONFIG_FILE}: peft_type {raw.get('peft_type')!r}; snugtune loads LORA adapters")
    try:
        config = PeftLoraConfig.from_pretrained(str(folder))
        with safe_open(folder / WEIGHTS_FILE, "pt") as stored:
            tensors = {k: stored.get_tensor(k) for k in stored.keys()}  # noqa: SIM118 (not a dict)
        assert isinstance(config, PeftLoraConfig)
        numbers = [config.lora_alpha, *(dict(config.alpha_pattern) if config.alpha_pattern else {}).values()]
        if not isinstance(config.r, int) or not all(isinstance(n, (int, float)) for n in numbers):
            raise ValueError(f"{CONFIG_FILE}: r, lora_alpha and alpha_pattern must be numbers")
    except (ValueError, TypeError, KeyError, AttributeError, SafetensorError, OSError) as error:
        raise InputError(f"{folder}: cannot be read as an adapter: {error}") from error
    if damaged := next((k for k, t in tensors.items() if not t.isfinite().all()), None):
        raise InputError(f"{folder / WEIGHTS_FILE}: '{damaged}' is not finite; the adapter is damaged or diverged")
    unsupported = [k for k in _UNSUPPORTED if getattr(config, k, None)]
    if isinstance(config.init_lora_weights, str) and config.init_lora_weights not in _PLAIN_INITS:
        unsupported.append(f"init_lora_weights={config.init_lora_weights} (it changes the base)")
    strangers = [k for k in tensors if not k.endswith((*_FACTOR_ENDINGS, _KEPT_BASE))]
    if unsupported or strangers:
        raise InputError(f"{folder}: uses {', '.join(unsupported or strangers[:3])}, which snugtune does not support")
    return config, tensors


def _check_base_weights(folder: Path, layers: Mapping[str, nn.Module], base_name: str, tensors: Mapping[str, Tensor]) -> None:
    """PEFT stores the weight of an adapted head too; it must be the base's own."""
    for key, stored in tensors.items():
        if key.endswith(_KEPT_BASE):
            name = key.removeprefix(_PREFIX).removesuffix(_KEPT_BASE)
            own = layers[name].weight if name in layers else None
            if not isinstance(own, Tensor) or not _equal_as_stored(own.cpu(), stored):
                raise InputError(f"{folder}: brings a weight for '{name}' that is not that of '{base_name}'; wrong base?")


def _equal_as_stored(a: Tensor, b: Tensor) -> bool:
    """Equality in the narrower of both number formats: either side may have been rounded on its way here."""
    narrow = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    return a.shape == b.shape and torch.equal(a.to(narrow), b.to(narrow))


def is_stamped(folder: Path) -> bool:
    """Whether an adapter folder says which weights it was trained on; others are judged by names and shapes alone."""
    return (folder / STAMP_FILE).is_file()


def _check_stamp(folder: Path, base_name: str, fingerprint: str) -> None:
    """Refuse an adapter that says it was trained on other weights."""
    stamp = folder / STAMP_FILE
    if is_stamped(folder):
        made_for = read_json(stamp)
        if made_for.get("base_fingerprint") != fingerprint:
            raise InputError(f"{stamp}: this adapter was trained on other weights ('{made_for.get('base')}') than '{base_name}'")


def _matched(
    folder: Path, base_name: str, name: str, layer: nn.Module, config: PeftLoraConfig, tensors: Mapping[str, Tensor]
) -> Factors:
    """The stored A and B of one site, checked against the base's shapes, and their scale."""
    a, b = (tensors.get(f"{_PREFIX}{name}.lora_{side}.weight") for side in "AB")
    width_out, width_in = FrozenLinear.shape_of(layer)
    rank = 0 if a is None or a.dim() == 0 else len(a)
    if a is None or b is None or not rank or a.shape != (rank, width_in) or b.shape != (width_out, rank):
        raise InputError(f"{folder}: the weights for '{name}' do not fit '{base_name}'; wrong base?")
    pattern = config.alpha_pattern or {}
    alpha = pattern.get(get_pattern_key(list(pattern), name), config.lora_alpha)
    scale = alpha / (len(a) ** 0.5 if config.use_rslora else len(a))
    return a, b, float(scale)
