"""A real headless ComfyUI on the CPU, with this pack and a base folder of its own, driven as a browser drives it.

with Server(folder) as server:
    server.install("sd15_noclip")                     # a small model file, by name
    run = server.run(prompt)                          # waits; the whole websocket transcript
    assert run.ok, run.why
    run.outputs["5"]["images"], run.of("progress"), run.history
"""

import asyncio
import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass, field

from trainyard.tools import env

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKS = {"trainyard": ROOT, "trainyard_kit": pathlib.Path(__file__).parent / "kit_nodes"}
ENDED = ("execution_success", "execution_error", "execution_interrupted")
QUIET = {
    "PYTHONUNBUFFERED": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
}


@dataclass
class Run:
    """One prompt's way through the server."""

    prompt_id: str
    status: int  # HTTP status of POST /prompt
    body: dict  # its answer: node_errors tell what was refused
    events: list = field(
        default_factory=list
    )  # every text message of the websocket: {"type", "data", "at": seconds since the start}
    binaries: list = field(default_factory=list)  # every binary message: previews
    history: dict | None = None

    @property
    def ok(self):
        """Everything ran. An answer of 200 that dropped some output nodes as invalid is no success."""
        return self.status == 200 and not self.body["node_errors"] and self.ending == "execution_success"

    @property
    def ending(self):
        return next((event["type"] for event in self.events if event["type"] in ENDED), None)

    @property
    def why(self):
        """What went wrong, as short as it can be said."""
        if self.status != 200 or self.body.get("node_errors"):
            return json.dumps(self.body, indent=1)
        error = next((event["data"] for event in self.events if event["type"] == "execution_error"), None)
        return (
            f"{error['node_type']}: {error['exception_message']}\n{''.join(error['traceback'])}"
            if error
            else str(self.ending)
        )

    @property
    def outputs(self):
        return (self.history or {}).get("outputs", {})

    def of(self, kind):
        """The data of every event of a type, in order."""
        return [event["data"] for event in self.events if event["type"] == kind]


class Server:
    """`base` keeps everything the server reads and writes; it stays after the end, for a second server to find."""

    def __init__(self, base, packs=None, arguments=(), python=None, environment=None):
        self.base = pathlib.Path(base)
        self.packs = PACKS if packs is None else packs
        self.arguments = arguments
        self.python = str(python or sys.executable)
        self.environment = os.environ | QUIET | (environment or {})
        self.log = self.base / "server.log"
        self.process = None

    # -- life ----------------------------------------------------------------------------------------------------------
    def start(self, seconds=180):
        """Starts the server and waits until it answers."""
        self.prepare()
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        begin = time.monotonic()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command(), cwd=self.home, env=self.environment, stdin=subprocess.DEVNULL, stdout=log,
                                            stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
        while not self.answers():
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended with {self.process.returncode} while starting.\n{self.tail()}")
            if time.monotonic() - begin > seconds:
                self.stop()
                raise TimeoutError(f"ComfyUI did not answer within {seconds} s.\n{self.tail()}")
            time.sleep(0.1)
        self.started_in = time.monotonic() - begin
        return self

    def prepare(self):
        self.home = env.find_comfyui()
        for name in ("input", "output", "temp", "user", "custom_nodes", "datasets", "models"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        for name, folder in self.packs.items():  # links, so that the working tree is what is tested
            link = self.base / "custom_nodes" / name
            link.is_symlink() or link.symlink_to(folder, target_is_directory=True)

    def command(self):
        white = ["--whitelist-custom-nodes", *self.packs] if self.packs else []
        return [self.python, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(self.port), "--base-directory", str(self.base),
                "--user-directory", str(self.base / "user"), "--database-url", "sqlite:///:memory:", "--disable-auto-launch",
                "--disable-api-nodes", "--disable-all-custom-nodes", *white, *self.arguments]  # fmt: skip

    def answers(self):
        with contextlib.suppress(OSError):
            return bool(self.get("/system_stats"))

    def stop(self):
        """Asks the server to end, and makes it end after ten seconds."""
        if self.process and self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
        self.kill()

    def kill(self):
        """kill -9: what a power cut or the out-of-memory killer does."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()

    def __enter__(self):
        return self.start()

    def __exit__(self, *error):
        self.stop()

    # -- log -----------------------------------------------------------------------------------------------------------
    def logs(self):
        return self.log.read_text(errors="replace")

    def tail(self, lines=60):
        return "\n".join(self.logs().splitlines()[-lines:])

    def import_errors(self, pack="trainyard"):
        """Lines of the log that say a pack was not imported: the server starts all the same."""
        folder = re.compile(re.escape(str(self.base / "custom_nodes" / pack)) + r"(?!\w)")
        bad = ("IMPORT FAILED", "Cannot import", "Error while calling comfy_entrypoint")
        return [line for line in self.logs().splitlines() if folder.search(line) and any(text in line for text in bad)]

    # -- HTTP ----------------------------------------------------------------------------------------------------------
    def get(self, path):
        """Parsed JSON, or bytes."""
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return parsed(answer)

    def post(self, path, data=None):
        """(HTTP status, parsed body); an error status is an answer too."""
        request = urllib.request.Request(
            self.url + path, json.dumps(data or {}).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, parsed(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, parsed(error)

    def object_info(self, node=None):
        """Schemas by node id, or the schema of one node."""
        return self.get("/object_info") if node is None else self.get(f"/object_info/{node}").get(node)

    def history(self, prompt_id):
        return self.get(f"/history/{prompt_id}").get(prompt_id)

    def interrupt(self, prompt_id=None):
        return self.post("/interrupt", {"prompt_id": prompt_id} if prompt_id else {})

    # -- files ---------------------------------------------------------------------------------------------------------
    def install(self, name):
        """File name of a small model (tiny.FILES), for the widget of a loader node."""
        from trainyard.tests.comfy import boot, tiny

        boot.boot()
        return self.add_model(tiny.kind(name), tiny.build(name))

    def add_model(self, kind, path):
        """File name of a model file, linked into models/<kind>."""
        link = self.base / "models" / kind / pathlib.Path(path).name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.exists() or link.symlink_to(pathlib.Path(path).resolve())
        return link.name

    def output(self, *parts):
        return self.base.joinpath("output", *parts)

    # -- prompts -------------------------------------------------------------------------------------------------------
    def run(self, prompt, seconds=300, watch=None, extra=None):
        """Runs an API prompt to its end. `watch(event)` sees every event as it comes, and may interrupt or kill.

        A server that dies on the way ends the transcript: `run.ending` is None then.
        """
        return asyncio.run(self.transcript(prompt, seconds, watch or (lambda event: None), extra or {}))

    async def transcript(self, prompt, seconds, watch, extra):
        import aiohttp

        client, run = uuid.uuid4().hex, Run(str(uuid.uuid4()), 0, {})
        address = f"ws://127.0.0.1:{self.port}/ws?clientId={client}"
        async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket_:
            await socket_.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
            order = {"prompt": prompt, "client_id": client, "prompt_id": run.prompt_id, **extra}
            run.status, run.body = await asyncio.to_thread(self.post, "/prompt", order)
            if run.status == 200:
                await asyncio.wait_for(listen(socket_, run, watch), seconds)
        if run.ending:
            run.history = await self.written_history(run.prompt_id)
        return run

    async def written_history(self, prompt_id):
        """The history entry, which is written just after the last event."""
        for _ in range(100):
            if found := await asyncio.to_thread(self.history, prompt_id):
                return found
            await asyncio.sleep(0.05)
        raise TimeoutError(f"No history for prompt {prompt_id} within 5 s of its end.\n{self.tail()}")


async def listen(socket_, run, watch):
    """Gathers messages until the prompt's last event, or until the server is gone."""
    import aiohttp

    begin = time.monotonic()
    async for message in socket_:
        if message.type == aiohttp.WSMsgType.BINARY:
            run.binaries.append(message.data)
        elif message.type == aiohttp.WSMsgType.TEXT:
            event = json.loads(message.data) | {"at": time.monotonic() - begin}
            run.events.append(event)
            await asyncio.to_thread(watch, event)
            if event["type"] in ENDED and event["data"].get("prompt_id") == run.prompt_id:
                return


def parsed(answer):
    body = answer.read()
    return json.loads(body) if body and "json" in answer.headers.get("Content-Type", "") else body


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
