"""Points in time as traces write them: seconds, or dates. Read alike on every Python."""

from __future__ import annotations

import math
import re
from datetime import datetime, timedelta, timezone

_DATE = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)(?:[T ](\d\d):(\d\d)(?::(\d\d)(?:[.,](\d+))?)?)?\s*(Z|[+-]\d\d:?\d\d)?", re.IGNORECASE
)


def seconds_of(value: object) -> float:
    """Seconds written as a number, or a date with a time as seconds since 1970, in UTC where it names no zone.

    Fractions of a second have any number of digits, of which the first six count.
    """
    if isinstance(value, str):
        found = _DATE.fullmatch(value.strip())
        if found is not None:
            return _seconds_of_date(found)
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not math.isfinite(seconds):
        raise ValueError(f"{value!r} is no time: write seconds, or as 2024-05-01 12:00:00")
    return seconds


def _seconds_of_date(found: re.Match[str]) -> float:
    *parts, fraction, zone = found.groups()
    year, month, day, hour, minute, second = (int(part or 0) for part in parts)
    microsecond = int((fraction or "0")[:6].ljust(6, "0"))
    return datetime(year, month, day, hour, minute, second, microsecond, _zone(zone)).timestamp()


def _zone(text: str | None) -> timezone:
    if text is None or text.upper() == "Z":
        return timezone.utc
    offset = timedelta(hours=int(text[1:3]), minutes=int(text[-2:]))
    return timezone(-offset if text[0] == "-" else offset)
