"""How long the program takes to answer, and the package to be imported.

Run: python -m benchmarks.startup

Holds `import hflit` below 0.5 s and `hflit --help` below 1 s, and fails where they are not. Each
figure is the lowest of several processes, as whatever else the machine does only adds to it; the
same of a Python that does nothing stands beside it.
"""

import subprocess
import sys
import time

REPEATS = 7
COMMANDS = {  # name -> command, and the most seconds it may take
    "python that does nothing": (["-c", "pass"], None),
    "import hflit": (["-c", "import hflit"], 0.5),
    "hflit --help": (["-m", "hflit", "--help"], 1.0),
    "hflit --version": (["-m", "hflit", "--version"], 1.0),
}
FOR_COMPARISON = {"hflit fit --help": ["-m", "hflit", "fit", "--help"]}  # loads torch for options


def seconds(words: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> int:
    slow = []
    for name, (words, limit) in COMMANDS.items():
        least = min(seconds(words) for _ in range(REPEATS))
        print(f"{name:<26} {least:6.3f} s" + (f", may take {limit} s" if limit else ""))
        if limit is not None and least > limit:
            slow.append(name)
    for name, words in FOR_COMPARISON.items():
        print(f"{name:<26} {min(seconds(words) for _ in range(2)):6.3f} s, not held")
    if slow:
        print(f"Too slow: {', '.join(slow)}.")
    return int(bool(slow))


if __name__ == "__main__":
    sys.exit(main())
