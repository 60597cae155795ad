"""Tensors that say `cuda:0`: host memory where values are computed, shapes alone elsewhere.

While `Pretending` is entered every operator comes here. It runs on what the tensors wrap, is
reported to the machine, and does what CUDA would do where host and device meet: it copies, waits or
refuses. Without values nothing is computed, and a number that the host asks for is zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch
import torch.fx.experimental._config
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from gpu_dry.meter import caller, kernels_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpu_dry.graphs import Machine

aten = torch.ops.aten
CUDA, META, CPU = torch.device("cuda:0"), torch.device("meta"), torch.device("cpu")

_WAITS = {
    *("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal"),
    *("unique_consecutive", "is_nonzero"),
}
_INDEXES = {"index", "index_put", "index_put_", "_index_put_impl_"}

STAND_INS: dict[str, Callable[..., Any]] = {}
"""Compiled operators of vLLM, in torch, on what device tensors wrap."""

PYTHON: dict[str, Callable[..., Any]] = {}
"""vLLM's operators that are Python: called with device tensors."""


class DeviceTensor(torch.Tensor):
    """What vLLM and the plugin hold instead of a tensor on a GPU."""

    inside: torch.Tensor
    machine: Machine
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inside: torch.Tensor) -> Self:
        assert not isinstance(inside, DeviceTensor)
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inside.size(),
            strides=inside.stride(),
            storage_offset=inside.storage_offset(),
            dtype=inside.dtype,
            layout=inside.layout,
            device=CUDA,
            requires_grad=False,
        )
        made.inside = inside
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(cls.machine, func, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.inside.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inside.untyped_storage()

    def __repr__(self) -> str:
        return f"DeviceTensor({self.inside!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> DeviceTensor:
        return DeviceTensor(self.inside.clone())

    def record_stream(self, *_: Any) -> None:
        pass

    def tolist(self) -> list[Any]:
        self.machine.wait("tolist")
        if self.machine.values:
            return self.inside.tolist()
        return torch.zeros(self.shape, dtype=self.dtype, device=CPU).tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


class Pretending(TorchDispatchMode):
    """Sends every operator to `dispatch`."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine = machine

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(self.machine, func, args, kwargs or {})


def enter(machine: Machine) -> None:
    """Tensors may be made on `cuda` from here on, for the rest of the process."""
    DeviceTensor.machine = machine
    torch._C._ensureCUDADeviceGuardSet()  # a guard that does nothing
    # A mask as an index hides nothing where nobody knows what it holds.
    torch.fx.experimental._config.meta_nonzero_assume_all_nonzero = True
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is seen to copy
    _follow_pinned_memory()
    torch.Tensor.record_stream = lambda *_: None
    Pretending(machine).__enter__()


# ---- pinned memory: which host tensors the device can reach by itself ----

_pinned: dict[int, StorageWeakRef] = {}


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    storage = tensor.untyped_storage()
    _pinned[storage.data_ptr()] = StorageWeakRef(storage)
    return tensor


def is_pinned(tensor: torch.Tensor) -> bool:
    if isinstance(tensor, DeviceTensor):
        return False
    seen = _pinned.get(tensor.untyped_storage().data_ptr())
    return seen is not None and not seen.expired()


def _follow_pinned_memory() -> None:
    original = torch.tensor

    def tensor(data: Any, *, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        made = original(data, **options)
        return pinned(made) if pin_memory else made

    torch.tensor = tensor
    torch.Tensor.is_pinned = lambda self, *_, **__: is_pinned(self)
    torch.Tensor.pin_memory = lambda self, *_, **__: (
        self if is_pinned(self) else pinned(self.clone())
    )


# ---- operators ----


def unwrapped(x: Any) -> Any:
    return x.inside if isinstance(x, DeviceTensor) else x


def dispatch(machine: Machine, func: Any, args: Any, kwargs: Any) -> Any:
    """What one operator does on the pretended device."""
    space, _, name = func._schema.name.partition("::")
    flat, spec = pytree.tree_flatten((args, kwargs))
    on_device = [x for x in flat if isinstance(x, DeviceTensor)]
    asked = kwargs.get("device")
    if not on_device and (asked is None or torch.device(asked).type != "cuda"):
        pin = kwargs.get("pin_memory")
        made = func(*args, **(kwargs | {"pin_memory": False} if pin else kwargs))
        return pinned(made) if pin else made
    if name == "_to_copy":
        return _moved(machine, func, args[0], kwargs)
    if name == "copy_":
        return _copied(machine, func, *args, **kwargs)
    if func._schema.name in PYTHON and func._schema.name not in STAND_INS:
        with Pretending(machine):
            return PYTHON[func._schema.name](*args, **kwargs)
    _check_host(machine, name, args, flat, ours=space == "aten" and bool(on_device))
    if name in _WAITS or (
        func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None
    ):
        machine.wait(name)
        if not machine.values and name == "_local_scalar_dense":
            return 0
    return _run(machine, func, flat, spec, on_device)


def _run(machine: Machine, func: Any, flat: list[Any], spec: Any, on_device: list[Any]) -> Any:
    place = CPU if machine.values else META
    moved = [x.inside if isinstance(x, DeviceTensor) else _on(place, x) for x in flat]
    args, kwargs = pytree.tree_unflatten(moved, spec)
    if kwargs.get("device") is not None:
        kwargs = kwargs | {"device": place}
    if kwargs.get("pin_memory"):
        kwargs = kwargs | {"pin_memory": False}
    run = func
    if func._schema.name in STAND_INS:
        run = STAND_INS[func._schema.name] if machine.values else _nothing
    elif machine.values and not func._schema.name.startswith(("aten::", "prim")):
        raise NotImplementedError(f"no stand-in for {func} in {caller()}")
    name = func._schema.name.partition("::")[2]
    if not machine.values and name in _GUESSED:
        run = _GUESSED[name]
    out = run(*args, **kwargs)
    machine.launch(name, kernels_of(func, out), lambda: run(*args, **kwargs), out)
    known = {id(x.inside): x for x in on_device}
    return pytree.tree_map_only(
        torch.Tensor, lambda o: known[id(o)] if id(o) in known else DeviceTensor(o), out
    )


def _one_value(x: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, ...]:
    """The shapes of `torch.unique` where all values are the same: nobody knows which they are."""
    place = torch.empty(x.shape, dtype=torch.int64, device=META)
    return x.new_empty(1), place, torch.empty(1, dtype=torch.int64, device=META)


def _all_of(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return x.new_empty(torch.broadcast_shapes(x.shape, mask.shape).numel())


_GUESSED: dict[str, Callable[..., Any]] = {"_unique2": _one_value, "masked_select": _all_of}
"""Operators whose shape depends on numbers."""


def _nothing(*_: Any, **__: Any) -> None:
    """Shapes of an operator that writes into its arguments."""


def _on(place: torch.device, x: Any) -> Any:
    if place == META and isinstance(x, torch.Tensor) and x.dim():
        return x.to(META)
    return x


def _check_host(machine: Machine, name: str, args: Any, flat: list[Any], *, ours: bool) -> None:
    """Tensors of the host among those of the device."""
    if name in _INDEXES:
        for index in args[1] or ():
            if isinstance(index, torch.Tensor):
                if index.dtype in {torch.bool, torch.uint8}:
                    machine.wait(f"{name} with a mask")
                elif not isinstance(index, DeviceTensor):
                    machine.wait(f"{name} with an index on the host")
        return
    if ours and any(
        isinstance(x, torch.Tensor) and not isinstance(x, DeviceTensor) and x.dim() for x in flat
    ):
        raise RuntimeError(f"Expected all tensors to be on the same device: {name} in {caller()}")


def _moved(machine: Machine, func: Any, source: torch.Tensor, kwargs: Any) -> torch.Tensor:
    """`tensor.to(...)` where one side is the device."""
    asked = kwargs.get("device")
    from_device = isinstance(source, DeviceTensor)
    to_device = from_device if asked is None else torch.device(asked).type == "cuda"
    # torch takes pinned memory for the answer of a copy to the host that does not block.
    sides = from_device, to_device
    _meet(machine, sides, source, answer=None, unblocked=kwargs.get("non_blocking"))
    options = {k: v for k, v in kwargs.items() if k not in {"device", "pin_memory"}}
    inside = unwrapped(source)
    if machine.values:
        out = func(inside, **options)
        machine.launch("_to_copy", 1, lambda: func(inside, **options), out)
    elif to_device:
        out = func(inside, **options, device=META)
        machine.launch("_to_copy")
    else:
        out = torch.zeros(source.shape, dtype=options.get("dtype") or source.dtype, device=CPU)
        machine.launch("_to_copy")
    if to_device:
        return DeviceTensor(out)
    return pinned(out) if kwargs.get("non_blocking") else out


def _copied(
    machine: Machine, func: Any, target: torch.Tensor, source: torch.Tensor, block_not: bool = False
) -> torch.Tensor:
    sides = isinstance(source, DeviceTensor), isinstance(target, DeviceTensor)
    _meet(machine, sides, source, answer=target, unblocked=block_not)
    to, there = unwrapped(target), unwrapped(source)
    if machine.values:
        func(to, there)
    else:
        torch.broadcast_shapes(target.shape, source.shape)
    machine.launch("copy_", 1 if target.numel() else 0, lambda: func(to, there), to)
    return target


def _meet(
    machine: Machine,
    sides: tuple[bool, bool],
    source: torch.Tensor,
    *,
    answer: torch.Tensor | None,
    unblocked: bool | None,
) -> None:
    """A copy between host and device waits unless it is told not to and the memory is pinned."""
    from_device, to_device = sides
    if from_device == to_device or not source.numel():
        return
    host = source if to_device else answer
    way = "host to device" if to_device else "device to host"
    if not unblocked:
        machine.wait(f"copy, {way}")
    elif host is not None and not is_pinned(host):
        machine.wait(f"copy of memory that is not pinned, {way}")


def wrapped(root: torch.nn.Module) -> torch.nn.Module:
    """Parameters, buffers and tensors in attributes go to the device; shared ones stay shared."""
    memo: dict[int, DeviceTensor] = {}
    keep: list[torch.Tensor] = []

    def wrap(tensor: torch.Tensor) -> DeviceTensor:
        if isinstance(tensor, DeviceTensor):
            return tensor
        if id(tensor) not in memo:
            memo[id(tensor)] = DeviceTensor(tensor.detach())
            memo[id(tensor)]._is_param = isinstance(tensor, torch.nn.Parameter)
            keep.append(tensor)  # or its id may be given again
        return memo[id(tensor)]

    for module in root.modules():
        for store in (module._parameters, module._buffers):
            store.update({name: wrap(x) for name, x in store.items() if x is not None})
        for name, x in list(vars(module).items()):
            if isinstance(x, torch.Tensor):
                vars(module)[name] = wrap(x)
            elif isinstance(x, list) and x and all(isinstance(one, torch.Tensor) for one in x):
                vars(module)[name] = [wrap(one) for one in x]
    return root
