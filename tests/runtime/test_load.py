"""Many calls from many threads and processes, and after a fork: results are the first ones, and memory is bounded."""

import gc
import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from secateur.kernels.native import load_native
from tests.runtime import loads

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(load_native() is None, reason="the kernels are not compiled"),
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc"),
]
CALLS = 100_000
FORKS = 20
ROUNDS = 600
"""How often everything is loaded and dropped in `test_a_day`."""
FLAT = 16 * 2**20
"""Bytes by which memory may grow in the last two thirds of these: 40 kB of what a round loads."""
workloads = pytest.mark.parametrize("workload", loads.WORKLOADS, ids=lambda workload: workload.__name__)


@pytest.fixture
def two_threads():
    """OpenMP threads of torch that have worked, as a fork finds them in a program."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.ones(700, 700) @ torch.ones(700, 700)
    yield
    torch.set_num_threads(before)


def answers(calls, times=20):
    """What each call gives, after it was repeated and gave the same every time."""
    assert all(np.array_equal(call(), expected) for call, expected in calls for _ in range(times))
    return [expected for _, expected in calls]


def in_fork(function):
    """How a forked child ends that calls a function: 0 when that returned, a signal when it did not in a minute."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        ended = 1
        try:
            function()
            ended = 0
        finally:
            os._exit(ended)
    return os.waitpid(pid, 0)[1]


def start_together(barrier, threads):
    """What a process of a pool does first: take as many threads as its parent, whose bits depend on them, and wait."""
    torch.set_num_threads(threads)
    barrier.wait(timeout=300)


def work(workload, count):
    """In a process of its own: hammer a workload; its answers, and the bytes that memory grew."""
    calls = workload()
    return answers(calls, 1), loads.hammer(calls, count)


def in_processes(number, workload, count):
    """What `work` gives in that many new processes, which start together."""
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(number)
    with ProcessPoolExecutor(number, spawn, start_together, (barrier, torch.get_num_threads())) as pool:
        return list(pool.map(work, [workload] * number, [count] * number))


@workloads
def test_eight_threads(workload):
    grown = loads.hammer(workload(), CALLS)
    print(f"{workload.__name__}: {CALLS} calls, memory grew by {grown / 2**20:.1f} MiB")
    assert grown < loads.GROWTH


@workloads
def test_two_processes_at_once(workload):
    expected = answers(workload())
    for found, grown in in_processes(2, workload, CALLS // 2):
        print(f"{workload.__name__}: {CALLS // 2} calls in a process, memory grew by {grown / 2**20:.1f} MiB")
        assert all(map(np.array_equal, found, expected))
        assert grown < loads.GROWTH


@workloads
def test_fork_and_spawn_after_use(workload, two_threads):
    calls = workload()
    loads.hammer(calls, 4000)
    assert in_fork(lambda: answers(calls)) == 0
    assert in_fork(lambda: loads.hammer(calls, 800)) == 0
    expected = answers(calls)
    ((found, _),) = in_processes(1, workload, 4000)
    assert all(map(np.array_equal, found, expected))
    assert in_fork(lambda: answers(calls)) == 0


@pytest.mark.parametrize("workload", [loads.encoder_chain, loads.decoder_step], ids=lambda workload: workload.__name__)
def test_fork_while_eight_threads_call(workload, two_threads):
    """ONNX Runtime is not among them: its locks stay locked in a child that is forked during a run."""
    calls, stop, right = workload(), threading.Event(), []

    def call_on(number):
        call, expected = calls[number % len(calls)]
        good = True
        while not stop.is_set():
            good = good and np.array_equal(call(), expected)
        right.append(good)

    threads = [threading.Thread(target=call_on, args=(number,)) for number in range(loads.THREADS)]
    for thread in threads:
        thread.start()
    try:
        ended = [in_fork(lambda: answers(calls, 5)) for _ in range(FORKS)]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert ended == [0] * FORKS
    assert right == [True] * loads.THREADS


def test_a_day(tmp_path, two_threads):
    day = loads.Day(tmp_path)
    for _ in range(ROUNDS // 3):
        day.round()
    gc.collect()
    memory, held = loads.resident(), loads.held()
    for _ in range(ROUNDS - ROUNDS // 3):
        day.round()
    gc.collect()
    print(f"{day.calls} calls, then {(loads.resident() - memory) / 2**20:.1f} MiB more than after a third of them")
    assert loads.resident() - memory < FLAT
    assert all(now <= held[name] + 2 for name, now in loads.held().items())
