"""Every scene of the pretend card; `make test` takes the quick ones (tests/card/scenes.py)."""

from trainyard.tests.card import scenes

scenes.chosen = scenes.ALL

from trainyard.tests.comfy.test_pretend_card import *  # noqa: E402, F403 - its tests, over all scenes
