"""What the front is told of a model."""

from dataclasses import replace

import pytest
from fakes import FakeBackend

from tightrope.engine.info import EMPTY_TEMPLATE, model_info

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(("template", "told"), [("{{ messages }}", "{{ messages }}"), ("", None), (" \n", None)])
def test_an_empty_chat_template_counts_as_none_and_is_noted(template: str, told: str | None):
    backend = FakeBackend()
    backend.card = replace(backend.card, chat_template=template, notes=("kernels",))

    info = model_info(backend)

    assert info.chat_template == told
    assert info.notes == (("kernels",) if told else ("kernels", EMPTY_TEMPLATE))
