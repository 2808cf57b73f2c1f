"""What is compared: each program as it comes, and as who knows it well would set it up for this machine. Extend it here."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One line of the table. `settings` go to the peer by its own names: the plan's pins, `SFTConfig`'s, the YAML's."""

    key: str  # for --only
    peer: str  # snugtune, trl, llamafactory
    title: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    micro: int = 0  # rows of a forward; 0: all of a step. snugtune's own is a setting.
    packed: bool = False  # a row holds several sequences: fewer rows make a step of as many tokens


_PINNED = {"micro_batch": 1, "recompute": "none"}
_LEAST = {"recompute": "blocks", "offload": "weights", "weights": "nf4", "double_quant": True, "optimizer_state": "8bit"}
_TRL_TUNED = {"gradient_checkpointing": False, "bf16": True, "dtype": "bfloat16"}
_LF = {"bf16": True}
_LF_FAST = _LF | {"disable_gradient_checkpointing": True}
_LF_EXAMPLE = _LF | {"preprocessing_num_workers": 16, "dataloader_num_workers": 4}  # examples/train_lora/qwen3_lora_sft.yaml
_NEAT = _LF_FAST | {"packing": True, "neat_packing": True}

ROWS = (
    Row("snugtune", "snugtune", "snugtune, as it comes"),
    Row("snugtune-three", "snugtune", "snugtune, micro-batch 3, no recompute", _PINNED | {"micro_batch": 3}),
    Row("snugtune-one", "snugtune", "snugtune, micro-batch 1, no recompute", _PINNED),
    Row("snugtune-lean", "snugtune", "snugtune, micro-batch 1, recompute", _PINNED | {"recompute": "blocks"}),
    Row("snugtune-least", "snugtune", "snugtune, in the least memory", _PINNED | _LEAST),
    Row("trl", "trl", "TRL, as it comes"),
    Row("trl-padded", "trl", "TRL, bf16, no checkpointing", _TRL_TUNED),
    Row("trl-one", "trl", "TRL, bf16, no checkpointing, micro-batch 1", _TRL_TUNED, micro=1),
    Row("trl-packed", "trl", "TRL, bf16, no checkpointing, packed", _TRL_TUNED | {"packing": True}, packed=True),
    Row("lf", "llamafactory", "LLaMA-Factory, as its example comes", _LF_EXAMPLE, micro=1),
    Row("lf-padded", "llamafactory", "LLaMA-Factory, no checkpointing", _LF_FAST),
    Row("lf-one", "llamafactory", "LLaMA-Factory, no checkpointing, micro-batch 1", _LF_FAST, micro=1),
    Row("lf-neat", "llamafactory", "LLaMA-Factory, no checkpointing, neat_packing", _NEAT, packed=True),
    Row("lf-neat-one", "llamafactory", "LLaMA-Factory, no checkpointing, neat_packing, micro-batch 1", _NEAT, 1, True),
    Row("lf-lean", "llamafactory", "LLaMA-Factory, checkpointing, micro-batch 1, no workers", _LF, micro=1),
)
