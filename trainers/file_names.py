"""Names of files and folders that every file system takes: what is made here may move to another machine."""

from __future__ import annotations

import unicodedata

MAX_NAME_BYTES = 255  # of one name, on nearly every disk; some count characters, and allow more
WINDOWS_PORTS = {f"{port}{number}" for port in ("com", "lpt") for number in "123456789¹²³"}
WINDOWS_DEVICES = {"con", "prn", "aux", "nul", "conin$", "conout$"} | WINDOWS_PORTS
UNSEEN_CATEGORIES = ("Cc", "Cs", "Zl", "Zp")  # control characters, half characters, line and paragraph breaks


def find_name_problem(name: str, suffix: str = "") -> str:
    """Why no file `name` + suffix can be made everywhere, as the end of a sentence; empty when it can. `suffix`: the
    longest that will be put behind it."""
    if any(unicodedata.category(character) in UNSEEN_CATEGORIES for character in name):
        return "holds characters that cannot be seen, such as a line break"
    if name != name.strip(" ") or name.endswith("."):
        return "begins or ends with a space, or ends with a dot"
    if name.split(".")[0].rstrip(" ").lower() in WINDOWS_DEVICES:
        return "is the name of a device on Windows, such as con, nul or com1, whatever follows its first dot"
    if (size := len(f"{name}{suffix}".encode())) > MAX_NAME_BYTES:
        return (
            f"is too long: the file {name}{suffix} would have a name of {size} bytes, and disks allow {MAX_NAME_BYTES}"
        )
    return ""
