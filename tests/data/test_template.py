"""Which chat template renders a record, with which variables, and what is refused in whose words."""

import json

import pytest

from megatron_psft.data.chat import ChatRenderer, RenderSettings, render_record
from megatron_psft.data.keys import REASONING_KEYS
from megatron_psft.data.messages import RecordError
from megatron_psft.data.records import Record
from megatron_psft.data.template import read_template
from megatron_psft.errors import UserError
from tests.data import templates, toys
from tests.data.toys import byte_tokenizer, calling, conversation, label_texts, label_texts_of

SWITCHED = "{% if enable_thinking %}<think>{% endif %}{{ greeting }}" + toys.CHATML


def text_of(record: Record, template, **settings) -> str:
    tokenizer = byte_tokenizer(template)
    renderer = ChatRenderer(tokenizer, "assistant", RenderSettings(**settings))
    (rendering,) = renderer.render(record)
    return rendering.text


def with_variables(**variables) -> Record:
    return Record(messages=conversation("Hi?", "Yes.").messages, source="toy:1", template_kwargs=variables)


@pytest.mark.parametrize(
    ("of_run", "of_row", "start"),
    [
        ({}, {}, "<|im_start|>"),
        ({"enable_thinking": True}, {}, "<think><|im_start|>"),
        ({"enable_thinking": True, "greeting": "Hello"}, {"enable_thinking": False}, "Hello<|im_start|>"),
        ({"greeting": "Hello"}, {"greeting": "Hey", "enable_thinking": True}, "<think>Hey<|im_start|>"),
    ],
)
def test_a_rows_variables_win_over_the_runs(of_run, of_row, start):
    assert text_of(with_variables(**of_row), SWITCHED, template_kwargs=of_run).startswith(start)


def test_a_prompt_is_rendered_under_the_same_variables():
    renderer = ChatRenderer(byte_tokenizer(SWITCHED), "last", RenderSettings(template_kwargs={"greeting": "Hello"}))
    assert renderer.render_prompt(conversation("Hi?").messages).startswith("Hello<|im_start|>")
    assert renderer.render_prompt(conversation("Hi?").messages, {"greeting": "Hey"}).startswith("Hey<|im_start|>")


@pytest.mark.parametrize("name", ["tools", "add_generation_prompt", "tokenize", "messages"])
def test_variables_that_rendering_sets_are_refused(name):
    with pytest.raises(RecordError, match=f"names that rendering sets itself.*{name}"):
        text_of(with_variables(**{name: True}), SWITCHED)
    with pytest.raises(UserError, match=f"chat_template_kwargs must not have {name}"):
        text_of(conversation("Hi?", "Yes."), SWITCHED, template_kwargs={name: True})


def test_a_variable_that_the_template_does_not_read_is_refused():
    with pytest.raises(RecordError, match="the chat template reads no variable enable_thinkin"):
        text_of(with_variables(enable_thinkin=True), SWITCHED)
    with pytest.raises(RecordError, match="the chat template reads no variable enable_thinking"):
        text_of(with_variables(enable_thinking=True), toys.CHATML)
    plain = text_of(conversation("Hi?", "Yes."), toys.CHATML)
    assert text_of(with_variables(enable_thinking=False), toys.CHATML) == plain, "it thinks for nobody"
    with pytest.raises(UserError, match=r"reads no enable_thinkin; did you mean enable_thinking\?"):
        text_of(conversation("Hi?", "Yes."), SWITCHED, template_kwargs={"enable_thinkin": False})


def test_a_template_can_be_given_in_place_of_the_tokenizers():
    given = toys.CHATML.replace("<|im_start|>", "<|start|>")
    assert text_of(conversation("Hi?", "Yes."), toys.CHATML, chat_template=given).startswith("<|start|>user")
    assert text_of(conversation("Hi?", "Yes."), None, chat_template=given).startswith("<|start|>user")


def test_records_with_tools_get_the_template_for_them():
    named = {"default": toys.CHATML, "tool_use": toys.TOOLS}
    assert text_of(calling(), named).startswith("<|im_start|>system\nadd ")
    assert text_of(conversation("Hi?", "Yes."), named).startswith("<|im_start|>user\nHi?")
    with pytest.raises(RecordError, match="does not render tool"):
        text_of(calling(), {"default": toys.CHATML, "rag": toys.TOOLS})


def test_a_tokenizer_without_a_default_template_names_those_it_has():
    named = {"tool_use": toys.TOOLS, "rag": toys.CHATML}
    with pytest.raises(UserError, match=r"named rag, tool_use and none named default; .*--chat-template"):
        text_of(conversation("Hi?", "Yes."), named)


def test_a_templates_file_is_read_or_refused_by_name(tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text(toys.CHATML)
    assert read_template(str(path)) == toys.CHATML
    path.write_text(" \n")
    for wrong in (path, tmp_path / "absent.jinja", tmp_path):
        with pytest.raises(UserError, match=f"chat_template \\({wrong}\\) must"):
            read_template(str(wrong))


PASTED = toys.TOOLS.replace("call.function.arguments | tojson", "call.function.arguments")  # as Python writes them
ADDED = toys.TOOLS.replace("{{ call.function.arguments | tojson }}", "{{ '' + call.function.arguments }}")
TEXT_ONLY = toys.TOOLS.replace(
    "{{ call.function.arguments | tojson }}",
    "{% if call.function.arguments is string %}{{ call.function.arguments }}{% endif %}",
)


@pytest.mark.parametrize("template", [toys.TOOLS, PASTED, ADDED, TEXT_ONLY])
def test_arguments_are_given_as_the_template_takes_them(template):
    assert label_texts(calling(), byte_tokenizer(template))[0] == '<call>add{"x": 1}</call><|im_end|>'


@pytest.mark.parametrize("arguments", [{"a": None, "b": [True, "é"]}, {}, {"q": 'say "hi"\n'}])
def test_arguments_as_text_are_json(arguments):
    record = calling()
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    record.messages[1]["tool_calls"] = [call]
    expected = f"<call>add{json.dumps(arguments, ensure_ascii=False)}</call><|im_end|>"
    assert label_texts(record, byte_tokenizer(ADDED))[0] == expected


def test_r1_writes_calls_with_arguments_as_text():
    record = Record(messages=calling().messages, source="toy:1")
    expected = '<|tool_call_begin|>add\n```json\n{"x": 1}\n```<|tool_call_end|><|end_of_sentence|>'
    assert label_texts(record, templates.R1.tokenizer())[0] == expected


@pytest.mark.parametrize(
    ("template", "record", "words"),
    [
        ("{% if tools %}{{ raise_exception('no tools here') }}{% endif %}" + toys.TOOLS, calling(), "no tools here"),
        (toys.TOOLS.replace("| tojson", "| nonsense"), calling(), "nonsense"),
        (toys.CHATML.replace("m.role", "m.role + 1"), conversation("Hi?", "Yes."), "TypeError: can only concatenate"),
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + toys.CHATML,
            conversation("Hi?", "Yes.", system="Be brief."),
            "no system",
        ),
    ],
)
def test_an_error_has_the_templates_own_words(template, record, words):
    with pytest.raises(RecordError, match=words):
        render_record(record, byte_tokenizer(template), "assistant")


@pytest.mark.parametrize("role", ["system", "developer", "tool"])
def test_a_role_that_the_template_leaves_out_is_refused(role):
    known = "{% for m in messages if m.role in ('user', 'assistant') %}"
    messages = [("user", "Hi?"), ("assistant", "Yes."), (role, "2"), ("user", "Why?"), ("assistant", "So.")]
    record = Record(messages=tuple({"role": r, "content": content} for r, content in messages), source="toy:1")
    with pytest.raises(RecordError, match=f"the chat template does not render role {role}"):
        label_texts(record, byte_tokenizer(toys.CHATML.replace("{% for m in messages %}", known)))
    assert label_texts(record, byte_tokenizer(toys.CHATML)) == ["Yes.<|im_end|>", "So.<|im_end|>"]


@pytest.mark.parametrize("key", REASONING_KEYS)
def test_reasoning_is_given_under_the_key_that_the_template_reads(key):
    tokenizer = byte_tokenizer(toys.TOOLS.replace("m.reasoning_content", f"m.{key}"))
    record = calling(reasoning_content="Hm.")
    assert label_texts(record, tokenizer)[1] == "<think>Hm.</think>So 2.<|im_end|>"


def test_probes_are_made_once(monkeypatch):
    tokenizer = byte_tokenizer(toys.TOOLS)
    renderer = ChatRenderer(tokenizer, "assistant")
    renderer.render(calling())
    rendered = []
    apply = type(tokenizer).apply_chat_template
    monkeypatch.setattr(
        type(tokenizer), "apply_chat_template", lambda *args, **more: rendered.append(args[1]) or apply(*args, **more)
    )
    renderer.render(calling())
    assert rendered
    assert all("Hi?" in message["content"] for messages in rendered for message in messages[:1])


def test_the_labels_of_named_templates_are_those_of_their_texts():
    tokenizer = byte_tokenizer({"default": toys.CHATML, "tool_use": toys.TOOLS})
    renderer = ChatRenderer(tokenizer, "assistant")
    (example,) = renderer.tokenize(renderer.render(calling()))
    assert label_texts_of(example, tokenizer) == label_texts(calling(), byte_tokenizer(toys.TOOLS))
