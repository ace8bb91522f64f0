"""A tokenizer for tiny vocabularies: one letter a token."""


class TinyTokenizer:
    """Maps lower-case letters and a few signs to the ids [0, size); the last id ends a text."""

    bos_token = None
    name_or_path = "tiny"
    has_chat_template = False

    def __init__(self, size: int, end_tokens: tuple[int, ...] | None = None):
        self.size = size
        self.eos_token_ids = {size - 1} if end_tokens is None else set(end_tokens)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [(ord(c) - 97) % self.size for c in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(97 + id) for id in ids)

    def __len__(self) -> int:
        return self.size
