"""Structured logs: one JSON object a line on stderr, with the id of the request that it is about.

{"time": "2026-01-31T12:00:00.123Z", "level": "info", "event": "request", "request_id": "...", "status": 200, "seconds": 1.2}
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timezone
from typing import Any


def write(level: str, event: str, **fields: Any) -> None:
    """One line; what stderr cannot take is lost, since a server goes on when nobody reads its log."""
    time = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    line = json.dumps({"time": time, "level": level, "event": event} | fields, default=str)
    try:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
    except (OSError, ValueError):  # closed: there is no place left to say so
        return


class Lines(logging.Handler):
    """Gives the messages of a library the same form."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one."""
        more = {"trace": logging.Formatter().formatException(record.exc_info)} if record.exc_info else {}
        write(record.levelname.lower(), "log", source=record.name, message=record.getMessage().strip(), **more)
