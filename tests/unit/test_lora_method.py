"""LoRA as a method: PEFT's initial values, targets, files and numbers. The truth is PEFT itself."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from conftest import (
    lora_gradients,
    nll_alone,
    nll_packed,
    packed,
    peft_twin,
    relative,
    sequences,
    shake,
    tiny_base,
    tiny_model,
    tiny_tokenizer,
)
from snugtune.errors import InputError
from snugtune.methods.lora import Lora, LoraAttached, LoraConfig
from snugtune.model.base import Base
from snugtune.types import Batch, Segment

LORA = Lora()


def _logits(base: Base, part: Tensor, job: str | None) -> Tensor:
    """What `base` says with `job`'s adapter on, outside of training."""
    base.model.eval()
    batch = packed([part], job)
    with base.routed(batch), torch.no_grad():
        head = base.head if job is None else base.head.for_segment(batch.segments[0])
        return head.logits(base.hidden(batch))


def _peft_logits(folder: Path, arch: str, part: Tensor, **overrides: Any) -> Tensor:
    """What PEFT makes of the adapter in `folder` over a fresh copy of the model."""
    twin = peft.PeftModel.from_pretrained(tiny_model(arch, **overrides), str(folder)).eval()
    with torch.no_grad():
        return twin(input_ids=part[None], use_cache=False).logits[0]


def _wrapped(twin: nn.Module) -> set[str]:
    """The modules that PEFT adapts in `twin`, by their names in the bare model."""
    return {n.removeprefix("base_model.model.") for n, m in twin.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}


def _saved(attached: LoraAttached, folder: Path) -> Path:
    folder.mkdir()
    attached.save(folder)
    return folder


# ---------------------------------------------------------------- initial values


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
def test_initial_factors_are_those_of_get_peft_model(arch: str, init: Any, rslora: bool) -> None:
    """Same seed, same model, PEFT's own "all-linear": the same A, B and scale, bit for bit."""
    base = tiny_base(arch)
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights=init, use_rslora=rslora)
    attached = LORA.attach(base, "j", config, seed=17)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(17)
        twin = peft.get_peft_model(
            tiny_model(arch),
            peft.LoraConfig(
                r=4,
                lora_alpha=6,
                use_rslora=rslora,
                target_modules="all-linear",
                init_lora_weights=True if init == "default" else init,
                task_type="CAUSAL_LM",
            ),
        )
    theirs = {n.replace(".default", ""): p for n, p in twin.named_parameters() if p.requires_grad}
    ours = attached.tensors()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for site in attached.sites:
        assert base.sites[site].slots["j"].scale == twin.get_submodule(f"base_model.model.{site}").scaling["default"]


def test_initial_factors_depend_on_the_seed_alone() -> None:
    """Neither on the global generator nor on jobs that came before; and they leave that generator as it was."""
    first, base = LORA.attach(tiny_base(), "j", LoraConfig(), seed=3), tiny_base()
    LORA.attach(base, "other", LoraConfig(r=2), seed=99)
    torch.rand(1)
    before = torch.random.get_rng_state()
    second = LORA.attach(base, "j", LoraConfig(), seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.flat, second.flat)
    assert not torch.equal(first.flat, LORA.attach(tiny_base(), "j", LoraConfig(), seed=4).flat)


def test_factors_are_fp32_whatever_the_base() -> None:
    """Steps of a small learning rate would vanish in bf16; the initial values do not depend on the base's dtype."""
    wide, narrow = (LORA.attach(tiny_base(dtype=dtype), "j", LoraConfig(), 0) for dtype in (torch.float32, torch.bfloat16))
    assert all(t.dtype == torch.float32 for t in narrow.tensors().values())
    assert torch.equal(wide.flat, narrow.flat)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_fresh_factors_change_nothing(arch: str) -> None:
    base, (part,) = tiny_base(arch), sequences(9)
    bare = _logits(base, part, None)
    LORA.attach(base, "j", LoraConfig(), 0)
    assert torch.equal(_logits(base, part, "j"), bare)


# ---------------------------------------------------------------- targets


def _endings(names: list[str]) -> set[str]:
    return {re.sub(r".*layers\.\d+\.|.*\.h\.\d+\.", "", n) for n in names}


ATTENTION = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
MLP = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ("llama", ATTENTION | MLP),
        ("gemma2", ATTENTION | MLP),
        ("gpt2", {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
        ("phi3", {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"}),
        ("gptoss", ATTENTION),
        ("mixtral", ATTENTION),
        ("qwen3moe", ATTENTION),
        ("phimoe", ATTENTION),
    ],
)
def test_all_linear_leaves_out_head_routers_and_experts(arch: str, expected: set[str]) -> None:
    attached = LORA.attach(tiny_base(arch), "j", LoraConfig(r=1), 0)
    assert _endings(attached.sites) == expected
    assert len(attached.sites) == 2 * len(expected)


@pytest.mark.parametrize("arch", ["hunyuan", "afmoe"])
def test_routers_that_are_plain_linears_are_left_out_too(arch: str) -> None:
    """HunYuan's `mlp.gate.wg` and AFMoE's `mlp.router.gate` are linears like any other to look at."""
    names = LORA.attach(tiny_base(arch), "j", LoraConfig(r=1), 0).sites
    assert names and not [n for n in names if re.search(r"\.gate\b|router|\.experts\.|lm_head", n)]


@pytest.mark.parametrize(("arch", "leaf"), [("jamba", "dt_proj"), ("gemma3n", "correction_coefs")])
def test_linears_that_training_reads_past_are_left_out(arch: str, leaf: str) -> None:
    """Their weight is used without a call, so that an adapter would stay zero: found by watching a forward in train mode."""
    base = tiny_base(arch)
    past = [name for name in base.linear_names if name.endswith(f".{leaf}")]
    assert past and sorted(base.read_past) == past
    assert not base.read_past.intersection(base.adaptable())
    assert base.model.training is False and not any(m._forward_pre_hooks for m in base.model.modules())
    with pytest.raises(InputError, match=rf"{leaf}: the model takes its weight as it lies"):
        LORA.attach(base, "j", LoraConfig(target_modules=(leaf,)), 0)


def test_a_linear_as_wide_as_there_are_experts_is_no_router() -> None:
    """Here k_proj and v_proj have 32 outputs and the model 32 experts."""
    base = tiny_base("qwen3moe", num_experts=32)
    assert _endings(LORA.attach(base, "j", LoraConfig(r=1), 0).sites) == ATTENTION


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("targets", ["list", "full names", "regex"])
def test_targets_mean_what_they_mean_in_peft(arch: str, targets: str) -> None:
    """Endings, full names and regular expressions choose the modules that PEFT chooses."""
    wanted: str | tuple[str, ...] = {
        ("llama", "list"): ("q_proj", "mlp.down_proj"),
        ("llama", "full names"): ("model.layers.1.self_attn.v_proj", "model.layers.0.mlp.up_proj", "lm_head"),
        ("llama", "regex"): r".*layers\.1\..*(q|v)_proj",
        ("gpt2", "list"): ("c_attn", "mlp.c_proj"),
        ("gpt2", "full names"): ("transformer.h.1.attn.c_proj",),
        ("gpt2", "regex"): r".*h\.0\.(attn|mlp)\.c_proj",
    }[arch, targets]
    attached = LORA.attach(tiny_base(arch), "j", LoraConfig(r=2, target_modules=wanted), 0)
    theirs = wanted if isinstance(wanted, str) else list(wanted)
    twin = peft.get_peft_model(tiny_model(arch), peft.LoraConfig(r=2, target_modules=theirs, task_type="CAUSAL_LM"))
    assert set(attached.sites) == _wrapped(twin) != set()


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (("q_proj", "q_porj"), "q_porj"),  # one wrong among right ones
        ("q_proj", "q_proj"),  # a bare string is a regular expression over full names, as in PEFT
        (r".*layers\.7\..*", "layers"),
        (("embed_tokens",), "embed_tokens"),  # exists, but is no linear
        ("q_proj(", "q_proj("),  # no regular expression at all
    ],
    ids=["typo", "bare", "regex", "embedding", "broken-regex"],
)
def test_a_target_that_matches_nothing_is_refused_by_name(targets: str | tuple[str, ...], named: str) -> None:
    base = tiny_base()
    with pytest.raises(InputError, match=r"method\.target_modules") as refusal:
        LORA.attach(base, "j", LoraConfig(target_modules=targets), 0)
    assert named in str(refusal.value)
    assert not base.sites, "a refused job leaves nothing behind"


def test_an_empty_list_of_targets_is_refused() -> None:
    """By the config or by the method; a job without a single factor would train nothing and say nothing."""
    with pytest.raises((InputError, ValidationError), match="target_modules"):
        LORA.attach(tiny_base(), "j", LoraConfig(target_modules=()), 0)


# ---------------------------------------------------------------- out to PEFT


PLAIN = {"r": 3, "lora_alpha": 5}


@pytest.mark.parametrize(
    ("arch", "settings"),
    [
        *((arch, PLAIN) for arch in ("llama", "gpt2", "gemma2", "qwen3", "phi3", "mixtral", "gptoss", "bloom", "mamba")),
        ("zamba2", PLAIN),  # some of its linears' names end in numbers, as those of the blocks
        ("llama", PLAIN | {"target_modules": ("lm_head", "q_proj")}),
        ("gemma2", PLAIN | {"target_modules": ("lm_head", "q_proj")}),
        ("gpt2", PLAIN | {"target_modules": ("lm_head", "c_attn")}),
        ("llama", PLAIN | {"use_rslora": True}),
        ("llama", PLAIN | {"target_modules": r".*layers\.1\..*(q|v)_proj"}),
        ("gpt2", PLAIN | {"target_modules": ("mlp.c_proj",)}),  # attn.c_proj has the same ending
    ],
)
def test_a_saved_adapter_is_the_same_model_in_peft(arch: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Loaded by `peft.PeftModel.from_pretrained` over a fresh copy, unmerged and merged by PEFT; no module more, none less."""
    base, (part,) = tiny_base(arch), sequences(12)
    attached = LORA.attach(base, "j", LoraConfig(**settings), 0)
    shake(attached)
    folder = _saved(attached, tmp_path / "adapter")
    ours = _logits(base, part, "j")
    assert relative(ours, _logits(base, part, None)) > 1e-2  # the adapter does something
    torch.testing.assert_close(_peft_logits(folder, arch, part), ours, rtol=1e-5, atol=1e-5)
    assert _wrapped(peft.PeftModel.from_pretrained(tiny_model(arch), str(folder))) == set(attached.sites)
    tied_head = arch in ("gpt2", "gemma2") and "lm_head" in settings.get("target_modules", ())
    if not tied_head:  # there PEFT would change the input embeddings too
        merged = peft.PeftModel.from_pretrained(tiny_model(arch), str(folder)).merge_and_unload()
        with torch.no_grad():
            torch.testing.assert_close(merged(input_ids=part[None], use_cache=False).logits[0], ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", ["hunyuan", "afmoe"])
def test_what_all_linear_adapts_peft_can_load(arch: str, tmp_path: Path) -> None:
    """For some MoE families PEFT reads `gate_proj` as the fused experts: an adapter for other modules of that name is lost."""
    base, (part,) = tiny_base(arch), sequences(12)
    attached = LORA.attach(base, "j", LoraConfig(r=2), 0)
    shake(attached)
    folder = _saved(attached, tmp_path / "adapter")
    torch.testing.assert_close(_peft_logits(folder, arch, part), _logits(base, part, "j"), rtol=1e-5, atol=1e-5)


def test_targets_that_peft_would_lose_are_refused(tmp_path: Path) -> None:
    """Asked for by name they are an error: an adapter that PEFT half forgets is not an adapter. Attention is not concerned."""
    base, (part,) = tiny_base("hunyuan"), sequences(12)
    with pytest.raises(InputError, match=r"method\.target_modules.*_proj"):
        LORA.attach(base, "j", LoraConfig(r=2, target_modules=("q_proj", "gate_proj", "up_proj", "down_proj")), 0)
    attached = LORA.attach(base, "j", LoraConfig(r=2, target_modules=("q_proj", "o_proj")), 0)
    shake(attached)
    folder = _saved(attached, tmp_path / "adapter")
    torch.testing.assert_close(_peft_logits(folder, "hunyuan", part), _logits(base, part, "j"), rtol=1e-5, atol=1e-5)


def test_a_saved_folder_is_pefts_and_stamped(tmp_path: Path) -> None:
    base = tiny_base()
    config = LoraConfig(r=3, lora_alpha=5, lora_dropout=0.1, target_modules=("q_proj",), use_rslora=True)
    folder = _saved(LORA.attach(base, "shop", config, 0), tmp_path / "adapter")
    written = json.loads((folder / "adapter_config.json").read_text())
    settings = {"r": 3, "lora_alpha": 5, "lora_dropout": 0.1, "use_rslora": True}
    expected = settings | {"peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True}
    assert {key: written[key] for key in expected} == expected
    assert written["target_modules"] == ["q_proj"] and written["base_model_name_or_path"] == "tiny-llama"
    tensors = load_file(folder / "adapter_model.safetensors")
    assert set(tensors) == {f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{s}.weight" for i in (0, 1) for s in "AB"}
    assert all(t.dtype == torch.float32 for t in tensors.values())
    stamp = json.loads((folder / "snugtune.json").read_text())
    assert stamp == {"base": "tiny-llama", "base_fingerprint": base.fingerprint, "job": "shop"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_our_own_folder_comes_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    """Also onto the same weights in another dtype: the fingerprint does not depend on it."""
    attached = LORA.attach(tiny_base(), "j", LoraConfig(r=3, lora_alpha=5, use_rslora=True), 0)
    shake(attached)
    loaded = LORA.load(tiny_base(dtype=dtype), "again", _saved(attached, tmp_path / "adapter"))
    assert loaded.sites == attached.sites and torch.equal(loaded.flat, attached.flat)
    for site in loaded.sites:
        assert loaded.base.sites[site].slots["again"].scale == attached.base.sites[site].slots["j"].scale


# ---------------------------------------------------------------- in from PEFT


def _peft_made(folder: Path, arch: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """An adapter of PEFT's own making, all its weights random."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        twin = peft.get_peft_model(tiny_model(arch), peft.LoraConfig(**settings))
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                if ".lora_" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
                    parameter.data = parameter.data.to(dtype)
    twin.save_pretrained(str(folder))
    return folder


PATTERNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "ranks": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}},
    "alphas": {"alpha_pattern": {"v_proj": 3, r"layers\.0\..*gate_proj": 11}},
    "anchored": {"rank_pattern": {"^model.layers.0.self_attn.o_proj": 1}, "alpha_pattern": {"^model.layers.1.mlp.down_proj": 2}},
    "both-rslora": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}, "use_rslora": True},
    "some-layers": {"layers_to_transform": [1], "target_modules": ["q_proj", "down_proj"]},
    "excluded": {"exclude_modules": ["v_proj"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_an_adapter_made_by_peft_is_the_same_model_here(pattern: str, tmp_path: Path) -> None:
    """Per-module ranks and scales included; saved again, it is still the same model in PEFT."""
    folder, base, (part,) = _peft_made(tmp_path / "theirs", "llama", **PATTERNS[pattern]), tiny_base(), sequences(12)
    attached = LORA.load(base, "j", folder)
    truth = _peft_logits(folder, "llama", part)
    torch.testing.assert_close(_logits(base, part, "j"), truth, rtol=1e-5, atol=1e-5)
    again = _saved(attached, tmp_path / "ours")
    torch.testing.assert_close(_peft_logits(again, "llama", part), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2", "gptoss"])
def test_peft_adapters_of_other_architectures_load(arch: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """GPT-2's Conv1D among them; factors stored in bf16 are computed with as they are."""
    targets = ["q_proj", "v_proj"] if arch == "gptoss" else "all-linear"
    folder, base, (part,) = _peft_made(tmp_path / "theirs", arch, dtype, target_modules=targets), tiny_base(arch), sequences(12)
    attached = LORA.load(base, "j", folder)
    assert attached.flat.dtype == torch.float32
    torch.testing.assert_close(_logits(base, part, "j"), _peft_logits(folder, arch, part), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["stored-fp32", "stored-bf16"])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=["base-fp32", "base-bf16"])
def test_the_heads_weight_may_have_been_rounded(base: torch.dtype, stored: torch.dtype, tmp_path: Path) -> None:
    """PEFT keeps an adapted head's own weight too, in the number format its base had."""
    folder = _peft_made(tmp_path / "theirs", "llama", target_modules=["lm_head"])
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    assert any("base_layer" in name for name in tensors)
    save_file({k: v.to(stored) if "base_layer" in k else v for k, v in tensors.items()}, file)
    assert LORA.load(tiny_base(dtype=base), "j", folder).sites == ["lm_head"]


def _edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


SITE = "model.layers.1.self_attn.q_proj"
A, B = (f"base_model.model.{SITE}.lora_{side}.weight" for side in "AB")


def _without(key: str) -> Callable[[Path], Any]:
    return lambda folder: _edit_tensors(folder, lambda tensors: tensors.pop(key))


def _with(key: str, *shape: int) -> Callable[[Path], Any]:
    return lambda folder: _edit_tensors(folder, lambda tensors: tensors.update({key: torch.zeros(*shape)}))


def _moved(tensors: dict[str, Tensor]) -> None:
    """All keys of layer 1 become keys of layer 9."""
    for key in list(tensors):
        tensors[key.replace("layers.1", "layers.9")] = tensors.pop(key)


def _config(**changes: Any) -> Callable[[Path], Any]:
    return lambda folder: _edit_config(folder, **changes)


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no B": (_without(B), SITE),
    "no A": (_without(A), SITE),
    "halves of two ranks": (_with(A, 9, 64), SITE),
    "a factor too wide": (_with(A, 4, 65), SITE),
    "a factor too long": (_with(B, 65, 4), SITE),
    "keys of no layer": (lambda folder: _edit_tensors(folder, _moved), "model.layers.9."),
    "a key of no kind": (_with("base_model.model.x.weight", 1), "x.weight"),
    "a head of its own": (_with("base_model.model.lm_head.base_layer.weight", 320, 64), "lm_head"),
    "no keys": (lambda folder: _edit_tensors(folder, dict.clear), "no LoRA weights"),
    "DoRA": (_config(use_dora=True), "use_dora"),
    "biases": (_config(lora_bias=True), "lora_bias"),
    "saved modules": (_config(modules_to_save=["lm_head"]), "modules_to_save"),
    "replicated layers": (_config(layer_replication=[[0, 2], [0, 2]]), "layer_replication"),
    "trained tokens": (_config(trainable_token_indices=[1]), "trainable_token_indices"),
    "activated LoRA": (_config(alora_invocation_tokens=[5, 6]), "alora_invocation_tokens"),
    "PiSSA": (_config(init_lora_weights="pissa"), "pissa"),
    "fast PiSSA": (_config(init_lora_weights="pissa_niter_4"), "pissa"),
    "OLoRA": (_config(init_lora_weights="olora"), "olora"),
    "another method": (_config(peft_type="IA3"), "IA3"),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model.safetensors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(case: str, tmp_path: Path) -> None:
    """Each would otherwise load as a plain LoRA that answers something else. PiSSA's and OLoRA's bases differ from ours."""
    spoil, named = REFUSED[case]
    folder, base = _peft_made(tmp_path / "theirs", "llama", target_modules=["q_proj", "v_proj"]), tiny_base()
    assert LORA.load(tiny_base(), "j", folder).sites
    spoil(folder)
    with pytest.raises(InputError) as refusal:
        LORA.load(base, "j", folder)
    assert named in str(refusal.value) and str(folder) in str(refusal.value)
    assert not any(site.slots for site in base.sites.values()), "a refused adapter leaves nothing behind"


def test_a_real_dora_adapter_is_refused(tmp_path: Path) -> None:
    folder = _peft_made(tmp_path / "theirs", "llama", use_dora=True)
    with pytest.raises(InputError, match="use_dora"):
        LORA.load(tiny_base(), "j", folder)


def test_the_wrong_base_is_known_by_its_fingerprint(tmp_path: Path) -> None:
    """Same architecture, same shapes, other weights: only the stamp can tell."""
    folder = _saved(LORA.attach(tiny_base(), "j", LoraConfig(), 0), tmp_path / "adapter")
    with pytest.raises(InputError, match="other weights") as refusal:
        LORA.load(tiny_base(seed=1), "j", folder)
    assert str(folder) in str(refusal.value) and "tiny-llama" in str(refusal.value)


@pytest.mark.parametrize(
    ("arch", "overrides"), [("gpt2", {}), ("llama", {"hidden_size": 32}), ("llama", {"num_hidden_layers": 1})]
)
def test_the_wrong_base_is_known_by_its_shapes(arch: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    """Without a stamp: other names, other widths, fewer layers."""
    folder = _peft_made(tmp_path / "theirs", "llama")
    with pytest.raises(InputError, match="wrong base"):
        LORA.load(tiny_base(arch, **overrides), "j", folder)


def test_fingerprints_tell_weights_apart_and_nothing_else() -> None:
    base = tiny_base()
    same = [tiny_base(dtype=torch.bfloat16), Base(tiny_model("llama"), tiny_tokenizer(), "another name")]
    assert {b.fingerprint for b in same} == {base.fingerprint}
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.down_proj").weight.add_(0.01)
    others = [tiny_base(seed=1), tiny_base("qwen3"), Base(model, tiny_tokenizer(), "tiny-llama")]
    assert len({base.fingerprint, *(b.fingerprint for b in others)}) == 4


# ---------------------------------------------------------------- several jobs on one base


def test_two_jobs_in_one_row_train_as_each_with_peft() -> None:
    """Other targets, ranks and scales; their sequences share one forward and one backward."""
    base, parts = tiny_base(), {"a": sequences(9, 4, seed=1), "b": sequences(1, 13, seed=2)}
    jobs = {
        "a": LORA.attach(base, "a", LoraConfig(r=3, lora_alpha=5), 0),
        "b": LORA.attach(base, "b", LoraConfig(r=6, target_modules=("q_proj", "down_proj"), use_rslora=True), 1),
    }
    for seed, attached in enumerate(jobs.values()):
        shake(attached, seed)
    row = packed([*parts["a"], *parts["b"]])
    batch = Batch(row.input_ids, row.position_ids, row.lengths, (Segment("a", slice(0, 13), 0), Segment("b", slice(13, 27), 0)))
    base.model.train()
    with base.routed(batch):
        hidden = base.hidden(batch)
        losses = {}
        for segment in batch.segments:
            own = parts[segment.job]
            scored = torch.cat([torch.arange(len(p)) < len(p) - 1 for p in own])
            targets = torch.cat([p[1:] for p in own])
            head = base.head.for_segment(segment)
            losses[segment.job] = head.nll(hidden[segment.tokens][scored], targets, torch.ones(len(targets)))
        torch.stack(list(losses.values())).sum().backward()
    for job, attached in jobs.items():
        twin = peft_twin(tiny_model("llama"), attached)
        truth = nll_alone(twin, parts[job])
        truth.backward()
        torch.testing.assert_close(losses[job], truth, rtol=1e-6, atol=0)
        for name, gradient in lora_gradients(attached).items():
            expected = twin.get_parameter(name).grad
            assert expected is not None and relative(gradient, expected) <= 2e-5, (job, name)


def test_detaching_gives_the_bare_base_back() -> None:
    """Exactly; a neighbour stays as it is."""
    base, (part,) = tiny_base(), sequences(12)
    bare = _logits(base, part, None)
    jobs = [LORA.attach(base, job, LoraConfig(r=r), 0) for job, r in (("a", 2), ("b", 5))]
    for seed, attached in enumerate(jobs):
        shake(attached, seed)
    beside = _logits(base, part, "b")
    assert not torch.equal(_logits(base, part, "a"), bare)
    jobs[0].detach()
    assert torch.equal(_logits(base, part, "a"), bare)
    assert torch.equal(_logits(base, part, "b"), beside)
    jobs[1].detach()
    assert torch.equal(_logits(base, part, "b"), bare) and torch.equal(_logits(base, part, None), bare)
    assert not any(site.slots for site in base.sites.values())


def test_the_kth_adapter_costs_no_module() -> None:
    """Adapters live outside the module tree: attaching, walking and saving the base stay as cheap as with one."""
    base = tiny_base()

    def tree() -> tuple[list[str], list[str], list[str]]:
        model = base.model
        return [n for n, _ in model.named_modules()], list(model.state_dict()), [n for n, _ in model.named_parameters()]

    LORA.attach(base, "job-0", LoraConfig(), 0)
    first = tree()
    for k in range(1, 6):
        LORA.attach(base, f"job-{k}", LoraConfig(r=k), k)
    assert tree() == first
    assert all(len(site.slots) == 6 for site in base.sites.values())


# ---------------------------------------------------------------- what the optimizer sees


def _backward(base: Base, parts: list[Tensor]) -> None:
    base.model.train()
    with base.routed(packed(parts, "j")):
        nll_packed(base, parts, "j").backward()


def test_gradients_gather_in_one_flat_buffer() -> None:
    """In PEFT's amount, added up over backwards, until zeroed; no parameter of the base collects any."""
    base, parts = tiny_base(), sequences(9, 4)
    attached = LORA.attach(base, "j", LoraConfig(r=2), 0)
    shake(attached)
    (flat,) = attached.parameters()
    assert flat.grad is not None and not flat.grad.any()
    _backward(base, parts)
    once, views = flat.grad.clone(), lora_gradients(attached)
    assert torch.equal(once, torch.cat([g.flatten() for g in views.values()])) and once.all()
    _backward(base, parts)
    torch.testing.assert_close(flat.grad, 2 * once)
    attached.zero_grad()
    assert not flat.grad.any() and not any(g.any() for g in lora_gradients(attached).values())
    assert all(p.grad is None for p in base.model.parameters())


def test_an_optimizer_step_reaches_the_sites() -> None:
    """The steps of torch's AdamW over PEFT's parameters, taken on the flat buffer."""
    base, parts = tiny_base(), sequences(9, 4)
    attached = LORA.attach(base, "j", LoraConfig(r=2), 0)
    shake(attached)
    twin = peft_twin(tiny_model("llama"), attached)
    theirs = [p for n, p in twin.named_parameters() if "lora_" in n]
    # a large eps: with the usual one, the sign of a rounding error would decide where a gradient is nearly zero
    settings: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-2}
    optimizers = [torch.optim.AdamW(attached.parameters(), fused=True, **settings), torch.optim.AdamW(theirs, **settings)]
    for _ in range(3):
        attached.zero_grad()
        _backward(base, parts)
        optimizers[0].step()
        attached.publish()
        optimizers[1].zero_grad()
        nll_alone(twin, parts).backward()
        optimizers[1].step()
    for name, factor in attached.tensors().items():
        assert relative(factor, twin.get_parameter(name.replace(".weight", ".default.weight"))) <= 1e-5, name
    (part,) = sequences(7, seed=3)
    with torch.no_grad():
        truth = twin(input_ids=part[None]).logits[0]
    torch.testing.assert_close(_logits(base, part, "j"), truth, rtol=1e-4, atol=1e-4)


def test_state_is_exact_and_independent_of_later_steps() -> None:
    base = tiny_base()
    attached = LORA.attach(base, "j", LoraConfig(r=2), 0)
    shake(attached)
    kept = {name: tensor.clone() for name, tensor in attached.state().items()}
    (part,) = sequences(12)
    before = _logits(base, part, "j")
    shake(attached, seed=9)
    assert not torch.equal(_logits(base, part, "j"), before)
    attached.load_state(kept)
    assert torch.equal(_logits(base, part, "j"), before)


def test_adapter_dropout_is_for_training_alone(tmp_path: Path) -> None:
    """It reaches the sites and the file; answering is PEFT's eval mode."""
    base, (part,) = tiny_base(), sequences(12)
    attached = LORA.attach(base, "j", LoraConfig(r=2, lora_dropout=0.5), 0)
    shake(attached)
    asked = _logits(base, part, "j")
    base.model.train()
    batch = packed([part], "j", seed=1)
    with base.routed(batch), torch.no_grad():
        trained = base.head.logits(base.hidden(batch))
    assert relative(trained, asked) > 1e-2
    folder = _saved(attached, tmp_path / "adapter")
    torch.testing.assert_close(_peft_logits(folder, "llama", part), asked, rtol=1e-5, atol=1e-5)
