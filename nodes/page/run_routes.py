"""HTTP routes for the page: the chart of a node, the list of runs on disk, the graph of one, and its deletion."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

from ...trainers import run_records
from ...trainers.files import read_json_object
from ...trainers.loop import mean_recent_loss
from ...trainers.runs import to_finite_json
from .. import paths
from . import live
from .same_origin import only_from_own_page

ROUTE_PREFIX = "/trainyard/runs"


def list_all_runs() -> list[dict]:
    """Every run on the disk, the newest first, with what is going on now; runs that have not saved anything yet come
    before them. A damaged one says why."""
    found = [summarise_saved_run(about) for about in run_records.list_run_records(paths.runs_folder())]
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
    return {
        **kept,
        "status": name_saved_status(about),
        "text": about["damage"],
        **(summarise_live_run(work) if work else {}),
    }


def name_saved_status(about: dict) -> str:
    if about["damage"]:
        return "damaged"
    if about["why"] != "finished":
        return "stopped"
    return "finished early" if about.get("early") else "finished"


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
    file = run_records.find_run_folder(paths.runs_folder(), folder) / "graph.json"
    if not os.path.lexists(file):
        raise ValueError(f"Run {folder!r} was queued without its workflow, so there is none to open.")
    try:
        return to_finite_json(read_json_object(file))
    except RecursionError as error:
        raise ValueError("graph.json is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"The workflow of run {folder!r} is damaged: {error}.") from error


def delete_saved_run(folder: str) -> dict:
    """Delete a run that is not at work. Raises ValueError for everything else."""
    if live.find_active_run(folder):
        raise ValueError(f"Run {folder!r} is training. Stop it first.")
    return {"freed": run_records.delete_run_folder(paths.runs_folder(), folder)}


def register_run_routes(routes) -> None:
    """Add the routes to the host's table."""
    from aiohttp import web

    async def answered(act, *given):
        """The act's result as JSON, off the event loop; what is wrong with the question as a 400."""
        try:
            text = await asyncio.to_thread(lambda: json.dumps(act(*given)))
            return web.json_response(text=text)
        except ValueError as error:
            return web.json_response({"error": str(error)}, status=400)
        except RecursionError:
            return web.json_response({"error": "The answer is nested too deeply to be sent."}, status=400)
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
    @only_from_own_page
    async def gone(request):
        return await answered(delete_saved_run, request.match_info["folder"])
