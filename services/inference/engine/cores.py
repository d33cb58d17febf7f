"""Who computes with how many threads: the engine's with all of them, every other one alone."""

from __future__ import annotations

import threading

import torch


def reserve(count: int) -> None:
    """Gives the calling thread so many threads for its arithmetic, and one to every thread that computes from now on.

    OpenMP keeps a team of threads for each thread that has ever computed with several. When all teams together are
    more than the cores, libgomp lets none of them wait actively any more, and the kernel has to wake them for every
    operation: on two cores the products of one layer and token take 142 microseconds with one team, 360 beside a
    second one that is idle, and 300 on one core.
    """
    torch.set_num_threads(count)
    torch.get_num_threads()  # a thread takes the common number when it is first asked: this one has, from here on
    # The common number is what was set last, by whichever thread.
    other = threading.Thread(target=torch.set_num_threads, args=(1,))
    other.start()
    other.join()
