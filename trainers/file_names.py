"""Names of files and folders that every file system takes: what is made here may move to another machine."""

from __future__ import annotations

import sys
import unicodedata
from pathlib import Path

MAX_NAME_BYTES = 255  # of one name, on nearly every disk; some count characters, and allow more
WINDOWS_PORTS = {f"{port}{number}" for port in ("com", "lpt") for number in "123456789¹²³"}
WINDOWS_DEVICES = {"con", "prn", "aux", "nul", "conin$", "conout$"} | WINDOWS_PORTS
PLATFORM = sys.platform  # which tests set
MAX_WINDOWS_PATH = 259  # UTF-16 units of a whole path: MAX_PATH is 260 with the zero that ends it
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


def check_path_length(path) -> None:
    """ValueError for a path that this system cannot write, though each of its names is fine: on Windows, while long
    paths are off."""
    full = str(Path(path).absolute())
    length = len(full.encode("utf-16-le", "surrogatepass")) // 2
    if PLATFORM == "win32" and length > MAX_WINDOWS_PATH and not are_long_paths_enabled():
        raise ValueError(
            f"The path {full} would have {length} characters, and Windows takes {MAX_WINDOWS_PATH} while long paths "
            "are off. Choose a shorter name, move ComfyUI's folder nearer to the drive's root, or switch on 'Enable "
            "Win32 long paths' in Windows and restart it."
        )


def are_long_paths_enabled() -> bool:
    """Whether Windows is set to take paths of more than 260 characters; False where there is no such setting."""
    try:
        import winreg as registry
    except ImportError:
        return False
    try:
        with registry.OpenKey(registry.HKEY_LOCAL_MACHINE, r"SYSTEM\CurrentControlSet\Control\FileSystem") as key:
            return registry.QueryValueEx(key, "LongPathsEnabled")[0] == 1
    except OSError:
        return False
