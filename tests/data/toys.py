"""Tiny tokenizers with the chat templates of model families, built without any download."""

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from megatron_psft.data.chat import LossOn, render_record
from megatron_psft.data.example import Example, label_runs
from megatron_psft.data.messages import Message
from megatron_psft.data.records import Record

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "<|start|>{{ m.role }}<|end_header|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end_header|>\n\n{% endif %}"
)
QWEN3 = (  # thoughts are taken out of all turns but the last, which has a block of them even where it has none
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip() if '</think>' in m.content else '' %}"
    "{% set answer = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}"
    "{{ answer }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
R1 = (  # the generation prompt opens a thought, which no turn of a conversation has
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}"
    "{% else %}<|assistant|>{{ m.content.split('</think>')[-1] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
NEMOTRON = (  # as QWEN3, but a turn without thoughts has another block than the generation prompt begins
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and '<think>' not in m.content %}<think></think>{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
QWEN3_WITHOUT_THINKING = QWEN3.replace("assistant\n{% endif %}", "assistant\n<think>\n\n</think>\n\n{% endif %}")
TOOLS = (  # as Qwen's: schemas stand in the system turn, calls and reasoning in the assistant's, results in the user's
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool.function.name }} {% endfor %}"
    "<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n"
    "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% for call in m.tool_calls %}"
    "<call>{{ call.function.name }}{{ call.function.arguments | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GLM = (  # a turn ends where the next role's mark stands
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LLAMA2 = (  # no generation prompt, and a blank before the end of turn
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
NO_GENERATION_PROMPT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TWO_END_TOKENS = (
    "{% for m in messages %}<|start|>{{ m.role }}<|end_header|>{{ m.content }}<|eot|></s>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end_header|>{% endif %}"
)
VICUNA = (  # the generation prompt ends in a blank that a byte-pair encoding glues to the answer's first word
    "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
COUNTING = (  # what comes after a turn depends on it
    CHATML + "{% if not add_generation_prompt %}{{ messages[-1].content | length }}{% endif %}"
)
IRREGULAR = (  # the fourth message has a header of its own
    "{% for m in messages %}{% if loop.index0 == 3 %}<|start|>{% else %}<|im_start|>{% endif %}{{ m.role }}\n"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}</s>{% endif %}"
)
XS = "{% if m.content == 'x' %}x{% else %}x{{ m.content }}x{% endif %}"  # as a content
ONLY_TEXT = (  # nothing special between turns
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

SPECIAL_TOKENS = (
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|end_header|>", "<|eot|>"),
    *("<|user|>", "<|assistant|>", "<|system|>"),
)


def byte_tokenizer(
    template: str | None,
    *,
    eos_token: str | None = "</s>",
    merges: Sequence[tuple[str, str]] = (),
    trim_offsets: bool = False,
    special_tokens: Sequence[str | AddedToken] = SPECIAL_TOKENS,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: one token per byte but for `merges`, in whose alphabet Ġ is a blank."""
    vocabulary = sorted(pre_tokenizers.ByteLevel.alphabet()) + [first + second for first, second in merges]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special_tokens))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos_token, chat_template=template
    )


def conversation(*contents: str, system: str | None = None) -> Record:
    """A record of user and assistant turns in alternation."""
    roles = ("user", "assistant")
    messages: list[Message] = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return Record(messages=tuple(messages), source="toy:1")


ADD: dict = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
SCHEMA: dict = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}


def calling(content: str = "", **last: str) -> Record:
    """A user asks, the assistant calls a tool, the tool answers, the assistant concludes."""
    return Record(
        messages=(
            {"role": "user", "content": "Hi?"},
            {"role": "assistant", "content": content, "tool_calls": [ADD]},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "So 2.", **last},
        ),
        tools=(SCHEMA,),
        source="toy:1",
    )


def label_texts(record: Record, tokenizer: PreTrainedTokenizerFast, loss_on: LossOn = "assistant") -> list[str]:
    """The decoded runs of label tokens."""
    return label_texts_of(render_record(record, tokenizer, loss_on), tokenizer)


def label_texts_of(example: Example, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [text for is_label, text in label_runs(example, tokenizer) if is_label]
