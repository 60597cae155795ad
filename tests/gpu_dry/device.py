"""A CUDA device that is not there: what NVML, `torch.cuda` and Triton's driver say about it.

`pretend("sm_90")` before vLLM is imported, in a process of its own. A `libcuda.so.1` that answers
"no device" must be found by the loader, see scripts/gpu-dry.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

import torch
import torch._dynamo.trace_rules
import torch._inductor

if TYPE_CHECKING:
    from gpu_dry.graphs import Machine


@dataclass(frozen=True)
class Gpu:
    """What software asks about a GPU."""

    capability: tuple[int, int]
    name: str
    memory: int  # bytes
    processors: int
    shared: int  # bytes a block may take

    @property
    def properties(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(
            name=self.name,
            major=self.capability[0],
            minor=self.capability[1],
            total_memory=self.memory,
            multi_processor_count=self.processors,
            is_integrated=False,
            warp_size=32,
            max_threads_per_multi_processor=1536 if self.capability[0] == 12 else 2048,
            regs_per_multiprocessor=65536,
            shared_memory_per_block=48 << 10,
            shared_memory_per_block_optin=self.shared,
            shared_memory_per_multiprocessor=self.shared + 1024,
            L2_cache_size=50 << 20,
            uuid="GPU-0",
            gcnArchName="",
            pci_bus_id=0,
        )


GPUS: Final = {
    "sm_90": Gpu((9, 0), "NVIDIA H100 80GB HBM3", 80 << 30, 132, 227 << 10),
    "sm_100": Gpu((10, 0), "NVIDIA B200", 180 << 30, 148, 227 << 10),
    "sm_120": Gpu((12, 0), "NVIDIA GeForce RTX 5090", 32 << 30, 170, 99 << 10),
}


def pretend(gpu: str, machine: Machine) -> Gpu:
    """Make torch, Triton and NVML speak of this GPU; `machine` is told of waits and captures."""
    # Before anything is replaced: Dynamo keys its rules by function object. For the same reason
    # no two names may get the same function.
    torch._dynamo.trace_rules.get_torch_obj_rule_map()
    # A slice of a wrapper tensor made in inference mode cannot be written to.
    torch.inference_mode = lambda _=True: torch.no_grad()
    torch.is_inference_mode_enabled = says(False)
    one = GPUS[gpu]
    _management_library(one)
    _torch_cuda(one, machine)
    _triton(one)
    return one


def says(answer: Any = None) -> Any:
    """A new function that gives this answer to whatever it is asked."""
    return lambda *_, **__: answer


def _management_library(gpu: Gpu) -> None:
    name = "vllm.third_party.pynvml"
    library = types.ModuleType(name)
    library.NVMLError = type("NVMLError", (Exception,), {})
    library.NVML_P2P_STATUS_OK = library.NVML_P2P_CAPS_INDEX_NVLINK = 0
    memory = types.SimpleNamespace(total=gpu.memory, free=gpu.memory, used=0)
    for function, answer in {
        "Init": None,
        "Shutdown": None,
        "DeviceGetCount": 1,
        "DeviceGetHandleByIndex": 0,
        "DeviceGetHandleByUUID": 0,
        "DeviceGetIndex": 0,
        "DeviceGetUUID": "GPU-0",
        "DeviceGetCudaComputeCapability": gpu.capability,
        "DeviceGetName": gpu.name,
        "DeviceGetMemoryInfo": memory,
        "DeviceGetP2PStatus": 0,
        "DeviceGetNumaNodeId": 0,
        "DeviceGetCpuAffinity": [3],
        "DeviceGetPciInfo": types.SimpleNamespace(busId=b"0000:00:00.0"),
    }.items():
        setattr(library, f"nvml{function}", says(answer))

    class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
        """Not through sys.modules: the parent package must get the attribute too."""

        def find_spec(self, fullname: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
            return importlib.machinery.ModuleSpec(name, self) if fullname == name else None

        def create_module(self, _: Any) -> types.ModuleType:
            return library

        def exec_module(self, module: types.ModuleType) -> None:
            pass

    sys.meta_path.insert(0, Finder())


class Context:
    """`with` this and nothing changes; Dynamo wants classes here."""

    def __init__(self, *_: Any) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _streams(machine: Machine) -> tuple[type, type]:
    class Stream(Context):
        cuda_stream = stream_id = device_index = 0
        device_type = 1

        def __init__(self, *_: Any, **__: Any) -> None:
            self.device = torch.device("cuda:0")

        def synchronize(self) -> None:
            machine.wait("stream.synchronize()")

        wait_stream, wait_event, record_event, query = says(), says(), says(), says(True)

    class Event:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        # The one wait that is meant: vLLM waits so for the record of the step before.
        record, wait, synchronize, query, elapsed_time = (
            *(says() for _ in range(3)),
            says(True),
            says(1.0),
        )

    return Stream, Event


def _torch_cuda(gpu: Gpu, machine: Machine) -> None:
    from gpu_dry.graphs import graph_class

    stream_class, event_class = _streams(machine)
    stream, properties, free = stream_class(), gpu.properties, (gpu.memory, gpu.memory)

    def synchronize(*_: Any) -> None:
        machine.wait("synchronize()")

    answers = {
        "is_available": True,
        "device_count": 1,
        "_device_count_nvml": 1,
        "current_device": 0,
        "is_initialized": True,
        "get_device_properties": properties,
        "get_device_capability": gpu.capability,
        "get_device_name": gpu.name,
        "can_device_access_peer": True,
        "mem_get_info": free,
        "current_blas_handle": 0,
        "current_stream": stream,
        "default_stream": stream,
        "graph_pool_handle": (0, 0),
        "stream": contextlib.nullcontext(),
        **dict.fromkeys(("memory_allocated", "max_memory_allocated"), 0),
        **dict.fromkeys(("memory_reserved", "max_memory_reserved"), 0),
        **dict.fromkeys(("set_device", "init", "_lazy_init", "_lazy_call", "set_stream")),
        **dict.fromkeys(("manual_seed", "manual_seed_all", "empty_cache", "ipc_collect")),
        **dict.fromkeys(("reset_peak_memory_stats", "set_rng_state")),
    }
    cuda = torch.cuda
    for name, answer in answers.items():
        setattr(cuda, name, says(answer))
    cuda.memory_stats = lambda *_, **__: defaultdict(int)
    cuda.get_rng_state = lambda *_: torch.zeros(16, dtype=torch.uint8)
    cuda.synchronize = lambda *_: synchronize()
    cuda.is_current_stream_capturing = lambda: machine.tape is not None
    cuda.Stream = cuda.ExternalStream = torch.Stream = stream_class
    cuda.Event = torch.Event = event_class
    cuda.StreamContext, cuda.device = (
        type("StreamContext", (Context,), {}),
        type("device", (Context,), {}),
    )
    graph, capture = graph_class(machine)
    cuda.CUDAGraph = cuda.graphs.CUDAGraph = graph
    cuda.graph = cuda.graphs.graph = capture
    cuda.graphs.graph_pool_handle = says((0, 0))
    cuda.memory.get_allocator_backend = says("none")
    torch.backends.cuda.is_built = says(True)

    accelerator = torch.accelerator
    for name, answer in {
        "is_available": True,
        "device_count": 1,
        "current_device_index": 0,
        "current_accelerator": torch.device("cuda"),
        "get_memory_info": free,
        "memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_allocated": 0,
        "current_stream": stream,
        **dict.fromkeys(("set_device_index", "empty_cache", "set_stream")),
        "reset_peak_memory_stats": None,
    }.items():
        setattr(accelerator, name, says(answer))
    accelerator.memory_stats = lambda *_, **__: defaultdict(int)
    accelerator.synchronize = lambda *_, **__: synchronize()


def _triton(gpu: Gpu) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver

    CudaDriver.is_active = staticmethod(says(True))  # or vLLM sees no Triton
    target = GPUTarget("cuda", gpu.capability[0] * 10 + gpu.capability[1], 32)
    limits = {
        "max_shared_mem": gpu.shared,
        "multiprocessor_count": gpu.processors,
        "max_num_regs": 65536,
        "warpSize": 32,
        "sm_clock_rate": 1,
        "mem_clock_rate": 1,
        "mem_bus_width": 1,
    }
    driver = types.SimpleNamespace(
        utils=types.SimpleNamespace(get_device_properties=says(limits)),
        get_current_target=says(target),
        get_current_device=says(0),
        get_current_stream=says(0),
        set_current_device=says(),
        get_active_torch_device=says(torch.device("cuda:0")),
        get_device_interface=says(torch.cuda),
        get_benchmarker=says(says([1.0, 1.0, 1.0])),
        get_empty_cache_for_benchmark=says(),
        clear_cache=says(),
        is_active=says(True),
    )
    triton.runtime.driver.set_active(driver)
    triton.runtime.driver._default = driver
