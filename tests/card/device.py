"""A graphics card that is not there, for torch: its devices, dtypes, shapes and bytes are real, its numbers are not.

    register_card()                           # once in a process; cannot be undone
    with PretendCard(24 * 2**30) as card:     # CPU tensors stay real, whatever is made on "card:0" is fake
        ...
    card.peak, card.current.up, card.current.reads

`card` is a PrivateUse1 device over torch's FakeTensorMode. As on CUDA, an op that mixes tensors of the card and of the
CPU raises, and so does one that no longer fits. Counted are the bytes that lie on the card, those that cross, and
whatever makes the CPU or the card wait: values that are read, copies that block or come from memory that is not
page-locked, and copies that nobody wrote down, such as that of the index in `x[[0, 1]]`. What is copied to the CPU is
zeros, and a number that is read is 1.

What a kernel takes as workspace, gaps between the allocator's pieces, and seconds are a real card's alone to tell.
"""

from __future__ import annotations

import pathlib
import sys
import weakref
from dataclasses import dataclass, field

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

from . import streams

CARD_TYPE = "card"
ALLOCATION_STEP = 512  # bytes: the caching allocator of CUDA rounds up to this
MAX_ZEROED_BYTES = 2**23  # larger copies on the CPU stay untouched memory, which costs nothing; adapters are smaller
PACK = pathlib.Path(__file__).resolve().parents[2]
HERE = pathlib.Path(__file__).resolve().parent

aten = torch.ops.aten
CROSSING_OPS = {aten.copy_.default, aten._to_copy.default}
READING_OPS = {aten._local_scalar_dense.default, aten.equal.default}
# torch gives a device that has no kernel of its own for these the composite formula, which keeps fp32 copies and single
# factors that CUDA's kernels never have in memory
FUSED_OPS = ("silu_backward", "mish_backward", "_fused_rms_norm", "_fused_rms_norm_backward")
PAGE_LOCKING_OPS = {aten._pin_memory.default, aten.is_pinned.default}
OPS_WITHOUT_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias"}
OPS_WITH_CPU_INDEX = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


@dataclass
class CardTraffic:
    """What crossed between card and CPU, and what made the CPU wait, in one part of a run."""

    up: int = 0  # bytes, to the card
    up_beside: int = 0  # of these, on a stream beside the computing one
    down: int = 0  # bytes, to the CPU
    waiting_copies: list[str] = field(default_factory=list)  # where those were asked for that something waits for
    down_copies: list[str] = field(default_factory=list)  # where those to the CPU were asked for
    reads: list[str] = field(default_factory=list)  # where values of the card were read
    implicit_copies: list[str] = field(default_factory=list)  # where an index or a list of numbers went to the card
    float64: list[str] = field(default_factory=list)  # where such a tensor was made: there is none on MPS and Intel
    races: list[str] = field(default_factory=list)  # accesses that another stream may be in the midst of
    peak: int = 0  # bytes on the card at most


class PretendCard(TorchDispatchMode):
    """As a context manager: the card is plugged in. `total`: bytes of memory."""

    plugged_in: PretendCard | None = None

    def __init__(self, total: int):
        super().__init__()
        self.total = int(total)
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.sizes: dict[int, int] = {}  # storage -> bytes
        self.uses: dict[int, streams.MemoryUse] = {}  # storage -> who touched it; of the CPU, those that were copied
        self.live = 0  # bytes
        self.page_locked: set[int] = set()  # addresses of memory that torch page-locked
        self.registered: dict[int, int] = {}  # address -> bytes, that somebody else page-locked
        self.current = CardTraffic()
        self.out_of_memory = ""  # what is to be raised

    @property
    def free(self) -> int:
        return self.total - self.live

    def begin_part(self) -> CardTraffic:
        """A new count of traffic, from here on."""
        self.current = CardTraffic(peak=self.live)
        return self.current

    def __enter__(self):
        self.one_thread = torch.autograd.set_multithreading_enabled(False)  # backward under the same modes
        PretendCard.plugged_in = self
        return super().__enter__()

    def __exit__(self, *error):
        PretendCard.plugged_in = None
        self.one_thread.__exit__(None, None, None)
        return super().__exit__(*error)

    # -- every op ------------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked several times for each op
        if func in PAGE_LOCKING_OPS or kwargs.get("pin_memory"):
            return self.page_lock(func, args, kwargs)
        if not (touches_card(args) or touches_card(kwargs.values())):
            return func(*args, **kwargs)
        if func in READING_OPS:
            return self.read_value(func, args[0])
        if func in OPS_WITH_CPU_INDEX and any(index is not None and not is_on_card(index) for index in args[1]):
            self.current.implicit_copies.append(find_caller())
        if func is aten.copy_.default and not is_on_card(args[0]):
            self.note_accesses(func, args, kwargs, ())
            return self.copy_to_cpu(*args, **kwargs)
        with self.fake:
            out = func(*args, **kwargs)
        if func in CROSSING_OPS:
            self.count_crossing(args, kwargs, out)
        out = self.keep_account(func, out)
        self.note_accesses(func, args, kwargs, out)
        return out

    def note_accesses(self, func, args, kwargs, out):
        """One tick of the current stream, with what it reads and writes: of the CPU's memory, what is copied."""
        is_crossing = func in CROSSING_OPS
        kind, name = func._schema.name.split("::")
        if not is_crossing and (func.is_view or kind == "prim" or name in OPS_WITHOUT_KERNEL):
            return
        access, values = streams.CardStream.current.tick(), (*args, *kwargs.values())
        changed = [value for spec, value in zip(func._schema.arguments, values, strict=False) if spec.is_write]
        reads, writes = list_storages(values), list_storages((*changed, out))
        for key in {**reads, **writes}:
            tensor = writes.get(key, reads.get(key))
            if is_on_card(tensor) or is_crossing:
                self.note_access(key, tensor, access, is_write=key in writes)

    def note_access(self, key, tensor, access, is_write):
        stream = streams.CardStream.current
        if key not in self.uses:  # of the CPU
            self.uses[key] = streams.MemoryUse(stream, access)
            weakref.finalize(tensor.untyped_storage(), self.uses.pop, key, None)
        if race := self.uses[key].find_race(access, stream, is_write):
            self.current.races.append(f"{find_caller()}: {race}")

    def keep_account(self, func, out):
        """The op's result, with what lies on the card counted and what lies on the CPU made real."""
        if isinstance(out, FakeTensor):
            return self.count_tensor(out)
        if isinstance(out, (tuple, list)):
            return type(out)(self.keep_account(func, value) for value in out)
        return out

    def count_tensor(self, tensor: FakeTensor):
        if not is_on_card(tensor):
            return make_cpu_tensor(tensor)
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.dtype in (torch.float64, torch.complex128):
            self.current.float64.append(find_caller())
        if key not in self.sizes:
            size = -(-storage.nbytes() // ALLOCATION_STEP) * ALLOCATION_STEP
            if self.live + size > self.total and not self.out_of_memory:
                self.out_of_memory = (
                    f"The pretend card is out of memory: {size} bytes are asked for, {self.free} of {self.total} free."
                )
            self.sizes[key] = size
            self.uses[key] = streams.MemoryUse.of_new_memory(streams.CardStream.current)
            self.live += size
            self.current.peak = max(self.current.peak, self.live)
            weakref.finalize(storage, self.forget_storage, key)
        self.raise_out_of_memory()
        return tensor

    def raise_out_of_memory(self):
        """Once a backward pass is over: torch's engine does not survive every error of a mode within it."""
        if self.out_of_memory and torch._C._current_graph_task_id() == -1:
            message, self.out_of_memory = self.out_of_memory, ""
            raise torch.OutOfMemoryError(message)

    def forget_storage(self, key):
        self.live -= self.sizes.pop(key, 0)
        use = self.uses.pop(key, None)
        if use is not None and use.is_free_too_early():
            self.current.races.append("memory was given back while another stream was at it")

    def read_value(self, func, tensor):
        self.current.reads.append(find_caller())
        if func is aten.equal.default or tensor.dtype is torch.bool:
            return True
        return 1.0 if tensor.is_floating_point() else 1

    def copy_to_cpu(self, target, source, non_blocking=False):
        self.count_copy(source, target, non_blocking)
        if target.nbytes <= MAX_ZEROED_BYTES:
            target.zero_()
        return target

    def count_crossing(self, args, kwargs, out):
        source = args[1] if len(args) > 1 and torch.is_tensor(args[1]) else args[0]
        if is_on_card(source) != is_on_card(out):
            self.count_copy(source, out, kwargs.get("non_blocking") or (len(args) > 2 and args[2] is True))

    def count_copy(self, source, target, non_blocking):
        place = find_caller()
        if is_on_card(target):
            self.current.up += source.numel() * source.element_size()
            if streams.CardStream.current is not streams.COMPUTING:
                self.current.up_beside += source.numel() * source.element_size()
        else:
            self.current.down += target.numel() * target.element_size()
            self.current.down_copies.append(place)
        if not non_blocking:
            self.current.waiting_copies.append(f"{place}: blocks")
        elif not self.is_page_locked(source if is_on_card(target) else target):
            self.current.waiting_copies.append(f"{place}: memory that is not page-locked")

    # -- page-locked memory --------------------------------------------------------------------------------------------

    def page_lock(self, func, args, kwargs):
        """What torch would do with a driver: this one page-locks nothing and keeps the addresses."""
        if func is aten.is_pinned.default:
            return self.is_page_locked(args[0])
        locked = args[0].clone() if func is aten._pin_memory.default else func(*args, **{**kwargs, "pin_memory": False})
        address = locked.untyped_storage().data_ptr()
        self.page_locked.add(address)
        weakref.finalize(locked.untyped_storage(), self.page_locked.discard, address)
        return locked

    def is_page_locked(self, tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.page_locked or tensor.data_ptr() in self.registered


def list_storages(values) -> dict[int, torch.Tensor]:
    """Storage -> one of the tensors in it."""
    found = {}
    for value in values:
        if isinstance(value, (list, tuple)):
            found |= list_storages(value)
        elif torch.is_tensor(value):
            found[value.untyped_storage()._cdata] = value
    return found


def touches_card(values) -> bool:
    return any(touches_card(value) if isinstance(value, (list, tuple)) else is_on_card(value) for value in values)


def is_on_card(leaf) -> bool:
    if isinstance(leaf, FakeTensor):
        return leaf.fake_device.type == CARD_TYPE
    if isinstance(leaf, torch.Tensor):
        return leaf.device.type == CARD_TYPE
    if isinstance(leaf, torch.device):
        return leaf.type == CARD_TYPE
    return isinstance(leaf, str) and leaf.split(":")[0] == CARD_TYPE


def make_cpu_tensor(tensor: FakeTensor) -> torch.Tensor:
    """Real memory for what came from the card: zeros, or what no page was touched of."""
    real = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    return real.zero_() if real.nbytes <= MAX_ZEROED_BYTES else real


def find_caller() -> str:
    """file:line function of the code that is neither torch nor this file."""
    frame = sys._getframe(1)
    while frame is not None:
        path = pathlib.Path(frame.f_code.co_filename)
        if "site-packages" not in path.parts and path.parent != HERE and not path.name.startswith("<"):
            name = path.relative_to(PACK) if path.is_relative_to(PACK) else pathlib.Path(*path.parts[-3:])
            return f"{name}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "?"


# -- what torch needs of a device ------------------------------------------------------------------------------------


class CardModule(backend_registration._DummyBackendModule):
    Stream, current_stream, stream = (
        streams.CardStream,
        staticmethod(streams.current_stream),
        staticmethod(streams.stream),
    )

    def get_amp_supported_dtype(self):  # torch.utils.checkpoint asks for it in backward
        return [torch.float16, torch.bfloat16]


def register_card():
    """torch knows the device `card` from now on. It changes torch for the whole process, and can be done once."""
    backend_registration._setup_privateuseone_for_python_backend(CARD_TYPE, backend_module=CardModule())
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty_strided", make_bare_tensor, "PrivateUse1")
    library.impl("empty.memory_format", make_bare_tensor, "PrivateUse1")
    library.impl("_copy_from", fill_bare_tensor, "PrivateUse1")
    for name in FUSED_OPS:
        library.impl(name, refuse_real_call, "PrivateUse1")
    sys.modules[__name__].library = library  # torch forgets the kernels with it
    torch.nn.Module._apply = move_module
    torch.nn.functional.scaled_dot_product_attention = choose_attention
    torch.Tensor.tolist = read_list
    autocast = torch.library.Library(
        "_", "IMPL"
    )  # casts nothing on the card; without it ops under autocast have no kernel
    autocast.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    sys.modules[__name__].autocast = autocast


def make_bare_tensor(size, *layout, dtype=None, **more):
    """Of tensors that torch's C++ makes out of numbers, behind every mode."""
    return torch._C._acc.create_empty_tensor(list(size), dtype or torch.get_default_dtype())


def fill_bare_tensor(source, target, non_blocking=False):
    if PretendCard.plugged_in is not None:
        PretendCard.plugged_in.current.implicit_copies.append(find_caller())
    return target


def refuse_real_call(*_, **__):
    raise RuntimeError("the pretend card computes nothing: its tensors are fake")


def move_module(self, fn, recurse=True):
    """Module._apply with new parameters: a fake tensor can neither be swapped nor take another device's data."""
    if recurse:
        for module in self.children():
            module._apply(fn)
    for name, value in self._parameters.items():
        if value is not None:
            with torch.no_grad():
                new = fn(value)
            if new is not value:
                self._parameters[name] = torch.nn.Parameter(new.detach(), requires_grad=value.requires_grad)
    for name, value in self._buffers.items():
        if value is not None:
            self._buffers[name] = fn(value)
    return self


torch_tolist = torch.Tensor.tolist


def read_list(tensor):
    if tensor.device.type != CARD_TYPE:
        return torch_tolist(tensor)
    PretendCard.plugged_in.current.reads.append(find_caller())
    return torch_tolist(torch.ones(tensor.shape, dtype=tensor.dtype))


class FusedAttention(torch.autograd.Function):
    """What a fused kernel (Dao 2023) holds: its inputs, its output and one number per query; in backward a sum of the
    queries' gradients in fp32 beside the gradients. torch would take the N x N path for a device it does not know."""

    @staticmethod
    def forward(ctx, q, k, v, mask):
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, mask, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v = ctx.saved_tensors[:3]
        sums = q.new_empty(q.shape, dtype=torch.float32)
        gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        del sums
        return (*gradients, None)


torch_attention = torch.nn.functional.scaled_dot_product_attention


def choose_attention(query, key, value, attn_mask=None, *more, **named):
    if query.device.type != CARD_TYPE:
        return torch_attention(query, key, value, attn_mask, *more, **named)
    devices = {t.device for t in (query, key, value, attn_mask) if t is not None}
    dtypes = {query.dtype, key.dtype, value.dtype}
    if len(devices) > 1 or len(dtypes) > 1:
        raise RuntimeError(f"attention over {devices} in {dtypes}: a kernel takes one device and one dtype")
    return FusedAttention.apply(query, key, value, attn_mask)
