"""python -m hypenet_kernels: what was built, what each op uses here, and a test of every op against its reference."""

import sys

import hypenet_kernels as kernels
from hypenet_kernels import _native, _selftest


def main() -> int:
    kernels.show_config()
    facts = kernels.report()
    devices = ["cpu", *(["cuda"] if facts["gpus"] and facts["modules"]["_cuda"] else [])]
    try:
        _native.cpu()
    except ImportError as error:
        sys.exit(f"\n{error}")
    print("\nself test (relative RMS error against the float64 reference)")
    failed = [passed for device in devices for passed in _selftest.run(device) if not passed]
    if "cuda" not in devices:
        print("  CUDA kernels: not run, " + ("no GPU visible" if facts["modules"]["_cuda"] else "not built"))
    print(f"  {len(failed)} failed" if failed else "  all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
