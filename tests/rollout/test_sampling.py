"""What is sampled, against the model's own probabilities and a plain greedy loop."""

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_psft.data.chat import ChatRenderer
from megatron_psft.errors import UserError
from megatron_psft.rollout.sampling import Sampler, SamplingConfig
from tests.support import tiny

PROMPTS = ["add one", "how many lemon or apple or pears plus one", "x"]
END = 2  # <|im_end|>


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = tiny.build_tokenizer(folder / "tokenizer")
    # No ids beyond the tokenizer's, which have no text.
    model = tiny.build_model(folder / "model", "qwen2", num_hidden_layers=2, vocab_size=200)
    tiny.teach(model, tokenizer, [(prompt, reply) for prompt in PROMPTS for reply in ("3", "two is 17")], steps=30)
    # What a published model may recommend: it would hold every sample to the likeliest token.
    (model / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "top_k": 1, "repetition_penalty": 1.5, "eos_token_id": [END, 0]})
    )
    return folder


def build_sampler(inputs: Path, **config) -> Sampler:
    tokenizer = AutoTokenizer.from_pretrained(inputs / "tokenizer")
    renderer = ChatRenderer(tokenizer, "last")
    return Sampler(inputs / "model", tokenizer, renderer, SamplingConfig(engine="transformers", **config))


def render(inputs: Path, question: str) -> str:
    tokenizer = AutoTokenizer.from_pretrained(inputs / "tokenizer")
    return ChatRenderer(tokenizer, "last").render_prompt([{"role": "user", "content": question}])


@torch.no_grad()
def next_probs(inputs: Path, tokens: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(inputs / "model")
    return model(torch.tensor([tokens])).logits[0, -1].softmax(-1)


def test_a_cold_sample_is_the_greedy_one_whatever_shares_its_batch(inputs):
    """Prompts of three lengths in batches of two: padding that were seen, or a mixed-up order, would show."""
    rendered = [render(inputs, prompt) for prompt in PROMPTS]
    assert rendered[0] == "<|im_start|>user\nadd one<|im_end|>\n<|im_start|>assistant\n"
    tokenizer = AutoTokenizer.from_pretrained(inputs / "tokenizer")
    groups = build_sampler(inputs, num_samples=1, temperature=1e-4, max_new_tokens=12, batch_size=2).sample(rendered)
    for prompt, (answer,) in zip(rendered, groups, strict=True):
        context = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        expected: list[int] = []
        while len(expected) < 12 and END not in expected:
            expected.append(int(next_probs(inputs, context + expected).argmax()))
        assert answer.tokens == tuple(expected)
        assert answer.is_finished == (expected[-1] == END)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (2.0, 1.0), (1.0, 0.6)])
@pytest.mark.slow
def test_tokens_are_as_frequent_as_the_model_says(inputs, temperature, top_p):
    """4,000 first tokens; the generation config's top-k of 1 would give one token only."""
    prompt = render(inputs, PROMPTS[0])
    sampler = build_sampler(
        inputs, num_samples=4000, temperature=temperature, top_p=top_p, max_new_tokens=1, batch_size=2000
    )
    ((*answers,),) = sampler.sample([prompt])
    found = torch.bincount(torch.tensor([answer.tokens[0] for answer in answers]), minlength=200) / 4000
    tokenizer = AutoTokenizer.from_pretrained(inputs / "tokenizer")
    probs = next_probs(inputs, tokenizer(prompt, add_special_tokens=False)["input_ids"]).pow(1 / temperature)
    probs, order = (probs / probs.sum()).sort(descending=True)
    probs[probs.cumsum(0) - probs >= top_p] = 0  # the smallest set that reaches top_p
    expected = torch.zeros(200).scatter(0, order, probs / probs.sum())
    # Five standard deviations of a count of 4,000 draws.
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / 4000).sqrt() + 1e-9).all()
    assert (found > 0.01).sum() >= 2


def test_an_answer_ends_before_its_end_token_or_is_unfinished(inputs):
    prompt = render(inputs, PROMPTS[0])
    ((*answers,),) = build_sampler(inputs, num_samples=64, max_new_tokens=3).sample([prompt])
    finished = [answer for answer in answers if answer.is_finished]
    assert {"3"} <= {answer.text for answer in finished}
    assert all(answer.tokens[-1] in (END, 0) and "<|" not in answer.text for answer in finished)
    cut = [answer for answer in answers if not answer.is_finished]
    assert cut
    assert all(len(answer.tokens) == 3 and END not in answer.tokens for answer in cut)


def test_the_same_seed_gives_the_same_answers(inputs):
    prompt = render(inputs, PROMPTS[0])
    first, again, other = (
        build_sampler(inputs, num_samples=16, max_new_tokens=8, seed=seed).sample([prompt]) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_the_model_is_loaded_once_until_the_sampler_is_closed(inputs, monkeypatch):
    loads, load = [], AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: loads.append(a) or load(*a, **k))
    prompt = render(inputs, PROMPTS[0])
    with build_sampler(inputs, num_samples=2, max_new_tokens=4) as sampler:
        assert loads == []
        first, again = sampler.sample([prompt]), sampler.sample([prompt])
        assert first == again
        assert [len(group) for group in sampler.sample([prompt, prompt], num_samples=3)] == [3, 3]
        assert len(loads) == 1
    assert sampler.sample([prompt]) == first
    assert len(loads) == 2


def test_a_model_that_sees_answers_in_text(inputs, tmp_path):
    """Also where a shorter prompt is padded; its positions are those of its language model."""
    (tmp_path / "tokenizer").symlink_to(inputs / "tokenizer")
    folder = tiny.build_model(tmp_path / "model", "qwen3_vl", num_hidden_layers=1, vocab_size=200)
    rendered, tokenizer = (
        [render(inputs, prompt) for prompt in PROMPTS],
        AutoTokenizer.from_pretrained(tmp_path / "tokenizer"),
    )
    groups = build_sampler(tmp_path, num_samples=1, temperature=1e-4, max_new_tokens=2).sample(rendered)
    model = tiny.load_model(folder)
    for prompt, (answer,) in zip(rendered, groups, strict=True):
        tokens = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
        assert answer.tokens[0] == int(model(tokens).logits[0, -1].argmax())
    with pytest.raises(UserError, match=r"max_position_embeddings \(512\)"):
        build_sampler(tmp_path, max_new_tokens=500).sample(rendered)


def test_prompt_and_answer_have_to_fit_into_the_model(inputs):
    sampler = build_sampler(inputs, max_new_tokens=500)
    with pytest.raises(UserError, match=r"max_new_tokens \(500\).*\d+ tokens.*max_position_embeddings \(512\)"):
        sampler.sample([render(inputs, PROMPTS[0])])


def test_a_folder_without_weights_is_told(inputs, tmp_path):
    (tmp_path / "config.json").write_text((inputs / "model" / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(inputs / "tokenizer")
    config = SamplingConfig(engine="transformers", max_new_tokens=8)
    sampler = Sampler(tmp_path, tokenizer, ChatRenderer(tokenizer, "last"), config)
    with pytest.raises(UserError, match=r"model \(.*\) must be a folder with a Hugging Face model"):
        sampler.sample([render(inputs, PROMPTS[0])])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_samples": 0}, r"num_samples \(0\) must be at least 1"),
        ({"temperature": 0.0}, r"temperature \(0.0\) must be greater than 0"),
        ({"top_p": 1.5}, r"top_p \(1.5\) must be greater than 0 and at most 1"),
        ({"seed": -1}, r"seed \(-1\)"),
        ({"vllm_tensor_parallel_size": 2}, r"vllm_tensor_parallel_size \(2\) has no effect with engine transformers"),
    ],
)
def test_values_out_of_range_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        SamplingConfig(engine="transformers", **config)


@pytest.fixture
def vllm(monkeypatch) -> ModuleType:
    """A stand-in with the part of vLLM's interface that is used; it keeps what it was asked for."""
    module = ModuleType("vllm")
    module.__spec__ = ModuleSpec("vllm", None)
    module.calls = []

    class LLM:
        def __init__(self, *, model, skip_tokenizer_init, tensor_parallel_size, max_model_len, seed):
            module.calls.append((model, skip_tokenizer_init, tensor_parallel_size, max_model_len, seed))

        def generate(self, prompts, sampling_params, *, use_tqdm):
            module.calls.append((prompts, sampling_params))
            ended, cut = SimpleNamespace(token_ids=(30, 31, END)), SimpleNamespace(token_ids=(30, 31, 32))
            return [SimpleNamespace(outputs=[ended, cut]) for _ in prompts]

    module.LLM, module.SamplingParams = LLM, dict
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


def test_vllm_gets_the_same_prompts_and_ends(inputs, vllm):
    """Against a stand-in: this says what vLLM is asked for, not what it does."""
    tokenizer = AutoTokenizer.from_pretrained(inputs / "tokenizer")
    config = SamplingConfig(num_samples=2, temperature=0.7, top_p=0.9, max_new_tokens=3, seed=5)
    rendered = [render(inputs, prompt) for prompt in PROMPTS]
    groups = Sampler(inputs / "model", tokenizer, ChatRenderer(tokenizer, "last"), config).sample(rendered)
    tokens = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in rendered]
    (engine, (prompts, params)) = vllm.calls
    assert engine == (str(inputs / "model"), True, 1, max(map(len, tokens)) + 3, 5)
    assert prompts == [{"prompt_token_ids": ids} for ids in tokens]
    assert params == {
        "n": 2,
        "temperature": 0.7,
        "top_p": 0.9,
        "max_tokens": 3,
        "stop_token_ids": [END, 0],
        "detokenize": False,
    }
    assert len(groups) == 3
    assert [(answer.tokens, answer.is_finished) for answer in groups[0]] == [
        ((30, 31, END), True),
        ((30, 31, 32), False),
    ]
    assert groups[0][0].text == tokenizer.decode([30, 31])


def test_vllm_is_asked_for_the_log_probabilities_of_what_it_has_sampled(inputs, vllm):
    """Of nothing more, and those after the end are cut off with their tokens."""
    tokenizer = AutoTokenizer.from_pretrained(inputs / "tokenizer")

    def generate(self, prompts, sampling_params, *, use_tqdm):
        vllm.calls.append(sampling_params)
        ids = (30, END, 31)
        steps = [{token: SimpleNamespace(logprob=-token / 8), 5: SimpleNamespace(logprob=-9.0)} for token in ids]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids, logprobs=steps)]) for _ in prompts]

    vllm.LLM.generate = generate
    config, renderer = SamplingConfig(num_samples=1, max_new_tokens=3), ChatRenderer(tokenizer, "last")
    sampler = Sampler(inputs / "model", tokenizer, renderer, config, with_log_probs=True)
    ((answer,),) = sampler.sample([render(inputs, PROMPTS[0])])
    assert vllm.calls[-1]["logprobs"] == 0
    assert (answer.tokens, answer.log_probs) == ((30, END), (-30 / 8, -END / 8))


def test_vllm_is_started_again_only_for_longer_prompts(inputs, vllm):
    tokenizer = AutoTokenizer.from_pretrained(inputs / "tokenizer")
    sampler = Sampler(inputs / "model", tokenizer, ChatRenderer(tokenizer, "last"), SamplingConfig(max_new_tokens=3))
    for prompt in ("x", "x", "how many lemon or apple", "x"):
        sampler.sample([render(inputs, prompt)])
    assert len([call for call in vllm.calls if len(call) == 5]) == 2


def test_vllm_is_taken_where_it_is_installed_and_refused_where_not(vllm, monkeypatch):
    assert SamplingConfig().uses_vllm
    with pytest.raises(UserError, match=r"batch_size \(8\) has no effect with engine vllm"):
        SamplingConfig(batch_size=8)
    monkeypatch.delitem(sys.modules, "vllm")
    assert not SamplingConfig().uses_vllm
    with pytest.raises(UserError, match=r"engine \(vllm\) must be installed"):
        SamplingConfig(engine="vllm")
