"""Write a Llama of random weights in any size, in bf16 or as bitsandbytes keeps it in NF4, tensor by tensor.

    python benchmarks/synthetic.py FOLDER --layers 32 --width 4096 --inner 11008 --heads 32 --vocab 32000 --nf4

Those are the measures of Llama-2 7B. Nothing larger than one tensor is ever in memory; one file a block. The weights have a
standard deviation of 0.02, so that states stay finite; the tokenizer knows bytes. It is for measuring, not for talking.
"""

import argparse
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

STD = 0.02
NF4 = (-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105003, 0.0, 0.0795803, 0.1609302, 0.2461123,
       0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0)  # fmt: skip
ABSMAX = STD / (sum(x * x for x in NF4) / 16) ** 0.5
"""Scales of blocks whose 16 codes are equally frequent."""
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class Spec(NamedTuple):
    """A tensor to write: how safetensors calls its dtype, its shape and bytes, and what makes it."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    make: Callable[[], torch.Tensor]


def write_llama(folder: Path, layers: int, width: int, inner: int, heads: int, vocab: int, nf4: bool, seed: int = 0) -> None:
    """Write config, tokenizer and weights; a folder that is there already stays as it is."""
    if (folder / "model.safetensors.index.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    for shard, specs in _shards(layers, width, inner, vocab, nf4, generator):
        _write(folder / shard, specs)
        weight_map |= dict.fromkeys(specs, shard)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        max_position_embeddings=4096, tie_word_embeddings=False, dtype="bfloat16",
    ).to_dict() | {"architectures": ["LlamaForCausalLM"]}  # fmt: skip
    if nf4:
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str))
    _tokenizer().save_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _shards(
    layers: int, width: int, inner: int, vocab: int, nf4: bool, generator: torch.Generator
) -> Iterator[tuple[str, dict[str, Spec]]]:
    attention = {f"self_attn.{p}_proj": (width, width) for p in "qkvo"}
    linears = attention | {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
    for layer in range(layers):
        prefix, specs = f"model.layers.{layer}", {}
        for name, (out, into) in linears.items():
            make = _packed if nf4 else _dense
            specs |= make(f"{prefix}.{name}.weight", out, into, generator)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            specs |= _ones(f"{prefix}.{norm}.weight", width)
        yield f"block-{layer:03d}.safetensors", specs
    ends = _dense("model.embed_tokens.weight", vocab, width, generator) | _dense("lm_head.weight", vocab, width, generator)
    yield "ends.safetensors", ends | _ones("model.norm.weight", width)


def _dense(name: str, out: int, into: int, generator: torch.Generator) -> dict[str, Spec]:
    def make() -> torch.Tensor:
        return torch.empty(out, into, dtype=torch.bfloat16).normal_(std=STD, generator=generator)

    return {name: Spec("BF16", (out, into), 2 * out * into, make)}


def _ones(name: str, width: int) -> dict[str, Spec]:
    return {name: Spec("BF16", (width,), 2 * width, lambda: torch.ones(width, dtype=torch.bfloat16))}


def _packed(name: str, out: int, into: int, generator: torch.Generator) -> dict[str, Spec]:
    """A weight as bitsandbytes saves it: two codes a byte, the scales of blocks of 64, the codes' values, and its state."""
    state = json.dumps({"quant_type": "nf4", "blocksize": 64, "shape": [out, into], "dtype": "bfloat16"}).encode()
    bytes_, blocks = out * into // 2, out * into // 64

    def packed() -> torch.Tensor:
        return torch.empty(bytes_, 1, dtype=torch.uint8).random_(256, generator=generator)

    return {
        name: Spec("U8", (bytes_, 1), bytes_, packed),
        f"{name}.absmax": Spec("F32", (blocks,), 4 * blocks, lambda: torch.full((blocks,), ABSMAX)),
        f"{name}.quant_map": Spec("F32", (16,), 64, lambda: torch.tensor(NF4)),
        f"{name}.quant_state.bitsandbytes__nf4": Spec(
            "U8", (len(state),), len(state), lambda: torch.frombuffer(bytearray(state), dtype=torch.uint8)
        ),
    }


def _write(file: Path, specs: dict[str, Spec]) -> None:
    """A safetensors file, tensor by tensor: length of the header, header, bytes."""
    header, offset = {}, 0
    for name, spec in specs.items():
        header[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [offset, offset + spec.nbytes]}
        offset += spec.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for spec in specs.values():
            out.write(spec.make().view(torch.uint8).numpy().data)


def _tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*specials, *letters])}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(token, special=True) for token in specials])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    for name, default in (("layers", 4), ("width", 1024), ("inner", 2816), ("heads", 16), ("vocab", 4096), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--nf4", action="store_true", help="as bitsandbytes keeps a model in NF4, instead of bf16")
    write_llama(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
