"""Files that take seconds to make and are the same for every test: made once, kept between runs, shared by processes."""

import hashlib
import os
import pathlib

from filelock import FileLock

ROOT = pathlib.Path(os.environ.get("TRAINYARD_TEST_CACHE") or pathlib.Path.home() / ".cache" / "trainyard-tests")


def cached_file(name, sources, write):
    """Path of a file that `write(path)` makes where the cache lacks it; a change of one of the `sources` makes a new one.

    `sources` are the files that decide what is in it: its code and the data which that reads. The lock lets a second
    process wait in place of doing the same work; the rename keeps a half-written file from ever being found."""
    digest = hashlib.sha256(b"".join(hashlib.sha256(pathlib.Path(source).read_bytes()).digest() for source in sources))
    path = ROOT / digest.hexdigest()[:12] / name
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
            write(draft)
            os.replace(draft, path)
    return path
