"""`python -m benches.gpu.values`: the tests marked gpu, spread over processes; of each test and back-end as many as
show every value of every parameter (`--thin`; `pytest -m gpu` runs all).

Most of their time goes into compiling Triton kernels on the host, one core a process; the kernels are small, so that
processes share the device without harm. Prints a line per test as it ends, what failed, and pytest's counts last: a run
that is cut off has said what it came to. Exit status 1 when a test failed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

from ..machine import ROOT

FILES = ("tests/test_gpu.py", "tests/test_cuda_compile.py", "tests/test_cuda_backward.py", "tests/test_benches.py")
MOST = 16  # each holds a CUDA context, some 500 MB
NO_TESTS = 5  # pytest's exit status of an empty part
OUTCOMES = {"PASSED": "passed", "FAILED": "failed", "ERROR": "error", "SKIPPED": "skipped"}


def run(part: int, parts: int, expression: str, seen: dict[str, str]) -> tuple[int, str]:
    """One process: (exit status, everything after the tests' own lines). `seen` takes test -> outcome."""
    command = [
        *(sys.executable, "-u", "-m", "pytest", "-v", "-p", "no:cacheprovider", "--tb=short", "--color=no"),
        *("-m", expression, "--thin", "--part", f"{part}/{parts}", *FILES),
    ]
    rest: list[str] = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            words = line.split()
            if len(words) > 1 and "::" in words[0] and words[1] in OUTCOMES:
                seen[words[0]] = words[1]
                print(words[0], words[1], flush=True)
            else:
                rest.append(line)
    return process.returncode, "".join(rest)


def main(expression: str = "gpu") -> int:
    parts = max(1, min(MOST, (os.cpu_count() or 1) - 2))  # the check and the sanitizers run beside
    began, seen = time.monotonic(), dict[str, str]()
    ended: list[tuple[int, str]] = [(1, "")] * parts

    def one(part: int) -> None:
        ended[part] = run(part, parts, expression, seen)

    threads = [threading.Thread(target=one, args=(part,)) for part in range(parts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failed = [rest for status, rest in ended if status not in (0, NO_TESTS)]
    print("\n".join(failed))
    totals = {name: sum(outcome == word for outcome in seen.values()) for word, name in OUTCOMES.items()}
    print(", ".join(f"{count} {name}" for name, count in totals.items()), f"in {time.monotonic() - began:.0f} s")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
