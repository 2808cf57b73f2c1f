"""The config: what is accepted, what is refused and in which words, overrides, jobs, and the way to disk and back."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from snugtune.config import JobConfig, RunConfig, read_config, to_config
from snugtune.data.sources import SourceConfig
from snugtune.errors import InputError
from snugtune.methods.full import FullConfig
from snugtune.methods.lora import LoraConfig
from snugtune.optim import ConstantConfig, CosineConfig, LinearConfig, WsdConfig

MINIMAL: dict[str, Any] = {"model": "demo", "output": "runs/x", "data": "d.jsonl"}


def config(**fields: Any) -> RunConfig:
    return to_config({**MINIMAL, **fields})


def refusal(**fields: Any) -> str:
    """The message about a config with these fields; one line, as the command prints it."""
    with pytest.raises(InputError) as error:
        config(**fields)
    assert "\n" not in str(error.value)
    assert "pydantic" not in str(error.value)
    return str(error.value)


def nested(field: str, value: Any) -> dict[str, Any]:
    """`a.b` and a value as a mapping."""
    first, *rest = field.split(".")
    return {first: nested(".".join(rest), value) if rest else value}


# Fields ----------------------------------------------------------------------------------------------------------------


def test_a_minimal_config_has_the_documented_defaults():
    c = config()
    assert [(s.path, s.format) for s in c.data] == [("d.jsonl", "auto")]
    assert (c.batch_size, c.max_seq_len, c.epochs, c.steps, c.seed) == (16, 1024, None, None, 0)
    assert (c.method, c.schedule, c.optimizer.type) == (LoraConfig(), ConstantConfig(), "adamw")
    [job] = c.resolved_jobs()
    assert job == JobConfig(name="default", data=({"path": "d.jsonl"},))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "data",
    [
        ["a.jsonl", {"path": "b.json", "format": "sharegpt"}],
        [{"path": "a.jsonl"}, {"path": "b.json", "format": "sharegpt"}],
        ("a.jsonl", {"path": "b.json", "format": "sharegpt"}),
    ],
)
def test_data_is_a_path_a_mapping_or_a_list_of_them(data: Any):
    assert [(s.path, s.format) for s in config(data=data).data] == [("a.jsonl", "auto"), ("b.json", "sharegpt")]
    assert [(s.path, s.format) for s in config(data=data[1]).data] == [("b.json", "sharegpt")]


def test_a_type_may_be_left_out_or_be_all_there_is():
    assert config(schedule="cosine").schedule == CosineConfig()
    assert config(schedule={"type": "linear", "warmup": 5}).schedule == LinearConfig(warmup=5)
    assert config(schedule={"warmup": 0.1}).schedule == ConstantConfig(warmup=0.1)
    assert config(method="full").method == FullConfig()
    assert config(method={"r": 4}).method == LoraConfig(r=4)
    assert config(optimizer={"lr": 1e-3}).optimizer.lr == 1e-3


def test_a_type_may_go_by_its_other_name():
    """Constant with cooldown is what others call wsd."""
    cooled = WsdConfig(cooldown=0.3)
    assert config(schedule="constant_with_cooldown").schedule == WsdConfig()
    assert config(schedule={"type": "constant_with_cooldown", "cooldown": 0.3}).schedule == cooled
    [job] = config(jobs=[{"schedule": {"type": "constant_with_cooldown", "cooldown": 0.3}}]).resolved_jobs()
    assert job.schedule == cooled


UNKNOWN = [
    ("lerning_rate", "optimizer.lr"),
    ("learning_rate", "optimizer.lr"),
    ("lr", "optimizer.lr"),
    ("outputs", "output"),
    ("output_dir", "output"),
    ("batchsize", "batch_size"),
    ("batch-size", "batch_size"),
    ("max_seq_lenght", "max_seq_len"),
    ("epoch", "epochs"),
    ("num_train_epochs", "epochs"),
    ("max_steps", "steps"),
    ("dataset", "data"),
    ("lora_r", "method.r"),
    ("warmup_ratio", "schedule.warmup"),
    ("gradient_checkpointing", "plan.recompute"),
    ("plan.micro_batches", "micro_batch"),
    ("plan.weight", "weights"),
    ("method.rank", "r"),
    ("method.alpha", "lora_alpha"),
    ("method.target_module", "target_modules"),
    ("schedule.warm_up", "warmup"),
    ("optimizer.weight_decai", "weight_decay"),
    ("optimizer.beta", "betas"),
    ("objective.typ", "type"),
]


@pytest.mark.parametrize(("field", "near"), UNKNOWN)
def test_an_unknown_field_is_named_with_the_one_meant(field: str, near: str):
    """Also deep inside; a field that stands elsewhere here is named with its place."""
    message = refusal(**nested(field, 3))
    *parents, leaf = field.split(".")
    where = f"{'.'.join(parents)}: " if parents else ""
    assert message == f"config: {where}unknown field '{leaf}'; did you mean '{near}'?"


def test_every_hint_points_at_a_field_that_exists():
    """A hint to nowhere is worse than none."""
    for name, field in RunConfig.elsewhere.items():
        place: Any = config()
        for part in field.split("."):
            assert part in type(place).model_fields, f"{name} -> {field}"
            place = getattr(place, part)
        assert not isinstance(place, BaseModel)


def test_unknown_fields_of_list_items_are_placed():
    assert "data.1: unknown field 'forma'; did you mean 'format'?" in refusal(data=["a.jsonl", {"path": "b", "forma": "alpaca"}])
    assert "jobs.1: unknown field 'sead'; did you mean 'seed'?" in refusal(jobs=[{"name": "a"}, {"name": "b", "sead": 1}])


BAD_VALUES = [
    ("batch_size", 0, "at least 1"),
    ("batch_size", "many", "a whole number"),
    ("batch_size", 1.5, "a whole number"),
    ("max_seq_len", 1, "at least 2"),
    ("epochs", 0, "above 0"),
    ("epochs", float("inf"), "finite"),
    ("epochs", float("nan"), "epochs: "),
    ("steps", 0, "at least 1"),
    ("seed", -1, "at least 0"),
    ("seed", 10**30, "below"),
    ("validation", 0.0, "between 0 and 1"),
    ("validation", 1, "between 0 and 1"),
    ("validation", 1.5, "between 0 and 1"),
    ("validation", {"path": "v", "colums": {}}, "validation: unknown field 'colums'; did you mean 'columns'?"),
    ("validation", {"path": ""}, "validation.path: must not be empty"),
    ("validation", {"format": "alpaca"}, "validation.path: required"),
    ("validation", {"path": "v", "weight": 2}, "weight"),
    ("validation", ["v"], "validation: "),
    ("max_grad_norm", 0, "above 0"),
    ("eval_every", 0, "at least 1"),
    ("checkpoint_every", 0, "at least 1"),
    ("keep_checkpoints", 0, "at least 1"),
    ("device", "tpu", "'auto', 'cpu' or 'cuda'"),
    ("model", "", "must not be empty"),
    ("output", "", "must not be empty"),
    ("model", 5, "expected text"),
    ("optimizer.lr", 0, "above 0"),
    ("optimizer.lr", "fast", "number"),
    ("optimizer.lr", float("inf"), "finite"),
    ("optimizer.betas", [0.9], "optimizer.betas"),
    ("optimizer.betas", [0.9, 1.0], "optimizer.betas"),
    ("optimizer.betas", [-0.1, 0.9], "optimizer.betas"),
    ("optimizer.type", "rmsprop", "'adamw'"),
    ("schedule.warmup", -1, "at least 0"),
    ("schedule.type", "cosin", "did you mean 'cosine'?"),
    ("schedule", "cosin", "did you mean 'cosine'?"),
    ("method", "lorra", "did you mean 'lora'?"),
    ("method.r", 0, "at least 1"),
    ("method.lora_alpha", -1, "above 0"),
    ("method.lora_dropout", 1.0, "below 1"),
    ("method.init_lora_weights", "zero", "'default', 'gaussian' or 'orthogonal'"),
    ("method", 5, "method: "),
    ("plan.micro_batch", 0, "at least 1"),
    ("plan.micro_batch", "one", "plan.micro_batch: "),
    ("plan.weights", "int3", "'fp16', 'int8', 'w8a8' or 'nf4'"),
    ("plan.recompute", "all", "'none' or 'blocks'"),
    ("plan.recompute", 0, "at least 1"),
    ("plan", "auto", "plan: "),
    ("jobs", "a", "jobs: "),
    ("jobs", ["a"], "jobs.0: "),
    ("samples", {"prompts": ["a", "\ud83d"]}, "samples.prompts.1: half a character"),
    ("jobs", [{"name": "a", "samples": {"prompts": ["\udcff"]}}], "jobs.0.samples.prompts.0: half a character"),
    ("data", "d\udcff.jsonl", "half a character"),
    ("data", 5, "data"),
    ("data", None, "data"),
]  # fmt: skip


ELSEWHERE = [
    ({"foo": 1}, "unknown field 'foo'; 'snugtune init' writes a config with every field explained"),
    ({"r": 8}, "unknown field 'r'; did you mean 'method.r'?"),
    ({"patience": 2}, "unknown field 'patience'; did you mean 'early_stopping.patience'?"),
    ({"schedule": {"cooldown": 0.1}}, "schedule: 'cooldown' is not a field of type 'constant'; it belongs to schedule.type: wsd"),
    ({"optimizer": {"momentum": 0.9}}, "optimizer: 'momentum' is not a field of type 'adamw'; it belongs to optimizer.type: sgd"),
    (
        {"optimizer": {"type": "sgd", "betas": [0.9, 0.9]}},
        "optimizer: 'betas' is not a field of type 'sgd'; it belongs to optimizer.type: adamw or optimizer.type: lion or "
        "optimizer.type: galore or optimizer.type: apollo",
    ),
    ({"method": {"last_blocks": 1}}, "method: 'last_blocks' is not a field of type 'lora'; it belongs to method.type: freeze"),
    ({"mixing": {"until": "last"}}, "mixing: 'until' is not a field of type 'concat'; it belongs to mixing.type: interleave"),
    ({"method": {"epochs": 3}}, "method: unknown field 'epochs'; it stands at the top level, not in method"),
    ({"method": {"lr": 1e-3}}, "method: unknown field 'lr'; did you mean 'optimizer.lr'?"),
    ({"optimizer": {"learning_rate": 1e-3}}, "optimizer: unknown field 'learning_rate'; did you mean 'lr'?"),
    ({"plan": {"zero": 1}}, "plan: unknown field 'zero'; there are weights, double_quant, outlier_threshold, "
     "micro_batch, recompute, optimizer_state, gradients, offload, head_rows, exact, execution, resident_jobs"),
    (
        {"jobs": [{"name": "a", "model": "x"}]},
        "jobs.0: unknown field 'model' of a job; it is the whole run's: give it once, at the top level",
    ),
    ({"jobs": [{"schedule": {"cooldown": 1}}]}, "jobs.0: schedule: 'cooldown' is not a field of type 'constant'; it belongs to "
     "schedule.type: wsd"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), ELSEWHERE, ids=[message for _, message in ELSEWHERE])
def test_a_field_in_the_wrong_place_is_told_its_own(fields: dict[str, Any], message: str):
    """Only what is near is offered; a field of another type says which."""
    assert refusal(**fields) == f"config: {message}"


WORDS = [
    ({"data": None}, "data: nothing to train on; give a file, a folder, or the id of a dataset on the hub"),
    (
        {"data": {"path": "d", "columns": {"question": "instruction"}}},
        "data.0.columns: the other way round: {instruction: question}, the name it means before the file's own",
    ),
    ({"data": {"path": "d", "columns": {"text": 5}}}, "data.0.columns.text: expected text (got 5)"),
    (
        {"data": {"path": "d", "format": "sharegt"}},
        "data.0.format: expected 'alpaca', 'sharegpt', 'messages', 'prompt', 'preference', 'text' or 'auto' (got 'sharegt'); "
        "did you mean 'sharegpt'?",
    ),
    ({"device": "gpu"}, "device: expected 'auto', 'cpu' or 'cuda' (got 'gpu')"),
    ({"plan": {"micro_batch": "one"}}, "plan.micro_batch: expected a whole number or 'auto' (got 'one')"),
    ({"plan": "auto"}, "plan: expected a group of fields like {weights: auto} (got 'auto')"),
    ({"batch_size": 2.5}, "batch_size: expected a whole number (got 2.5)"),
    ({"batch_size": True}, "batch_size: expected a whole number (got true)"),
    ({"early_stopping": True}, "early_stopping: expected a group of fields like {patience: 3} (got true)"),
    ({"model": None}, "model: expected text (got nothing)"),
    ({"model": ["a"]}, "model: expected text (got a list)"),
    ({"max_grad_norm": "none"}, "max_grad_norm: expected a number (got 'none'); nothing is written null"),
    ({"schedule": {"warmup": "5%"}}, "schedule.warmup: expected a number (got '5%'); write 0.05"),
    ({"validation": "5%"}, "validation: '5%' is no path; write 10% as 0.1"),
    ({"method": {"target_modules": []}}, "method.target_modules: must not be empty"),
    ({"optimizer": {"betas": [0.9, 0.9, 0.9]}}, "optimizer.betas: expected at most 2 values, found 3"),
    ({"epochs": 1, "steps": 1}, "give epochs or steps, not both (set one to null)"),
    (
        {"tracking": "wandb,mlflow"},
        "tracking.0: expected one of them a time (got 'wandb,mlflow'); a list is written [wandb, mlflow]",
    ),
    (
        {"jobs": [{"name": "a b"}]},
        "jobs.0: name: expected letters, digits, '.', '_' and '-', at most 64, the first a letter or a digit (got 'a b')",
    ),
]


@pytest.mark.parametrize(("fields", "message"), WORDS, ids=[message for _, message in WORDS])
def test_words_are_a_persons(fields: dict[str, Any], message: str):
    assert refusal(**fields) == f"config: {message}"


@pytest.mark.parametrize(("field", "value", "words"), BAD_VALUES, ids=[f"{f}={v!a}" for f, v, _ in BAD_VALUES])
def test_a_bad_value_is_named_with_its_field(field: str, value: Any, words: str):
    message = refusal(**nested(field, value))
    assert words in message
    assert message.startswith("config: " + field.split(".")[0])


def test_a_bad_value_is_shown():
    assert refusal(batch_size=-3).endswith("(got -3)")


def test_every_bad_field_is_listed():
    """Not one a try."""
    message = refusal(batch_size=0, seed=-1, optimizer={"lr": -1})
    assert all(f"{name}: " in message for name in ("batch_size", "seed", "optimizer.lr"))


@pytest.mark.parametrize("name", ["model", "output"])
def test_what_must_be_given_is_named(name: str):
    with pytest.raises(InputError) as error:
        to_config({k: v for k, v in MINIMAL.items() if k != name})
    assert str(error.value) == f"config: {name}: required, but not given"


@pytest.mark.parametrize("data", ["left out", []])
def test_nothing_to_train_on_is_said_in_one_line(data: Any):
    with pytest.raises(InputError) as error:
        to_config({k: v for k, v in MINIMAL.items() if k != "data"} | ({} if data == "left out" else {"data": data}))
    assert "data: nothing to train on" in str(error.value)
    assert "\n" not in str(error.value) and "JobConfig" not in str(error.value)


def test_epochs_and_steps_exclude_each_other():
    assert "give epochs or steps, not both" in refusal(epochs=1, steps=5)


def test_configs_are_frozen():
    """What was validated cannot be changed behind the run's back."""
    c = config()
    for owner, name in ((c, "seed"), (c.optimizer, "lr"), (c.resolved_jobs()[0], "seed")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(owner, name, 1)


def test_a_config_passes_through():
    c = config()
    assert to_config(c) is c


# Files -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def config_file(tmp_path: Path):
    def write(text: str | bytes) -> Path:
        path = tmp_path / "c.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


TEXT = "model: demo\noutput: runs/x\ndata: d.jsonl\n"


def test_numbers_in_yaml_may_be_written_the_way_people_do(config_file):
    """YAML 1.1 takes 1e-4 for text."""
    c = read_config(config_file(TEXT + "optimizer: {lr: 1e-4, eps: 1E-7}\nepochs: 1e0\nvalidation: 5e-2\n"))
    assert (c.optimizer.lr, c.optimizer.eps, c.epochs, c.validation) == (1e-4, 1e-7, 1.0, 0.05)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("model: demo\noutput: [a\nseed: 1\n", r"c\.yaml:3: not valid YAML", id="unclosed list"),
        pytest.param("model: demo\n\toutput: x\n", r"c\.yaml:2: not valid YAML", id="tab"),
        pytest.param("model: demo\noutput: a: b\n", r"c\.yaml:2: not valid YAML", id="second colon"),
        pytest.param("model: !!python/object/apply:os.getcwd []\n", r"c\.yaml:1: not valid YAML.*python/object", id="a call"),
        pytest.param("model: demo\nplan: !!python/name:os.system\n", r"c\.yaml:2: not valid YAML.*python/name", id="a function"),
        pytest.param("a: &a [*b]\n", r"c\.yaml:1: not valid YAML", id="unknown anchor"),
        pytest.param("- model: demo\n", r"c\.yaml: expected fields like 'model: \.\.\.', found a list", id="a list"),
        pytest.param("demo", r"c\.yaml: expected fields.*found text", id="a text"),
        pytest.param("", r"c\.yaml: expected fields", id="empty"),
        pytest.param("# nothing\n", r"c\.yaml: expected fields", id="comments"),
        pytest.param("model: demo\n---\nmodel: demo\n", r"c\.yaml:2: not valid YAML", id="two documents"),
        pytest.param(b"model: \xff\xfe\n", r"c\.yaml: cannot be read", id="not UTF-8"),
        pytest.param("model: " + "[" * 3000, r"c\.yaml: not valid YAML", id="nested too deeply"),
        pytest.param("model: \x01\n", r"c\.yaml.*not valid YAML", id="control characters"),
        pytest.param(TEXT + "1: 2\n", r"c\.yaml: unknown field '1'", id="a number as field"),
        pytest.param(TEXT + "lerning_rate: 1\n", r"c\.yaml: unknown field 'lerning_rate'", id="unknown field"),
    ],
)
def test_a_bad_file_is_named_with_its_line(config_file, text: str | bytes, words: str):
    with pytest.raises(InputError, match=words) as error:
        read_config(config_file(text))
    assert len(str(error.value)) < 500


def test_a_file_that_is_none_is_named(tmp_path: Path):
    with pytest.raises(InputError, match=r"no config file .*none\.yaml"):
        read_config(tmp_path / "none.yaml")
    with pytest.raises(InputError, match=r"is a folder, not a config"):
        read_config(tmp_path)


NO_CONFIGS = [
    ("d.jsonl", '{"messages": []}', "d.jsonl: this is data, not a config; 'snugtune init --data .*d.jsonl' writes"),
    ("d.json", '[{"messages": []}]', "d.json: this is data"),
    ("d.json", '{"instruction": "a"}', "d.json: this is data"),
    ("d.txt", "Once upon: a time", "d.txt: this is data"),
    ("m.gguf", "GGUF", "m.gguf: this is a model"),
    ("run/config.yaml", "", r"run is a folder, not a config; there is one in it: .*run/config\.yaml"),
    ("run/adapter_config.json", "{}", "run is an adapter's folder, not a config; 'snugtune chat .*run' talks to it"),
    ("run/config.json", "{}", "run is a model's folder, not a config; 'snugtune init --model .*run"),
]


@pytest.mark.parametrize(("name", "text", "words"), NO_CONFIGS)
def test_what_is_no_config_is_told_what_it_is(tmp_path: Path, name: str, text: str, words: str):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    with pytest.raises(InputError, match=words):
        read_config(path if path.parent == tmp_path else path.parent)


def test_a_config_may_be_json(tmp_path: Path):
    (tmp_path / "c.json").write_text('{"model": "demo", "output": "x", "data": "d.jsonl"}')
    assert read_config(tmp_path / "c.json").model == "demo"


def test_a_file_with_nearly_that_name_is_offered(tmp_path: Path):
    (tmp_path / "shop.yaml").touch()
    with pytest.raises(InputError, match=r"no config file .*shp\.yaml; did you mean '.*/shop\.yaml'\?"):
        read_config(tmp_path / "shp.yaml")
    (tmp_path / "shop.yaml").unlink()
    with pytest.raises(InputError, match=r"no config file .*; 'snugtune init' writes one"):
        read_config(tmp_path / "shp.yaml")


def test_yaml_runs_no_code(config_file, tmp_path: Path):
    """The refusal must come before the call."""
    made = tmp_path / "made"
    with pytest.raises(InputError):
        read_config(config_file(f"model: !!python/object/apply:os.mkdir ['{made}']\n"))
    assert not made.exists()


# Overrides -------------------------------------------------------------------------------------------------------------


def with_set(config_file, *overrides: str, text: str = TEXT) -> RunConfig:
    return read_config(config_file(text), overrides)


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("seed=3", "seed", 3),
        ("epochs=0.5", "epochs", 0.5),
        ("epochs=2", "epochs", 2.0),
        ("max_grad_norm=null", "max_grad_norm", None),
        ("trust_remote_code=true", "trust_remote_code", True),
        ("model=org/name", "model", "org/name"),
        ("output=runs/a=b", "output", "runs/a=b"),
        ("optimizer.lr=1e-4", "optimizer.lr", 1e-4),
        ("optimizer.lr=2.5E-5", "optimizer.lr", 2.5e-5),
        ("optimizer.betas=[0.8, 0.9]", "optimizer.betas", (0.8, 0.9)),
        ("validation=1e-1", "validation", 0.1),
        ("validation=held.jsonl", "validation", "held.jsonl"),
        ("plan.micro_batch=2", "plan.micro_batch", 2),
        ("plan={weights: bf16}", "plan.weights", "bf16"),
        ("schedule=cosine", "schedule", CosineConfig()),
        ("schedule.warmup=0.1", "schedule", ConstantConfig(warmup=0.1)),
        ("method.target_modules=[q_proj, v_proj]", "method.target_modules", ("q_proj", "v_proj")),
        (" seed = 4", "seed", 4),
    ],
)
def test_an_override_sets_its_field(config_file, override: str, field: str, value: Any):
    """At any depth, also where the file has no such group yet."""
    place: Any = with_set(config_file, override)
    for part in field.split("."):
        place = getattr(place, part)
    assert place == value and type(place) is type(value)


def test_overrides_apply_in_turn(config_file):
    """The later one wins, also inside the earlier one."""
    c = with_set(config_file, "seed=1", "method={r: 2, lora_alpha: 3}", "method.r=5", "seed=2")
    assert (c.seed, c.method) == (2, LoraConfig(r=5, lora_alpha=3))


def test_an_override_reaches_into_a_shorthand(config_file):
    """`schedule: cosine` is `schedule: {type: cosine}`."""
    text = TEXT + "schedule: cosine\nmethod: lora\n"
    c = with_set(config_file, "schedule.warmup=0.1", "method.r=3", text=text)
    assert (c.schedule, c.method) == (CosineConfig(warmup=0.1), LoraConfig(r=3))


def test_an_override_reaches_into_a_path(config_file):
    """`data: d.jsonl` is `data: {path: d.jsonl}`."""
    (source,) = with_set(config_file, "data.format=sharegpt").data
    assert (source.path, source.format) == ("d.jsonl", "sharegpt")
    (source,) = with_set(config_file, "data.path=e.jsonl").data
    assert source.path == "e.jsonl"


def test_an_override_leaves_its_neighbours_alone(config_file):
    c = with_set(config_file, "method.r=3", text=TEXT + "method: {type: lora, r: 4, lora_alpha: 32}\n")
    assert c.method == LoraConfig(r=3, lora_alpha=32)


LISTS = TEXT.replace("d.jsonl", "[a.jsonl, {path: b.jsonl}]") + "jobs: [{name: a}, {name: b, method: {r: 4}}]\n"


def test_list_items_go_by_their_position(config_file):
    overrides = "data.0=c.jsonl", "data.1.format=alpaca", "jobs.1.method.r=16", "jobs.0.optimizer.lr=1e-5"
    c = with_set(config_file, *overrides, text=LISTS)
    assert [(s.path, s.format) for s in c.data] == [("c.jsonl", "auto"), ("b.jsonl", "alpaca")]
    first, second = c.resolved_jobs()
    assert (first.optimizer.lr, second.method.r) == (1e-5, 16)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", "expected field=value"),
        ("", "expected field=value"),
        ("=3", "expected field=value"),
        (" =3", "expected field=value"),
        ("seed=[1", "not valid YAML"),
        ("plan=!!python/name:os.system", "not valid YAML"),
        ("seed.x=1", "'seed' is not a group of fields"),
        ("seed.x.y=1", "not inside a group of fields"),
        ("data.2=c.jsonl", "'2' is not one of the list's 2 positions (from 0)"),
        ("data.-1=c.jsonl", "'-1' is not one of the list's 2 positions (from 0)"),
        ("data.first=c.jsonl", "'first' is not one of the list's 2 positions (from 0)"),
        ("jobs.7.seed=1", "'7' is not one of the list's 2 positions (from 0)"),
        ("optimiser.lr=1", "unknown field 'optimiser'; did you mean 'optimizer'?"),
        ("method.rr=1", "method: unknown field 'rr'; did you mean 'r'?"),
        ("jobs.0.nam=x", "jobs.0: unknown field 'nam'; did you mean 'name'?"),
        ("optimizer.lr=fast", "optimizer.lr: "),
    ],
)
def test_a_bad_override_is_named(config_file, override: str, words: str):
    with pytest.raises(InputError) as error:
        with_set(config_file, override, text=LISTS + "seed: 1\n")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


BLAMED = [
    (("batch_size=x",), "", "--set batch_size=x: batch_size: expected a whole number (got 'x')"),
    (("output=",), "", "--set output=: output: expected text (got nothing)"),
    (("steps=5",), "epochs: 3\n", "--set steps=5: give epochs or steps, not both (set one to null)"),
    (("seed=1",), "batch_size: x\n", "{file}: batch_size: expected a whole number (got 'x')"),
    (("batch_size=0",), "seed: -1\n", "--set batch_size=0: batch_size: must be at least 1 (got 0); {file}: seed: "
     "must be at least 0 (got -1)"),
    (("batch_size=0", "seed=x", "steps=3"), "", "--set batch_size=0: batch_size: must be at least 1 (got 0); "
     "--set seed=x: seed: expected a whole number (got 'x')"),
    (("schedule=linear", "schedule.cooldown=1"), "", "--set schedule.cooldown=1: schedule: 'cooldown' is not a field of type "
     "'linear'; it belongs to schedule.type: wsd"),
    (("jobs.0.name=a",), "", "--set jobs.0.name=a: 'jobs' is no list, so it has no position 0; give it whole: "
     "--set 'jobs=[...]'"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "more", "message"), BLAMED, ids=[" ".join(overrides) for overrides, *_ in BLAMED])
def test_a_mistake_is_blamed_on_what_brought_it(config_file, overrides: tuple[str, ...], more: str, message: str):
    path = config_file(TEXT + more)
    with pytest.raises(InputError) as error:
        read_config(path, overrides)
    assert str(error.value) == message.format(file=path)


def test_an_override_mends_what_the_file_has_wrong(config_file):
    assert with_set(config_file, "batch_size=2", text=TEXT + "batch_size: x\n").batch_size == 2


def test_one_source_has_a_position_too(config_file):
    (source,) = with_set(config_file, "data.0.format=alpaca").data
    assert (source.path, source.format) == ("d.jsonl", "alpaca")


# Jobs ------------------------------------------------------------------------------------------------------------------


def jobs(shared: dict[str, Any], *own: dict[str, Any]) -> tuple[JobConfig, ...]:
    return config(**shared, jobs=[{"name": f"job-{i}", **fields} for i, fields in enumerate(own)]).resolved_jobs()


def test_a_job_takes_what_it_does_not_give():
    """Every field of a job but its name; its own wins over the shared one, which wins over the default."""
    shared = {"seed": 1, "batch_size": 2, "validation": 0.5, "objective": "sft", "schedule": "cosine", "epochs": 3}
    first, second = jobs(shared, {}, {"seed": 9, "data": "own.jsonl", "validation": None})
    assert first == JobConfig.model_validate({"name": "job-0", "data": "d.jsonl", **shared})
    assert second == JobConfig.model_validate({"name": "job-1", **shared, "seed": 9, "data": "own.jsonl", "validation": None})


VALIDATION = {"path": "v.csv", "columns": {"text": "words"}}


@pytest.mark.parametrize(
    ("shared", "own", "expected"),
    [
        (VALIDATION, {}, SourceConfig.model_validate(VALIDATION)),
        (VALIDATION, {"validation": "w.jsonl"}, "w.jsonl"),
        (VALIDATION, {"validation": 0.5}, 0.5),
        (VALIDATION, {"validation": None}, None),
        ("v.csv", {"validation": {**VALIDATION, "path": "w.csv"}}, SourceConfig(path="w.csv", columns={"text": "words"})),
    ],
)
def test_validation_is_a_fraction_a_path_or_a_source(shared: Any, own: dict[str, Any], expected: Any):
    """A path alone takes nothing from the source it replaces; in the stored config it stays a path."""
    c = config(validation=shared, jobs=[{"name": "a", **own}])
    stored = yaml.safe_load(c.to_yaml())
    assert to_config(stored) == c
    assert (stored["validation"] == shared) == isinstance(shared, str)
    [job] = c.resolved_jobs()
    assert job.validation == expected


def test_an_override_reaches_into_the_validation_file(config_file):
    c = with_set(config_file, "validation=v.csv", "validation.columns={text: words}")
    assert c.validation == SourceConfig.model_validate(VALIDATION)


def test_data_may_be_given_by_the_jobs_alone():
    c = to_config({"model": "demo", "output": "x", "jobs": [{"name": "a", "data": "a.jsonl"}, {"name": "b", "data": "b.jsonl"}]})
    assert [job.data[0].path for job in c.resolved_jobs()] == ["a.jsonl", "b.jsonl"]


def test_a_job_without_data_is_named():
    with pytest.raises(InputError, match=r"jobs\.1: data: nothing to train on"):
        to_config({"model": "demo", "output": "x", "jobs": [{"name": "a", "data": "a.jsonl"}, {"name": "b"}]})


COSINE = {"schedule": {"type": "cosine", "warmup": 7}}


def test_a_group_of_fields_is_merged_field_by_field():
    shared = {"method": {"r": 4, "lora_alpha": 32}, "optimizer": {"lr": 1e-3, "weight_decay": 0.1}, **COSINE}
    [job] = jobs(shared, {"method": {"r": 8}, "optimizer": {"lr": 1e-5}, "schedule": {"type": "cosine"}})
    assert job.method == LoraConfig(r=8, lora_alpha=32)
    assert (job.optimizer.lr, job.optimizer.weight_decay) == (1e-5, 0.1)
    assert job.schedule == CosineConfig(warmup=7)


def test_a_bare_type_is_the_group_with_that_type():
    """`schedule: cosine` and `schedule: {type: cosine}` mean the same in a job too."""
    bare = {"schedule": "cosine", "method": "lora"}
    short, long = jobs({**COSINE, "method": {"r": 4}}, bare, {name: {"type": value} for name, value in bare.items()})
    assert (short.schedule, short.method) == (long.schedule, long.method) == (CosineConfig(warmup=7), LoraConfig(r=4))


def test_a_group_of_another_type_starts_afresh():
    """Its fields mean something else there."""
    [job] = jobs({**COSINE, "method": {"r": 4}}, {"schedule": "linear", "method": "full"})
    assert (job.schedule, job.method) == (LinearConfig(), FullConfig())
    [job] = jobs(COSINE, {"schedule": {"type": "linear"}})
    assert job.schedule == LinearConfig()


def test_a_jobs_length_replaces_the_shared_one():
    """Epochs and steps exclude each other, so a job's own choice undoes the other."""
    found = jobs({"epochs": 2}, {"steps": 5}, {}, {"epochs": 3})
    assert [(j.epochs, j.steps) for j in found] == [(None, 5), (2, None), (3, None)]
    assert [(j.epochs, j.steps) for j in jobs({"steps": 2}, {"epochs": 5}, {})] == [(5, None), (None, 2)]
    assert "jobs.0: give epochs or steps, not both" in refusal(jobs=[{"name": "a", "epochs": 1, "steps": 1}])


def test_names_must_differ():
    assert "jobs: the name 'a' is given twice" in refusal(jobs=[{"name": "a"}, {"name": "b"}, {"name": "a"}])
    assert "jobs: the name 'default' is given twice" in refusal(jobs=[{}, {}])


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a b", "-a", "ä", "a\n", "x" * 65, 5])
def test_names_that_make_no_folder_are_refused(name: Any):
    """They name folders and parts of weights."""
    assert "jobs.0: name: " in refusal(jobs=[{"name": name}])


def test_full_tuning_needs_a_run_of_its_own():
    assert config(jobs=[{"name": "a", "method": "full"}]).resolved_jobs()[0].method == FullConfig()
    message = refusal(jobs=[{"name": "a"}, {"name": "b", "method": "full"}])
    assert "'b' uses method 'full', which cannot share a base" in message
    assert "cannot share a base" in refusal(method="full", jobs=[{"name": "a"}, {"name": "b"}])


def test_a_bad_field_of_a_job_is_placed():
    assert "jobs.1: method.r: " in refusal(jobs=[{"name": "a"}, {"name": "b", "method": {"r": 0}}])
    assert "jobs.0: unknown field 'model'" in refusal(jobs=[{"name": "a", "model": "x"}])


# To disk and back ------------------------------------------------------------------------------------------------------

# PyYAML takes these three for line breaks wherever they stand; no path or name has them.
PRINTABLE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x85\u2028\u2029"), min_size=1, max_size=12)
POSITIVE = st.floats(1e-9, 1e9)
SCHEDULES = st.builds(lambda t, w: {"type": t, "warmup": w}, st.sampled_from(["constant", "linear", "cosine"]), st.floats(0, 100))
METHODS = st.one_of(
    st.just({"type": "full"}),
    st.builds(
        lambda r, alpha, targets: {"r": r, "lora_alpha": alpha, "target_modules": targets},
        st.integers(1, 64),
        POSITIVE,
        st.one_of(PRINTABLE, st.lists(PRINTABLE, min_size=1, max_size=3)),
    ),
)
OWN_FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**63 - 1),
        "batch_size": st.integers(1, 512),
        "validation": st.one_of(st.none(), st.floats(0.001, 0.999), PRINTABLE.map(lambda name: name + ".jsonl")),
        "optimizer": st.builds(lambda lr, eps: {"lr": lr, "eps": eps}, POSITIVE, POSITIVE),
        "schedule": SCHEDULES,
        "max_grad_norm": st.one_of(st.none(), POSITIVE),
    },
)


@settings(deadline=None, derandomize=True, max_examples=80)
@given(OWN_FIELDS, METHODS, PRINTABLE, PRINTABLE, st.lists(PRINTABLE, min_size=1, max_size=3), st.lists(OWN_FIELDS, max_size=2))
def test_a_config_comes_back_from_yaml_as_it_was(tmp_path_factory, fields, method, model, output, data, own):
    """A run's folder is its only memory of what it trains: any text and any number must survive, and so must the jobs."""
    if len(own) > 1 and method.get("type") == "full":
        own = own[:1]
    before = to_config({
        **fields, "model": model, "output": output, "data": data, "method": method,
        "jobs": [{"name": f"j{i}", **f} for i, f in enumerate(own)],
    })  # fmt: skip
    path = tmp_path_factory.mktemp("run") / "config.yaml"
    path.write_text(before.to_yaml(), encoding="utf-8")
    after = read_config(path)
    assert after == before
    assert after.resolved_jobs() == before.resolved_jobs()
    assert after.to_yaml() == before.to_yaml()


def test_the_stored_config_is_complete():
    """Defaults may change in a later version; what a finished run used must stay readable."""
    stored = yaml.safe_load(config().to_yaml())
    assert set(stored) == set(RunConfig.model_fields)
    assert set(stored["method"]) == set(LoraConfig.model_fields)
    assert stored["optimizer"]["lr"] == 2e-4


@pytest.mark.parametrize("name", ["2024-11-21", "2024-13-45"])
def test_a_folder_named_like_a_date_stays_text(config_file, name: str):
    """YAML 1.1 would make a date of it, or fail where it is none."""
    text = f"model: demo\ndata: d.jsonl\noutput: {name}\n"
    assert read_config(config_file(text)).output == name
    assert read_config(config_file(text), ["output=2023-01-01"]).output == "2023-01-01"
