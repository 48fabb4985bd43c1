"""Pieces of a text have the tokens of the whole, with every tokenizer whose splitting is known, and no other is cut."""

import json

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_psft.data import word_cache
from megatron_psft.data.word_cache import WordCache

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
SPLITS = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    "qwen": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN), "isolated"), BYTES]),
    "llama3": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), BYTES]),
}
# Whatever an expression may treat in a way of its own, and what is normalized, combined or no blank to everybody.
FRAGMENTS = [
    *("a", "the", "Word", "x", "é", "e\u0301", "\u0301", "中", "我们", "ß", "½", "²", "7", "2024", "_", "__"),
    *(" ", "  ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", "\u0085", "\x1c", "\u200b", "\ufeff"),
    *("'", "'s", "'LL", "\u2019t", ".", ",\n", "...", "^2", "$", "\\frac{", "}", "(", "😀", "\x00", "-", "--\n"),
    *("<|im_start|>", "<|im_end|>", "<|im_", "<tool>", "assistant"),
]
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=30).map("".join)


def make_tokenizer(pre_tokenizer, *, token: AddedToken | None = None) -> PreTrainedTokenizerFast:
    """A BPE of its own for each way to split, with merges within and, were it allowed, across its parts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    text = (
        "the Word we've 2024 seen, x^2 + 3x = 5.\n\nWait... it's \\frac{a}{b}  we' ll. été\u0301 我们 ½² __init__\r\n"
    )
    tokenizer.train_from_iterator([text] * 20, trainer)
    tokenizer.add_special_tokens([token or AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZERS = {name: make_tokenizer(split) for name, split in SPLITS.items()}
CACHES = {name: WordCache(tokenizer) for name, tokenizer in TOKENIZERS.items()}


def assert_equal_to_the_whole(cache: WordCache, tokenizer, texts: list[str]) -> None:
    wholes = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    for ids, offsets, encoded in zip(wholes["input_ids"], wholes["offset_mapping"], cache.encode(texts), strict=True):
        assert encoded.tokens.tolist() == ids
        assert [tuple(pair) for pair in encoded.offsets.tolist()] == offsets
        assert (encoded.tokens.dtype, encoded.offsets.dtype) == (np.int32, np.int32)


@pytest.mark.parametrize("name", SPLITS)
@given(texts=st.lists(TEXTS, min_size=1, max_size=3))
@example(texts=["<|im_start|>assistant\nWe've seen x_1, x_2 and  x.\n\nWait: 7 + 2024...", "", " "])
def test_pieces_have_the_tokens_and_offsets_of_the_whole(name, texts):
    assert_equal_to_the_whole(CACHES[name], TOKENIZERS[name], texts)


@pytest.mark.parametrize("name", SPLITS)
def test_a_word_is_tokenized_once(name, monkeypatch):
    cache, asked = WordCache(TOKENIZERS[name]), []
    tokenize = cache._tokenize
    monkeypatch.setattr(cache, "_tokenize", lambda texts: asked.append(sorted(texts)) or tokenize(texts))
    cache.encode(["a word,<|im_end|>a"])
    cache.encode(["a word now", "now"])
    assert asked == [sorted(["a", " word", ",", "<|im_end|>"]), sorted([" now", "now"])]


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(word_cache, "_MOST_WORDS", 10)
    cache = WordCache(TOKENIZERS["qwen"])
    for first in range(0, 60, 6):
        assert_equal_to_the_whole(cache, TOKENIZERS["qwen"], [f"w{n} " + "x" * 40 for n in range(first, first + 6)])
        assert len(cache._words) < 10 + 7
        assert max(map(len, cache._words)) < 40


BORROWED = AddedToken("<|im_start|>", rstrip=True)  # takes the blanks behind it


@pytest.mark.parametrize(
    "tokenizer",
    [
        make_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)),
        make_tokenizer(pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\w+ \w+|."), "isolated"), BYTES])),
        make_tokenizer(pre_tokenizers.Metaspace()),
        make_tokenizer(SPLITS["qwen"], token=BORROWED),
    ],
    ids=["prefix-space", "other-expression", "metaspace", "stripping-token"],
)
@given(text=TEXTS)
@example(text="the Word we've seen <|im_start|>  the Word")
def test_other_tokenizers_get_their_texts_whole(tokenizer, text):
    cache = WordCache(tokenizer)
    assert cache._pieces(text) == [text]
    assert_equal_to_the_whole(cache, tokenizer, [text])


def test_merges_that_are_left_to_chance_are_drawn_for_every_text():
    tokenizer = make_tokenizer(SPLITS["qwen"])
    tokenizer.backend_tokenizer.model.dropout = 0.5
    assert WordCache(tokenizer)._pieces("the Word we've seen") == ["the Word we've seen"]


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "llama3"])
def test_real_tokenizers_are_cut_and_agree_on_long_chains_of_thought(real_data, name):
    tokenizer = AutoTokenizer.from_pretrained(real_data / "tokenizers" / name)
    with open(real_data / "longcot" / "limo_r1_distill_qwen_32b.jsonl", encoding="utf-8") as file:
        texts = [json.loads(line)["messages"][-1]["content"] for line in file][:20]
    cache = WordCache(tokenizer)
    assert_equal_to_the_whole(cache, tokenizer, texts)
    assert len(cache._pieces(texts[0])) > len(texts[0]) / 10
