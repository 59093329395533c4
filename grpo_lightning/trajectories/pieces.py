"""What each token of a sequence shows: text that is right when joined, although a token may be part of a character."""

import codecs
import re
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

TokenBytes = Callable[[int], bytes | None]
"""From a token id to what the token says in UTF-8, which may be part of a character; None for an unknown id."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_bytes(tokenizer: Any) -> TokenBytes:
    """What each token of a Hugging Face tokenizer says, special tokens under their names.

    Args:
        tokenizer: Of byte-level BPE, of SentencePiece's kind, or any other that decodes single tokens.
    """
    special = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()}
    kind = str(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", ""))
    byte_of = _byte_alphabet() if "ByteLevel" in kind else {}

    @cache
    def of(token_id: int) -> bytes | None:
        if token_id in special:
            return special[token_id].encode()
        # Fast tokenizers answer None for an id that they do not know, others raise.
        piece = tokenizer.convert_ids_to_tokens(token_id) if token_id < len(tokenizer) else None
        if piece is None:
            return None
        if byte_of:
            return b"".join(byte_of.get(letter) or letter.encode() for letter in piece)
        if match := _BYTE_TOKEN.fullmatch(piece):
            return bytes.fromhex(match[1])
        if "▁" in piece:
            return str(piece).replace("▁", " ").encode()
        return str(tokenizer.decode([token_id])).encode()

    return of


def _byte_alphabet() -> dict[str, bytes]:
    """The letters in which byte-level BPE writes bytes: those that print stand for themselves, others come from 256."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): bytes([byte]) for byte in printable}
    return letters | {chr(256 + place): bytes([byte]) for place, byte in enumerate(others)}


class PieceTable:
    """What tokens show, each way of showing one kept once.

    Args:
        token_bytes: What a token says; None to show ids instead.

    Attributes:
        ids: Token id of each entry.
        texts: What it shows, of each entry; None for an id without text.
        bytes: Hexadecimal bytes of the entries whose token does not complete a character.
    """

    def __init__(self, token_bytes: TokenBytes | None) -> None:
        self.ids: list[int] = []
        self.texts: list[str | None] = []
        self.bytes: dict[int, str] = {}
        self._token_bytes = token_bytes or (lambda token_id: None)
        self._place: dict[tuple[int, str | None], int] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def entries(self, token_ids: Iterable[int]) -> list[int]:
        """The entry of each token of one sequence.

        A character is shown by the token that completes it; the tokens before it that hold its other bytes show none.
        Bytes that are no part of any character show as U+FFFD.

        Args:
            token_ids: The sequence, from its start.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        shown = []
        for token_id in token_ids:
            raw = self._token_bytes(token_id)
            shown.append(self._entry(token_id, None if raw is None else decoder.decode(raw), raw))
        return shown

    def truncate(self, length: int) -> None:
        """Forget all entries but the first ``length``."""
        del self.ids[length:], self.texts[length:]
        self.bytes = {place: raw for place, raw in self.bytes.items() if place < length}
        self._place = {key: place for key, place in self._place.items() if place < length}

    def _entry(self, token_id: int, text: str | None, raw: bytes | None) -> int:
        place = self._place.setdefault((token_id, text), len(self.ids))
        if place == len(self.ids):
            self.ids.append(token_id)
            self.texts.append(text)
            if raw and not text:
                self.bytes[place] = raw.hex(" ")
        return place
