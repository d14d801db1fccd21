"""Orders of two streams on the pretend card, right and wrong: prints one line of JSON, name -> races that were seen.

    python tests/card/orders.py

To be run in a process of its own, because torch cannot unlearn a device."""

import json
import pathlib
import sys
import types

if "trainyard" not in sys.modules:  # the pack, without ComfyUI
    sys.modules["trainyard"] = types.ModuleType("trainyard")
    sys.modules["trainyard"].__path__ = [str(pathlib.Path(__file__).resolve().parents[2])]

import torch
from trainyard.tests.card import device, streams
from trainyard.trainers.memory.prefetch import TransferStream

device.register_card()
DEVICE = torch.device("card:0")


def fetch_and_receive(transfers, source):
    return transfers.receive(transfers.fetch([source]))[0].add(1)


def fetch_without_receiving(transfers, source):
    return transfers.fetch([source]).copies[0].add(1)


def fetch_before_the_memory_is_free(transfers, source):
    """Without the wait of TransferStream.fetch."""
    copy = torch.empty_like(source, device=DEVICE)
    with streams.stream(transfers.stream):
        copy.copy_(source, non_blocking=True)
    streams.COMPUTING.wait_stream(transfers.stream)


def fetch_and_drop(transfers, source):
    transfers.fetch([source])
    transfers.drop_arrivals()


def fetch_and_lose(transfers, source):
    transfers.fetch([source])
    transfers.arrivals.clear()


def fetch_what_is_still_coming_down(transfers, source):
    """Without it, too."""
    source.copy_(torch.ones(source.shape, device=DEVICE), non_blocking=True)
    with streams.stream(transfers.stream):
        source.to(DEVICE, non_blocking=True)


def fetch_what_came_down(transfers, source):
    source.copy_(torch.ones(source.shape, device=DEVICE), non_blocking=True)
    return transfers.receive(transfers.fetch([source]))


def overwrite_what_is_being_read(transfers, source):
    value = torch.ones(4, device=DEVICE)
    transfers.stream.wait_stream(streams.COMPUTING)
    with streams.stream(transfers.stream):
        twice = value * 2
    value.zero_()
    streams.COMPUTING.wait_stream(transfers.stream)
    return twice


ORDERS = (
    fetch_and_receive,
    fetch_without_receiving,
    fetch_before_the_memory_is_free,
    fetch_and_drop,
    fetch_and_lose,
    fetch_what_came_down,
    fetch_what_is_still_coming_down,
    overwrite_what_is_being_read,
)


def main():
    seen = {}
    with device.PretendCard(2**20) as card:
        for order in ORDERS:
            traffic = card.begin_part()
            result = order(TransferStream(DEVICE), torch.ones(4).pin_memory())
            del result
            seen[order.__name__] = [race.split(": ")[-1] for race in traffic.races]
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
