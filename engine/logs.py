"""What log lines look like, in every process of the server: readable by default, one JSON object a line on demand.

Code that has more to say than words passes `extra={"fields": {…}}`; the text form leaves the fields out. Requests are
logged one by one ("octavo.access") in JSON, where machines read them, and in text only at level debug. No torch here.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any

TEXT = "%(asctime)s %(levelname)s %(message)s"
ACCESS = "octavo.access"


class JsonFormatter(logging.Formatter):
    """One object a line: time (UTC, ISO 8601), level, logger, message, the fields, and exception if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "time": when.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def set_up_logging(form: str, level: str) -> None:
    """Send this process's log to stderr in `form` "text" or "json", from `level` ("debug" … "error") on."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter(TEXT, datefmt="%H:%M:%S"))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    if form != "json" and level != "debug":
        logging.getLogger(ACCESS).setLevel(logging.WARNING)
