"""One run of LLaMA-Factory's SFT: everything not set here is its default. Runs in its own environment.

    python with_llamafactory.py TASK    # JSON, as task.py writes it

LLaMA-Factory imports torchaudio for multimodal data alone. Its builds on PyPI need CUDA, so where there is none that loads an
empty module stands in for it; nothing here calls it.
"""

import importlib.util
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

if importlib.util.find_spec("torchaudio") is None:
    stand_in = ModuleType("torchaudio")
    stand_in.__spec__ = ModuleSpec("torchaudio", None)
    sys.modules["torchaudio"] = stand_in

from llamafactory.train.tuner import run_exp
from watch import Steps


def main() -> None:
    task = json.loads(sys.argv[1])
    data = Path(task["data"])
    run_exp(
        {
            "model_name_or_path": task["model"], "stage": "sft", "do_train": True, "finetuning_type": "lora",
            "lora_rank": task["r"], "lora_alpha": task["alpha"], "lora_dropout": 0.0, "lora_target": "all",
            "dataset_dir": str(data.parent), "dataset": data.stem, "cutoff_len": task["max_length"],
            "per_device_train_batch_size": task["micro"], "gradient_accumulation_steps": task["accumulate"],
            "max_steps": task["steps"], "learning_rate": task["lr"], "lr_scheduler_type": "constant", "seed": task["seed"],
            "output_dir": task["output"], "logging_steps": 1, "save_steps": 10**6, "report_to": "none", "use_cpu": True,
            **task["settings"],
        },
        callbacks=[Steps(Path(task["lines"]))],
    )  # fmt: skip


if __name__ == "__main__":  # its workers import this file
    main()
