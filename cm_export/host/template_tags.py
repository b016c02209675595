"""Tags of chat templates besides Jinja's own, those that transformers knows: loop controls, and the mark of an answer.

{% generation %}{{ message['content'] }}{% endgeneration %}   ->   the content; the mark is for those who train
"""

from typing import Any

from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser


class _Answer(Extension):
    """What stands between the two tags stands as it is."""

    tags = {"generation"}  # noqa: RUF012 (so is it in the class that this one derives from)

    def parse(self, parser: Parser) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


TAGS = (loopcontrols, _Answer)
