"""Joined pieces are the text, of real kinds of tokenizer and of bytes that are no text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grpo_lightning.trajectories.pieces import PieceTable, token_bytes


def byte_level():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=["<|im_end|>", "</é>"])


def byte_fallback():
    words = ["▁Hello", "▁wor", "ld", "▁"] + [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def shown(table, ids):
    return [table.texts[entry] for entry in table.entries(ids)]


@given(st.text())
def test_joined_pieces_of_byte_level_bpe_are_the_text(text):
    tokenizer = TOKENIZER
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert "".join(shown(PieceTable(token_bytes(tokenizer)), ids)) == text


TOKENIZER = byte_level()


def test_a_character_stands_where_it_is_completed():
    ids = TOKENIZER("a😀", add_special_tokens=False)["input_ids"]
    table = PieceTable(token_bytes(TOKENIZER))
    assert shown(table, ids) == ["a", "", "", "", "😀"]
    assert [table.bytes.get(entry) for entry in table.entries(ids)] == [None, "f0", "9f", "98", None]


def test_special_tokens_show_their_names():
    table = PieceTable(token_bytes(TOKENIZER))
    assert shown(table, TOKENIZER("é<|im_end|></é>", add_special_tokens=False)["input_ids"]) == [
        "",
        "é",
        "<|im_end|>",
        "</é>",
    ]


def test_bytes_that_are_no_character_are_replaced_and_later_ones_not():
    table = PieceTable(lambda token_id: bytes([token_id]))
    assert shown(table, [0xF0, 0x9F, 0x41, 0xC3, 0xA9]) == ["", "", "\ufffdA", "", "é"]


def test_a_sequence_that_ends_within_a_character_shows_bytes():
    table = PieceTable(lambda token_id: bytes([token_id]))
    entries = table.entries([0x41, 0xE6, 0x97])
    assert [table.texts[entry] for entry in entries] == ["A", "", ""]
    assert [table.bytes.get(entry) for entry in entries] == [None, "e6", "97"]


def test_pieces_of_sentencepiece():
    tokenizer = byte_fallback()
    ids = tokenizer.convert_tokens_to_ids(["▁Hello", "▁wor", "ld", "<0xC3>", "<0xA9>"])
    assert shown(PieceTable(token_bytes(tokenizer)), ids) == [" Hello", " wor", "ld", "", "é"]


def test_other_tokenizers_decode_single_tokens(tiny_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids = tokenizer("user: 1", add_special_tokens=False)["input_ids"]
    assert "".join(shown(PieceTable(token_bytes(tokenizer)), ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("unknown", [258, 10**6])
def test_ids_beyond_the_vocabulary_have_no_text(unknown):
    assert shown(PieceTable(token_bytes(TOKENIZER)), [unknown]) == [None]


def test_without_a_tokenizer_there_are_ids_alone():
    table = PieceTable(None)
    assert shown(table, [7, 7, 8]) == [None, None, None]
    assert table.ids == [7, 8]


def test_each_way_of_showing_a_token_is_kept_once():
    table = PieceTable(lambda token_id: bytes([token_id]))
    table.entries([0x41, 0x41, 0xC3, 0xA9, 0xC4, 0xA9])
    # 0xA9 ends two different characters.
    assert [(table.ids[i], table.texts[i]) for i in range(len(table))] == [
        (0x41, "A"),
        (0xC3, ""),
        (0xA9, "é"),
        (0xC4, ""),
        (0xA9, "ĩ"),
    ]


def test_what_was_truncated_comes_back_as_new():
    table = PieceTable(lambda token_id: bytes([token_id]))
    table.entries([0x41])
    table.entries([0x42, 0xC3])
    table.truncate(1)
    assert (table.ids, table.texts, table.bytes) == ([0x41], ["A"], {})
    assert (table.entries([0xC3]), table.entries([0x41])) == ([1], [0])
    assert table.bytes == {1: "c3"}
