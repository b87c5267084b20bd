"""Tests of the places of threads, which notes of ranks say."""

import subprocess
import sys
import textwrap
import threading

from hf_context_parallel.distributed.notes import _place

WATCHED = """
    import gc, random, sys, threading, time
    from hf_context_parallel.distributed.notes import _place

    class Garbage:
        def __init__(self):
            self.itself = self

        def __del__(self):
            time.sleep(0)  # another thread goes on

    def watch():
        while running:
            gc.disable()
            [Garbage() for _ in range(3)]
            gc.set_threshold(random.randint(1, 40))
            gc.enable()
            _place(watched)

    def deep(k):
        return sum([k]) if not k else deep(k - 1)

    watched, running = threading.get_ident(), True
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    end = time.monotonic() + 3
    while time.monotonic() < end:
        deep(20)
    print("survived")
"""


def test_a_thread_that_runs_is_not_disturbed():
    """Garbage is collected while the frames of another thread are read, and the process ends."""
    command = [sys.executable, "-c", textwrap.dedent(WATCHED)]
    assert "survived" in subprocess.run(command, capture_output=True, text=True, timeout=60).stdout


def test_the_place_of_a_thread_is_in_code_of_the_user():
    inside, done = threading.Event(), threading.Event()

    def waits_here():
        inside.set()
        done.wait()

    thread = threading.Thread(target=waits_here)
    thread.start()
    inside.wait()
    place, waits = _place(thread.ident)
    done.set()
    thread.join()
    assert place.startswith(f"{__file__}:") and place.endswith(" in waits_here") and not waits
    assert _place(thread.ident) == ("", False)
