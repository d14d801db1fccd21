"""A custom node pack for the server of tests/chaos: kills the server inside a save.

While the file named by TRAINYARD_CHAOS exists, it holds a number: the server dies at so manyth writing through or
renaming of a file in the runs folder.
"""

import os
import pathlib
import signal

NODE_CLASS_MAPPINGS = {}
ORDER = pathlib.Path(os.environ.get("TRAINYARD_CHAOS", "/nowhere/order"))
REPLACE, FSYNC = os.replace, os.fsync


def count_down():
    if ORDER.exists():
        left = int(ORDER.read_text()) - 1
        ORDER.write_text(str(left))
        if left <= 0:
            ORDER.unlink()
            os.kill(os.getpid(), signal.SIGKILL)


def replace(source, target, **more):
    if f"{os.sep}trainyard{os.sep}" in str(target):
        count_down()
    return REPLACE(source, target, **more)


def fsync(descriptor):
    if f"{os.sep}trainyard{os.sep}" in os.path.realpath(f"/proc/self/fd/{descriptor}"):
        count_down()
    return FSYNC(descriptor)


os.replace, os.fsync = replace, fsync
