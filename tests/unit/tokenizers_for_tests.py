"""Small tokenizers built in code: a byte-level BPE like GPT-2's and a SentencePiece-like one with byte fallback."""

from collections.abc import Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = (
    "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>",
)  # fmt: skip

_CORPUS = (
    "You are a helpful assistant. Hello, how are you today? The answer is here: one, two, three.",
    "user assistant system model User Assistant System Human Question Answer question answer",
    "What is the capital of France? The capital of France is Paris.\n\nAnother line of text.\n\n\nAnd more of it.",
)


_TIKTOKEN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How Llama 3's and Qwen's kind cuts text into words: line breaks stay together, also before a word."""


def byte_level(
    template: str | None = None,
    eos: str = "</s>",
    bos: str | None = "<s>",
    trim_offsets: bool = True,
    special: Sequence[str | AddedToken] = SPECIAL_TOKENS,
    added: Sequence[str] = (),
    words: str | None = None,
):
    """GPT-2's kind: every byte has a token, so an emoji is several tokens that share the offsets of one character.

    `trim_offsets` is GPT-2's habit of leaving a word's leading space out of its offsets. `special` and `added` are
    control tokens; those in `added` are not marked special. `words`: another way than GPT-2's to cut text into words.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    if words is not None:
        cut = pre_tokenizers.Split(Regex(words), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return _wrapped(tokenizer, template, eos, bos, special, added)


def tiktoken_like(template: str | None = None, **how):
    """Llama 3's and Qwen's kind: bytes, too, but cut into other words."""
    return byte_level(template, words=_TIKTOKEN, **how)


def sentencepiece_like(
    template: str | None = None,
    eos: str = "</s>",
    bos: str | None = "<s>",
    special: Sequence[str | AddedToken] = SPECIAL_TOKENS,
    added: Sequence[str] = (),
):
    """Llama 2's kind: spaces become a letter, one is put in front, and unknown characters fall back to byte tokens."""
    letters = sorted({c for text in _CORPUS for c in text.replace(" ", "▁")} | set("▁[]/<>|_'"))
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    merges = [tuple(pair.split()) for pair in ("▁ t", "▁t h", "▁th e", "▁ H", "l l", "e ll", "▁H ell", "▁Hell o", "H ell")]
    vocabulary = {name: i for i, name in enumerate([*names, *("".join(pair) for pair in merges)])}
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _wrapped(tokenizer, template, eos, bos, special, added)


def _wrapped(
    tokenizer: Tokenizer,
    template: str | None,
    eos: str,
    bos: str | None,
    special: Sequence[str | AddedToken],
    added: Sequence[str],
) -> PreTrainedTokenizerFast:
    others = [token for token in special if str(token) not in (eos, bos)]
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos,
        bos_token=bos,
        extra_special_tokens=others,
        clean_up_tokenization_spaces=False,
    )
    wrapped.add_tokens(list(added))
    wrapped.chat_template = template
    return wrapped
