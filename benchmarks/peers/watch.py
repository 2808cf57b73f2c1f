"""What a trainer of transformers really trains on, a line of JSON a step. Runs in the peers' environments."""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

IGNORED = -100


def real_tokens(inputs: dict[str, Any]) -> int:
    """Tokens of a forward that are no padding: those that may attend to themselves, whatever kind of mask says so."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return inputs["input_ids"].numel()
    if mask.ndim == 2:
        return int((mask != 0).sum())
    own = mask.diagonal(dim1=-2, dim2=-1)
    return int((own == 0).sum() if own.is_floating_point() else own.bool().sum())  # what is added to scores, or what is allowed


def labels(inputs: dict[str, Any]) -> int:
    """Tokens of a forward that are learned; a row's first is nobody's next token."""
    return int((inputs["labels"][:, 1:] != IGNORED).sum())


class Steps(TrainerCallback):
    """Writes `{"tokens", "label_tokens", "loss"}` as soon as a step is done; log every step."""

    def __init__(self, file: Path):
        self.file = file.open("a", buffering=1, encoding="utf-8")
        self.seen = {"tokens": 0, "label_tokens": 0}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module: Any, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        self.seen["tokens"] += real_tokens(inputs)
        self.seen["label_tokens"] += labels(inputs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is not None and "loss" in logs:  # the summary at the end has none
            self.file.write(json.dumps(self.seen | {"loss": float(logs["loss"])}) + "\n")
            self.seen = dict.fromkeys(self.seen, 0)
