"""The base: one pretrained model, frozen or not, that 1..N jobs train on. Nothing above this knows transformers.

Shapes: T tokens of a row, D model width, V vocabulary.
"""

import hashlib
import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from snugtune import allocator
from snugtune.errors import InputError
from snugtune.model import attention, gated, grouped, liger, norms, proofs
from snugtune.model.frozen import FrozenLinear, freeze_linears, take_products
from snugtune.model.gated import lean_mlps
from snugtune.model.head import Head, Logits
from snugtune.model.kernels import UNMEASURED, Setting, choose, setting_of
from snugtune.model.load import load_config, load_frozen, load_model, load_tokenizer, products_of, stored_width
from snugtune.model.norms import lean_norms
from snugtune.model.quantize import ROUTER_NAME, sample
from snugtune.model.rope import forget_lengths
from snugtune.model.routed import RoutedLinear, Router, Spare, generator_of, route_functions
from snugtune.model.source import ModelSource, Say, mute
from snugtune.model.spill import Spill, place_for
from snugtune.types import MIN_ROWS, NARROW, Batch, Plan, Recompute, Segment

Found = tuple[PreTrainedTokenizerBase, list[str]]
"""A tokenizer, and what there is to say of it."""

AttentionInterface.register(attention.NAME, attention.varlen_attention)
AttentionInterface.register(attention.FLASH, partial(attention.varlen_attention, has_flash=True))

# The projections that PEFT takes for those of an MoE's fused experts, wherever they stand.
_EXPERT_LEAVES = frozenset({"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
_POSITION_TABLE = re.compile(r"(^|\.)(wpe|embed_positions|pos_encoding|positions?_embed(dings?)?)$")
# ALiBi's distances are a table there, as long as the config says; others make them as they need them.
_DISTANCE_TABLE = frozenset({"mpt"})
_MAMBA_TYPES = frozenset({"mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"})
_DRAWS_EXPERTS = frozenset({"phimoe"})
# What Mamba's fused kernels take in at once, where they are installed; without them it would be called.
_FUSED_IN_MAMBA = frozenset({"out_proj", "dt_proj"})


class Base:
    """A pretrained model with its tokenizer, head and sites.

    `packable` says whether several sequences may share a row (decided by rule and proved at construction); `apart` why
    several jobs cannot share a forward, if so; `moe` whether experts see neighbours' rows; `notes` what the user should be
    told, `kernel_notes` too, once it is frozen; `fingerprint` identifies the weights. `proved`: what is known of it already.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        notes: tuple[str, ...] = (),
        identity: str | None = None,
        proved: proofs.Proved | None = None,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.router = Router()
        self.spare = Spare()
        self.sites: dict[str, RoutedLinear] = {}
        self.embedding_noise: dict[str, float] = {}  # job -> NEFTune's alpha
        model.get_input_embeddings().register_forward_hook(self._perturb)
        forget_lengths(model)
        self.frozen = False
        self.body = find_body(model)  # None: only the model as a whole can be called, and gives logits
        self.native_attention = str(model.config._attn_implementation)
        self.fingerprint = identity or fingerprint(samples_of(model))
        linears = {n: m for n, m in model.named_modules() if FrozenLinear.takes(m) or isinstance(m, FrozenLinear)}
        self.linear_names = tuple(linears)
        self.conv1d_names = frozenset(n for n, m in linears.items() if isinstance(m, Conv1D) or getattr(m, "transposed", False))
        self.moe = proofs.experts_of(model.config) is not None
        self.notes = notes
        self.kernel_notes: tuple[str, ...] = ()
        self.groups = False  # adapters take grouped products
        proved = proved or proofs.prove(model, self.body, self.linear_names, name)
        self.read_past, self.apart = proved.read_past, proved.apart
        self.packable = proved.obstacle is None
        if self.packable:
            model.set_attn_implementation(attention.NAME)
        else:
            self.notes += (f"sequences of this model cannot share a row ({proved.obstacle}); training one per forward",)
        self.own_head = proved.head is None
        self.body = None if proved.head is None else self.body
        self.head = Head(None, Logits()) if proved.head is None else Head(*proved.head, router=self.router)
        self.head.cached = self.device.type != "cuda"
        if model.config.model_type in _DRAWS_EXPERTS:
            self.notes += ("it draws its experts at random in training: no two runs are alike, and resuming is not bit-exact",)
        if self.own_head:
            self.notes += ("the model's head is not a plain projection; using its own, unchunked (more memory)",)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return proofs.dtype_of(self.model)

    @property
    def min_rows(self) -> int:
        """Tokens that a row is filled up to; 0 where a sequence has its row to itself."""
        return MIN_ROWS if self.packable else 0

    @property
    def vocab_size(self) -> int:
        return proofs.vocab_size_of(self.model)

    def freeze(self, setting: Setting | None = None) -> None:
        """Make every linear a `FrozenLinear`, let functions route, and let no base weight train. Idempotent.

        `setting`: what the choice of kernels goes by, if not this machine.
        """
        if not self.frozen:
            freeze_linears(self.model)
            if self.head.project is not None:
                self.head.project = self.model.get_output_embeddings()
            lean_mlps(self.model, self.device)
            lean_norms(self.model, self.dtype)
            self._take_kernels(setting_of(self.device, self.dtype) if setting is None else setting)
            if self.apart is None:
                route_functions(self.model, self.router)
            self.frozen = True

    def _take_kernels(self, setting: Setting) -> None:
        """Those that this device is to have, where they agree with our own here; without jobs that share, no grouped ones."""
        chosen = choose(setting)
        tried = dict[str, bool]()
        if chosen.norms == "liger":
            tried["Liger's norms"] = norms.take_kernel(self.model, liger.rms_norm, self.dtype)
        if chosen.gated_layers == "liger":
            tried["Liger's gated layers"] = gated.take_kernels(self.model, liger.PRODUCTS, self.dtype, self.device)
        if chosen.adapters == "grouped" and self.apart is None:
            shapes = {FrozenLinear.shape_of(self.model.get_submodule(name)) for name in self._shared()}
            self.groups = grouped.groups_are_independent(self.device, self.dtype, shapes)
            tried["torch's grouped products"] = self.groups
        for name, taken in tried.items():
            what = f"in use, {UNMEASURED}" if taken else "not in use: no layers here that they compute as our own do, to rounding"
            self.kernel_notes += (f"{name}: {what}",)

    def site(self, name: str) -> RoutedLinear:
        """The routed layer at linear `name`; becomes one on first use. The base must be frozen."""
        if name not in self.sites:
            linear = self.model.get_submodule(name)
            assert isinstance(linear, FrozenLinear), "freeze() the base before asking for sites"
            site = RoutedLinear(linear, self.router, name)
            if self.groups and grouped.takes(linear.shape, self.dtype):
                site.products = grouped.Grouped
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
        experts = proofs.experts_of(self.model.config)
        head = self.model.get_output_embeddings()
        names = []
        for name in self.linear_names:
            module = self.model.get_submodule(name)
            inner = module.frozen if isinstance(module, RoutedLinear) else module
            is_head = inner is head or module is head
            wide_as_experts = getattr(inner, "out_features", getattr(inner, "nf", None)) == experts
            is_router = wide_as_experts and ROUTER_NAME.search(name) is not None
            if not (is_head or is_router or self.refuses(name)):
                names.append(name)
        return tuple(names)

    def refuses(self, name: str) -> str | None:
        """Why linear `name` must not carry an adapter, or None."""
        leaf = name.rpartition(".")[2]
        fused = self.model.config.model_type in _MAMBA_TYPES and leaf in _FUSED_IN_MAMBA
        if fused or name in self.read_past:
            return "the model takes its weight as it lies, without calling it"
        if self.moe and (leaf in _EXPERT_LEAVES or ".experts." in name):
            return "PEFT would read it as the fused experts"
        return None

    def configure(self, recompute: Recompute | bool, head_rows: int, spill: bool = False) -> None:
        """Set the memory knobs: recompute blocks in backward; rows of logits alive at once; those blocks' inputs kept elsewhere.

        `spill` needs `recompute`. Raises `InputError`, and `StorageError` where there is no place to keep them.
        """
        self.head.rows_at_once = head_rows
        every = {"none": 0, "blocks": 1}[recompute] if isinstance(recompute, str) else int(recompute)
        if every:
            if not self.model.supports_gradient_checkpointing:
                raise InputError(f"plan.recompute: '{self.name}' does not support recomputing its blocks; set it to none")
            self.model.activation_checkpointing_enable({"use_reentrant": False})
            self.model.disable_input_require_grads()  # of use for reentrant recompute alone; it keeps the first block's input
            if spill:
                self._spill()
            if every > 1:
                self._keep_all_but(every)
        else:
            self.model.activation_checkpointing_disable()

    def _keep_all_but(self, every: int) -> None:
        """Recompute the first block of each so many alone: the last, whose turn comes at the peak, is kept where that can be."""
        blocks = [module for module in self.model.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not blocks:
            raise InputError(f"plan.recompute: '{self.name}' recomputes all of its blocks or none; set it to blocks")
        for at, block in enumerate(blocks):
            block.gradient_checkpointing = at % every == 0

    def _spill(self) -> None:
        """Recompute by our own function, which keeps the blocks' inputs elsewhere."""
        if "gradient_checkpointing_func" not in inspect.signature(self.model._set_gradient_checkpointing).parameters:
            raise InputError(f"plan.offload: '{self.name}' brings its own way of recomputing its blocks; set it to none")
        recomputed = Spill(place_for(self.device)).checkpoint
        self.model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=recomputed)

    def rows_are_independent(self, most: int) -> bool:
        """Whether rows of a forward keep their bits among others, up to `most` at once. Each job's head has its own rows."""
        return proofs.rows_are_independent(self.model, self._shared(), most)

    def _shared(self) -> Iterator[str]:
        """The linears that several jobs' rows go through at once: not the head."""
        projections = (self.head.project, getattr(self.head.project, "frozen", None))
        return (name for name in self.linear_names if self.model.get_submodule(name) not in projections)

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
        assert self.packable or len(batch.lengths) == 1, "an unpackable model takes one sequence per forward"
        borders = proofs.borders(batch, self.device) if self.packable else {}
        return proofs.states(self.model, self.body, input_ids=batch.input_ids, **borders)

    def _perturb(self, module: nn.Module, inputs: object, embedded: Tensor) -> Tensor | None:
        """NEFTune (Jain et al. 2023, arXiv 2310.05914): uniform noise of +-alpha / sqrt(L D) on each sequence in training.

        Drawn from the chunk's seed: a job's noise does not depend on its neighbours. `embedded` [1, T, D].
        """
        noisy = [s for s in self.router.segments if s.job in self.embedding_noise] if module.training else []
        if not noisy:
            return None
        noise = torch.zeros_like(embedded, requires_grad=False)
        for segment in noisy:
            alpha = self.embedding_noise[segment.job]
            generator = generator_of(segment.seed, embedded.device)
            for part in noise[0, segment.tokens].split(segment.lengths):
                drawn = torch.rand(part.shape, generator=generator, device=part.device).mul_(2).sub_(1)
                part.copy_(drawn.mul_(alpha / part.numel() ** 0.5))
        return embedded + noise

    @property
    def max_positions(self) -> int | None:
        """The length of the model's table of positions (learned, or made once); None for models that compute them."""
        learned = (n for n, m in self.model.named_modules() if isinstance(m, nn.Embedding))
        tables = (*learned, *(n for n, _ in self.model.named_buffers()))
        has_table = self.model.config.model_type in _DISTANCE_TABLE or any(_POSITION_TABLE.search(n) for n in tables)
        return self.context_length if has_table else None

    @property
    def context_length(self) -> int | None:
        """The longest sequence that the model was made for, in tokens; None where its config does not tell."""
        config = self.model.config.get_text_config()
        named = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
        return next((length for length in named if isinstance(length, int) and length > 0), None)


def load_base(
    source: ModelSource, plan: Plan, trust_remote_code: bool = False, say: Say = mute, found: Found | None = None
) -> Base:
    """Load the model of `source` as `plan` says. Raises `InputError` for anything that is not a usable causal LM.

    `found`: its tokenizer, where that was loaded before.

    Under plan.offload: weights the first load of a model writes a file, and raises `StorageError` where that cannot be.
    """
    config = load_config(source, trust_remote_code)
    tokenizer, tokenizer_notes = found or load_tokenizer(source, trust_remote_code)
    if plan.weights in NARROW or plan.offload == "weights" or stored_width(source, config) is not None:
        model, samples, model_notes = load_frozen(source, config, plan, trust_remote_code, say)
        allocator.give_back_freed()  # what reading left
        base = Base(model, tokenizer, source.name, (*source.notes, *tokenizer_notes, *model_notes), fingerprint(samples))
        take_products(model, products_of(plan))
        return base
    identity = None
    if plan.weights == "fp16":  # what the fingerprint looks at does not survive the rounding to fp16
        identity = fingerprint(samples_of(load_model(source, config, "bf16", "cpu", trust_remote_code)[0]))
    model, model_notes = load_model(source, config, plan.weights, plan.device, trust_remote_code)
    allocator.give_back_freed()  # what reading left
    return Base(model, tokenizer, source.name, (*source.notes, *tokenizer_notes, *model_notes), identity)


def find_body(model: PreTrainedModel) -> PreTrainedModel | None:
    """The part that gives hidden states: `get_decoder()`, which guesses by names, or else the inner model without a head."""
    candidates = (model.get_decoder(), model.base_model, *model.children())
    inner = (m for m in candidates if isinstance(m, PreTrainedModel) and m is not model)
    return next((m for m in inner if m.get_output_embeddings() is None), None)


def fingerprint(samples: Mapping[str, bytes]) -> str:
    """A hash of the names, shapes and samples of all weights: it identifies a base, in whatever format it was loaded."""
    digest = hashlib.sha256()
    for name, taken in sorted(samples.items()):
        digest.update(name.encode() + taken)
    return digest.hexdigest()[:32]


def samples_of(model: nn.Module) -> dict[str, bytes]:
    """A sample of every parameter."""
    return {name: sample(parameter) for name, parameter in model.named_parameters()}
