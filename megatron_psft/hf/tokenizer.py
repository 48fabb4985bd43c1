"""Whether two tokenizers make the same tokens, and which class has a folder's tokenizer load as its files say.

transformers 5 chooses a tokenizer's class by the `model_type` of the config.json beside it and by what
tokenizer_config.json names. Some classes (Qwen2Tokenizer) take nothing but the vocabulary from tokenizer.json, and cut
texts their own way.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_psft.errors import UserError, first_line

if TYPE_CHECKING:  # it takes seconds to import
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"

HARD_TEXTS = (
    "",
    " ",
    "24clips 48/2",
    "#### 72",
    "1234567890 3.14159 1,000,000 ٣٤٥ ½ ²",
    "Hello  12345   two, three    blanks ",
    "\tindented\n\n\n    def f(x):\n\treturn x[0]  # 4 spaces\r\n\r\n",
    "don't I'LL we've O'Neill \u2019s",
    "a\u0301 e\u0308 \u1e9b\u0323 \ufb01 \u212b",  # decomposed, ligature, Ångström: NFC, NFD, NFKC
    "é ü ñ Ω İı ß",
    "你好\uff0c世界。こんにちは 안녕하세요",
    "مرحبا שלום हिन्दी ไทย",
    "😀👍🏽👨‍👩‍👧 ☃\ufe0f",
    "\u200b\ufeff\u00a0\u2028\u3000\x00\x07\x7f",
    "snake_case camelCase kebab-case HTTPServer2 x86_64 foo.bar::baz()",
    '{"key": [1, 2.5e-3, null], "s": "\\n"} <a href="x?y=1&z=2">&amp;</a>',
    "\\frac{1}{2} $x^2$ \\boxed{42}",
    "https://example.org/a-b?c=d#e user@example.org",
    "<think>\nreasoning\n</think>\n\nanswer <|unknown|> </s> [INST]",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa ........ -------- ========",
)
"""Texts on which tokenizers differ."""

_MAX_ADDED_TOKENS = 400
_SHOWN_CHARACTERS = 24

_CLASSES: tuple[dict[str, Any], ...] = (
    {},
    {"tokenizer_class": "PreTrainedTokenizerFast"},
    # For some model types transformers 5 heeds no class but its own, unless there is another one for AutoTokenizer,
    # which it then does not load as long as nobody says trust_remote_code.
    {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "auto_map": {"AutoTokenizer": ["as_tokenizer_json.PreTrainedTokenizerFast"] * 2},
    },
)
"""What is written into tokenizer_config.json, the first that helps."""


def highest_id(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, int]:
    """The token with the highest id, and this: ids may have gaps, so that it is not told by their number."""
    return max(tokenizer.get_vocab().items(), key=itemgetter(1))


def needed_rows(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Of the embedding, for each id of the tokenizer."""
    _, number = highest_id(tokenizer)
    return number + 1


def check_rows(tokenizer: "PreTrainedTokenizerBase", rows: int, *, can_resize: bool = False) -> None:
    """Raises UserError where an id has no row in the embedding, to which a training run (`can_resize`) may add some."""
    token, number = highest_id(tokenizer)
    if number >= rows:
        other_way = ", or add rows with --resize-vocab" if can_resize else ""
        raise UserError(
            f"tokenizer ({tokenizer.name_or_path}) has ids up to {number} ({token}), but the model's embedding has "
            f"{rows} rows (vocab_size); name the tokenizer that belongs to the model{other_way}"
        )


def token_difference(
    wanted: "PreTrainedTokenizerBase", found: "PreTrainedTokenizerBase", texts: Sequence[str] = ()
) -> str | None:
    """How tokens of `found` differ from those `wanted`, on hard texts and `texts`; None where they do not."""
    return _text_difference(wanted, found, texts) or _vocabulary_difference(wanted, found)


def _text_difference(
    wanted: "PreTrainedTokenizerBase",
    found: "PreTrainedTokenizerBase",
    texts: Sequence[str],
    *,
    add_special_tokens: bool = False,
) -> str | None:
    tried = [*HARD_TEXTS, *_around_added_tokens(wanted), *texts]
    ids = [tokenizer(tried, add_special_tokens=add_special_tokens)["input_ids"] for tokenizer in (wanted, found)]
    text = next((text for text, mine, theirs in zip(tried, *ids, strict=True) if mine != theirs), None)
    if text is None:
        return None
    parts = [text] if len(text) <= _SHOWN_CHARACTERS else [text[i : i + _SHOWN_CHARACTERS] for i in range(len(text))]
    for part in parts:
        mine, theirs = (_pieces(tokenizer, part, add_special_tokens) for tokenizer in (wanted, found))
        if mine != theirs:
            return f"{part!r} is cut into {mine}, not {theirs}"
    return f"{text[:_SHOWN_CHARACTERS]!r}... has other tokens"


def _vocabulary_difference(wanted: "PreTrainedTokenizerBase", found: "PreTrainedTokenizerBase") -> str | None:
    mine, theirs = wanted.get_vocab(), found.get_vocab()
    if mine == theirs:
        return None
    token, _ = min(set(mine.items()) ^ set(theirs.items()), key=lambda item: item[1])
    return f"token {token!r} has id {mine.get(token)}, not {theirs.get(token)}"


def _difference(
    wanted: "PreTrainedTokenizerBase", found: "PreTrainedTokenizerBase", texts: Sequence[str]
) -> str | None:
    """The same, and of what else a tokenizer is for."""
    how = token_difference(wanted, found, texts) or _text_difference(wanted, found, (), add_special_tokens=True)
    if how is not None:
        return how
    for name in ("eos_token", "bos_token", "pad_token"):
        if getattr(wanted, name) not in (None, getattr(found, name)):
            return f"its {name} is {getattr(wanted, name)!r}, not {getattr(found, name)!r}"
    return None


def settle_class(folder: Path, wanted: "PreTrainedTokenizerBase", texts: Sequence[str] = ()) -> None:
    """Has AutoTokenizer load the tokenizer of `folder`, beside its config.json, as `wanted`, by a change to its
    tokenizer_config.json if there must be one. Raises UserError where none helps."""
    from transformers import AutoTokenizer

    path = folder / TOKENIZER_CONFIG
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for change in _CLASSES:
        if change:
            path.write_text(json.dumps(config | change, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            _add_tokenizer_file(folder, wanted)
        try:
            found = _difference(wanted, AutoTokenizer.from_pretrained(folder, trust_remote_code=False), texts)
        except (OSError, ValueError) as error:  # as for a class that there is not
            found = first_line(error)
        if found is None:
            return
    raise UserError(
        f"tokenizer ({wanted.name_or_path}) loads as another one beside this model's config.json: {found}; give the "
        "tokenizer that belongs to the model"
    )


def as_its_file(folder: Path, loaded: "PreTrainedTokenizerBase") -> tuple["PreTrainedTokenizerBase", str | None]:
    """The tokenizer that tokenizer.json of `folder` describes: `loaded`, or where this differs another, and how."""
    from transformers import PreTrainedTokenizerFast

    if not (folder / TOKENIZER_FILE).is_file() or type(loaded) is PreTrainedTokenizerFast:
        return loaded, None
    exact = PreTrainedTokenizerFast.from_pretrained(folder)
    how = token_difference(exact, loaded)
    return (loaded, None) if how is None else (exact, how)


def _add_tokenizer_file(folder: Path, tokenizer: "PreTrainedTokenizerBase") -> None:
    """For folders of vocab.json and merges.txt, which the class that made the tokenizer of them reads."""
    if not (folder / TOKENIZER_FILE).is_file():
        (folder / TOKENIZER_FILE).write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")


def _around_added_tokens(tokenizer: "PreTrainedTokenizerBase") -> Iterator[str]:
    tokens: Iterable[Any] = tokenizer.added_tokens_decoder.values()
    contents = [str(token) for token in tokens][:_MAX_ADDED_TOKENS]
    yield from (f"a {content} b{content}\n{content}" for content in contents)


def _pieces(tokenizer: "PreTrainedTokenizerBase", text: str, add_special_tokens: bool) -> list[str]:
    ids = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
    return [str(tokenizer.convert_ids_to_tokens(number)) for number in ids]
