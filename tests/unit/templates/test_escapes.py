"""A chat template is a program of whoever made the model: known ways out of jinja lead nowhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ds_cp.errors import DsCpError
from ds_cp.templates.chat import ChatTemplate
from ds_cp.templates.processes import TemplateProcesses
from tests.helpers.fake_engine import make_tokenizer

ESCAPES = {
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__['os'].popen(COMMAND).read() }}",
    "init": "{{ messages.__init__.__globals__ }}",
    "attr": "{{ ''|attr('__class__')|attr('__base__')|attr('__subclasses__')() }}",
    "cycler": "{{ cycler.__init__.__globals__.os.popen(COMMAND).read() }}",
    "joiner": "{{ joiner.__init__.__globals__.os.system(COMMAND) }}",
    "namespace": "{{ namespace.__init__.__globals__.os.system(COMMAND) }}",
    "lipsum": "{{ lipsum.__globals__['os'].system(COMMAND) }}",
    "self": "{{ self._TemplateReference__context.environment.globals }}",
    "format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "format_map": "{{ '{a.__class__.__mro__}'.format_map({'a': ''}) }}",
    "loop": "{% for m in messages %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "macro": "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}",
    "code": "{{ raise_exception.__code__.co_consts }}",
    "include": "{% include FILE %}",
    "import": "{% import FILE as x %}",
    "do": "{% set x = messages.append(1) %}{{ messages.clear() }}",
}


@pytest.fixture(scope="module")
def processes() -> Iterator[TemplateProcesses]:
    found = TemplateProcesses()
    yield found
    found.close()


@pytest.mark.parametrize("name", ESCAPES)
def test_a_template_does_not_get_out(
    name: str, processes: TemplateProcesses, tmp_path: Path
) -> None:
    """It is refused, or what it reaches for is nothing: no object of Python's in the text."""
    mark = tmp_path / "ran"
    text = ESCAPES[name].replace("COMMAND", f"'touch {mark}'").replace("FILE", "'/etc/passwd'")
    tokenizer = make_tokenizer(text)
    try:
        template = ChatTemplate(tokenizer, processes)
        hello = [{"role": "user", "content": "hello"}]
        said = template.render(hello, add_generation_prompt=True, max_chars=10_000, timeout_s=60.0)
    except DsCpError:
        said = ""
    assert not mark.exists()
    assert not any(word in said for word in ("<class", "<function", "root:", "built-in", "{'")), (
        said
    )
