"""Show characters that would steer a terminal or a page instead of obeying them."""

from __future__ import annotations

import re

# the last two of each plane are no characters, and no file of XML may hold them
_NONE = "".join(chr(plane << 16 | last) for plane in range(17) for last in (0xFFFE, 0xFFFF))
# Characters that are obeyed, turn text around, are halves or none; not line ends and tabs.
_STEERING = re.compile(
    f"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff{_NONE}]"
)


def visible(text: str) -> str:
    r"""Write the characters that steer, turn text round or are none by their numbers.

    Names in files of somebody else's may hold them.

    Example:
        >>> print(visible("ant\x1b[2J"))
        ant\u001b[2J
    """
    return _STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
