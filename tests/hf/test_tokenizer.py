"""An exported folder's tokenizer makes the tokens that the model was trained on, whatever loader and model there are.

What tokenizer.json says is told by the `tokenizers` library, which knows of no model types.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_psft.errors import UserError
from megatron_psft.hf.hub import load_tokenizer
from megatron_psft.hf.side_files import SideFiles
from tests.support import tiny
from tests.support.marks import slow

MODEL_TYPES = ["qwen2", "qwen3", "llama", "mixtral", "qwen3_moe"]
CLASSES = ["PreTrainedTokenizerFast", None, "Qwen2Tokenizer", "LlamaTokenizerFast", "NoSuchTokenizer"]
TEXTS = [
    "24clips 48/2",
    "#### 72",
    "Hello  12345\n\n x",
    "a\u0301 é",
    "don't I'LL",
    "<|im_end|> x<|im_end|>",
    "你好 😀",
    " ",
]
WORDS = [
    "24clips 48/2 12345 add 3 plus 17",
    "the sum of two numbers",
    "Hello  world",
    "don't",
    "\u00e9t\u00e9 e\u0301te\u0301",
]
REAL = Path(__file__).parents[3] / "shared/data/tokenizers"


def byte_level(folder: Path) -> Tokenizer:
    """GPT-2's splitting, as home-made tokenizers have it: numbers are not cut into digits."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def llama_3(folder: Path) -> Tokenizer:
    """Up to three digits stay together."""
    tokenizer = byte_level(folder)
    cut = pre_tokenizers.Split(pattern=r"\p{N}{1,3}| ?\p{L}+|\s+", behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return tokenizer


def metaspace(folder: Path) -> Tokenizer:
    """As made from SentencePiece models: blanks are marks, unknown characters bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def decomposing(folder: Path) -> Tokenizer:
    tokenizer = byte_level(folder)
    tokenizer.normalizer = normalizers.NFKD()
    return tokenizer


KINDS: list[Callable[[Path], Tokenizer]] = [byte_level, llama_3, metaspace, decomposing]


def build(folder: Path, kind: Callable[[Path], Tokenizer], tokenizer_class: str | None) -> Path:
    tokenizer = kind(folder)
    specials = ["<unk>", tiny.PAD, tiny.IM_START, tiny.IM_END]
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind is not metaspace else [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(WORDS * 3, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=tiny.IM_END, pad_token=tiny.PAD).save_pretrained(
        folder
    )
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("tokenizer_class")
    given = {} if tokenizer_class is None else {"tokenizer_class": tokenizer_class}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | given))
    return folder


def model(folder: Path, model_type: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 400, "eos_token_id": 0}))
    return folder


def ids_of_file(folder: Path) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]


def ids_of(tokenizer) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize("tokenizer_class", CLASSES)
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_was_trained_with_is_loaded_beside_every_model(tmp_path, kind, tokenizer_class):
    source = build(tmp_path / "tokenizer", kind, tokenizer_class)
    tokenizer = load_tokenizer(source)
    assert ids_of(tokenizer) == ids_of_file(source)
    for model_type in MODEL_TYPES:
        target = tmp_path / f"target-{model_type}"
        target.mkdir()
        files = SideFiles(
            model_folder=model(tmp_path / model_type, model_type), tokenizer_folder=source, tokenizer=tokenizer
        )
        files.check()
        files.write(target, torch.float32)
        found = AutoTokenizer.from_pretrained(target)
        assert ids_of(found) == ids_of_file(source), model_type
        assert found.get_vocab() == tokenizer.get_vocab(), model_type
        assert (found.eos_token, found.pad_token) == (tokenizer.eos_token, tokenizer.pad_token), model_type
        assert ids_of(load_tokenizer(target)) == ids_of_file(source), model_type  # and this trainer reads it again


@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        ("qwen2.5", "qwen2"),
        *(slow(name, model_type) for name in ("qwen2.5", "llama3", "qwen3") for model_type in MODEL_TYPES),
    ],
)
def test_published_tokenizers_keep_their_tokens_beside_every_model(tmp_path, name, model_type):
    if not REAL.is_dir():
        pytest.skip("the published tokenizers are not here")
    tokenizer, target = load_tokenizer(REAL / name), tmp_path / "target"
    target.mkdir()
    files = SideFiles(
        model_folder=model(tmp_path / "model", model_type), tokenizer_folder=REAL / name, tokenizer=tokenizer
    )
    files.write(target, torch.float32)
    assert ids_of(AutoTokenizer.from_pretrained(target)) == ids_of_file(REAL / name)


def test_what_loads_as_it_should_is_copied_byte_for_byte(tmp_path):
    source = build(tmp_path / "tokenizer", byte_level, "PreTrainedTokenizerFast")
    (tmp_path / "target").mkdir()
    files = SideFiles(
        model_folder=model(tmp_path / "model", "llama"), tokenizer_folder=source, tokenizer=load_tokenizer(source)
    )
    files.write(tmp_path / "target", torch.float32)
    for path in source.iterdir():
        assert (tmp_path / "target" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("kind", [byte_level, llama_3, decomposing])
def test_a_models_own_tokenizer_makes_the_tokens_of_its_file(tmp_path, caplog, kind):
    """Though transformers takes another class for Qwen2 models, with its own splitting."""
    folder = build(model(tmp_path / "model", "qwen2"), kind, "PreTrainedTokenizerFast")
    assert ids_of(AutoTokenizer.from_pretrained(folder)) != ids_of_file(folder)
    tokenizer = load_tokenizer(folder)
    assert ids_of(tokenizer) == ids_of_file(folder)
    (line,) = caplog.messages
    assert (
        f"tokenizer ({folder}): Qwen2Tokenizer of transformers would not make the tokens of its tokenizer.json" in line
    )
    assert "is cut into [" in line


def test_a_tokenizer_that_is_loaded_as_its_file_says_is_taken_without_a_word(tmp_path, caplog):
    folder = build(model(tmp_path / "model", "qwen3"), byte_level, "PreTrainedTokenizerFast")
    load_tokenizer(folder)
    assert not caplog.messages


def test_a_tokenizer_of_vocabulary_and_merges_gets_a_file_where_it_needs_one(tmp_path):
    source = tmp_path / "tokenizer"
    build(source, byte_level, "Qwen2Tokenizer")
    content = json.loads((source / "tokenizer.json").read_text())["model"]
    (source / "tokenizer.json").unlink()
    (source / "vocab.json").write_text(json.dumps(content["vocab"]))
    (source / "merges.txt").write_text("\n".join(map(" ".join, content["merges"])))
    tokenizer = load_tokenizer(source)
    for model_type in MODEL_TYPES:
        target = tmp_path / f"target-{model_type}"
        target.mkdir()
        files = SideFiles(
            model_folder=model(tmp_path / model_type, model_type), tokenizer_folder=source, tokenizer=tokenizer
        )
        files.write(target, torch.float32)
        assert ids_of(AutoTokenizer.from_pretrained(target)) == ids_of(tokenizer), model_type


def test_a_tokenizer_that_cannot_be_loaded_as_it_was_is_refused_with_a_text_that_shows_it(tmp_path):
    source = build(tmp_path / "tokenizer", byte_level, "PreTrainedTokenizerFast")
    other = build(tmp_path / "other", llama_3, "PreTrainedTokenizerFast")
    files = SideFiles(
        model_folder=model(tmp_path / "model", "llama"), tokenizer_folder=other, tokenizer=load_tokenizer(source)
    )
    with pytest.raises(UserError) as caught:
        files.check()
    assert f"tokenizer ({source}) loads as another one beside this model's config.json: '" in str(caught.value)
    assert "is cut into ['" in str(caught.value)
    (tmp_path / "target").mkdir()
    with pytest.raises(UserError):
        files.write(tmp_path / "target", torch.float32)


def test_tokenizers_are_compared_on_the_runs_own_texts(tmp_path):
    """Which find what no text of the list shows."""
    source = build(tmp_path / "tokenizer", byte_level, "PreTrainedTokenizerFast")
    other = tmp_path / "other"
    build(other, byte_level, "PreTrainedTokenizerFast")
    content = json.loads((other / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Replace", "pattern": {"String": "qqq"}, "content": "q"}
    (other / "tokenizer.json").write_text(json.dumps(content))
    files = {"model_folder": model(tmp_path / "model", "llama"), "tokenizer_folder": other}
    SideFiles(**files, tokenizer=load_tokenizer(source)).check()
    with pytest.raises(UserError, match=r"'.*qqq.*' is cut into"):
        SideFiles(**files, tokenizer=load_tokenizer(source), texts=["fine", "a " * 50 + "qqq" + " b" * 50]).check()


def write_generation(folder: Path, content: dict | None) -> SideFiles:
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "bos_token_id": 5, "eos_token_id": 0, "pad_token_id": None})
    )
    if content is not None:
        (folder / "generation_config.json").write_text(json.dumps(content))
    return SideFiles(model_folder=folder, tokenizer_folder=folder, stop_id=3)


@pytest.mark.parametrize(
    ("base", "expected", "others"),
    [
        ({"eos_token_id": 0, "temperature": 0.7}, {"eos_token_id": [0, 3], "temperature": 0.7}, ", besides 0"),
        ({"eos_token_id": [0, 1]}, {"eos_token_id": [0, 1, 3]}, ", besides 0, 1"),
        ({"eos_token_id": None}, {"eos_token_id": 3}, ""),
        ({"top_p": 0.9}, {"eos_token_id": [0, 3], "top_p": 0.9}, ", besides 0"),  # config.json's counts
        (None, {"bos_token_id": 5, "eos_token_id": [0, 3]}, ", besides 0"),
    ],
)
def test_generation_stops_where_training_taught_to(tmp_path, caplog, base, expected, others):
    caplog.set_level("INFO")
    files = write_generation(tmp_path / "model", base)
    (tmp_path / "target").mkdir()
    files.write(tmp_path / "target", torch.float32)
    assert json.loads((tmp_path / "target" / "generation_config.json").read_text()) == expected
    (line,) = caplog.messages
    assert line == f"export: generation_config.json stops at 3 (3), which ends a turn{others}"
    assert json.loads((tmp_path / "target" / "config.json").read_text())["eos_token_id"] == 0


@pytest.mark.parametrize("known", [3, [3], [0, 3]])
def test_generation_that_stops_there_already_is_as_it_was(tmp_path, caplog, known):
    caplog.set_level("INFO")
    files = write_generation(tmp_path / "model", {"eos_token_id": known})
    (tmp_path / "target").mkdir()
    files.write(tmp_path / "target", torch.float32)
    name = "generation_config.json"
    assert (tmp_path / "target" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
    assert not caplog.messages


def test_named_templates_are_exported(tmp_path):
    source = build(tmp_path / "tokenizer", byte_level, "PreTrainedTokenizerFast")
    templates = {"default": "{{ messages }}", "tool_use": "{{ tools }}", "rag": "{{ documents }}"}
    (source / "additional_chat_templates").mkdir()
    for name, text in templates.items():
        (source / "additional_chat_templates" / f"{name}.jinja").write_text(text)
    files = SideFiles(
        model_folder=model(tmp_path / "model", "qwen2"), tokenizer_folder=source, tokenizer=load_tokenizer(source)
    )
    (tmp_path / "target").mkdir()
    files.write(tmp_path / "target", torch.float32)
    assert AutoTokenizer.from_pretrained(tmp_path / "target").chat_template == templates


@pytest.mark.parametrize("own", ["config", "list", "file", "folder", "none"])
def test_the_template_trained_with_takes_the_place_of_the_tokenizers_own(tmp_path, own):
    source = build(tmp_path / "tokenizer", byte_level, "PreTrainedTokenizerFast")
    config = json.loads((source / "tokenizer_config.json").read_text())
    if own == "config":
        config["chat_template"] = "own"
    if own == "list":
        config["chat_template"] = [{"name": "default", "template": "own"}, {"name": "tool_use", "template": "own"}]
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    if own == "file":
        (source / "chat_template.jinja").write_text("own")
    if own == "folder":
        (source / "additional_chat_templates").mkdir()
        (source / "additional_chat_templates" / "tool_use.jinja").write_text("own")
    files = SideFiles(
        model_folder=model(tmp_path / "model", "llama"),
        tokenizer_folder=source,
        tokenizer=load_tokenizer(source),
        chat_template="{{ messages }}\n",
    )
    (tmp_path / "target").mkdir()
    files.write(tmp_path / "target", torch.float32)
    assert AutoTokenizer.from_pretrained(tmp_path / "target").chat_template == "{{ messages }}\n"
