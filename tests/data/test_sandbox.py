"""rm.data.sandbox: templates write what they write in Jinja's own sandbox; greedy ones are given up in time."""

import resource

import jinja2.sandbox
import pytest

from rm.data import chat, sandbox
from rm.data.tokenizer import Tokenizer
from tests import text_fixtures
from tests.templates import TEMPLATES

MESSAGES = [
    {"role": "user", "content": "How many are 2 and 3?"},
    {"role": "assistant", "content": "5\n"},
    {"role": "user", "content": " Thank you "},
    {"role": "assistant", "content": "Of course."},
]
DOUBLING = (
    "{% set n = namespace(x='a' * 1000) %}{% for i in range(60) %}{% set n.x = n.x SIGN n.x %}{% endfor %}{{ n.x }}"
)
NESTING = "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
MACROS = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
GREEDY = {
    "the bytes of a number": "{{ (1).to_bytes(10**10, 'big') }}",
    "bytes": "{{ 'a'.encode() * 10**10 }}",
    "a translation": "{{ ('a' * 10**5).translate({97: 'b' * 10**6}) }}",
    "texts between lines": "{{ ('b' * 10**6) | wordwrap(1, wrapstring='c' * 10**6) }}",
    "two loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a loop over a filter": "{% for i in range(99999) %}{{ range(99999)|map('string')|list|length }}{% endfor %}",
    "macros that call themselves": MACROS,
    "a recursive loop": "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "times": "{{ 'a' * 10**10 }}",
    "times a list": "{{ ([1] * 10**10)|length }}",
    "doubled": DOUBLING.replace("SIGN", "~"),
    "added": DOUBLING.replace("SIGN", "+"),
    "a list in a list": NESTING + "{{ n.x }}",
    "its JSON": NESTING + "{{ n.x|tojson }}",
    "a width": "{{ '%3000000000d' % 1 }}",
    "a width as a value": "{{ '%*d' % (3000000000, 1) }}",
    "a format": "{{ '{:3000000000}'.format(1) }}",
    "the filter format": "{{ '%3000000000d'|format(1) }}",
    "center": "{{ 'a'|center(3000000000) }}",
    "a method": "{{ 'a'.ljust(3000000000) }}",
    "replace": "{{ ('a' * 9**7).replace('a', 'b' * 9**7) }}",
    "the filter replace": "{{ ('a' * 9**7)|replace('a', 'b' * 9**7) }}",
    "join": "{{ range(99999)|list|join('b' * 9**7) }}",
    "a power": "{{ (9 ** 9) ** (9 ** 9) }}",
    "squares": "{% set n = namespace(x=9) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x > 1 }}",
    "a long output": "{% for i in range(99999) %}{{ 'a' * 9**7 }}{% endfor %}",
    "a date": "{{ strftime_now('%3000000000Y') }}",
    "blocks": "{% set x %}{% for i in range(99999) %}{{ 'a' * 9**7 }}{% endfor %}{% endset %}",
    "break outside a loop": "{% break %}",
    "thirty loops": "{% for i in [1] %}" * 30 + "{% endfor %}" * 30,
    "brackets": "{{ " + "(" * 300 + "1" + ")" * 300 + " }}",
    "half of a pair": "{{ '\\ud800' }}",
    "attributes": "{{ ''.__class__.__mro__ }}",
    "attributes by a filter": "{{ (''|attr('__class__')).x }}",
    "attributes by a format": "{{ '{0.__class__.__mro__}'.format('') }}",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(text_fixtures.byte_level(tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.parametrize("name", GREEDY)
def test_a_greedy_or_broken_template_is_refused_by_name(name, tokenizer, monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 0.2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    template = chat.ChatTemplate(GREEDY[name] + "{{ messages[0].content }}", "the template", tokenizer)
    with pytest.raises(ValueError, match=r"^the template .*\w") as refused:
        template.render(MESSAGES, find_replies=False)
    assert "\n" not in str(refused.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # KiB


GROWING = (
    "{% set n = namespace(x=[], y='a' * 10**7) %}{% for i in range(9999) %}{% set n.x = n.x + [PART] %}{% endfor %}"
)
HOARDERS = {
    "many texts": GROWING.replace("PART", "'a' * 10**7 ~ i"),
    "parts of a text": GROWING.replace("PART", "n.y[i:]"),
    "methods of a text": GROWING.replace("PART", "n.y.upper()"),
    "filters": GROWING.replace("PART", "n.y|upper"),
    "a text in pieces": GROWING.replace("PART", "n.y[:10**6].split('a')"),
    "no loop": "{% set y = 'a' * 10**7 %}" + "".join(f"{{% set x{i} = y[{i}:] %}}" for i in range(99)),
}


@pytest.mark.parametrize("name", HOARDERS)
def test_a_template_that_keeps_many_texts_is_refused(name, tokenizer, monkeypatch):
    monkeypatch.setattr(sandbox, "MEMORY", 2**26)
    template = chat.ChatTemplate(HOARDERS[name] + "{{ messages[0].content }}", "the template", tokenizer)
    with pytest.raises(
        ValueError, match="^the template refuses the dialogue: it takes more than 0.0625 GiB of memory$"
    ):
        template.render(MESSAGES, find_replies=False)


@pytest.mark.parametrize("source", ["x|list", "x|sort", "x.splitlines()", "x.split()", "x|wordcount"])
def test_a_long_text_is_not_taken_apart(source, tokenizer):
    template = chat.ChatTemplate(f"{{% set x = '\u4e00' * 10**8 %}}{{{{ ({source}) }}}}", "the template", tokenizer)
    with pytest.raises(ValueError, match="^the template refuses the dialogue: it makes a text of more than"):
        template.render(MESSAGES, find_replies=False)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_writes_what_it_writes_in_the_sandbox_of_jinja(name, tokenizer):
    source = TEMPLATES[name] if isinstance(TEMPLATES[name], str) else TEMPLATES[name][0]
    options = {"trim_blocks": True, "lstrip_blocks": True, "extensions": [chat._Generation, "jinja2.ext.loopcontrols"]}
    texts = []
    for environment in (jinja2.sandbox.ImmutableSandboxedEnvironment(**options), sandbox.Sandbox(**options)):
        environment.globals |= {"raise_exception": chat._raise_exception, "strftime_now": chat._strftime_now}
        variables = {"messages": MESSAGES, "bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}
        try:
            texts.append(environment.from_string(source).render(variables))
        except Exception as error:
            texts.append(str(error))
    assert texts[0] == texts[1] and texts[0]


def test_loops_know_their_length_and_what_is_before_and_behind(tokenizer):
    source = (
        "{% for m in messages if m.role == 'user' %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{% endfor %}"
        "{% for x in undefined_name %}{% else %}none{% endfor %}"
        "{% for k, v in {'a': 1}.items() %}{{ k ~ v ~ [k] }}{% endfor %}"
    )
    plain, bounded = (
        e.from_string(source).render(messages=MESSAGES) for e in (jinja2.Environment(), sandbox.Sandbox())
    )
    assert plain == bounded == "1/2False2/2Truenonea1['a']"
