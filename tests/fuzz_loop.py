"""Run many cases of tests/test_fuzz.py in one process, one seed each: `make fuzz-asan` does so under the sanitizers.

    python tests/fuzz_loop.py --cases 1000000 --first 0

Half of the cases have right inputs, half one wrong one. The first failure ends the loop with its seed.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent))  # which python -P leaves out
import test_fuzz

SAY_EVERY = 10_000


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    for done, seed in enumerate(range(options.first, options.first + options.cases)):
        check = test_fuzz.check_wrong_inputs if seed % 2 else test_fuzz.check_right_inputs
        try:
            check(seed)
        except BaseException:
            print(f"seed {seed} of {check.__name__}", flush=True)
            raise
        if (done + 1) % SAY_EVERY == 0:
            print(f"{done + 1} cases, {(done + 1) / (time.monotonic() - began):.0f} per second", flush=True)
    print(f"{options.cases} cases from seed {options.first}, no failure")


if __name__ == "__main__":
    main()
