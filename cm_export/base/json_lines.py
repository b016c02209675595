"""Files of one JSON value a line (JSON Lines), as editors and spreadsheets write them.

"\\ufeff{...}\\r\\n\\n{...}"   ->   (1, "{...}"), (3, "{...}")     line numbers as an editor counts them
"""

from collections.abc import Iterator
from pathlib import Path

from .errors import InputError


def numbered(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, without a byte-order mark. Raises InputError for a file that is not UTF-8 text.

    A line ends with a line feed only: a JSON text may hold the other characters that Python takes for the end of a line.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as e:
        raise InputError(f"cannot be read ({e.strerror})", where=path, fix="give a JSON Lines file") from e
    except UnicodeDecodeError as e:
        raise InputError("cannot be read (not UTF-8 text)", where=path, fix="save it as UTF-8, JSON Lines") from e
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.strip()
