"""Real tokenizers that split characters: byte-level BPE, and SentencePiece with byte fallback."""

from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END = "<end>"


def byte_level(merged: tuple[str, ...] = ()) -> TokenizerWrapper:
    """A token for each byte, and one for each of the texts in ``merged``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocabulary = {token: id for id, token in enumerate(alphabet)}
    merges = []
    for text in merged:
        [(name, _)] = split.pre_tokenize_str(text)
        for end in range(2, len(name) + 1):
            if name[:end] not in vocabulary:
                merges.append((name[: end - 1], name[end - 1]))
                vocabulary[name[:end]] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    return _wrapped(tokenizer)


def byte_fallback(characters: str) -> TokenizerWrapper:
    """A token for each of these characters; others are split into their bytes."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *characters]
    vocabulary = {name: id for id, name in enumerate(dict.fromkeys(names))}
    model = models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _wrapped(tokenizer)


def _wrapped(tokenizer: Tokenizer) -> TokenizerWrapper:
    tokenizer.add_special_tokens([END])
    return TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END))
