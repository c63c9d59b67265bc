"""Run every op twice, with launches by the fake driver and on the emulator, and compare the launches.

python tests/fake_driver/launch_everything.py, with the fake libcuda.so.1 in LD_LIBRARY_PATH, and the checkout and its
tests in PYTHONPATH. Prints the numbers of launches and of kernels.
"""

import ctypes

import cuda_resources
import emulation
import every_op

from hypenet_kernels import _native

STREAM = 0x1234
PADDING = {"hype_attention_fwd_kernel": {269, 270, 271, 276, 277, 278, 279}}  # bytes of no field of its struct


class Kernel(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char * 512), ("shared_bytes", ctypes.c_int), ("carveout", ctypes.c_int))


class Launch(ctypes.Structure):
    _fields_ = (
        ("kernel", Kernel),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("params", ctypes.c_char * 512),
    )


def main():
    driver = ctypes.CDLL("libcuda.so.1")
    driver.fake_launch.restype = ctypes.POINTER(Launch)
    launched, emulated = _native.runtime_cuda(), emulation.module()
    launched.set_compiler(lambda source, expression, capability: (b"cubin", expression.encode()))
    emulated.set_only_records(True)
    emulated.forget_launches()

    def launch_twice(module, kernel, tensors, **fields):
        errors = []
        for run, stream in ((getattr(launched, kernel.__name__), (0, STREAM)), (kernel, (0, 0))):
            try:
                run(fields, stream)
            except RuntimeError as error:
                errors.append(error)
        assert len(errors) in (0, 2), errors
        for error in errors:
            assert "less shared memory than the kernel needs" in str(error), error
            raise error

    emulation.launch = launch_twice
    # The least shared memory first: what a kernel was once allowed stays.
    for num_processors, shared_bytes in sorted(cuda_resources.EMULATED_DEVICES, key=lambda device: device[1]):
        emulated.set_num_processors(num_processors)
        emulated.set_max_shared_bytes(shared_bytes)
        ctypes.c_int.in_dll(driver, "fake_num_processors").value = num_processors
        ctypes.c_int.in_dll(driver, "fake_max_shared_bytes").value = shared_bytes
        with emulation.emulated():
            every_op.run("cpu", small=shared_bytes < every_op.LARGE)
    records = emulated.launches()
    assert driver.fake_num_launches() == len(records) > 0, (driver.fake_num_launches(), len(records))
    for i, record in enumerate(records):
        compare(driver.fake_launch(i).contents, record)
    kernels = {driver.fake_launch(i).contents.kernel.name for i in range(len(records))}
    assert driver.fake_num_kernels() == driver.fake_num_relaxed_loads() == len(kernels)  # each loaded once
    print(len(records), len(kernels))


def compare(launch, record):
    name = launch.kernel.name.decode()
    assert name.partition("<")[0].rpartition("::")[2] == record["name"], (name, record["name"])
    assert list(launch.grid) == [record["num_blocks"], 1, 1] and list(launch.block) == [record["num_threads"], 1, 1]
    assert launch.shared_bytes == record["shared_bytes"] == max(launch.kernel.shared_bytes, 0), name
    assert launch.kernel.carveout == (100 if launch.shared_bytes else 0) and launch.stream == STREAM, name
    params = ctypes.string_at(ctypes.addressof(launch) + Launch.params.offset, len(record["params"]))
    different = {i for i, pair in enumerate(zip(params, record["params"], strict=True)) if pair[0] != pair[1]}
    assert different <= PADDING.get(record["name"], set()), f"{name}: bytes {different} of {len(params)}"


if __name__ == "__main__":
    main()
