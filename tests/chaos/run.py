"""What a run survives: kills, interrupts, flipped bits, cuts, hostile files and names, on a real ComfyUI server.

    python tests/chaos/run.py --seed 1 --rounds 5 [--only "flipped bit in the state"] [--base folder]

Every trial starts from the same half-finished run of a tiny model, does one harm, lets the run go on, and compares the
LoRA that comes out with that of a run that nothing happened to. The same seed does the same harm, up to the moments at
which processes happen to be. Ends with 1 when anything was accepted wrongly, failed without words, or was left behind.
"""

import argparse
import collections
import json
import os
import pathlib
import random
import shutil
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
import trainyard_plugin  # noqa: E402  makes `trainyard` importable

sys.path.remove(str(ROOT / "tests"))
from trainyard.tests.comfy.server import PACKS, Server  # noqa: E402
from trainyard.tests.comfy.test_train_lora_server import graph, make_dataset  # noqa: E402
from trainyard.trainers.files import read_safetensors, tensor_hash  # noqa: E402

assert trainyard_plugin
OUTCOMES = ("same", "refused", "wrong", "raw", "left")
MEANING = {
    "same": "ended in the same LoRA, or the list came",
    "refused": "refused in words",
    "wrong": "accepted, with another result",
    "raw": "failed without words",
    "left": "left locked, listed as training, or undeletable",
}
WORDS = ("ValueError", "OSError", "RuntimeError", "RunInUse")  # errors that are written for a person
NAME, STEPS, HALF = "chaos", 6, 4
HOSTILE_JSON = (
    "", "{", "{}", "[]", "null", "1e999", "NaN", "[" * 60_000, '{"a":' * 60_000, '{"name": [], "step": "x", "steps": {}, "why": 5}',
    '{"name": "x", "step": -5, "steps": 1e400, "why": null}', '{"name": "\\ud800", "step": 1, "steps": 2, "why": "finished", "loss": NaN}',
    '{"name": "x", "step": ' + "9" * 5000 + "}", "\0" * 64, "\ufeff{}", '{"name": "x", "step": 1, "steps": 2, "why": "stopped", "validation": 7}',
)  # fmt: skip
HOSTILE_NAMES = (
    "あ" * 80, "x" * 101, "nul", "COM1.v2", "a\n", "a\tb", "../up", "a/b", "a\\b", ".hidden", "", "a\0b", "con ", "é" * 100, "😀" * 60, "a\u202eb",
    "x" * 100, "あ" * 70, "ok name+1",
)  # fmt: skip


class Chaos:
    """The server, the run that nothing happened to, and the half-finished one that every trial begins with."""

    def __init__(self, base, seed):
        self.random = random.Random(seed)
        self.order = pathlib.Path(base) / "kill_at"
        packs = PACKS | {"trainyard_chaos": pathlib.Path(__file__).parent / "kill_pack"}
        self.server = Server(base, packs=packs, environment={"TRAINYARD_CHAOS": str(self.order)})
        self.runs = self.server.output("loras", "trainyard")
        self.half = pathlib.Path(base) / "half"
        self.turn = 0

    def prepare(self):
        self.server.start()
        self.dataset = make_dataset(self.server, "chaos")
        whole = self.train(save_every=1)
        assert whole.ok, whole.why
        self.folder = next(self.runs.glob(f"{NAME}-*"))
        self.expected = self.digest(self.lora())
        self.finished = pathlib.Path(self.server.base) / "finished"
        shutil.copytree(self.folder, self.finished)
        self.delete_run()
        assert self.train(steps=HALF, save_every=1).ok
        shutil.copytree(self.folder, self.half)
        begun = time.monotonic()
        assert self.train().ok and self.digest(self.lora()) == self.expected, "a run that goes on is not the same run"
        self.seconds = time.monotonic() - begun

    # -- doing -----------------------------------------------------------------------------------------------------
    def train(self, **changes):
        """One Run of the node, with a `save_every` of its own, so that ComfyUI does not answer from its cache."""
        self.turn += 1
        widgets = {"steps": STEPS, "save_every": 1000 + self.turn, "run_name": NAME, **changes}
        return self.server.run(graph(self.server, self.dataset, **widgets))

    def restore(self, source=None):
        """The half-finished run, or the finished one, in the place of whatever is there."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(source or self.half, self.folder)

    def lora(self):
        return self.folder / f"{NAME}.safetensors"

    def digest(self, path):
        return tensor_hash(read_safetensors(path)[0])

    def post_delete(self, name):
        """(status, body) as the page would get it."""
        path = f"/trainyard/runs/{urllib.parse.quote(name)}/delete"
        request = urllib.request.Request(self.server.url + path, b"", {"Origin": self.server.url})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def delete_run(self):
        return self.post_delete(self.folder.name)

    def forget_nodes(self):
        """ComfyUI's cache of outputs is emptied: the cached files are read again."""
        self.server.post("/free", {"unload_models": True, "free_memory": True})
        time.sleep(1.5)

    def flip_bit(self, path):
        blob = bytearray(path.read_bytes())
        bit = self.random.randrange(8 * len(blob))
        blob[bit // 8] ^= 1 << bit % 8
        path.write_bytes(blob)

    def cut(self, path):
        path.write_bytes(path.read_bytes()[: self.random.randrange(path.stat().st_size)])

    def cached_files(self):
        return sorted((self.server.base / "datasets" / "trainyard_cache").rglob("*.safetensors"))

    def recover(self):
        """A server that answers, and nothing of the run."""
        self.server.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.server.start()

    # -- judging -----------------------------------------------------------------------------------------------------
    def judge(self, run):
        """What became of a prompt that should have ended in the expected LoRA."""
        if run.ok:
            if not self.lora().exists() or self.digest(self.lora()) != self.expected:
                return "wrong"
            rubbish = [file for file in self.folder.rglob("*") if ".part" in file.name or "next" in file.name]
            return "left" if rubbish else "same"
        error = next((event["data"] for event in run.events if event["type"] == "execution_error"), None)
        if error is None:
            return "refused" if run.body.get("node_errors") or run.ending else "raw"
        kind, text = error["exception_type"].rpartition(".")[2], error["exception_message"]
        return "refused" if kind in WORDS and len(text) > 30 else "raw"

    def left_behind(self):
        """What of the run outlives the trial: "training", or a folder that cannot be deleted; empty when nothing."""
        if [run for run in self.server.get("/trainyard/runs") if run["status"] == "training"]:
            return "training"
        status, body = self.delete_run()
        gone = status == 200 or (status == 400 and "There is no run" in body)
        return "" if gone and not self.folder.exists() else body

    # -- trials: (harm, then what became of it) ------------------------------------------------------------------------
    def kill_at_a_random_moment(self):
        self.restore()
        self.train_while_dying(threading.Timer(self.random.uniform(0, self.seconds), self.server.kill))
        return self.go_on_after_kill()

    def kill_inside_a_save(self):
        self.restore()
        self.order.write_text(str(self.random.randint(1, 20)))
        self.train_while_dying()
        self.order.unlink(missing_ok=True)
        return self.go_on_after_kill()

    def train_while_dying(self, killer=None):
        self.forget_nodes()
        if killer:
            killer.start()
        try:
            self.train(save_every=1)
        except OSError:  # the connection to a server that is dying
            self.server.process.wait(30)
        if killer:
            killer.join()

    def go_on_after_kill(self):
        self.server.kill()
        self.server.start()
        return self.judge(self.train())

    def interrupt_at_a_random_moment(self):
        self.restore()
        timer = threading.Timer(self.random.uniform(0, self.seconds), self.server.interrupt)
        timer.start()
        self.train()
        timer.join()
        if [run for run in self.server.get("/trainyard/runs") if run["status"] == "training"]:
            return "left"
        time.sleep(0.3)  # an interrupt that came after the end is forgotten
        return self.judge(self.train())

    def flipped_bit_in_the_state(self):
        self.restore()
        self.flip_bit(self.folder / "resume.state")
        return self.judge(self.train())

    def flipped_bit_in_a_finished_lora(self):
        self.restore(self.finished)
        self.flip_bit(self.lora())
        return self.judge(self.train())

    def flipped_bit_in_a_loaded_lora(self):
        self.turn += 1
        source, target = self.server.output("loras", f"flipped{self.turn}.safetensors"), f"loaded{self.turn}"
        shutil.copyfile(self.finished / f"{NAME}.safetensors", source)
        self.flip_bit(source)
        prompt = {
            "1": {"class_type": "TrainyardLoadLora", "inputs": {"file": source.name}},
            "2": {"class_type": "TrainyardSaveLora", "inputs": {"lora": ["1", 0], "name": target}},
        }
        run = self.server.run(prompt)
        saved = self.server.output("loras", f"{target}.safetensors")
        return ("same" if self.digest(saved) == self.expected else "wrong") if run.ok else self.judge(run)

    def flipped_bit_in_the_cache(self):
        """Refused in words at most once: the next Run makes the file again."""
        self.restore()
        self.forget_nodes()
        self.flip_bit(self.random.choice(self.cached_files()))
        first = self.judge(self.train())
        second = self.judge(self.train()) if first == "refused" else first
        return second if second == "same" or first != "refused" else "left"

    def cut_of_a_file(self):
        source = self.random.choice((self.half, self.finished))
        self.restore(source)
        names = ["resume.state", "resume.previous.state", "run.json", "graph.json"]
        names += [f"{NAME}.safetensors"] if source == self.finished else []
        self.cut(self.folder / self.random.choice(names))
        self.server.get("/trainyard/runs")
        return self.judge(self.train())

    def cut_of_both_states(self):
        self.restore()
        for name in ("resume.state", "resume.previous.state"):
            self.cut(self.folder / name)
        return self.judge(self.train())

    def hostile_values_in_the_record(self):
        self.restore()
        (self.folder / "run.json").write_text(self.random.choice(HOSTILE_JSON), errors="surrogatepass")
        if self.folder.name not in [run["folder"] for run in self.server.get("/trainyard/runs")]:
            return "left"
        return self.judge(self.train())

    def hostile_values_in_the_graph(self):
        self.restore()
        (self.folder / "graph.json").write_text(self.random.choice(HOSTILE_JSON), errors="surrogatepass")
        try:
            self.server.get(f"/trainyard/runs/{self.folder.name}/graph")
            return "same"
        except urllib.error.HTTPError as error:
            with error:
                return "refused" if error.code == 400 and "error" in json.loads(error.read()) else "raw"

    def pipe_in_the_place_of_a_file(self):
        self.restore()
        path = self.folder / self.random.choice(("run.json", "graph.json", "resume.state", "resume.previous.state"))
        path.unlink()
        os.mkfifo(path)
        self.server.get("/trainyard/runs")
        return self.judge(self.train())

    def hostile_name(self):
        name = self.random.choice(HOSTILE_NAMES)
        run = self.train(run_name=name, steps=1)
        if not run.ok:
            return self.judge(run)
        made = [folder for folder in self.runs.iterdir() if (folder / f"{name.strip(' ')}.safetensors").exists()]
        return "same" if len(made) == 1 and self.post_delete(made[0].name)[0] == 200 else "left"

    def deletion_while_the_run_goes_on(self):
        self.restore()
        told = []
        timer = threading.Timer(self.random.uniform(0, self.seconds), lambda: told.append(self.delete_run()[0]))
        timer.start()
        run = self.train()
        timer.join()
        if told != [200] and told != [400]:
            return "raw"
        if told == [200] and not self.folder.exists():  # deleted when it had ended
            return "same" if run.ok else self.judge(run)
        return self.judge(run)

    def four_deletions_at_once(self):
        self.restore()
        told = []
        threads = [threading.Thread(target=lambda: told.append(self.delete_run()[0])) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return "same" if sorted(told) == [200, 400, 400, 400] else "raw"


TRIALS = {  # name -> (trial, how often in a round)
    "kill at a random moment": (Chaos.kill_at_a_random_moment, 1),
    "kill inside a save": (Chaos.kill_inside_a_save, 1),
    "interrupt at a random moment": (Chaos.interrupt_at_a_random_moment, 2),
    "flipped bit in the state": (Chaos.flipped_bit_in_the_state, 5),
    "flipped bit in a finished LoRA": (Chaos.flipped_bit_in_a_finished_lora, 3),
    "flipped bit in a loaded LoRA": (Chaos.flipped_bit_in_a_loaded_lora, 5),
    "flipped bit in the cache": (Chaos.flipped_bit_in_the_cache, 3),
    "one file cut off": (Chaos.cut_of_a_file, 3),
    "both states cut off": (Chaos.cut_of_both_states, 1),
    "hostile run.json": (Chaos.hostile_values_in_the_record, 3),
    "hostile graph.json": (Chaos.hostile_values_in_the_graph, 5),
    "pipe in a file's place": (Chaos.pipe_in_the_place_of_a_file, 1),
    "hostile name": (Chaos.hostile_name, 4),
    "deletion while the run goes on": (Chaos.deletion_while_the_run_goes_on, 2),
    "four deletions at once": (Chaos.four_deletions_at_once, 2),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=[], choices=[*TRIALS], metavar="TRIAL")
    parser.add_argument("--base", type=pathlib.Path, help="keeps the server's files here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="trainyard-chaos-") as temporary:
        counts = run_rounds(Chaos(arguments.base or temporary, arguments.seed), arguments.rounds, arguments.only)
    print_counts(counts)
    return int(any(count[bad] for count in counts.values() for bad in ("wrong", "raw", "left")))


def run_rounds(chaos, rounds, only):
    """{name: outcome counts}"""
    counts = {name: collections.Counter() for name in TRIALS if not only or name in only}
    begun = time.monotonic()
    try:
        chaos.prepare()
        for number in range(rounds):
            for name in counts:
                trial, times = TRIALS[name]
                for _ in range(times):
                    counts[name][run_trial(chaos, name, trial)] += 1
            print(f"round {number + 1} of {rounds}, {time.monotonic() - begun:.0f} s", flush=True)
    finally:
        chaos.server.stop()
    return counts


def run_trial(chaos, name, trial):
    left = ""
    try:
        outcome = trial(chaos)
        if left := chaos.left_behind():
            outcome = "left"
    except OSError as error:  # an HTTP status of 500, or no answer
        outcome, left = "raw", str(error)
        chaos.recover()
    if outcome in ("wrong", "raw", "left"):
        print(f"{outcome.upper()}: {name} {left}\n{chaos.server.tail(12)}", flush=True)
    return outcome


def print_counts(counts):
    for outcome, meaning in MEANING.items():
        print(f"{outcome}: {meaning}")
    print(f"\n| harm | trials | {' | '.join(OUTCOMES)} |\n|---|---|{'---|' * len(OUTCOMES)}")
    for name, count in counts.items():
        print(f"| {name} | {count.total()} | {' | '.join(str(count[outcome]) for outcome in OUTCOMES)} |")
    total = sum(counts.values(), collections.Counter())
    print(f"| all | {total.total()} | {' | '.join(str(total[outcome]) for outcome in OUTCOMES)} |")


if __name__ == "__main__":
    sys.exit(main())
