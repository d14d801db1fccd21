"""Runs the proofs of proofs.toml and prints their figures.

    python tests/proofs/run.py                           # all of them, or those named
    python tests/proofs/run.py --changed --seconds 200   # those whose code changed, as many as 200 s of a core allow

Changed is what differs from the commit where this branch left origin/main; on main itself, from the commit before. The
variable PROOFS_SINCE names another one. Without git, or without such a commit, nothing counts as changed.
"""

import argparse
import os
import pathlib
import shlex
import subprocess
import sys
import time

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def read_proofs():
    return tomllib.loads((HERE / "proofs.toml").read_text(encoding="utf-8"))


def git(*arguments):
    """What git says, or None where it fails or is missing."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def find_base_commit():
    """The commit to compare with, or None."""
    if since := os.environ.get("PROOFS_SINCE"):
        return git("merge-base", "HEAD", since)
    base = git("merge-base", "HEAD", "origin/main")
    return base if base and base != git("rev-parse", "HEAD") else git("rev-parse", "--verify", "--quiet", "HEAD~1")


def list_changed_files():
    """Paths that differ from the base commit, new ones included."""
    base = find_base_commit()
    if base is None:
        return []
    files = [git("diff", "--name-only", base), git("ls-files", "--others", "--exclude-standard")]
    return "\n".join(filter(None, files)).splitlines()


def depends_on(proof, files):
    """Whether one of the files is code of the proof."""
    folders = tuple(code for code in proof["code"] if code.endswith("/"))
    return any(file in proof["code"] or file.startswith(folders) for file in files)


def choose_within(proofs, seconds):
    """(names that fit into so many seconds, the cheapest first; names that do not)."""
    chosen, left = [], []
    for name in sorted(proofs, key=lambda name: proofs[name]["seconds"]):
        fits = sum(proofs[one]["seconds"] for one in [*chosen, name]) <= seconds
        (chosen if fits else left).append(name)
    return chosen, left


def run_proof(name, proof):
    """True when its bound is kept. pytest prints what a passed test printed: the figures."""
    program, *rest = shlex.split(proof["command"])
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-m", program, *rest, "-q", "--no-header", "-rP"], cwd=ROOT)
    print(
        f"{name}: {'kept' if done.returncode == 0 else 'BROKEN'}, {time.monotonic() - start:.0f} s. {proof['figure']}: {proof['bound']}"
    )
    return done.returncode == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--changed", action="store_true", help="only those whose code changed")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of one core, for all of them")
    asked = parser.parse_args()
    proofs = {name: proof for name, proof in read_proofs().items() if not asked.names or name in asked.names}
    if asked.changed:
        files = list_changed_files()
        proofs = {name: proof for name, proof in proofs.items() if depends_on(proof, files)}
    chosen, left = choose_within(proofs, asked.seconds)
    if not proofs:
        print("no proof depends on what changed" if asked.changed else "no such proof")
    broken = [name for name in chosen if not run_proof(name, proofs[name])]
    if left:
        print(f"NOT RUN, no time: {', '.join(left)} (make proofs)")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
