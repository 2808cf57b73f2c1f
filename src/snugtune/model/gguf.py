"""GGUF files as models: dequantised once into a cached transformers folder.

Unpacking a file takes seconds to minutes, so the result is kept under `cache_dir()`. It runs in a process of its own
(`python -m snugtune.model.gguf SOURCE TARGET`): its transient memory is several times the model's, and would count as
the run's peak. The converted weights are the file's, not those of the model on the hub that the file was made from.
"""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from snugtune.errors import InputError
from snugtune.files import cache_dir, claimed, make_folder, remove_leftovers, whole_folder
from snugtune.model.gguf_header import check_gguf

# Byte-level vocabularies whose merges were learned on single digits, and that transformers does not know by name:
# digits are cut out one by one before GPT-2's split (llama.cpp, `llama-vocab.cpp`).
SINGLE_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
# Vocabularies that use GPT-2's own split, which is what transformers builds by default.
PLAIN_GPT2 = frozenset({"gpt-2", "gpt2", "default", "olmo", "mpt", "jais", "trillion", "granite-docling"})
FORMAT = 1  # part of the cache key; raise it when the conversion changes


def converted(file: Path, say: Callable[[str], None]) -> tuple[Path, tuple[str, ...]]:
    """The transformers folder made from `file` and what to say about it; converts on the first use."""
    stat = file.stat()
    key = f"{FORMAT}:{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
    target = cache_dir() / "gguf" / f"{file.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if not (target / "config.json").is_file():
        check_gguf(file)
        say(f"unpacking {file.name} (once; kept in {target.parent})")
        make_folder(target.parent)
        with claimed(target.parent, waiting=say):
            if not (target / "config.json").is_file():  # another process may have done it meanwhile
                remove_leftovers(target.parent)
                try:
                    _convert_apart(file, target)
                finally:
                    remove_leftovers(target.parent)  # of one that was interrupted: it is killed
    notes = json.loads((target / "snugtune.json").read_text())["notes"]
    return target, tuple(notes)


def _convert_apart(file: Path, target: Path) -> None:
    """`convert` in a process of its own; out of reach of the terminal's Ctrl-C, which is ours to answer."""
    command = [sys.executable, "-P", "-m", "snugtune.model.gguf", str(file), str(target)]  # -P: not from this folder
    done = subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(f"model: {file} could not be read as GGUF: {last}")


def convert(source: Path, target: Path) -> None:
    """Write `source` as a transformers folder at `target`, all or nothing.

    Quantised files become bf16 (their own error is larger than its rounding), files with 16 or 32 bit matrices fp32.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    types, pre = _inspect(source)
    dtype = torch.float32 if types & {"F32", "F16"} else torch.bfloat16
    location: dict[str, Any] = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(**location)
    notes = [f"{source.name}: weights dequantised from {'/'.join(sorted(types))}; not bit-equal to the original model"]
    notes += _set_pre_tokenizer(tokenizer, pre)
    loaded = AutoModelForCausalLM.from_pretrained(**location, dtype=dtype, quantization_config=GgufConfig(dequantize=True))
    config = type(loaded.config).from_dict({k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"})
    # A model that came from GGUF refuses to be saved; the same weights in a fresh one do not.
    with torch.device("meta"):
        fresh = AutoModelForCausalLM.from_config(config, dtype=dtype)
    fresh.load_state_dict(loaded.state_dict(), assign=True)
    fresh.generation_config = loaded.generation_config
    with whole_folder(target) as made:
        fresh.save_pretrained(made)
        tokenizer.save_pretrained(made)
        (made / "snugtune.json").write_text(json.dumps({"notes": notes}))


def _inspect(file: Path) -> tuple[set[str], str | None]:
    """The number formats of the file's matrices, and its pre-tokenizer's name."""
    from gguf import GGUFReader

    reader = GGUFReader(str(file))
    types = {t.tensor_type.name for t in reader.tensors if len(t.shape) > 1}
    field = reader.fields.get("tokenizer.ggml.pre")
    return types, None if field is None else str(field.contents())


def _set_pre_tokenizer(tokenizer: Any, name: str | None) -> list[str]:
    """Honour `tokenizer.ggml.pre` where transformers does not. Returns what the user should be told."""
    from tokenizers import pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    if name is None or name in PLAIN_GPT2 or name in GGUF_PRE_TOKENIZER_SPLITS:
        return []
    if name not in SINGLE_DIGITS:
        return [f"its pre-tokenizer '{name}' is unknown here; text may be cut into other tokens than the model was trained on"]
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    return []


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
