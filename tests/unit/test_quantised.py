"""Bases whose weights are quantised while they are loaded. Truths: the dense model of the same folder, encoded weight by
weight; PEFT over the dequantised model; and for training, other roads to the same bits."""

import json
from pathlib import Path
from typing import Any, Literal

import peft
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

from conftest import (
    NoWatch,
    lora_gradients,
    nll_alone,
    nll_packed,
    packed,
    peft_twin,
    relative,
    sequences,
    shake,
    tiny_model,
)
from quantised import KINDS, loaded, plan_of, saved
from snugtune.config import JobConfig, to_config
from snugtune.errors import InputError
from snugtune.memory.plan import make_plan
from snugtune.methods.lora import Lora, LoraAttached, LoraConfig
from snugtune.model.base import Base
from snugtune.model.frozen import FrozenLinear
from snugtune.model.load import format_of, load_config, load_frozen, load_model
from snugtune.model.source import ModelSource
from snugtune.training.evaluation import evaluate as asked
from snugtune.training.examples import JobData
from snugtune.training.job import start_job
from snugtune.training.trainer import Trainer
from snugtune.types import Example, Width

ARCHS = ["llama", "gpt2", "gemma2", "phi3", "opt", "mixtral", "qwen3moe", "hunyuan", "deepseek_v3", "mamba", "bloom", "gptoss"]
"""Untied and tied heads, Conv1D, biases, experts that are renamed and stacked while they are read, experts that are linears."""


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


def _base(folders: Path, arch: str = "llama", kind: str = "nf4", compute: str = "fp32", **fields: Any) -> Base:
    return loaded(saved(folders / arch, arch), kind, compute, **fields)


def _narrow(base: Base) -> dict[str, FrozenLinear]:
    named = {n.removesuffix(".frozen"): m for n, m in base.model.named_modules() if isinstance(m, FrozenLinear)}
    return {name: layer for name, layer in named.items() if layer.format.name in ("nf4", "fp4", "int8")}


def _dequantised(base: Base, arch: str, **overrides: Any) -> PreTrainedModel:
    """Plain transformers with the weights that `base` computes with."""
    model = tiny_model(arch, **overrides)
    with torch.no_grad():
        for name, layer in _narrow(base).items():
            weight = model.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            weight.copy_(layer.weight.t() if layer.transposed else layer.weight)
    return model


# ---------------------------------------------------------------- loading


@pytest.fixture(scope="module")
def dense(request: pytest.FixtureRequest, folders: Path) -> Base:
    return _base(folders, request.param, "fp32")


@pytest.mark.parametrize("kind", ["nf4", "nf4-double", "int8"])
@pytest.mark.parametrize(("arch", "dense"), [(arch, arch) for arch in ARCHS], ids=ARCHS, indirect=["dense"])
def test_weights_are_those_of_the_dense_model_encoded(arch: str, dense: Base, kind: str, folders: Path) -> None:
    """Every linear but head and routers; all else as it is. The fingerprint does not depend on the format."""
    base = _base(folders, arch, kind)
    assert base.fingerprint == dense.fingerprint
    format, linears = format_of(plan_of(kind)), {n for n in dense.linear_names if not _is_head_or_router(n)}
    layers = _narrow(base)
    assert layers.keys() == linears and linears
    for name, layer in layers.items():
        weight, transposed = dense.model.get_submodule(name).weight, name in dense.conv1d_names
        assert isinstance(weight, Tensor) and layer.transposed == transposed
        parts = format.encode(weight.t() if transposed else weight)
        assert all(torch.equal(layer.parts()[part], tensor) for part, tensor in parts.items())
    theirs = dict(dense.model.named_parameters())
    inner = {f"{name}.{leaf}" for name in linears for leaf in ("weight", "bias")}
    assert {n for n, _ in base.model.named_parameters()} == theirs.keys() - inner
    assert all(torch.equal(p, theirs[n]) for n, p in base.model.named_parameters())


def _is_head_or_router(name: str) -> bool:
    return name.endswith(("lm_head", ".wg", "router", "mlp.gate")) or ".router." in name


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2", "mixtral", "bloom"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_its_logits_are_those_of_the_dequantised_model(kind: str, arch: str, folders: Path) -> None:
    base, (part,) = _base(folders, arch, kind), sequences(17)
    truth = _dequantised(base, arch)
    with torch.no_grad(), base.answering(None):
        assert relative(base.model(input_ids=part[None]).logits, truth(input_ids=part[None]).logits) <= 1e-5


def test_everything_that_is_computed_with_is_in_one_format(tmp_path: Path) -> None:
    """Under fp16 a base is read in bf16 first; biases of encoded linears are no parameters by then."""
    base = loaded(saved(tmp_path / "gpt2", "gpt2"), "int8", "fp16")
    floating = {n: t.dtype for n, t in base.model.named_parameters()}
    floating |= {n: t.dtype for n, t in base.model.named_buffers() if n.endswith(".bias")}
    assert any(n.endswith(".bias") and "attn" in n for n in floating)
    assert set(floating.values()) == {torch.float16}


@pytest.mark.parametrize("offload", ["none", "weights"])
@pytest.mark.parametrize("compute", ["bf16", "fp16"])
def test_what_a_model_wants_in_fp32_is_left_in_fp32(
    compute: Width, offload: Literal["none", "weights"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms in fp16 alone, a linear always. The truth is what transformers' own loading makes of the same model."""
    monkeypatch.setenv("SNUGTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(LlamaPreTrainedModel, "_keep_in_fp32_modules", ["input_layernorm"])
    monkeypatch.setattr(LlamaPreTrainedModel, "_keep_in_fp32_modules_strict", ["o_proj"])
    source = ModelSource("tiny", str(saved(tmp_path / "llama")))
    plain, _ = load_model(source, load_config(source, False), compute, "cpu", False)
    plan = plan_of("nf4", compute, offload=offload)
    model, _, _ = load_frozen(source, load_config(source, False), plan, False)
    ours, truth = ({n: p.dtype for n, p in m.named_parameters()} for m in (model, plain))
    assert ours == {n: truth[n] for n in ours}
    assert {n.split(".")[-2] for n in truth.keys() - ours.keys()} == {
        "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    wide = {n.split(".")[-2] for n, dtype in ours.items() if dtype == torch.float32}
    assert wide == {"o_proj"} | ({"input_layernorm"} if compute == "fp16" else set())


def test_a_model_with_norms_in_fp32_computes_in_fp16(tmp_path: Path) -> None:
    base = loaded(saved(tmp_path / "gptoss", "gptoss"), "nf4", "fp16")
    dtypes = {n: p.dtype for n, p in base.model.named_parameters() if "norm" in n or "embed" in n}
    assert dtypes["model.norm.weight"] == torch.float32 and dtypes["model.embed_tokens.weight"] == torch.float16


@pytest.mark.parametrize("compute", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_fingerprint_survives_narrow_products(kind: str, compute: str, folders: Path) -> None:
    """What is computed with in 16 bits is encoded from weights in bf16; the fingerprint looks at no more than that."""
    assert _base(folders, "llama", kind, compute).fingerprint == _base(folders, "llama", "fp32").fingerprint


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral"])
def test_shards_are_the_whole(arch: str, folders: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path / "sharded", arch)
    (folder / "model.safetensors").unlink()
    tiny_model(arch).save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    base, whole = loaded(folder), _base(folders, arch)
    assert base.fingerprint == whole.fingerprint
    for name, layer in _narrow(whole).items():
        assert torch.equal(_narrow(base)[name].weight, layer.weight)


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own-llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_models_that_bring_their_own_code_are_quantised_too(folders: Path, tmp_path: Path) -> None:
    """Their class comes from the folder; so do the answers."""
    folder = saved(tmp_path / "own")
    (folder / "own_llama.py").write_text(OWN_CODE)
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "own_llama.OwnConfig", "AutoModelForCausalLM": "own_llama.OwnForCausalLM"}
    (folder / "config.json").write_text(
        json.dumps(config | {"model_type": "own-llama", "auto_map": auto, "architectures": ["OwnForCausalLM"]})
    )
    base, (part,) = loaded(folder, trust=True), sequences(11)
    assert type(base.model).__name__ == "OwnForCausalLM"
    theirs = _base(folders)
    with torch.no_grad(), base.answering(None), theirs.answering(None):
        assert torch.equal(base.model(input_ids=part[None]).logits, theirs.model(input_ids=part[None]).logits)


def test_what_stays_wide_is_said_where_it_is_much(folders: Path, tmp_path: Path) -> None:
    """The experts of an MoE are no linears; where most of a model is, nothing is said."""
    said = [note for note in _base(folders, "mixtral").notes if "of the weights stay in fp32" in note]
    sizes = {name: p.numel() for name, p in tiny_model("mixtral").named_parameters()}
    attention = sum(size for name, size in sizes.items() if "self_attn" in name)
    assert len(said) == 1 and said[0].startswith(f"{1 - attention / sum(sizes.values()):.0%} of") and "experts" in said[0]
    large = saved(tmp_path / "large", intermediate_size=512)
    assert not any("stay in" in note for note in loaded(large).notes)


def test_only_the_weights_are_smaller(folders: Path) -> None:
    """Bytes of all linears of the blocks: 4.5 and 4.13 bits a weight (nested scales need their table of 1 KiB), 8 for int8."""
    weights = sum(m.out_features * m.in_features for m in _narrow(_base(folders)).values())
    sizes = {kind: sum(m.nbytes for m in _narrow(_base(folders, "llama", kind)).values()) for kind in ("nf4", "int8")}
    assert sizes["nf4"] * 8 == weights * 4.5
    rows = sum(m.out_features for m in _narrow(_base(folders)).values())
    assert sizes["int8"] == weights + 4 * rows


def test_not_a_number_is_refused(tmp_path: Path) -> None:
    """Rounding would have hidden it in a block's scale."""
    folder, model = saved(tmp_path / "x"), tiny_model("llama")
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.up_proj").weight[3, 4] = float("nan")
    model.save_pretrained(folder)
    for kind in KINDS:
        with pytest.raises(InputError, match="not finite"):
            loaded(folder, kind)


# ---------------------------------------------------------------- LoRA on them


def _logits(base: Base, part: Tensor, job: str | None) -> Tensor:
    base.model.eval()
    batch = packed([part], job)
    with base.routed(batch), torch.no_grad():
        head = base.head if job is None else base.head.for_segment(batch.segments[0])
        return head.logits(base.hidden(batch))


def _attached(base: Base, job: str = "j", **settings: Any) -> LoraAttached:
    attached = Lora().attach(base, job, LoraConfig(**{"r": 3, "lora_alpha": 5} | settings), 0)
    shake(attached)
    return attached


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_fresh_factors_change_nothing(kind: str, arch: str, folders: Path) -> None:
    base, (part,) = _base(folders, arch, kind), sequences(17)
    bare = _logits(base, part, None)
    Lora().attach(base, "j", LoraConfig(), 0)
    assert torch.equal(_logits(base, part, "j"), bare)


def test_initial_factors_do_not_depend_on_the_format(folders: Path) -> None:
    bases = [_base(folders, "gpt2", kind) for kind in ("fp32", "nf4", "int8")]
    first, *others = [Lora().attach(base, "j", LoraConfig(), 7) for base in bases]
    assert all(other.sites == first.sites and torch.equal(other.flat, first.flat) for other in others)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2", "mixtral"])
@pytest.mark.parametrize("kind", ["nf4", "nf4-double", "int8"])
def test_gradients_are_pefts_over_the_dequantised_model(kind: str, arch: str, folders: Path) -> None:
    """Of every factor, with recompute; PEFT's own layers over plain linears are the truth."""
    base, parts = _base(folders, arch, kind), sequences(9, 14)
    attached = _attached(base)
    base.configure(True, 512)
    twin = peft_twin(_dequantised(base, arch), attached)
    base.model.train()
    with base.routed(packed(parts, "j")):
        loss = nll_packed(base, parts, "j")
        loss.backward()
    truth = nll_alone(twin, parts)
    truth.backward()
    torch.testing.assert_close(loss, truth, rtol=1e-5, atol=0)
    for name, gradient in lora_gradients(attached).items():
        expected = twin.get_parameter(name).grad
        assert expected is not None and relative(gradient, expected) <= 2e-5, name


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_adapter_loads_in_peft_on_the_dequantised_base(kind: str, arch: str, folders: Path, tmp_path: Path) -> None:
    """And comes back here, onto a base in any format: it is the adapter of the same weights."""
    base, (part,) = _base(folders, arch, kind), sequences(17)
    attached = _attached(base)
    (tmp_path / "adapter").mkdir()
    attached.save(tmp_path / "adapter")
    twin = peft.PeftModel.from_pretrained(_dequantised(base, arch), str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        truth = twin(input_ids=part[None], use_cache=False).logits[0]
    assert relative(_logits(base, part, "j"), truth) <= 1e-5
    for other in ("nf4-double", "fp32"):
        again = Lora().load(_base(folders, arch, other), "again", tmp_path / "adapter")
        assert torch.equal(again.flat, attached.flat)


# ---------------------------------------------------------------- training, to the last bit


def _trained(
    base: Base, plan: Any, jobs: dict[str, dict[str, Any]], steps: int = 4, evaluate: bool = False, halfway: bool = False
) -> dict[str, Tensor]:
    """The factors of jobs trained together; `evaluate`: with evaluations in between; `halfway`: brought to another trainer."""
    data = {
        name: JobData(
            tuple(
                Example(ids, torch.ones(len(ids)).index_fill(0, torch.tensor(0), 0.0), "x")
                for ids in sequences(9, 14, 5, 20, seed=s)
            ),
            tuple(Example(ids, torch.ones(len(ids)).index_fill(0, torch.tensor(0), 0.0), "x") for ids in sequences(7, seed=9)),
        )
        for s, name in enumerate(jobs)
    }

    def start() -> Trainer:
        trainer = Trainer(base, plan, NoWatch())
        for name, fields in jobs.items():
            common = {
                "name": name,
                "data": "x.jsonl",
                "batch_size": 2,
                "steps": steps,
                "max_seq_len": 32,
                "optimizer": {"lr": 1e-2},
            }
            method = {"type": "lora", "r": 3, "lora_dropout": 0.2}
            trainer.add(start_job(base, JobConfig.model_validate(common | {"method": method} | fields), data[name], plan))
        return trainer

    trainer = start()
    for step in range(steps):
        if halfway and step == steps // 2:
            states = {name: job.state() for name, job in trainer.jobs.items()}
            for name in jobs:
                trainer.remove(name)
            trainer = start()
            for name, (tensors, numbers) in states.items():
                trainer.jobs[name].load_state({k: v.clone() for k, v in tensors.items()}, numbers)
        if evaluate:
            for job in trainer.jobs.values():
                asked(trainer, job)
        while any(job.step <= step for job in trainer.jobs.values()):
            trainer.step()
    return {name: job.attached.state()["flat"].clone() for name, job in trainer.jobs.items()}


JOBS = {"a": {}, "b": {"method": {"type": "lora", "r": 5, "target_modules": ["q_proj", "down_proj"]}, "seed": 3}}
ONE = {"a": JOBS["a"]}


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_is_the_same_by_every_road(kind: str, compute: str, folders: Path) -> None:
    """Bit for bit: recomputed or not, with evaluations in between, stopped and gone on with, beside another job or alone."""
    plan = plan_of(kind, compute)
    truth = _trained(_base(folders, "llama", kind, compute), plan, ONE)["a"]
    assert truth.any()
    recomputing = plan_of(kind, compute, recompute="blocks")
    others = {
        "recomputed": _trained(_base(folders, "llama", kind, compute), recomputing, ONE),
        "evaluated": _trained(_base(folders, "llama", kind, compute), plan, ONE, evaluate=True),
        "resumed": _trained(_base(folders, "llama", kind, compute), plan, ONE, halfway=True),
        "joint": _trained(_base(folders, "llama", kind, compute), plan, JOBS),
    }
    assert [road for road, jobs in others.items() if not torch.equal(jobs["a"], truth)] == []


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_another_format_trains_another_adapter(kind: str, folders: Path) -> None:
    """So that the test above compares something."""
    dense = _trained(_base(folders, "llama", "fp32"), plan_of("fp32"), ONE)["a"]
    narrow = _trained(_base(folders, "llama", kind), plan_of(kind), ONE)["a"]
    assert 1e-3 < relative(narrow, dense) < 1


# ---------------------------------------------------------------- what the plan says


def _config(**fields: Any) -> Any:
    return to_config({"model": "m", "data": "d.jsonl", "output": "o", "device": "cpu", "steps": 1} | fields)


def _methods(kind: str) -> list[dict[str, Any]]:
    return [{"type": kind}] if kind == "full" else [{"type": "freeze", "last_blocks": 1}]


@pytest.mark.parametrize("method", ["full", "freeze"])
@pytest.mark.parametrize(
    ("pins", "named"),
    [
        ({"weights": "nf4"}, "plan.weights: nf4"),
        ({"weights": "int8"}, "plan.weights: int8"),
        ({"offload": "weights"}, "plan.offload"),
    ],
)
def test_weights_that_train_cannot_be_narrow(pins: dict[str, str], named: str, method: str) -> None:
    with pytest.raises(InputError, match=f"{named}.*method: {method} trains them; use method: lora"):
        make_plan(_config(plan=pins, method=_methods(method)[0]))


@pytest.mark.parametrize("method", ["full", "freeze"])
@pytest.mark.parametrize("weights", ["auto", "bf16"])
def test_a_quantised_checkpoint_is_not_trained_itself(weights: str, method: str) -> None:
    with pytest.raises(InputError, match=f"method: {method} trains the base's weights, but the checkpoint keeps them in nf4"):
        make_plan(_config(plan={"weights": weights}, method=_methods(method)[0]), "nf4")


@pytest.mark.parametrize(("pinned", "stored"), [("nf4", "int8"), ("int8", "nf4")])
def test_a_checkpoint_is_not_quantised_twice(pinned: str, stored: Any) -> None:
    with pytest.raises(InputError, match=f"plan.weights: {pinned} asked for, but the checkpoint keeps its weights in {stored}"):
        make_plan(_config(plan={"weights": pinned}), stored)


@pytest.mark.parametrize(
    ("pins", "stored", "weights"),
    [
        ({}, None, None),
        ({}, "nf4", "nf4"),
        ({}, "int8", "int8"),
        ({"weights": "nf4"}, "nf4", "nf4"),
        ({"weights": "fp32"}, "nf4", "fp32"),
    ],
)
def test_the_format_of_weights(pins: dict[str, str], stored: Any, weights: str | None) -> None:
    """As pinned, as the checkpoint keeps them, or that of the products: never narrow by itself."""
    plan = make_plan(_config(plan=pins), stored).plan
    assert plan.weights == (weights or plan.compute) and plan.compute in ("fp32", "bf16")


def test_the_plan_tells_what_is_narrow() -> None:
    planned = make_plan(_config(plan={"weights": "nf4", "double_quant": True}))
    assert planned.plan.double_quant and any(f"nf4 (as asked, products in {planned.plan.compute})" in r for r in planned.reasons)
    stored = make_plan(_config(), "int8")
    assert any("int8 (as the checkpoint keeps them, products in" in reason for reason in stored.reasons)
