"""What an optimizer step costs on this device: milliseconds and bytes of state, against torch's fused AdamW in fp32.

    python benchmarks/optimizers.py                     # 1, 5 and 50 million weights
    python benchmarks/optimizers.py --weights 5e6 --repeats 9 --json result.json

Each optimizer steps one weight of N numbers, as LoRA's factors lie in one buffer; those that look at shapes have a matrix.
All take turns, and the turns are repeated: what else the machine does falls on all alike. Shown are medians, and the spread.
bitsandbytes' own 8-bit optimizers stand beside ours, for comparison.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snugtune.optim import AdafactorConfig, AdamWConfig, ApolloConfig, GaloreConfig, LionConfig, SgdConfig
from snugtune.types import OptimizerState

BASELINE = "adamw fp32"
CONFIGS = {
    "adamw": AdamWConfig(),
    "lion": LionConfig(),
    "sgd": SgdConfig(),
    "adafactor": AdafactorConfig(),
    "galore": GaloreConfig(),
    "apollo": ApolloConfig(),
}


def programs() -> dict[str, Callable[[nn.Parameter], torch.optim.Optimizer]]:
    """Name -> what makes the optimizer of a weight; the baseline first."""
    from bitsandbytes.optim.adamw import AdamW8bit
    from bitsandbytes.optim.lion import Lion8bit

    def ours(name: str, state: OptimizerState) -> Callable[[nn.Parameter], torch.optim.Optimizer]:
        return lambda weight: CONFIGS[name].build([weight], state)

    made = {f"{name} fp32": ours(name, "fp32") for name in CONFIGS}
    made |= {f"{name} 8bit": ours(name, "8bit") for name, config in CONFIGS.items() if config.obstacle() is None}
    if torch.cuda.is_available():
        made |= {f"{name} paged": ours(name, "paged") for name, config in CONFIGS.items() if config.obstacle() is None}
    made["bitsandbytes AdamW8bit"] = lambda weight: AdamW8bit([weight], weight_decay=0.0)
    made["bitsandbytes Lion8bit"] = lambda weight: Lion8bit([weight])
    return made


def timed(optimizer: torch.optim.Optimizer, steps: int, device: str) -> float:
    """Milliseconds of one step, the mean over a few."""
    begun = time.perf_counter()
    for _ in range(steps):
        optimizer.step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begun) / steps * 1e3


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of what the optimizer remembers."""
    return sum(v.nbytes for entry in optimizer.state.values() for v in entry.values() if isinstance(v, Tensor))


def measure(count: int, repeats: int, device: str) -> list[dict[str, Any]]:
    """One entry an optimizer, for weights of `count` numbers."""
    width = 1024
    optimizers: dict[str, torch.optim.Optimizer] = {}
    for name, make in programs().items():
        shape = (max(1, count // width), width) if CONFIGS.get(name.split()[0], AdamWConfig()).by_matrix else (count,)
        weight = nn.Parameter(torch.randn(shape, device=device))
        weight.grad = torch.randn(shape, device=device)
        optimizers[name] = make(weight)
        timed(optimizers[name], 2, device)  # makes the state, and warms up
    steps = max(1, 2_000_000 // count)
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(repeats):
        for name, optimizer in optimizers.items():
            times[name].append(timed(optimizer, steps, device))
    base_ms, base_bytes = statistics.median(times[BASELINE]), state_bytes(optimizers[BASELINE])
    return [
        {
            "optimizer": name,
            "weights": count,
            "ms": round(statistics.median(taken), 3),
            "ms_min": round(min(taken), 3),
            "ms_max": round(max(taken), 3),
            "state_bytes": state_bytes(optimizers[name]),
            "time_ratio": round(statistics.median(taken) / base_ms, 2),
            "state_ratio": round(state_bytes(optimizers[name]) / base_bytes, 4),
        }
        for name, taken in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=float, nargs="+", default=[1e6, 5e6, 50e6], help="numbers that are stepped")
    parser.add_argument("--repeats", type=int, default=7, help="turns of each")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="file for the results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = []
    for count in arguments.weights:
        results += (found := measure(int(count), arguments.repeats, arguments.device))
        print(f"\n{int(count):,} weights, {arguments.device}, {arguments.threads} threads")
        print(f"{'optimizer':24}{'ms a step':>11}{'spread':>19}{'ratio':>8}{'state, bytes':>15}{'a weight':>10}")
        for r in found:
            spread = f"{r['ms_min']:.2f} to {r['ms_max']:.2f}"
            print(
                f"{r['optimizer']:24}{r['ms']:11.2f}{spread:>19}{r['time_ratio']:8.2f}{r['state_bytes']:15,}"
                f"{r['state_bytes'] / r['weights']:10.3f}"
            )
    if arguments.json:
        conditions = {"device": arguments.device, "threads": arguments.threads, "torch": torch.__version__}
        arguments.json.write_text(json.dumps({**conditions, "repeats": arguments.repeats, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
