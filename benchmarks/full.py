"""Full training of the demo's model in less memory: the peak of each means, and what it learns on the same data.

    python benchmarks/full.py --data alpaca_en_demo.json [--steps 20] [--batch 4] [--length 256] [--only adamw released]

Every program is a process of its own. Clipping is off for all, since released gradients cannot be clipped.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from common import in_turn, table, train

Fields = dict[str, Any]
MINI: Fields = {"type": "apollo", "rank": 1, "scaling": "tensor"}
ROTATED: Fields = {"type": "rotate", "blocks": 3, "every": 3}
RELEASED: Fields = {"gradients": "released"}
PROGRAMS: dict[str, Fields] = {
    "adamw": {},
    "8bit": {"plan": {"optimizer_state": "8bit"}},
    "adafactor": {"optimizer": {"type": "adafactor"}},
    "galore": {"optimizer": {"type": "galore"}},
    "apollo": {"optimizer": {"type": "apollo"}},
    "released": {"plan": RELEASED},
    "8bit, released": {"plan": RELEASED | {"optimizer_state": "8bit"}},
    "galore, released": {"plan": RELEASED, "optimizer": {"type": "galore"}},
    "apollo-mini, released": {"plan": RELEASED, "optimizer": MINI},
    "rotate (BAdam)": {"method": ROTATED},
    "rotate with ends (LISA)": {"method": ROTATED | {"ends": True}},
}


def config(name: str, asked: argparse.Namespace, seed: int) -> Fields:
    fields = PROGRAMS[name]
    return {
        "model": "demo", "data": asked.data, "validation": asked.validation, "steps": asked.steps, "batch_size": asked.batch,
        "max_seq_len": asked.length, "max_grad_norm": None, "checkpoint_every": asked.steps, "eval_every": asked.steps,
        "seed": seed,
        "method": fields.get("method", "full"), "optimizer": {"lr": asked.lr} | fields.get("optimizer", {}),
        "plan": {"weights": asked.weights, "micro_batch": asked.batch} | fields.get("plan", {}),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--validation", type=float, default=0.03, help="fraction of the data")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step, which is one forward")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--weights", default="bf16")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:

        def program(name: str, index: int) -> Any:
            return train(config(name, asked, index), Path(scratch) / f"{list(PROGRAMS).index(name)}-{index}")

        results = in_turn({name: partial(program, name) for name in asked.only}, asked.rounds)
    rows = [
        (name, ", ".join(f"{r.peak_bytes / 2**20:.0f}" for r in found), ", ".join(f"{r.held_out:.4f}" for r in found))
        for name, found in results.items()
    ]
    print(table(("means", "peak, MiB", "held-out loss"), rows))


if __name__ == "__main__":
    main()
