"""snugtune: fine-tune a language model in the memory you have.

    import snugtune
    run = snugtune.train({"model": "demo", "data": "data.jsonl", "output": "runs/first"})
    print(snugtune.load(run.folder).reply("Hello!"))

    with snugtune.open("demo") as trainer:  # step by step
        job = trainer.add({"method": {"r": 8}})
        job.forward_backward(job.examples([{"prompt": "Hello!", "completion": "Ahoy!"}]))
        job.optim_step()
        print(job.sample(["Hello!"]))

Importing this package is light: torch and transformers are loaded by the functions that need them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from snugtune.config import RunConfig
    from snugtune.live import LiveTrainer
    from snugtune.observer import RunResult
    from snugtune.tuned import Tuned

# On CPU it warns, as soon as anything imports it (PEFT, a base in fewer bits), that it lacks a kernel which is never called here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__version__ = "0.1.0"
__all__ = ["__version__", "load", "open", "train"]


def train(config: RunConfig | Mapping[str, Any] | str | Path) -> RunResult:
    """Train 1..N jobs as `config` says (a `RunConfig`, a mapping of its fields, or the path of a YAML file).

    Goes on from the last checkpoint when `output` holds an interrupted run of the same config; returns at once when
    that run is finished. Raises `snugtune.errors.SnugtuneError` for anything the caller can mend.
    """
    from snugtune.config import read_config, to_config
    from snugtune.run import train as run_train

    return run_train(read_config(config) if isinstance(config, (str, Path)) else to_config(config))


def load(run: str | Path, adapter: str | None = None, trust_remote_code: bool = False, weights: str = "auto") -> Tuned:
    """Load what a run trained, ready to answer: a run folder, or a PEFT adapter folder.

    `adapter` picks a job of a run that trained several; `trust_remote_code` lets code run that
    comes with the model; `weights` is their format (fp32, bf16, fp16, int8, w8a8, nf4), by default the one the run was trained
    with. Raises `snugtune.errors.InputError` for anything else.
    """
    from snugtune.tuned import load as load_tuned

    return load_tuned(Path(run), adapter, trust_remote_code=trust_remote_code, weights=weights)


def open(
    model: str | Path, plan: Mapping[str, Any] | None = None, device: str = "auto", trust_remote_code: bool = False
) -> LiveTrainer:
    """Load a base and nothing else, for jobs that are added, driven and removed from Python.

    `model`, `plan`, `device` and `trust_remote_code` are those of a run's config. Raises
    `snugtune.errors.SnugtuneError` for anything the caller can mend.
    """
    from snugtune.live import open_trainer

    return open_trainer(model=str(model), plan=plan or {}, device=device, trust_remote_code=trust_remote_code)
