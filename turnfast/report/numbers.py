"""Numbers as text."""

from __future__ import annotations

import math

MINUS = "\u2212"


def signed(value: float, digits: int) -> str:
    """Format with a sign; zero has none.

    >>> signed(0.25, 2), signed(-0.001, 2)
    ('+0.25', '0.00')
    """
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", MINUS)


def short(value: float) -> str:
    """Format with three significant digits, and a suffix or power of ten if that is shorter.

    >>> short(0.12345), short(12345.0), short(3.2e-7), short(40)
    ('0.123', '12.3k', '3.2e-7', '40')
    """
    size = abs(value)
    if size == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            scale = 1e3 if unit == "k" else limit
            return _trim(f"{value / scale:.3g}") + unit
    if size < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        text = f"{_trim(mantissa)}e{int(exponent)}"
    else:
        text = _trim(f"{value:.3g}") if size < 1000 else f"{value:.0f}"
    return text.replace("-", MINUS, 1) if value < 0 else text


def duration(seconds: float) -> str:
    """
    >>> duration(5.25), duration(65), duration(7300)
    ('5.2 s', '1 min 05 s', '2 h 01 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _trim(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text
