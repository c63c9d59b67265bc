"""python -m hypenet_kernels: what was built, what each op uses here, and a test of every op against its reference.

python -m hypenet_kernels warmup: compile the CUDA kernels of a model with NVRTC, before anything waits for them.

python -m hypenet_kernels hub: write this installation as a repository for the Hugging Face hub's library `kernels`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import hypenet_kernels as kernels
from hypenet_kernels import _hub, _native, _selftest, _warmup

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def main(arguments: Sequence[str] = ()) -> int:
    parser = argparse.ArgumentParser(prog="python -m hypenet_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    warmup = commands.add_parser("warmup", help="compile the CUDA kernels with NVRTC")
    warmup.add_argument("--head-dims", type=int, nargs="+", default=[128], metavar="D", help="of the model's mixers")
    warmup.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16"], help="of the model")
    warmup.add_argument("--capability", metavar="9.0", help="compute capability; default: that of the current GPU")
    warmup.add_argument("--threads", type=int, help="that compile; default: as many as processors")
    hub = commands.add_parser("hub", help="write a kernel repository for the Hugging Face hub")
    hub.add_argument("folder", type=Path, help="the repository; another Python's native modules in it are kept")
    hub.add_argument("--variants", nargs="+", default=[], metavar="torch213-cxx11-cu130-x86_64-linux")
    hub.add_argument("--version", type=int, default=1, help="of the repository, named in get_kernel (default: 1)")
    options = parser.parse_args(arguments)
    run = {"warmup": _run_warmup, "hub": _run_hub}.get(options.command, _run_selftest)
    return run(options)


def _run_warmup(options: argparse.Namespace) -> int:
    if options.capability is None and not torch.cuda.is_available():
        sys.exit("warmup: no GPU is visible: name its compute capability, like --capability 9.0")
    major, _, minor = (options.capability or "{}.{}".format(*torch.cuda.get_device_capability())).partition(".")
    if not (major.isdecimal() and minor.isdecimal()):
        sys.exit(f"warmup: --capability must be two numbers like 9.0, got {options.capability}")
    dtypes = [DTYPES[name] for name in options.dtypes]
    try:
        _warmup.warmup((int(major), int(minor)), options.head_dims, dtypes, options.threads)
    except (NotImplementedError, RuntimeError) as error:
        sys.exit(f"warmup: {error}")
    return 0


def _run_hub(options: argparse.Namespace) -> int:
    try:
        written = _hub.write(options.folder, options.variants, options.version)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    print("\n".join(map(str, written)))
    return 0


def _run_selftest(_: argparse.Namespace) -> int:
    kernels.show_config()
    facts = kernels.report()
    usable = any(choice["cuda"]["implementation"] for choice in facts["ops"].values())
    devices = ["cpu", *(["cuda"] if facts["gpus"] and usable else [])]
    try:
        _native.cpu()
    except ImportError as error:
        sys.exit(f"\n{error}")
    print("\nself test (relative RMS error against the float64 reference)")
    failed = [passed for device in devices for passed in _selftest.run(device) if not passed]
    if "cuda" not in devices:
        print("  CUDA kernels: not run, " + ("no GPU visible" if usable else "not built"))
    print(f"  {len(failed)} failed" if failed else "  all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
