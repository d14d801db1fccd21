"""HTTP routes for the page: the chart of a node, the list of runs on disk, the graph of one, and its deletion."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from ...trainers import runs
from ...trainers.loop import mean_recent_loss
from ...trainers.runs import to_finite_json
from .. import paths
from . import live

ROUTE_PREFIX = "/trainyard/runs"


def list_all_runs() -> list[dict]:
    """Every run on the disk, the newest first, with what is going on now; runs that have not saved anything yet come
    before them."""
    found = [summarise_saved_run(about) for about in runs.list_run_records(paths.runs_folder())]
    known = {about["folder"] for about in found}
    fresh = [
        dict(
            summarise_live_run(one), model="", bytes=0, changed=None, lora=None, file=None, sample=None, validation=None
        )
        for one in live.LIVE_RUNS.values()
        if one.status == live.TRAINING and one.folder not in known
    ]
    return to_finite_json([*reversed(fresh), *found])


def summarise_saved_run(about: dict) -> dict:
    """One run as the sidebar shows it."""
    kept = {
        key: about.get(key)
        for key in (
            "folder",
            "name",
            "step",
            "steps",
            "loss",
            "model",
            "validation",
            "sample",
            "bytes",
            "changed",
            "lora",
        )
    }
    work = live.find_active_run(about["folder"])
    kept["file"] = (
        str(Path("trainyard", about["folder"], about["lora"])) if about["lora"] else None
    )  # as LoRA loaders list it
    ended = "finished early" if about.get("early") else "finished"
    return {
        **kept,
        "status": ended if about["why"] == "finished" else "stopped",
        **(summarise_live_run(work) if work else {}),
    }


def summarise_live_run(one: live.LiveRun) -> dict:
    """What a run at work says of itself."""
    sample = {"sample": one.samples[-1]["file"]} if one.samples else {}
    return {
        "folder": one.folder,
        "name": one.name,
        "step": len(one.losses),
        "steps": one.steps,
        "status": one.status,
        "prompt": one.prompt,
        "loss": mean_recent_loss(one.losses) if one.losses else None,
        "text": one.text,
        **sample,
    }


def read_run_graph(folder: str) -> dict:
    """The workflow and the prompt of a run. Raises ValueError when it has none."""
    file = runs.find_run_folder(paths.runs_folder(), folder) / "graph.json"
    if not file.is_file():
        raise ValueError(f"Run {folder!r} was queued without its workflow, so there is none to open.")
    return json.loads(file.read_text(encoding="utf-8"))


def delete_saved_run(folder: str) -> dict:
    """Delete a run that is not at work. Raises ValueError for everything else."""
    if live.find_active_run(folder):
        raise ValueError(f"Run {folder!r} is training. Stop it first.")
    return {"freed": runs.delete_run_folder(paths.runs_folder(), folder)}


def register_run_routes(routes) -> None:
    """Add the routes to the host's table."""
    from aiohttp import web

    async def answered(act, *given):
        """The act's result as JSON, off the event loop; what is wrong with the question as a 400."""
        try:
            return web.json_response(await asyncio.to_thread(act, *given))
        except ValueError as error:
            return web.json_response({"error": str(error)}, status=400)
        except OSError as error:
            return web.json_response({"error": f"{error.strerror}: {error.filename}"}, status=500)

    @routes.get(ROUTE_PREFIX)
    async def everything(_):
        return await answered(list_all_runs)

    @routes.get(f"{ROUTE_PREFIX}/{{node}}")
    async def one(request):
        found = live.find_last_run(request.match_info["node"], request.query.get("workflow", ""))
        return web.json_response(found.full_state() if found else {})

    @routes.get(f"{ROUTE_PREFIX}/{{folder}}/graph")
    async def graph(request):
        return await answered(read_run_graph, request.match_info["folder"])

    @routes.post(f"{ROUTE_PREFIX}/{{folder}}/delete")
    async def gone(request):
        return await answered(delete_saved_run, request.match_info["folder"])
