"""Tokenised data, kept: the same items, tokenizer, template and settings are tokenised once.

Items are cached in shards of `SHARD`, each a safetensors file named by everything its content follows from. So what an
interrupted process had done is found again, and two processes at worst do the same work twice: files appear whole, and the
same name means the same content. Data that grew at its end is tokenised at its end alone, unless a fraction of it is held
out for validation: that is drawn anew.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from snugtune.data.forms import Item
from snugtune.data.sources import Drops
from snugtune.errors import StorageError
from snugtune.files import code_of, forget_unused, make_folder, still_used, write_whole
from snugtune.types import Example

SHARD = 1000  # items

Tokenise = Callable[[Iterable[Item], Drops], list[Example]]


def tokenizer_identity(tokenizer: Any) -> str:
    """What of a tokenizer decides about the tokens of a conversation, as a hash."""
    parts = (tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map)
    parts += (tokenizer.split_special_tokens,)
    return hashlib.blake2b(repr(parts).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


@functools.cache
def _our_tools() -> tuple[str, str, str]:
    """The code of this process, which stays as it is."""
    return code_of(Path(__file__).parent), version("transformers"), version("tokenizers")


class TokenCache:
    """Shards in `folder`, for one way of tokenising, which `settings` describe in full.

    `problem` says why nothing could be kept, if so: a cache that cannot be written stops nobody.
    """

    def __init__(self, folder: Path, settings: Sequence[object]):
        self.folder = folder
        self.settings = repr((*_our_tools(), *settings))
        self.problem: str | None = None

    def tokenised(self, items: Sequence[Item], tracked: Iterable[Item], tokenise: Tokenise, drops: Drops) -> list[Example]:
        """All examples of `items`, in order. `tracked` yields the same items and shows progress."""
        stream, examples, written = iter(tracked), [], False
        for start in range(0, len(items), SHARD):
            shard = items[start : start + SHARD]
            coming = islice(stream, len(shard))
            path = self.folder / f"{self._key(shard)}.safetensors"
            found = _read(path)
            if found is None:
                found = _tokenise(coming, tokenise)
                written = self._write(path, *found) or written
            else:
                list(coming)
            examples += found[0]
            drops.merge(found[1])
        if written:
            forget_unused(self.folder)
        return examples

    def _key(self, shard: Sequence[Item]) -> str:
        digest = hashlib.blake2b(self.settings.encode(), digest_size=20)
        for item in shard:
            digest.update(repr(item).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def _write(self, path: Path, examples: Sequence[Example], drops: Drops) -> bool:
        tensors = {
            "lengths": torch.tensor([len(e.tokens) for e in examples], dtype=torch.int64),
            "tokens": _joined([e.tokens for e in examples]).to(torch.int32),
            "weights": _joined([e.weights for e in examples]).float(),
        }
        about = {"sources": json.dumps([e.source for e in examples]), "drops": json.dumps([drops.counts, drops.places])}
        try:
            make_folder(self.folder)
            write_whole(path, save(tensors, about))
        except StorageError as error:
            self.problem = f"the tokens are not kept for the next run: {error}"
            return False
        return True


def _tokenise(items: Iterable[Item], tokenise: Tokenise) -> tuple[list[Example], Drops]:
    drops = Drops()
    return tokenise(items, drops), drops


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat(list(parts)) if parts else torch.empty(0)


def _read(path: Path) -> tuple[list[Example], Drops] | None:
    """The examples of a shard and what was left out in it; None where there is no whole file."""
    try:
        with safe_open(path, "pt") as stored:
            lengths, tokens, weights = (stored.get_tensor(name) for name in ("lengths", "tokens", "weights"))
            about = stored.metadata()
        sources, (counts, places) = json.loads(about["sources"]), json.loads(about["drops"])
        examples = list(_examples(lengths.tolist(), tokens.long(), weights, sources))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError):
        return None  # it is made anew
    still_used(path)
    drops = Drops()
    drops.counts.update(counts)
    drops.places.update(places)
    return examples, drops


def _examples(lengths: list[int], tokens: torch.Tensor, weights: torch.Tensor, sources: list[str]) -> Iterator[Example]:
    for ids, w, source in zip(tokens.split(lengths), weights.split(lengths), sources, strict=True):
        yield Example(ids, w, source)
