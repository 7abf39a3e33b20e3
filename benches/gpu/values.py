"""`python -m benches.gpu.values`: the tests marked gpu, spread over processes; of each test and back-end as many as
show every value of every parameter (`--thin`; `pytest -m gpu` runs all).

Their time is the host's. Triton's kernels are compiled in the process of the test that launches them first, 3 minutes
of one core for those of the back-end triton and nearly as many for the 8-bit screen's, so there are somewhat more
processes than cores. PyTorch has one thread in each: with one per core the fp64 references of 14 processes wait for
each other at every barrier (four times the seconds per test where that was tried).

Each process has tests of one kind: what has not been proven on a GPU begins at once, and after an illegal access, which
fails every later test of its process, the other kinds still say what they have to.

Prints a line per test as it ends, what failed, and pytest's counts last: a run that is cut off has said what it came
to. Exit status 1 when a test failed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from ..machine import ROOT

FILES = tuple(f"tests/test_{name}.py" for name in ("gpu", "cuda_compile", "cuda_backward", "cuda_adam", "benches"))
# Kind -> (what pytest's -k selects, processes on 16 cores). Each process holds a CUDA context, some 500 MB.
KINDS = {
    "int8": ("int8 or 8_bit", 7),
    "cuda": ("cuda and not int8 and not 8_bit", 5),
    "triton": ("not cuda and not int8 and not 8_bit", 8),
}
NO_TESTS = 5  # pytest's exit status of an empty part
OUTCOMES = {"PASSED": "passed", "FAILED": "failed", "ERROR": "error", "SKIPPED": "skipped"}


def run(kind: str, part: str, expression: str, seen: dict[str, str], launched: set[str]) -> tuple[int, str]:
    """One process: (exit status, everything after the tests' own lines). `seen` takes test -> outcome, `launched` the
    Triton kernels that ran."""
    command = [
        *(sys.executable, "-u", "-m", "pytest", "-v", "-p", "no:cacheprovider", "--tb=short", "--color=no"),
        *("-m", expression, "-k", KINDS[kind][0], "--thin", "--part", part, *FILES),
    ]
    rest: list[str] = []
    pipe, environment = subprocess.PIPE, {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            words = line.split()
            if len(words) > 1 and "::" in words[0] and words[1] in OUTCOMES:
                seen[words[0]] = words[1]
                print(words[0], words[1], flush=True)
            elif len(words) == 2 and words[0] == "launched":
                launched.add(words[1])
            else:
                rest.append(line)
    return process.returncode, "".join(rest)


def parts(cores: int) -> list[tuple[str, str]]:
    """(kind, i/n) of every process."""
    counts = {kind: max(1, most * min(cores, 16) // 16) for kind, (_, most) in KINDS.items()}
    return [(kind, f"{i}/{count}") for kind, count in counts.items() for i in range(count)]


def main(expression: str = "gpu") -> int:
    began, seen, launched = time.monotonic(), dict[str, str](), set[str]()
    processes = parts(os.cpu_count() or 1)
    with ThreadPoolExecutor(len(processes)) as pool:
        ended = list(pool.map(lambda process: run(*process, expression, seen, launched), processes))
    failed = [rest for status, rest in ended if status not in (0, NO_TESTS)]
    print("\n".join(failed))
    print("\n".join(f"launched {name}" for name in sorted(launched)))
    totals = {name: sum(outcome == word for outcome in seen.values()) for word, name in OUTCOMES.items()}
    print(", ".join(f"{count} {name}" for name, count in totals.items()), f"in {time.monotonic() - began:.0f} s")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
