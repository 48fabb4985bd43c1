"""Hand-written likenesses of published chat templates, each with its special tokens: what they do to the parts of a
conversation is theirs, the text around it is shortened."""

from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from tests.data.toys import byte_tokenizer


class Published(NamedTuple):
    """A template and the special tokens that it writes; the last one ends the text."""

    template: str
    special_tokens: tuple[str, ...]

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return byte_tokenizer(self.template, eos_token=self.special_tokens[-1], special_tokens=self.special_tokens)


_CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

CHATML = Published(
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    _CHATML_TOKENS,
)
SMOLLM2 = Published(
    "{% for m in messages %}{% if loop.first and messages[0].role != 'system' %}"
    "<|im_start|>system\nYou are SmolLM.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    _CHATML_TOKENS,
)
_QWEN_CALLS = (
    "{% for call in m.tool_calls %}{% set f = call.function %}{% if m.content or not loop.first %}{{ '\n' }}{% endif %}"
    '<tool_call>\n{"name": "{{ f.name }}", "arguments": '
    "{% if f.arguments is string %}{{ f.arguments }}{% else %}{{ f.arguments | tojson }}{% endif %}"
    "}\n</tool_call>{% endfor %}"
)
_QWEN_TOOLS = (
    "{% if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    "{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}<|im_end|>\n"
    "{% elif messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n"
)
_QWEN_RESULT = "<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"
QWEN25 = Published(
    _QWEN_TOOLS + "{% else %}<|im_start|>system\nYou are Qwen.<|im_end|>\n{% endif %}{% for m in messages %}"
    "{% if m.role == 'user' or (m.role == 'system' and not loop.first) or (m.role == 'assistant' and not m.tool_calls)"
    " %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant\n{{ m.content }}" + _QWEN_CALLS + "<|im_end|>\n"
    "{% elif m.role == 'tool' %}" + _QWEN_RESULT + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    _CHATML_TOKENS,
)
QWEN3 = Published(
    _QWEN_TOOLS + "{% endif %}{% set ns = namespace(last=-1) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' or (m.role == 'system' and not loop.first) %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}{% set content, thought = m.content, '' %}"
    "{% if m.reasoning_content is string %}{% set thought = m.reasoning_content %}{% elif '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "<think>\n{{ thought.strip('\n') }}\n</think>\n\n{{ content.lstrip('\n') }}{% else %}{{ content }}{% endif %}"
    + _QWEN_CALLS.replace("m.content", "content")
    + "<|im_end|>\n{% elif m.role == 'tool' %}"
    + _QWEN_RESULT
    + "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
    _CHATML_TOKENS,
)
LLAMA3 = Published(
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ strftime_now('%d %b %Y') }}\n\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% set messages = messages[1:] %}{% endif %}"
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}<|eot_id|>"
    "{% for m in messages %}{% if not (m.role == 'tool' or 'tool_calls' in m) %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% elif 'tool_calls' in m %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('This model only supports single tool-calls at once!') }}"
    "{% endif %}{% set f = m.tool_calls[0].function %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    '{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}<|eot_id|>'
    "{% else %}<|start_header_id|>ipython<|end_header_id|>\n\n{{ m.content | tojson }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    ("<s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)
R1 = Published(  # drops the reasoning of all turns; the generation prompt opens the next one
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
    "{% elif m.role == 'assistant' %}{% set content = m.content.split('</think>')[-1] %}<|Assistant|>"
    "{% if m.tool_calls %}{{ content }}{% for call in m.tool_calls %}<|tool_call_begin|>{{ call.function.name }}\n"
    "```json\n{{ call.function.arguments + '' }}\n```<|tool_call_end|>{% endfor %}{% else %}{{ content }}{% endif %}"
    "<|end_of_sentence|>{% elif m.role == 'tool' %}<|tool_output_begin|>{{ m.content }}<|tool_output_end|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}",
    (
        *("<s>", "<|User|>", "<|Assistant|>", "<|tool_call_begin|>", "<|tool_call_end|>"),
        *("<|tool_output_begin|>", "<|tool_output_end|>", "<|end_of_sentence|>"),
    ),
)
GEMMA = Published(
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    ("<s>", "<start_of_turn>", "<end_of_turn>"),
)
MISTRAL = Published(  # no generation prompt, and ids of nine letters
    "{{ bos_token }}{% for tool in tools or [] %}[AVAILABLE_TOOLS]{{ tool | tojson }}[/AVAILABLE_TOOLS]{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% elif m.role == 'system' %}[SYSTEM]{{ m.content }}[/SYSTEM]"
    "{% elif m.role == 'assistant' and m.tool_calls %}[TOOL_CALLS][{% for call in m.tool_calls %}"
    "{% if call.id | length != 9 %}{{ raise_exception('Tool call IDs should be of length 9!') }}{% endif %}"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}, "id": "{{ call.id }}"}'
    "{% endfor %}]</s>{% elif m.role == 'assistant' %} {{ m.content }}</s>"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]"
    "{% else %}{{ raise_exception('Only user, system, assistant and tool roles are supported!') }}{% endif %}"
    "{% endfor %}",
    (
        *("<s>", "[INST]", "[/INST]", "[SYSTEM]", "[/SYSTEM]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
        *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "</s>"),
    ),
)
GLM = Published(  # a turn ends where the next one begins; arguments are written one by one
    "[gMASK]<sop>{% if tools %}<|system|>\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}"
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}"
    "{% if m.role == 'assistant' %}{% set content, thought = m.content, '' %}"
    "{% if m.reasoning_content is string %}{% set thought = m.reasoning_content %}{% elif '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1] %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}<|assistant|>"
    "{% if loop.index0 > ns.last and thought %}\n<think>{{ thought.strip() }}</think>"
    "{% else %}\n<think></think>{% endif %}{% if content.strip() %}\n{{ content.strip() }}{% endif %}"
    "{% for call in m.tool_calls %}\n<tool_call>{{ call.function.name }}"
    "{% for key, value in call.function.arguments.items() %}\n<arg_key>{{ key }}</arg_key>\n"
    "<arg_value>{{ value }}</arg_value>{% endfor %}\n</tool_call>{% endfor %}"
    "{% elif m.role == 'tool' %}<|observation|>\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% elif m.role == 'system' or m.role == 'user' %}<|{{ m.role }}|>\n{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking is defined and not enable_thinking %}"
    "\n<think></think>{% endif %}{% endif %}",
    ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>"),
)
GPT_OSS = Published(  # reasoning under `thinking`, of the last turn only, and a channel for each part
    "{% set ns = namespace(call=none) %}<|start|>system<|message|>You are ChatGPT.<|end|>"
    "{% if messages[0].role in ['system', 'developer'] %}<|start|>developer<|message|>{{ messages[0].content }}<|end|>"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for tool in tools or [] %}<|start|>developer<|message|>{{ tool | tojson }}<|end|>{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if '<|channel|>' in m.content %}{{ raise_exception('Pass the thinking under thinking.') }}{% endif %}"
    "{% if m.tool_calls %}{% set f = m.tool_calls[0].function %}{% set ns.call = f.name %}"
    "{% if m.content and m.thinking %}{{ raise_exception('Cannot pass both content and thinking!') }}{% endif %}"
    "{% if m.content or m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.content or m.thinking }}"
    "<|end|>{% endif %}<|start|>assistant to=functions.{{ f.name }}<|channel|>commentary json<|message|>"
    "{{ f.arguments | tojson }}<|call|>"
    "{% elif loop.last and not add_generation_prompt %}{% if 'thinking' in m %}"
    "<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>"
    "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% set ns.call = none %}{% endif %}"
    "{% elif m.role == 'tool' %}{% if ns.call is none %}"
    "{{ raise_exception('Message has tool role, but there was no previous assistant message with a tool call!') }}"
    "{% endif %}<|start|>functions.{{ ns.call }} to=assistant<|channel|>commentary<|message|>"
    "{{ m.content | tojson }}<|end|>{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}",
    ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>", "<|return|>"),
)

PUBLISHED = {
    **{"chatml": CHATML, "smollm2": SMOLLM2, "qwen2.5": QWEN25, "qwen3": QWEN3, "llama3": LLAMA3, "r1": R1},
    **{"gemma": GEMMA, "mistral": MISTRAL, "glm": GLM, "gpt-oss": GPT_OSS},
}
