"""The server's log: JSON, one object a line, on stderr; of requests their ids, counts and timings, never their text."""

from __future__ import annotations

import datetime
import json
import logging

LOGGER = logging.getLogger("dvi_jax.serve")


class JsonLines(logging.Formatter):
    """`{"time", "level", "event", ...}`; a record's own fields are given as `extra={"fields": {...}}`."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        line = {"time": time, "level": record.levelname.lower(), "event": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def set_up_logs() -> None:
    """Send our lines and uvicorn's to stderr as JSON; uvicorn's own lines on requests are left out."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    for name, level in (("dvi_jax.serve", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def say(event: str, level: int = logging.INFO, **fields: object) -> None:
    """Write one line."""
    LOGGER.log(level, event, extra={"fields": fields})
