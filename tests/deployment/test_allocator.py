"""The arenas of glibc's allocator that a service's threads share."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

# each of twelve threads asks for memory while the others hold theirs; glibc then says how many arenas there are
COUNT = """
import ctypes, sys, threading
from diffad.deployment.allocator import limit_arenas
if sys.argv[2] == "limited":
    limit_arenas()
libc, barrier = ctypes.CDLL(None), threading.Barrier(12)
def work():
    libc.malloc(1000)
    barrier.wait()
threads = [threading.Thread(target=work) for _ in range(12)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
libc.fopen.restype, libc.malloc_info.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
libc.fclose.argtypes = [ctypes.c_void_p]
file = libc.fopen(sys.argv[1].encode(), b"w")
libc.malloc_info(0, file)
libc.fclose(file)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_info"), reason="the C library is not glibc"
)
def test_threads_share_two_arenas(tmp_path):
    counts = []
    for how in ("limited", "as it is"):
        subprocess.run([sys.executable, "-c", COUNT, tmp_path / "info.xml", how], check=True)
        counts.append((tmp_path / "info.xml").read_text().count("<heap nr="))
    limited, unlimited = counts
    assert limited <= 2 < unlimited
