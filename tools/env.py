"""Finds ComfyUI and makes the project's own `.venv`. Prints what it does; does nothing when nothing changed.

    python3 tools/env.py            # make or refresh .venv (what `make env` runs)
    python3 tools/env.py --where    # only say what was found

With ComfyUI, `.venv` sees the packages of ComfyUI's environment through a `.pth` file and adds the pack's requirements
and the development tools on top: nothing is ever installed into the user's ComfyUI. Without it, `.venv` stands alone,
with torch from the package registry. Standard library only: it runs before there is an environment.
"""

import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

ROOT = pathlib.Path(os.path.abspath(__file__)).parents[1]  # not resolved: a link in custom_nodes/ still knows its place
VENV = ROOT / ".venv"
STAMP = VENV / "trainyard-env.json"
LAYER = "comfyui_host.pth"
SETUP = 3  # raised when this file makes a different environment from the same requirements
BIN = "Scripts" if os.name == "nt" else "bin"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
VOCABULARY = "open_clip_torch"  # only its CLIP vocabulary file is read; what it depends on could replace a CPU torch


# -- ComfyUI and its Python --------------------------------------------------------------------------------------------
def is_comfyui(folder):
    return (folder / "main.py").is_file() and (folder / "comfy" / "cli_args.py").is_file()


def find_comfyui():
    """ComfyUI's folder or None: COMFYUI_PATH, else the one this pack lies in, else ~/comfy/ComfyUI."""
    named = os.environ.get("COMFYUI_PATH")
    if named:
        folder = pathlib.Path(named).expanduser().absolute()
        if not is_comfyui(folder):
            raise SystemExit(
                f"COMFYUI_PATH={named} holds no ComfyUI (no main.py and comfy/ in it). Correct it or unset it."
            )
        return folder
    places = (ROOT.parents[1], ROOT.resolve().parents[1], pathlib.Path.home() / "comfy" / "ComfyUI")
    return next((place for place in places if is_comfyui(place)), None)


def python_of(environment):
    return environment / BIN / ("python.exe" if os.name == "nt" else "python")


def answer(python, code):
    """The JSON that `code` prints in another Python, or None when it fails there."""
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return json.loads(done.stdout) if done.returncode == 0 else None


def host_python(comfyui):
    """The Python that runs ComfyUI, or None: its .venv or venv, else the environment that runs this."""
    for folder in (comfyui / ".venv", comfyui / "venv"):
        if python_of(folder).is_file():
            return python_of(folder)
    beside = pathlib.Path(sys.executable)
    needed = (
        "import importlib.util as u, json; print(json.dumps(all(u.find_spec(n) for n in ('torch', "
        "'transformers', "
        "'aiohttp'))))"
    )
    inside = (
        VENV.resolve() in pathlib.Path(sys.prefix).resolve().parents
        or pathlib.Path(sys.prefix).resolve() == VENV.resolve()
    )
    return beside if not inside and answer(beside, needed) else None


def package_folders(python):
    """The folders a Python imports installed packages from."""
    code = (
        "import json, sys; print(json.dumps([p for p in sys.path if p.rstrip('/\\\\').endswith(('site-packages', "
        "'dist-packages'))]))"
    )
    return answer(python, code) or []


# -- the environment ---------------------------------------------------------------------------------------------------
def requirements(host):
    names = ["requirements.txt", "requirements-dev.txt"] + ([] if host else ["requirements-standalone.txt"])
    return [ROOT / name for name in names]


def fingerprint(python, host):
    """What the environment depends on: the base Python, the host's packages and the requirement files."""
    texts = [path.read_text() for path in requirements(host)]
    version = answer(python, "import json, sys; print(json.dumps(sys.version))")
    return hashlib.sha256(json.dumps([SETUP, version, host, *texts]).encode()).hexdigest()


def stamp():
    try:
        return json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}


def say(text):
    print(f"[env] {text}", flush=True)


def call(*command):
    subprocess.run([str(part) for part in command], check=True, stdin=subprocess.DEVNULL)


def pip(*arguments, quiet_failure=False):
    command = [str(python_of(VENV)), "-m", "pip", "--disable-pip-version-check", "--no-input", *map(str, arguments)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode and not quiet_failure:
        raise SystemExit(f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}\n[env] FAILED: {' '.join(command)}")
    return done


def make_venv(python):
    try:
        call(python, "-m", "venv", VENV)
    except subprocess.CalledProcessError:
        shutil.rmtree(VENV, ignore_errors=True)
        raise SystemExit(
            f"[env] {python} cannot make a virtual environment. On Debian or Ubuntu: apt install python3-venv"
        ) from None


def site_packages():
    return pathlib.Path(
        answer(python_of(VENV), "import json, sysconfig; print(json.dumps(sysconfig.get_path('purelib')))")
    )


def layer(host):
    """Lets `.venv` see the host's packages, after its own."""
    lines = [f"import site; site.addsitedir({folder!r})" for folder in host]
    (site_packages() / LAYER).write_text("\n".join(lines) + "\n")


def has_gpu():
    return sys.platform == "darwin" or os.name == "nt" or bool(shutil.which("nvidia-smi") or shutil.which("rocm-smi"))


def install_torch():
    """torch, the small CPU build where no GPU asks for more: from the configured indexes, else from pytorch.org."""
    if answer(python_of(VENV), "import json, torch; print(json.dumps(torch.__version__))"):
        return
    if not has_gpu():
        listed = re.findall(r"\d[\w.]*\+cpu", pip("index", "versions", "torch", quiet_failure=True).stdout)
        if listed and not pip("install", f"torch=={listed[0]}", quiet_failure=True).returncode:
            return
        if not pip(
            "install", "--timeout", 10, "--retries", 0, "--index-url", CPU_INDEX, "torch", quiet_failure=True
        ).returncode:
            return
        say("no CPU build of torch can be reached: installing the full one (several GB)")
    pip("install", "torch")


def build(python, host):
    """A `.venv` that answers the requirement files. Kept packages are kept; a change of host starts afresh."""
    if not python_of(VENV).is_file() or stamp().get("host", host) != host:
        shutil.rmtree(VENV, ignore_errors=True)
        make_venv(python)
    if host:
        layer(host)
    else:
        say("installing torch")
        install_torch()
    say("installing " + ", ".join(path.name for path in requirements(host)))
    pip("install", *(part for path in requirements(host) for part in ("-r", path)))
    pip("install", "--no-deps", VOCABULARY)


def ensure():
    """Path of the environment's Python, after making or refreshing it if needed."""
    comfyui = find_comfyui()
    python = comfyui and host_python(comfyui)
    host = package_folders(python) if python else []
    python = python or pathlib.Path(getattr(sys, "_base_executable", None) or sys.executable)
    wanted = fingerprint(python, host)
    if stamp().get("fingerprint") != wanted or not python_of(VENV).is_file():
        say(f".venv over {comfyui} ({python})" if host else f".venv on its own ({python}); {no_host(comfyui)}")
        build(python, host)
        STAMP.write_text(json.dumps({"fingerprint": wanted, "host": host}))
    return python_of(VENV)


def no_host(comfyui):
    if comfyui is None:
        return "ComfyUI not found (set COMFYUI_PATH to its folder)"
    return (
        f"ComfyUI at {comfyui} has no environment that can run it (no .venv or venv inside, and this Python lacks "
        "its packages)"
    )


def where():
    comfyui = find_comfyui()
    python = comfyui and host_python(comfyui)
    say(f"ComfyUI {comfyui}, run by {python}" if python else no_host(comfyui))


if __name__ == "__main__":
    where() if "--where" in sys.argv[1:] else ensure()
