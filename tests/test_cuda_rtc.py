"""CUDA without nvcc: NVRTC compiles every kernel for every GPU, cubins are kept safely, launches are as emulated ones.

No GPU is needed: a fake driver stands for libcuda.
"""

import errno
import functools
import os
import re
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import every_op
import pytest
import torch

import hypenet_kernels
import hypenet_kernels.__main__ as command
from hypenet_kernels import _native, _nvrtc, _warmup

FOLDER = Path(__file__).with_name("fake_driver")
CAPABILITIES = {"sm_80": (8, 0), "sm_89": (8, 9), "sm_90a": (9, 0), "sm_100a": (10, 0), "sm_120a": (12, 0)}
QUICK = (  # the kernel of each file that compiles soonest, or nearly so
    r"causal_conv1d_sum_kernel",
    r"commit_states_kernel<unsigned int>",
    r"gated_delta_bwd_chunk_kernel<.*bf16, 64, \(.*Rule\)1",
    r"gated_delta_bwd_chunk_small_kernel<.*bf16, 64, \(.*Rule\)1",
    r"gated_delta_bwd_scan_kernel<.*bf16, 64, \(.*Rule\)1.*Start\)0",
    r"gated_delta_fill_kernel<.*FwdParams",
    r"gated_delta_map_kernel",
    r"gated_delta_scan_kernel<.*bf16, 64, \(.*Rule\)1.*4, 2>",
    r"gated_delta_chain_kernel<.*64, \(.*Rule\)1.*FwdParams",
    r"gated_delta_step_kernel<.*<64, \(.*State\)0>, .*bf16",
    r"hype_attention_bwd_prepare_kernel<.*<64, 64>, .*bf16",
    r"hype_attention_decode_combine_kernel<.*bf16",
    r"hype_attention_fwd_kernel<.*<64>, .*bf16",
)
SMALL = ("commit_states.cuh", "hypenet::cuda::states::commit_states_kernel<unsigned int>")

pytestmark = pytest.mark.skipif(not _nvrtc.is_installed(), reason=f"no NVRTC: {_nvrtc.INSTALL}")


@functools.cache
def every_kernel():
    """Return all kernels that ops can launch on GPUs with much or little shared memory, as (source, expression)."""
    large = _warmup.collect((9, 0), [lambda: every_op.run("cpu")])
    small = _warmup.collect((8, 6), [lambda: every_op.run("cpu", small=True)])
    return list(dict.fromkeys(large + small))


def check_compiles(kernels, targets):
    """Compile kernels for targets; fail where one has spills, a stack or anything else in local memory."""
    with ThreadPoolExecutor(2) as pool:
        jobs = [(*kernel, target) for target in targets for kernel in kernels]
        built = list(pool.map(lambda job: _nvrtc.build(*job), jobs))
    problems = []
    for (_, expression, target), cubin in zip(jobs, built, strict=True):
        used = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", cubin.log)
        assert used and cubin.code.startswith(b"\x7fELF") and cubin.symbol.encode() in cubin.code
        problems += [f"{target} {expression}: {used}"] * (set(used) != {("0", "0", "0")})
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("target", CAPABILITIES)
def test_a_kernel_of_every_file_compiles(target):
    chosen = [next(kernel for kernel in every_kernel() if re.search(pattern, kernel[1])) for pattern in QUICK]
    assert {source for source, _ in chosen} == {source for source, _ in every_kernel()}
    check_compiles(chosen, [target])


@pytest.mark.slow
@pytest.mark.parametrize("target", CAPABILITIES)
def test_every_kernel_compiles_without_local_memory(target):
    check_compiles(every_kernel(), [target])


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HYPENET_CACHE", str(tmp_path / "cubins"))
    return tmp_path / "cubins"


@pytest.fixture
def builds(monkeypatch):
    """The kernels that NVRTC was asked for."""
    asked, build = [], _nvrtc.build
    monkeypatch.setattr(_nvrtc, "build", lambda *kernel: (asked.append(kernel), build(*kernel))[1])
    return asked


def test_a_kernel_is_compiled_once(cache, builds):
    assert not _nvrtc.is_cached(*SMALL, (9, 0))
    first, second = (_nvrtc.compile_kernel(*SMALL, (9, 0)) for _ in range(2))
    assert first == second and first[1] in first[0] and builds == [(*SMALL, "sm_90a")]
    assert _nvrtc.is_cached(*SMALL, (9, 0)) and not _nvrtc.is_cached(*SMALL, (8, 0))
    assert [path.suffix for path in cache.iterdir()] == [".cubin"]


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "header"])
def test_a_damaged_file_is_compiled_anew(cache, builds, damage):
    whole = _nvrtc.compile_kernel(*SMALL, (9, 0))
    (path,) = cache.iterdir()
    data = path.read_bytes()
    cases = {"cut": data[:-1], "changed": data[:-1] + bytes([data[-1] ^ 1]), "empty": b"", "header": b'["a"]' + data}
    path.write_bytes(cases[damage])
    code, symbol = _nvrtc.compile_kernel(*SMALL, (9, 0))
    assert symbol == whole[1] and len(builds) == 2 and list(cache.iterdir()) == [path]
    assert _nvrtc._read(path) == _nvrtc.Cubin(code, symbol.decode())


def test_two_processes_at_once(cache, tmp_path):
    code = f"from hypenet_kernels import _nvrtc; print(len(_nvrtc.compile_kernel(*{SMALL}, (9, 0))[0]))"
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    sizes = {process.communicate()[0] for process in running}
    assert len(sizes) == 1 and not any(process.returncode for process in running)
    (path,) = cache.iterdir()
    assert _nvrtc._read(path) is not None


def test_a_full_disk_costs_a_warning(cache, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    _nvrtc._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="not kept in .*: No space left on device"):
        code, _ = _nvrtc.compile_kernel(*SMALL, (9, 0))
    assert code.startswith(b"\x7fELF") and list(cache.iterdir()) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        _nvrtc.compile_kernel(*SMALL, (9, 0))


def test_a_folder_that_cannot_be_made_costs_a_warning(tmp_path, monkeypatch):
    (tmp_path / "file").touch()  # a read-only home would not stop root
    monkeypatch.setenv("HYPENET_CACHE", str(tmp_path / "file" / "cubins"))
    _nvrtc._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="not kept in"):
        assert _nvrtc.compile_kernel(*SMALL, (9, 0))[0].startswith(b"\x7fELF")


def test_the_cache_folder(monkeypatch):
    monkeypatch.delenv("HYPENET_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert _nvrtc.cache_folder() == Path("/caches/hypenet")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert _nvrtc.cache_folder() == Path("/home/someone/.cache/hypenet")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert _nvrtc.cache_folder() is None and _nvrtc.compile_kernel(*SMALL, (9, 0))[0].startswith(b"\x7fELF")


def test_the_key_covers_sources_options_target_and_version(cache, tmp_path, monkeypatch):
    shutil.copytree(_nvrtc.SOURCES, tmp_path / "csrc")
    monkeypatch.setattr(_nvrtc, "SOURCES", tmp_path / "csrc")
    paths = [_nvrtc._cache_path(*SMALL, "sm_90a"), _nvrtc._cache_path(*SMALL, "sm_80")]
    with monkeypatch.context() as patch:
        patch.setattr(_nvrtc, "FLAGS", (*_nvrtc.FLAGS, "--generate-line-info"))
        paths.append(_nvrtc._cache_path(*SMALL, "sm_90a"))
    with monkeypatch.context() as patch:
        patch.setattr(_nvrtc, "version", lambda: (12, 0))
        paths.append(_nvrtc._cache_path(*SMALL, "sm_90a"))
    for name in ("params.h", "cuda/tile.cuh", "cuda/arch/sm80.cuh", "cuda/rtc/include/limits"):
        with open(tmp_path / "csrc" / name, "a") as file:
            file.write("//")
        _nvrtc._digest.cache_clear()
        paths.append(_nvrtc._cache_path(*SMALL, "sm_90a"))
    _nvrtc._digest.cache_clear()
    assert len(set(paths)) == len(paths)


def test_targets():
    assert {target: _nvrtc.architecture(capability) for target, capability in CAPABILITIES.items()} == {
        target: target for target in CAPABILITIES
    }
    assert _nvrtc.architecture((12, 9)) == "sm_121"  # a GPU of which this NVRTC does not know yet
    with pytest.raises(NotImplementedError, match=r"need a GPU of compute capability 8.0 or more, got one of 7.5"):
        _nvrtc.architecture((7, 5))
    with pytest.raises(NotImplementedError, match=r"need an NVRTC newer than .*, got one of 99.0"):
        _nvrtc.architecture((99, 0))


def test_an_error_of_the_compiler_is_shown():
    with pytest.raises(RuntimeError, match=r"could not compile no_kernel for sm_90a:\n.*no_kernel"):
        _nvrtc.build("commit_states.cuh", "hypenet::cuda::no_kernel", "sm_90a")


def test_what_is_missing_is_said(monkeypatch):
    _nvrtc._nvrtc.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "cuda", "11.8")
        with pytest.raises(NotImplementedError, match=r"NVRTC must be of torch's CUDA 11.8, got .*pip install"):
            _nvrtc.version()
    with monkeypatch.context() as patch:
        patch.setattr(_nvrtc, "is_installed", lambda: False)
        with pytest.raises(NotImplementedError, match=r"NVRTC is not installed: pip install 'hypenet\[cuda\]'"):
            _nvrtc.version()


@pytest.mark.parametrize(
    ("targets", "runs", "runs_not"),
    [
        ("8.0;9.0a+PTX", [(8, 0), (8, 6), (8, 9), (9, 0)], [(7, 5), (10, 0), (12, 0)]),
        ("8.6 12.0f", [(8, 6), (8, 9), (12, 0), (12, 1)], [(8, 0), (9, 0)]),
        ("10.0a", [(10, 0)], [(10, 3)]),
    ],
)
def test_machine_code_runs_on_its_own_major(targets, runs, runs_not):
    assert all(_native.runs_on(targets, capability) for capability in runs)
    assert not any(_native.runs_on(targets, capability) for capability in runs_not)


def test_kernels_of_nvcc_come_first(monkeypatch):
    versions = [13000, 13020]  # of the runtime and the driver
    built, runtime = SimpleNamespace(versions=lambda: versions), object()
    monkeypatch.setattr(_native, "built_cuda", lambda: built)
    monkeypatch.setattr(_native, "runtime_cuda", lambda: runtime)
    monkeypatch.setattr(_native, "build_info", lambda: {"cuda_targets": "8.0;9.0a+PTX"})
    choose = _native.cuda_for.__wrapped__
    assert [choose(x) is built for x in ((8, 0), (8, 9), (9, 0), (10, 0))] == [True, True, True, False]
    monkeypatch.setattr(_nvrtc, "is_installed", lambda: False)
    assert choose((10, 0)) is built  # by its PTX
    versions[1] = 12080
    with pytest.raises(NotImplementedError, match=r"need a driver of CUDA 13, .*, got one of CUDA 12: update"):
        choose((9, 0))
    monkeypatch.setattr(_nvrtc, "is_installed", lambda: True)
    assert choose((9, 0)) is runtime
    monkeypatch.setattr(_native, "built_cuda", lambda: None)
    assert choose((8, 0)) is runtime


def test_warmup_compiles_what_is_missing(cache, monkeypatch, capsys):
    monkeypatch.setattr(_nvrtc, "build", lambda source, expression, target: _nvrtc.Cubin(b"code", expression))
    arguments = ["warmup", "--capability", "9.0", "--head-dims", "64", "128"]
    assert command.main(arguments) == 0
    first = capsys.readouterr().out.splitlines()
    count = int(first[0].split()[0])
    assert (
        f"of which {count} are to be compiled" in first[0] and len(first) == count + 1 == len(list(cache.iterdir())) + 1
    )
    assert f" {count}/{count} " in first[-1] and any("gated_delta_scan_kernel" in line for line in first)
    assert command.main(arguments) == 0
    assert "of which 0 are to be compiled" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"--capability must be two numbers like 9.0, got nine"):
        command.main(["warmup", "--capability", "nine"])


def test_warmup_leaves_no_trace():
    before = _native.kernel, _native.cuda, _native.on_cuda
    with pytest.raises(ZeroDivisionError):
        _warmup.collect((9, 0), [lambda: 1 / 0])
    assert before == (_native.kernel, _native.cuda, _native.on_cuda) and _native.runtime_cuda().stop_collecting() == []


def test_without_a_driver_the_module_says_so():
    code = """if True:
        from hypenet_kernels import _native
        module = _native.runtime_cuda()
        fields = {name: 1 for name in ("B", "T", "HV", "K", "V", "num_slots", "num_threads")}
        fields |= {"dtype": 1, "state_indices": (0, False), "num_accepted": (0, False), "states": 0, "state": 0}
        try:
            module.commit_states(fields, (0, 0))
        except RuntimeError as error:
            print(error)
    """
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    if not _native.runtime_cuda().missing_driver():
        pytest.skip("a driver is here")
    said = (
        r"commit_states: commit_states_kernel: no NVIDIA driver: libcuda.so.1.* \(1 blocks of 256 threads and 0 bytes"
    )
    assert re.match(said, ran.stdout), ran.stdout
    needed = subprocess.run(["ldd", _native.runtime_cuda().__file__], capture_output=True, text=True, check=True).stdout
    assert "libcuda" not in needed and "libnvrtc" not in needed


@pytest.fixture(scope="module")
def fake_driver(tmp_path_factory):
    """An environment in which libcuda.so.1 is the fake one."""
    folder = tmp_path_factory.mktemp("driver")
    compiler = os.environ.get("CC") or shutil.which("gcc") or "cc"
    sources, library = str(FOLDER / "driver.c"), str(folder / "libcuda.so.1")
    subprocess.run([compiler, "-Wall", "-shared", "-fPIC", "-O1", sources, "-o", library], check=True)
    libraries = f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    return os.environ | {"LD_LIBRARY_PATH": libraries, "PYTHONPATH": f"{FOLDER.parent}:{FOLDER.parents[1]}"}


def test_launches_are_those_of_the_emulated_module(fake_driver):
    """Every op: same kernels, grid, block, shared memory and bytes of the params; each kernel loaded once."""
    script = [sys.executable, str(FOLDER / "launch_everything.py")]
    ran = subprocess.run(script, env=fake_driver, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    launches, kernels = map(int, ran.stdout.split())
    assert launches > kernels == len(every_kernel())


@pytest.mark.parametrize(
    ("capability", "scan", "bwd_scan", "bwd_chunk"),
    [
        ((8, 0), "8, 2>", "0, 2>", "bwd_chunk_kernel"),
        ((9, 0), "8, 2>", "0, 2>", "bwd_chunk_kernel"),
        ((8, 6), "4, 1>", "0, 1>", "bwd_chunk_small_kernel"),
        ((12, 0), "4, 1>", "0, 1>", "bwd_chunk_small_kernel"),
    ],
)
def test_which_kernels_are_chosen_by_shared_memory(capability, scan, bwd_scan, bwd_chunk):
    inputs = [x.requires_grad_() for x in every_op._recurrent_inputs("cpu", torch.bfloat16, 128, 70)]

    def run():
        hypenet_kernels.chunk_gated_delta_rule(*inputs)[0].float().sum().backward()

    names = [name for _, name in _warmup.collect(capability, [run])]
    for kernel, kind in (("_scan_kernel", scan), ("bwd_scan_kernel", bwd_scan), ("bwd_chunk", bwd_chunk)):
        assert any(kernel in name and kind in name for name in names), names
    assert sum("bwd_chunk" in name for name in names) == sum("bwd_scan" in name for name in names) == 1
