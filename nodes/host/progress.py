"""Progress in the node and its text line, log lines, and the host's interrupt."""

from __future__ import annotations

import logging
import time

import comfy.lora
import comfy.model_management as mm


class NodeProgressReporter:
    """Progress of a run, in ComfyUI's own bar and as a text line in the node; raises the host's interrupt."""

    def __init__(self, steps: int, node_id=None):
        self.bar = comfy.utils.ProgressBar(steps, node_id=node_id)
        self.node_id = node_id

    def __call__(self, progress):
        mm.throw_exception_if_processing_interrupted()
        self.bar.update_absolute(progress.step, progress.steps)
        self.show_text(progress.format_line())

    def show_text(self, line: str):
        show_node_text(line, self.node_id)


def show_node_text(line: str, node_id=None):
    """A line of text in the node, which stays there until the next one."""
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is not None and node_id is not None:
        server.send_progress_text(line, node_id, server.client_id)
    logging.debug("Trainyard: %s", line)


class ItemProgressReporter:
    """Progress of a job that counts things: report(done, total, what)."""

    def __init__(self, node_id=None):
        self.report = NodeProgressReporter(1, node_id)
        self.last_update = 0.0

    def __call__(self, done, total, what=""):
        now = time.monotonic()
        if now - self.last_update > 0.4 or done == total:
            self.last_update = now
            self.report.bar.update_absolute(done, total)
            self.report.show_text(f"{done}/{total} {what}")


def raise_if_interrupted():
    """Raise the host's interrupt if the user pressed Cancel."""
    mm.throw_exception_if_processing_interrupted()


def log_once(line: str, said=set()):  # noqa: B006 - the set is the memory
    if line not in said:
        said.add(line)
        logging.info("Trainyard: %s", line)


def log_warning(line: str):
    logging.warning("Trainyard: %s", line)
