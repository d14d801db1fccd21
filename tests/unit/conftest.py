"""What every unit test runs under."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Toy matrices on one thread: on a busy machine two threads wait for each other seventy times longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
