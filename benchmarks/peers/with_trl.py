"""One run of TRL's `SFTTrainer` with PEFT: everything not set here is its default. Runs in its own environment.

python with_trl.py TASK    # JSON, as task.py writes it
"""

import json
import sys
from pathlib import Path

from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer
from watch import Steps


def main() -> None:
    task = json.loads(sys.argv[1])
    settings = dict(task["settings"])
    dtype = settings.pop("dtype", None)
    config = SFTConfig(
        output_dir=task["output"], max_steps=task["steps"], max_length=task["max_length"], seed=task["seed"],
        per_device_train_batch_size=task["micro"], gradient_accumulation_steps=task["accumulate"],
        learning_rate=task["lr"], lr_scheduler_type="constant", logging_steps=1, report_to="none", use_cpu=True,
        model_init_kwargs={"dtype": dtype} if dtype else None, **settings,
    )  # fmt: skip
    lora = LoraConfig(r=task["r"], lora_alpha=task["alpha"], lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    data = load_dataset("json", data_files=task["data"], split="train")
    SFTTrainer(
        model=task["model"], args=config, train_dataset=data, peft_config=lora, callbacks=[Steps(Path(task["lines"]))]
    ).train()


if __name__ == "__main__":
    main()
