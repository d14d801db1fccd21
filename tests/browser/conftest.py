"""What every test in a browser needs: the driver, and a way to run one of the scripts beside this file."""

import json
import os
import pathlib
import shutil
import subprocess

import pytest
from trainyard.tests.conftest import chromium

HERE = pathlib.Path(__file__).parent


@pytest.fixture(scope="session")
def driver():
    """playwright-core beside the scripts; the browser is the system's. driver(script, url, plan, *flags) gives what the
    script saw."""
    if not (HERE / "node_modules" / "playwright-core").is_dir():
        npm = shutil.which("npm")
        if npm is None:
            pytest.skip("npm not found, so the browser cannot be driven (install Node's npm)")
        done = subprocess.run(
            [npm, "ci", "--no-audit", "--no-fund"], cwd=HERE, capture_output=True, text=True, timeout=300
        )
        if done.returncode:
            pytest.skip(f"`npm ci` in {HERE} failed, so the browser cannot be driven: {done.stderr.strip()[-300:]}")
    return drive


def drive(script, url, plan, *flags, seconds=600):
    command = ["node", str(HERE / script), url, str(plan), *flags]
    done = subprocess.run(
        command, env=os.environ | {"CHROMIUM": chromium()}, capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return json.loads(done.stdout.splitlines()[-1])
