"""The base: one pretrained model, frozen or not, that 1..N jobs train on. Nothing above this knows transformers.

Shapes: T tokens of a row, D model width, V vocabulary.
"""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from snugtune.errors import InputError
from snugtune.model import attention
from snugtune.model.frozen import FrozenLinear, freeze_linears
from snugtune.model.head import Head, Logits
from snugtune.model.load import load_config, load_model, load_tokenizer
from snugtune.model.routed import RoutedLinear, Router
from snugtune.model.source import ModelSource
from snugtune.types import Batch, Plan, Segment

AttentionInterface.register(attention.NAME, attention.varlen_attention)
_PROOF = f"{attention.NAME}_proof"

# RoPE variants whose angles depend on the length of the whole row, not on positions alone.
_ROW_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})
# Mixers that carry a state along the row.
_STATEFUL_LAYERS = ("linear_attention", "mamba", "ssm", "conv", "recurrent", "hybrid", "chunked_attention")
# What MoE families call the linear that chooses experts (it is also as wide as there are experts).
_ROUTER_NAME = re.compile(r"(^|\.)(gate|router|wg)(\.|$)")
# The projections that PEFT takes for those of an MoE's fused experts, wherever they stand.
_EXPERT_LEAVES = frozenset({"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
_POSITION_TABLE = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings?)$")
_MAMBA_TYPES = frozenset({"mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"})
_DRAWS_EXPERTS = frozenset({"phimoe"})
_READ_PAST = frozenset({"out_proj", "dt_proj"})
# Packed against separate: the relative L2 difference of hidden states that rounding alone explains, by dtype.
_PROOF_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float64: 1e-6}


class Base:
    """A pretrained model with its tokenizer, head and sites.

    `packable` says whether several sequences may share a row (decided by rule and proved at construction); `moe`
    whether experts see neighbours' rows; `notes` what the user should be told; `fingerprint` identifies the weights.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        notes: tuple[str, ...] = (),
        identity: str | None = None,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.router = Router()
        self.sites: dict[str, RoutedLinear] = {}
        self.frozen = False
        self.body = _find_body(model)  # None: only the model as a whole can be called, and gives logits
        self.native_attention = str(model.config._attn_implementation)
        self.fingerprint = identity or fingerprint(model)
        self.linear_names = tuple(n for n, m in model.named_modules() if FrozenLinear.takes(m))
        self.conv1d_names = frozenset(n for n in self.linear_names if isinstance(model.get_submodule(n), Conv1D))
        self.moe = _count_experts(model) is not None
        self._check_causal()
        obstacle = _packing_obstacle(model) or self._prove_packing()
        self.packable = obstacle is None
        self.notes = notes
        if obstacle is not None:
            self.notes += (f"sequences of this model cannot share a row ({obstacle}); training one per forward",)
        self.head, self.own_head = self._check_head()
        if model.config.model_type in _DRAWS_EXPERTS:
            self.notes += ("it draws its experts at random in training: no two runs are alike, and resuming is not bit-exact",)
        if self.own_head:
            self.notes += ("the model's head is not a plain projection; using its own, unchunked (more memory)",)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype  # pyright: ignore[reportReturnType, reportAttributeAccessIssue]

    @property
    def vocab_size(self) -> int:
        return self.model.get_input_embeddings().weight.shape[0]  # pyright: ignore[reportReturnType, reportIndexIssue]

    def freeze(self) -> None:
        """Make every linear a `FrozenLinear` and let no base weight train. Idempotent."""
        if not self.frozen:
            freeze_linears(self.model)
            self.frozen = True
            if self.head.project is not None:
                self.head.project = self.model.get_output_embeddings()

    def site(self, name: str) -> RoutedLinear:
        """The routed layer at linear `name`; becomes one on first use. The base must be frozen."""
        if name not in self.sites:
            linear = self.model.get_submodule(name)
            assert isinstance(linear, FrozenLinear), "freeze() the base before asking for sites"
            site = RoutedLinear(linear, self.router, name)
            site.train(linear.training)
            parent, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, site)
            self.sites[name] = site
            if linear is self.head.project:
                self.head.project = site
        return self.sites[name]

    def adaptable(self) -> tuple[str, ...]:
        """What "all-linear" means: every linear but the output head and, in an MoE, its routers and feed-forward layers.

        PEFT reads the names of an MoE's feed-forward linears (shared experts, dense first layers) as the fused experts.
        """
        experts = _count_experts(self.model)
        head = self.model.get_output_embeddings()
        names = []
        for name in self.linear_names:
            module = self.model.get_submodule(name)
            inner = module.frozen if isinstance(module, RoutedLinear) else module
            is_head = inner is head or module is head
            wide_as_experts = getattr(inner, "out_features", getattr(inner, "nf", None)) == experts
            is_router = wide_as_experts and _ROUTER_NAME.search(name) is not None
            if not (is_head or is_router or self.refuses(name)):
                names.append(name)
        return tuple(names)

    def refuses(self, name: str) -> str | None:
        """Why linear `name` must not carry an adapter, or None."""
        leaf = name.rpartition(".")[2]
        if self.model.config.model_type in _MAMBA_TYPES and leaf in _READ_PAST:
            return "the model takes its weight as it lies, without calling it"
        if self.moe and (leaf in _EXPERT_LEAVES or ".experts." in name):
            return "PEFT would read it as the fused experts"
        return None

    def configure(self, recompute: bool, head_rows: int) -> None:
        """Set the memory knobs: recompute each block in backward; rows of logits alive at once."""
        self.head.rows_at_once = head_rows
        if recompute:
            if not self.model.supports_gradient_checkpointing:
                raise InputError(f"plan.recompute: '{self.name}' does not support recomputing its blocks; set it to none")
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        else:
            self.model.activation_checkpointing_disable()

    @contextmanager
    def routed(self, batch: Batch) -> Iterator[None]:
        """Route the sites by `batch` inside the block, which must span forward *and* backward."""
        with self.router.routing(batch.segments):
            yield

    @contextmanager
    def answering(self, job: str | None) -> Iterator[None]:
        """Inside the block the model is ready to generate: its native attention, no dropout, `job`'s adapter on all rows."""
        segments = () if job is None else (Segment(job, slice(None), 0),)
        training, packed = self.model.training, str(self.model.config._attn_implementation)
        self.model.eval()
        self.model.set_attn_implementation(self.native_attention)
        try:
            with self.router.routing(segments):
                yield
        finally:
            self.model.set_attn_implementation(packed)
            self.model.train(training)

    def hidden(self, batch: Batch) -> Tensor:
        """Hidden states of a row, [T, D]; for a model that keeps its own head, its logits [T, V]."""
        inputs: dict[str, object] = {"input_ids": batch.input_ids, "use_cache": False}
        if self.packable:
            borders = torch.tensor([0, *batch.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            longest = max(batch.lengths)
            inputs |= {"position_ids": batch.position_ids, "cu_seq_lens_q": borders.to(self.device), "cu_seq_lens_k": borders,
                       "max_length_q": longest, "max_length_k": longest}  # fmt: skip
        else:
            assert len(batch.lengths) == 1, "an unpackable model takes one sequence per forward"
        return self._body(**inputs)

    def _body(self, **inputs: object) -> Tensor:
        """The body's last hidden states [T, D], or the model's logits; a residual kept in fp32 goes to the head in its dtype."""
        if self.body is None:
            return self.model(**inputs).logits[0]
        return self.body(**inputs).last_hidden_state[0].to(self.dtype)

    @property
    def max_positions(self) -> int | None:
        """The length of the model's table of learned positions; None for models that compute them."""
        tables = (n for n, m in self.model.named_modules() if isinstance(m, nn.Embedding) and _POSITION_TABLE.search(n))
        return getattr(self.model.config, "max_position_embeddings", None) if next(tables, None) else None

    def _check_causal(self) -> None:
        """Later tokens must not change earlier states. Raises `InputError`: such a model knows the answers it is to learn."""
        ids = _probe_batch(self.vocab_size, self.device).input_ids[:, :17]
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            whole, part = (self._body(input_ids=ids[:, :n], use_cache=False)[:9] for n in (17, 9))
        self.model.train(training)
        if not whole.isfinite().all():
            raise InputError(f"model: the weights of '{self.name}' give states that are not finite; its files may be damaged")
        if _relative(part, whole, per_token=self.moe) > _PROOF_TOLERANCE[self.dtype]:
            kind = self.model.config.model_type
            raise InputError(f"model: '{self.name}' ({kind}) is not a causal language model: its tokens see those after them")

    def _prove_packing(self) -> str | None:
        """Two short sequences in one row against each alone with the model's own attention. None when they agree."""
        self.packable = True
        windows: set[int | None] = set()
        AttentionInterface.register(_PROOF, attention.watching(windows))
        batch = _probe_batch(self.vocab_size, self.device)
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            alone = [self._body(input_ids=ids, use_cache=False) for ids in batch.input_ids.split(batch.lengths, dim=1)]
            try:
                self.model.set_attn_implementation(_PROOF)
                packed = self.hidden(batch)
                self.model.set_attn_implementation(attention.NAME)
            except Exception as error:  # a model that breaks on packed rows is not packable, whatever the way it breaks
                self.model.set_attn_implementation(self.native_attention)
                return (str(error).splitlines() or [type(error).__name__])[0]
            finally:
                self.model.train(training)
        error = _relative(packed, torch.cat(alone), per_token=self.moe)
        if error > _PROOF_TOLERANCE[self.dtype]:
            obstacle = f"packed and separate differ by {error:.1e}"
        elif _slides(self.model) and windows == {None}:
            obstacle = "it does not tell its attention of its sliding window"
        else:
            return None
        self.model.set_attn_implementation(self.native_attention)
        return obstacle

    def _check_head(self) -> tuple[Head, bool]:
        """The chunked head if it reproduces the model's own logits, else the model's own."""
        project = self.model.get_output_embeddings()
        config = self.model.config
        cap = getattr(config, "final_logit_softcapping", None)
        scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
        head = Head(project, Logits(scale=scale, softcap=cap), router=self.router)
        batch = _probe_batch(self.vocab_size, self.device)
        ids = batch.input_ids[:, : batch.lengths[0]]
        with torch.no_grad(), self.answering(None):
            own = self.model(input_ids=ids, use_cache=False).logits[0]
            try:
                ours = head.logits(self._body(input_ids=ids, use_cache=False)) if self.body is not None and project else None
            except RuntimeError:  # its projection does not even fit the hidden states: the head is something else
                ours = None
        if ours is not None and ours.shape == own.shape and _relative(ours, own) <= _PROOF_TOLERANCE[self.dtype]:
            return head, False
        self.body = None
        return Head(None, Logits()), True


def load_base(source: ModelSource, plan: Plan, trust_remote_code: bool = False) -> Base:
    """Load the model of `source` as `plan` says. Raises `InputError` for anything that is not a usable causal LM."""
    config = load_config(source, trust_remote_code)
    tokenizer, tokenizer_notes = load_tokenizer(source, trust_remote_code)
    identity = None
    if plan.weights == "fp16":  # what the fingerprint looks at does not survive the rounding to fp16
        identity = fingerprint(load_model(source, config, "bf16", "cpu", trust_remote_code)[0])
    model, model_notes = load_model(source, config, plan.weights, plan.device, trust_remote_code)
    return Base(model, tokenizer, source.name, (*source.notes, *tokenizer_notes, *model_notes), identity)


def _find_body(model: PreTrainedModel) -> PreTrainedModel | None:
    """The part that gives hidden states: `get_decoder()`, which guesses by names, or else the inner model without a head."""
    candidates = (model.get_decoder(), model.base_model, *model.children())
    inner = (m for m in candidates if isinstance(m, PreTrainedModel) and m is not model)
    return next((m for m in inner if m.get_output_embeddings() is None), None)


def _packing_obstacle(model: PreTrainedModel) -> str | None:
    """Why sequences must not share a row, as far as the config tells; leaks that show only at length are found here."""
    config = model.config
    if getattr(model, "_is_stateful", False):
        return "it carries a state along the row"
    kinds = [str(k) for k in getattr(config, "layer_types", None) or ()]
    stateful = [k for k in kinds if any(word in k for word in _STATEFUL_LAYERS)]
    if stateful:
        return f"it has {stateful[0]} layers"
    if getattr(config, "alibi", False):
        return "ALiBi positions"
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for part in (rope, *(v for v in rope.values() if isinstance(v, dict))):
        if part.get("rope_type") in _ROW_DEPENDENT_ROPE:
            return f"{part['rope_type']} RoPE depends on the row's length"
    if not model._supports_attention_backend:
        return "its attention is not replaceable"
    return None


def _slides(model: PreTrainedModel) -> bool:
    """Whether the config asks for a sliding window in any layer."""
    config = model.config
    kinds = getattr(config, "layer_types", None)
    declared = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    return bool(declared) and (kinds is None or "sliding_attention" in kinds)


def _count_experts(model: PreTrainedModel) -> int | None:
    counts = (getattr(model.config, k, None) for k in ("num_experts", "num_local_experts", "n_routed_experts"))
    return next((c for c in counts if isinstance(c, int) and c > 1), None)


def _probe_batch(vocab_size: int, device: torch.device) -> Batch:
    """Two short sequences of arbitrary tokens, the second longer, so that a leak of either kind shows."""
    lengths = (11, 17)
    ids = (torch.arange(sum(lengths)) * 7919 + 13) % min(vocab_size, 1000)
    positions = torch.cat([torch.arange(n) for n in lengths])
    return Batch(ids[None].to(device), positions[None].to(device), lengths, ())


def _relative(ours: Tensor, truth: Tensor, per_token: bool = False) -> float:
    """||ours - truth|| / ||truth|| in fp32 or better; infinite when not finite.

    `per_token`: the median over tokens. In low precision rounding sends a few tokens of an MoE to other experts.
    """
    a, b = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (ours, truth))
    dim = -1 if per_token else None
    error = float(((a - b).norm(dim=dim) / b.norm(dim=dim).clamp_min(1e-30)).median())
    return error if error == error else float("inf")


def fingerprint(model: nn.Module) -> str:
    """A hash of names, shapes and a sample of every weight in bf16: the same whether it was loaded in fp32 or in bf16."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 16)][:16].to("cpu", torch.bfloat16).float()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:32]
