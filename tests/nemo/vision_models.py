"""Tiny random models that see, with their processors, and records with drawings, all written from a seed."""

import random
from collections.abc import Iterator
from pathlib import Path

import torch
from datasets import Dataset, Features, Image, Sequence, Value
from PIL import Image as Images
from PIL import ImageDraw
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
)

from tests.support import tiny

VOCAB_SIZE = 212  # Bridge pads no vocabulary: two ranks must divide it
PATCH_SIZE = 56  # of pixels: Bridge's collator makes images as large as 200,704 of them
SEEING = {name: f"<|{name}|>" for name in ("vision_start", "image_pad", "vision_end", "video_pad")}

_IMAGE = f"{SEEING['vision_start']}{SEEING['image_pad']}{SEEING['vision_end']}"
_PART = f"{{% if part['type'] == 'image' %}}{_IMAGE}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}" + _PART + "{% endfor %}<|im_end|>\n{% endfor %}"
)
"""ChatML as the processors of published models have it."""


def build_model(folder: Path, family: str) -> Path:
    """Writes a checkpoint of `qwen2_5_vl` or `qwen3_vl` in fp32, and its processor in the folder `processor` below, as
    beside a config.json transformers 5 replaces what a tokenizer splits words by."""
    tokenizer = _build_tokenizer(folder / "tokenizer")
    config = tiny._config(family, tie_word_embeddings=False, vocab_size=VOCAB_SIZE)
    for name in ("vision_start", "vision_end"):
        setattr(config, f"{name}_token_id", tokenizer.convert_tokens_to_ids(SEEING[name]))
    for name in ("image", "video"):
        setattr(config, f"{name}_token_id", tokenizer.convert_tokens_to_ids(SEEING[f"{name}_pad"]))
    config.vision_config.patch_size = PATCH_SIZE
    if family == "qwen2_5_vl":
        config.vision_config.window_size = 4 * PATCH_SIZE  # smaller than an image
    model = AutoModelForImageTextToText.from_config(config)
    tiny._randomize(model, 0)
    with torch.no_grad():
        patches = model.model.visual.patch_embed.proj.weight
        patches *= (PATCH_SIZE / patches[0].numel()) ** 0.5  # each output is a sum over all of a patch
    model.save_pretrained(folder)
    tiny._respell_config(Path(folder) / "config.json")
    options = {"patch_size": PATCH_SIZE, "merge_size": 2, "temporal_patch_size": 2}
    kind = Qwen2_5_VLProcessor if family == "qwen2_5_vl" else Qwen3VLProcessor
    parts = (Qwen2VLImageProcessor(**options), tokenizer, Qwen2VLVideoProcessor(**options))
    kind(*parts, chat_template=TEMPLATE).save_pretrained(folder / "processor")
    return Path(folder)


def _build_tokenizer(folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny.build_tokenizer(folder))
    tokenizer.add_special_tokens({"additional_special_tokens": list(SEEING.values())})
    return tokenizer


def write_records(folder: Path, count: int) -> None:
    """Writes a folder as `datasets` reads it, in the columns of Bridge's adapter `raven`: one drawing or two, a
    question and an answer each."""
    rng = random.Random(0)
    rows = [
        {
            "images": [_draw(rng) for _ in range(rng.choice((1, 1, 2)))],
            "texts": [{"user": tiny._sentence(rng, 12), "assistant": tiny._sentence(rng, 20)}],
        }
        for _ in range(count)
    ]
    text = {"user": Value("string"), "assistant": Value("string")}
    features = Features({"images": Sequence(Image()), "texts": [text]})
    folder.mkdir(parents=True)
    Dataset.from_list(rows, features=features).to_parquet(folder / "train.parquet")


def _draw(rng: random.Random) -> Images.Image:
    """Shapes in colours, from landscape to portrait."""
    size = rng.choice(((336, 196), (196, 336), (252, 252)))
    image = Images.new("RGB", size, _colour(rng))
    pen = ImageDraw.Draw(image)
    for _ in range(4):
        left, top = (rng.randrange(length - 60) for length in size)
        box = (left, top, left + rng.randrange(20, 60), top + rng.randrange(20, 60))
        rng.choice((pen.ellipse, pen.rectangle))(box, fill=_colour(rng))
    return image


def _colour(rng: random.Random) -> tuple[int, int, int]:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def read_records(folder: Path) -> Iterator[tuple[list[Images.Image], str, str]]:
    """Drawings, question and answer of each record."""
    for row in Dataset.from_parquet(str(folder / "train.parquet"), cache_dir=str(folder.parent / "cache")):
        (text,) = row["texts"]
        yield row["images"], text["user"], text["assistant"]
