"""The fresh process that verifies an artifact: `python -m qcompiler.artifact.worker TARGET FOLDER FEEDS OUTPUTS`.

Loads the folder as a user would, runs every FEEDS/<number>.npz and writes OUTPUTS/<number>.npz. A file that makes a
runtime allocate without bound, hang or crash takes this process down, not the compiler.
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import numpy as np

from qcompiler import registry
from qcompiler.artifact.verify import PEAK
from qcompiler.errors import QcompilerError
from qcompiler.target import Backend


def main(target: str, folder: Path, feeds: Path, outputs: Path) -> None:
    """Run all feeds in numeric order."""
    limit_resources()
    backend: Backend = registry.find("backends", target)()
    runnable = backend.load(folder)
    for path in sorted(feeds.glob("*.npz"), key=lambda p: int(p.stem)):
        with np.load(path, allow_pickle=False) as data:
            result = runnable.run(dict(data))
        np.savez(outputs / path.name, **{k: np.asarray(v) for k, v in result.items()})  # type: ignore[arg-type]
    (outputs / PEAK).write_text(str(own_peak()))


def own_peak() -> int:
    """Peak resident bytes of this program.

    Linux counts what the parent held before it started a child as the child's in `ru_maxrss`, not in VmHWM.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    found = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return 1024 * (found[0] if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def limit_resources() -> None:
    """No core files, and no more address space than the machine has memory (with some for mapped libraries)."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = memory + (8 << 30)
    if hard == resource.RLIM_INFINITY or hard > wanted:
        resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))


if __name__ == "__main__":
    try:
        main(sys.argv[1], *(Path(a) for a in sys.argv[2:5]))
    except QcompilerError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
