"""Tiny random Hugging Face checkpoints, a home-trained tokenizer and records in its words, all written from a seed."""

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3VLConfig,
)
from transformers.utils import logging as transformers_logging

FAMILIES = ("qwen2", "llama", "qwen3")
MOE_FAMILIES = ("qwen3_moe", "mixtral")
VARIANTS = ("mistral", "qwen2-yarn", "qwen3-yarn")
"""What differs from one of the families in a part; `-yarn` is how a config.json says it, not a model_type."""
VISION_FAMILIES = ("qwen2_5_vl", "qwen3_vl")
"""Those of a language model beside a vision tower."""
VOCAB_SIZE = 211  # prime: no tensor-parallel size divides it, so the padded columns are there in every layout

PAD, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_VOCABULARY = """
add all answer apple because both box check count divide each eleven equals every find first five four from gives
half hence how increases is lemon less let many minus more nine now of one over pears plus price proof seven she so
square sum ten than the then three times total twelve twice two we what when which with x y zero 3 17 42 1/2 = + *
"""
WORDS = _VOCABULARY.split()

SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
_ROPE_THETA = 1000.0  # no library's default
# Wavelengths at head_dim 16 are 6, 15, 35, 84 ... tokens: below 64 / 4 kept, above 64 / 1 times 8, in between blended.
_LLAMA3_ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}

_YARN_ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 4.0}


def build_model(
    folder: Path,
    family: str,
    *,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "1GB",
    hub_config: bool = True,
    seed: int = 0,
    **shape,
) -> Path:
    """Writes a checkpoint of `family` and returns its folder.

    Every parameter is random, norm weights and biases included, so that one that is dropped or swapped shows. The scale
    makes the next-token distribution far from uniform.

    Args:
        folder: created.
        family: `qwen2` (QKV bias), `llama` (llama3 RoPE scaling), `qwen3` (QK norm, wide heads), `qwen3_moe` (the same
            with 8 experts in all layers but the second, 3 for each token), `mixtral` (4 experts, 2 for each token), or
            one of `VARIANTS`.
        tied: one matrix for embedding and output layer.
        dtype: of the file.
        shard_size: of one safetensors file, e.g. `100KB` for several files.
        hub_config: spells RoPE and dtype as published checkpoints do; otherwise as transformers 5 writes them.
        seed: of the weights.
        shape: overrides of the config, e.g. `num_hidden_layers=2`.
    """
    auto_class = AutoModelForImageTextToText if family in VISION_FAMILIES else AutoModelForCausalLM
    model = auto_class.from_config(_config(family, tie_word_embeddings=tied, **shape))
    _randomize(model, seed)
    transformers_logging.disable_progress_bar()
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    if hub_config:
        _respell_config(Path(folder) / "config.json")
    return Path(folder)


def load_model(folder: Path, **options) -> torch.nn.Module:
    """What transformers makes of a checkpoint."""
    sees = "vision_config" in json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    auto_class = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    return auto_class.from_pretrained(folder, **options)


def _config(family: str, **overrides):
    rope = {"rope_type": "default", "rope_theta": _ROPE_THETA}
    if family in VISION_FAMILIES:
        return _vision_config(family, rope, **overrides)
    if family == "mistral":
        return MistralConfig(**{**SHAPE, "rope_parameters": rope, "sliding_window": 12, **overrides})
    if family.endswith("-yarn"):
        yarn = _YARN_ROPE if family.startswith("qwen2") else {**_YARN_ROPE, "truncate": False, "attention_factor": 0.9}
        return _config(family.removesuffix("-yarn"), **{"rope_parameters": {**rope, **yarn}, **overrides})
    if family == "qwen2":
        return Qwen2Config(**{**SHAPE, "rope_parameters": rope, **overrides})
    if family == "qwen3":
        return Qwen3Config(**{**SHAPE, "rope_parameters": rope, "head_dim": 24, **overrides})
    if family == "qwen3_moe":
        sparse = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "norm_topk_prob": True}
        heads = {"head_dim": 24, "mlp_only_layers": [1]}
        return Qwen3MoeConfig(**{**SHAPE, **sparse, **heads, "rope_parameters": rope, **overrides})
    if family == "mixtral":
        sparse = {"num_local_experts": 4, "num_experts_per_tok": 2}
        return MixtralConfig(**{**SHAPE, **sparse, "rope_parameters": rope, **overrides})
    assert family == "llama", family
    return LlamaConfig(**{**SHAPE, "rope_parameters": {**rope, **_LLAMA3_ROPE, "rope_type": "llama3"}, **overrides})


def _vision_config(family: str, rope: dict, *, tie_word_embeddings: bool, **overrides):
    """The sections of the rotary embedding are all different, so that one that mattered would be seen."""
    text = {**SHAPE, "rope_parameters": {**rope, "mrope_section": [1, 2, 5]}, **overrides}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4}
    vision |= {"out_hidden_size": text["hidden_size"]}
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    # The ids of transformers' defaults are beyond this vocabulary.
    outside = {name: VOCAB_SIZE - 1 - number for number, name in enumerate(ids)}
    outside["tie_word_embeddings"] = tie_word_embeddings
    if family == "qwen2_5_vl":
        vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
        return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **outside)
    vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    text = {"head_dim": 16, **text, "tie_word_embeddings": tie_word_embeddings}
    return Qwen3VLConfig(text_config=text, vision_config=vision, **outside)


@torch.no_grad()
def _randomize(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            parameter.copy_(1 + 0.2 * noise)
        elif parameter.dim() == 1:
            parameter.copy_(0.2 * noise)
        else:
            gain = 1.6 if "embed_tokens" in name or "lm_head" in name else 1.0
            parameter.copy_(gain / math.sqrt(parameter.shape[-1]) * noise)


def hub_tensors(tensors: Mapping[str, torch.Tensor], family: str) -> dict[str, torch.Tensor]:
    """Parameters, or their gradients, as published checkpoints name and cut them: each expert of a family that has them
    with matrices of its own, which transformers 5 holds as one tensor; without a vision tower's."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith("model.visual."):
            continue
        block, _, kind = name.rpartition(".experts.")
        if kind == "gate_up_proj":
            for expert, (gate, up) in enumerate(matrix.chunk(2) for matrix in tensor):
                found[f"{block}.experts.{expert}.gate_proj.weight"] = gate
                found[f"{block}.experts.{expert}.up_proj.weight"] = up
        elif kind == "down_proj":
            found |= {f"{block}.experts.{expert}.down_proj.weight": matrix for expert, matrix in enumerate(tensor)}
        else:
            found[name] = tensor
    if family == "mixtral":
        spellings = {".mlp.": ".block_sparse_moe.", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
        for theirs, published in spellings.items():
            found = {name.replace(theirs, published): tensor for name, tensor in found.items()}
    return found


def _respell_config(path: Path) -> None:
    config = json.loads(path.read_text())
    text = config.get("text_config", config)
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope.pop("rope_theta")
    if "mrope_section" in rope:
        if config["model_type"] == "qwen2_5_vl":
            rope["type"] = rope.pop("rope_type").replace("default", "mrope")
        text["rope_scaling"] = rope
    else:
        text["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    if config["model_type"] == "qwen2_5_vl":  # published in one level
        config = {**config.pop("text_config"), **config}
    path.write_text(json.dumps(config, indent=2))


def teach(model: Path, tokenizer: Path, exchanges: Sequence[tuple[str, str]], *, steps: int = 60) -> Path:
    """Trains a checkpoint, in place, to reply to each question as the (question, reply) pairs do; several replies to
    one question become about as probable as they are frequent."""
    network, words = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(tokenizer)
    heads, texts = [], []
    for question, reply in exchanges:
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        heads.append(words.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True))
        texts.append(words.apply_chat_template(chat, tokenize=False).rstrip("\n"))
    batch = words(texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, head in zip(labels, heads, strict=True):
        row[: len(words(head, add_special_tokens=False)["input_ids"])] = -100
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(steps):
        loss = network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    network.save_pretrained(model)
    return model


def build_tokenizer(folder: Path) -> Path:
    """Writes a byte-level BPE tokenizer of 200 tokens with ChatML's template and returns its folder.

    The folder must not hold a model: beside a Qwen2 `config.json`, transformers 5 replaces a tokenizer's pre-tokenizer.
    It knows ASCII text only.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    ascii_text = "".join(map(chr, range(32, 127))) + "\n"
    alphabet = {character for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(ascii_text) for character in piece}
    specials = [PAD, IM_START, IM_END]
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=specials, initial_alphabet=sorted(alphabet), show_progress=False
    )
    roles = ["system\n", "user\n", "assistant\n"]
    tokenizer.train_from_iterator(roles + [f" {word}" for word in WORDS], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=IM_END, pad_token=PAD, chat_template=CHATML)
    fast.save_pretrained(folder)
    path = Path(folder) / "tokenizer_config.json"
    # transformers 5 writes `TokenizersBackend`, which transformers 4 does not know.
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2)
    )
    return Path(folder)


def build_sparse_tokenizer(folder: Path, number: int) -> Path:
    """The same, but its last token has another id, so that there is a gap before it."""
    build_tokenizer(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = number
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def write_records(path: Path, count: int, *, seed: int = 0, max_words: int = 20, max_exchanges: int = 3) -> Path:
    """Writes `count` lines of `{"messages": [...]}`: one to `max_exchanges` exchanges, some after a system message.

    The number of words per message is uniform in its logarithm between 1 and `max_words`: most are short, few are long.
    """
    rng = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            roles = ["user", "assistant"] * rng.randint(1, max_exchanges)
            roles = ["system", *roles] if rng.random() < 0.25 else roles
            messages = [{"role": role, "content": _sentence(rng, max_words)} for role in roles]
            file.write(json.dumps({"messages": messages}) + "\n")
    return Path(path)


def _sentence(rng: random.Random, max_words: int) -> str:
    return " ".join(rng.choices(WORDS, k=round(max_words ** rng.random())))


def run_flags(folder: Path) -> list[str]:
    """Builds the inputs of the smallest run in `folder`, and returns the flags that name them: all it needs but its
    length and `--save`."""
    model = build_model(folder / "model", "qwen2", num_hidden_layers=1)
    tokenizer = build_tokenizer(folder / "tokenizer")
    records = write_records(folder / "records.jsonl", 8)
    return f"--load-hf {model} --tokenizer {tokenizer} --data {records} --global-batch-size 4".split()
