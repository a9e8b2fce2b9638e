#!/usr/bin/env python3
"""Kills a training run again and again with SIGKILL, resumes it, and compares the end with an unbroken run's.

It is killed up to --longest seconds after it began to train, or after its first, second or third new checkpoint. Both
runs must end with the same model, optimizer, schedule and running state, bit for bit. Everything is tiny and lies in a
temporary folder: a teacher of a few iterations, and drawn images.
"""

import argparse
import sys
import tempfile
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how often to kill (default 20)")
    parser.add_argument("--iterations", type=int, default=200, help="of the run (default 200)")
    parser.add_argument("--period", type=int, default=3, help="iterations between checkpoints (default 3)")
    parser.add_argument("--longest", type=float, default=1.0, help="see above, in seconds (default 1)")
    parser.add_argument("--workers", type=int, default=0, help="data loading processes (default 0)")
    parser.add_argument("--num-gpus", type=int, default=1, help="training processes, GPUs if there are any (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills (default 0)")
    args = parser.parse_args()

    # Imported here because it takes seconds, which --help and mistyped arguments should not.
    from d2kd.experiments.kill_and_resume import kill_and_resume

    with tempfile.TemporaryDirectory(prefix="kill_and_resume_") as folder:
        return kill_and_resume(Path(folder), args)


if __name__ == "__main__":
    sys.exit(main())
