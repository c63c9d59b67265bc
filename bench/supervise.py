"""Measure all ops in child processes, so that a crash or a hang costs one number and not the run.

python -m bench.supervise DEVICE OUT.json [--quick]

Resumes from OUT.json if it exists. If a case kills its process (an illegal memory access, a hang, an abort), the record
says so and a new process continues with the rest. Needs none of the packages of the command line.
"""

import faulthandler
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import ops, records, tables
from bench.records import OpsRecord

STEP_SECONDS = 45  # a check or a timing that takes longer counts as a hang
COMMAND = (sys.executable, "-m", "bench.supervise")


def work(device: str, out: Path, *flags: str) -> None:
    """Measure what the record in `out` lacks, until done or until something ends the process."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit then undoes the step that it interrupts

    def on_case(index: int, count: int, name: str) -> None:
        print(f"{index + 1}/{count} {name}", flush=True)

    def save(record: OpsRecord) -> None:
        records.save(out, record)
        faulthandler.dump_traceback_later(STEP_SECONDS, exit=True)

    record = records.load(out) if out.is_file() else None
    ops.run([], device, quick="--quick" in flags, on_case=on_case, save=save, record=record)
    faulthandler.cancel_dump_traceback_later()


def main(device: str, out: Path, *flags: str, command: Sequence[str | Path] = COMMAND) -> str | int:
    """Start one worker process after another, as long as each adds to the record, then print the table.

    Returns:
        0 if every case was timed, else one line that names those that were not.
    """
    stopped, before = [], None
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    while (ended := subprocess.run([*command, device, out, *flags, "--work"]).returncode) and not stopped:
        now = out.read_bytes() if out.is_file() else None
        if now == before:
            break
        before = now
    if not out.is_file():
        return f"{out} was not written"
    record: OpsRecord = records.load(out)
    print(tables.markdown(tables.OPS_HEADER, [tables.op_cells(row) for row in record["rows"]]))
    print(f"{sum(row['ours'] is not None for row in record['rows'])} of {len(record['rows'])} cases timed", flush=True)
    wrong = [row["name"] for row in record["rows"] if row["failure"] or "unfinished" in row]
    return f"not timed: {', '.join(wrong) or 'the rest'}" if wrong or ended else 0


if __name__ == "__main__":
    device, out, *flags = sys.argv[1:]
    sys.exit((work if "--work" in flags else main)(device, Path(out), *flags))
