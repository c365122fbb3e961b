"""Chat templates: what published ones use, and what the sandbox refuses."""

import pytest

from deconfound_jax.models.chat import render

CHATML = """{% for message in messages %}
    {% if loop.first and message['role'] != 'system' %}
        {{- '<|im_start|>system\nYou help.<|im_end|>\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""
ASKED = [{"role": "user", "content": "Name a sea."}]


def test_messages_become_turns():
    system = "<|im_start|>system\nYou help.<|im_end|>\n"
    turn = "<|im_start|>user\nName a sea.<|im_end|>\n"
    assert render(CHATML, ASKED) == system + turn
    assert render(CHATML, ASKED, add_generation_prompt=True) == system + turn + "<|im_start|>assistant\n"
    own = [{"role": "system", "content": "Be brief."}, *ASKED, {"role": "assistant", "content": "<b> & 北海"}]
    assert render(CHATML, own) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n" + turn + "<|im_start|>assistant\n<b> & 北海<|im_end|>\n"
    )


def test_what_published_templates_use():
    template = """{{ bos_token }}{% set found = namespace(n=0) %}
{% for message in messages %}
{% if message.role == 'tool' %}{% continue %}{% endif %}
{% set found.n = found.n + 1 %}
[{{ message['role'] }}] {{ message['content'] | trim | tojson }}
{% if found.n == 2 %}{% break %}{% endif %}
{%- endfor %}
{{ tools is defined }} {{ strftime_now('%%') }} {{ eos_token }}"""
    roles = ["tool", "user", "assistant", "user"]
    messages = [{"role": role, "content": f" <{role}> é\n"} for role in roles]
    lines = '[user] "<user> é"\n[assistant] "<assistant> é"\n'
    assert render(template, messages, bos_token="<s>", eos_token="</s>") == f"<s>{lines}False % </s>"


@pytest.mark.parametrize(
    "escape",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ strftime_now.__globals__['__builtins__'] }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'system'}) }}",
        "{{ range(10000000) | list }}",
    ],
)
def test_the_sandbox_refuses(escape):
    with pytest.raises(ValueError, match="chat_template: .*(SecurityError|OverflowError)"):
        render(escape, ASKED)
    assert ASKED == [{"role": "user", "content": "Name a sea."}]


@pytest.mark.parametrize(
    "escape",
    ["{{ messages.__class__ }}", "{{ raise_exception.__globals__ }}", "{{ '{0.__class__}'.format(messages) }}"],
)
def test_what_leads_into_python_reads_as_nothing(escape):
    assert render(escape, ASKED) == ""


def test_a_template_opens_no_file(tmp_path):
    (tmp_path / "secret").write_text("42")
    with pytest.raises(ValueError, match="chat_template"):
        render("{% include '" + str(tmp_path / "secret") + "' %}", ASKED)


def test_errors_say_whose_they_are():
    with pytest.raises(ValueError, match="chat_template: Roles must alternate"):
        render("{{ raise_exception('Roles must alternate') }}", ASKED)
    with pytest.raises(ValueError, match="chat_template: .*TemplateSyntaxError"):
        render("{% if %}", ASKED)
    with pytest.raises(ValueError, match=r"chat_template: .*\(TypeError\)"):
        render("{{ messages[0].content + 1 }}", ASKED)
    with pytest.raises(ValueError, match=r"messages: expected 'role' and 'content' in each, got \['text'\]"):
        render(CHATML, [{"text": "Name a sea."}])
