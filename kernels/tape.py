"""What one operator call allocates and launches: recorded once, then replayed at other addresses.

At every launch Triton finds out anew which compiled kernel to run and how to pass its arguments,
and before it the operator chooses kernels and tiles again: together most of the host time of a
call. All of it depends on the facts of the call alone (shapes, strides, dtypes, alignment,
options). A `Tape` keeps, under those facts, the buffers to allocate and for every launch the very
arguments of Triton's C launcher; a replay fills in addresses and the stream.

While a call is recorded its tape is the thread's, and `kernels.launch` writes to it. So between
`play` and the end of the function: allocate by `tape.empty`, launch by `launch`, look at no values.
Another torch operation on the way (the cast of W under autocast) makes a tensor that the tape does
not know: such a call is right, but never replayed.
"""

from __future__ import annotations

import copy
import inspect
import threading

import torch
import triton
from triton.runtime import driver

INTERPRETING = triton.knobs.runtime.interpret
MAX_TAPES = 2048  # batches of ever new sizes record ever new ones
MAX_MAPS = 4096  # tensor maps kept per argument: one for each layer of this shape, and each buffer
_tapes: dict[tuple, Tape] = {}
_thread = threading.local()
_making_room = threading.Lock()


def play(function, inputs, options):
    """`function(tape, *inputs, *options)`, a list of tensors (or None) it made by `tape.empty`.

    The function may do nothing to tensors but launch kernels by `kernels.launch`; what it chooses
    may depend on the options and the inputs' facts, never on their values. inputs: tensors or
    None, the first on the device of all. options: hashable.
    """
    first = inputs[0]
    if INTERPRETING:
        return function(Tape(inputs), *inputs, *options)
    addresses, facts = [], [function, first.get_device(), options]
    for t in inputs:
        if t is None:
            facts.append(None)
        else:
            address = t.data_ptr()
            addresses.append(address)
            facts += (t.dtype, t.shape, t.stride(), address & 15)
    key = tuple(facts)
    tape = _tapes.get(key)
    if tape is not None and not _profiled():
        return tape.replay(first, addresses)
    tape = _thread.tape = Tape(inputs)
    try:
        outputs = function(tape, *inputs, *options)
    finally:
        _thread.tape = None
    if tape.end(outputs):
        with _making_room:
            _keep(_tapes, key, tape, MAX_TAPES)
    return outputs


def _keep(kept: dict, key, value, most: int) -> None:
    """kept[key] = value, in the place of the oldest where there are as many as there may be."""
    if len(kept) >= most:
        del kept[next(iter(kept))]
    kept[key] = value


def forget() -> None:
    """Drop all tapes: what they hold was chosen and compiled before something changed."""
    _tapes.clear()


def recording() -> Tape | None:
    """The tape of the operator call that this thread is in, if it is being recorded."""
    return getattr(_thread, "tape", None)


def _profiled() -> bool:
    """Whether a profiler listens to launches: it gets its metadata from Triton's own path."""
    hook = triton.knobs.runtime.launch_enter_hook
    return bool(hook is not None and getattr(hook, "calls", True))


class Tape:
    def __init__(self, inputs) -> None:
        self.first = inputs[0]
        self.buffers: list[tuple] = []  # (shape, dtype, zeroed) in order
        self.launches: list[Launch] = []
        self.made: list[torch.Tensor] = []
        addresses = [t.data_ptr() for t in inputs if t is not None]
        self.inputs = len(addresses)
        self.slots = {address: i for i, address in enumerate(addresses)}
        # of two inputs at one address it would be open which one a kernel was given
        self.complete = len(self.slots) == len(addresses)

    def empty(self, shape, dtype=None, *, zeroed=False) -> torch.Tensor:
        """A new tensor on the inputs' device, in the first input's dtype unless given."""
        tensor = _allocate(self.first, shape, dtype, zeroed)
        self.slots[tensor.data_ptr()] = self.inputs + len(self.buffers)
        self.buffers.append((tuple(shape), dtype, zeroed))
        self.made.append(tensor)
        return tensor

    def add(self, compiled, grid, arguments) -> None:
        """Record a launch of a compiled kernel that has just been made."""
        if self.complete:
            launch = Launch(compiled, grid, arguments, self.slots)
            self.launches.append(launch)
            self.complete = launch.complete

    def end(self, outputs) -> bool:
        """Close the tape; whether it can be replayed."""
        made = [id(t) for t in self.made]
        self.outputs = [None if t is None else made.index(id(t)) for t in outputs]
        self.device = driver.active.get_current_device()
        del self.first, self.made, self.slots
        return self.complete

    def replay(self, first: torch.Tensor, addresses: list[int]) -> list[torch.Tensor | None]:
        tensors = [_allocate(first, *buffer) for buffer in self.buffers]
        addresses += [t.data_ptr() for t in tensors]
        stream = driver.active.get_current_stream(self.device)
        for launch in self.launches:
            launch.replay(stream, addresses)
        return [None if i is None else tensors[i] for i in self.outputs]


def _allocate(first: torch.Tensor, shape, dtype, zeroed) -> torch.Tensor:
    # torch takes sizes one by one faster than in a tuple
    tensor = first.new_empty(*shape) if dtype is None else first.new_empty(*shape, dtype=dtype)
    return tensor.zero_() if zeroed else tensor


class Launch:
    """One launch: the arguments of Triton's C launcher, with addresses and stream left open.

    How these arguments look differs between Triton versions, so they are not built here: Triton
    builds them once for a launcher that only notes them down, and what belongs to a tensor is
    found again by identity.
    """

    def __init__(self, compiled, grid, arguments, slots) -> None:
        self.compiled, self.grid, self.arguments = compiled, grid, arguments
        bases = [getattr(a, "base", a) for a in arguments]
        tensors = {id(t): t for t in bases if isinstance(t, torch.Tensor)}
        # an empty tensor has no address
        self.complete = all(t.data_ptr() in slots for t in tensors.values() if t.numel())
        if not self.complete:
            return
        self.descriptors = [
            (i, slots[a.base.data_ptr()]) for i, a in enumerate(arguments) if hasattr(a, "base")
        ]
        self.run = c_launcher(compiled)
        self.before, self.rest, self.template = self._expanded(arguments)
        given = [(i, a) for i, a in enumerate(self.template) if isinstance(a, torch.Tensor)]
        self.pointers = [(i, slots[a.data_ptr()]) for i, a in given if a.numel()]
        # a descriptor becomes its tensor map, its shape and its strides: 5 arguments of a matrix
        start = len(self.template) - len(arguments) - 4 * len(self.descriptors)
        self.maps = [
            (start + i + 4 * before, slot, {}) for before, (i, slot) in enumerate(self.descriptors)
        ]
        assert all("map" in type(self.template[i]).__name__.lower() for i, _, _ in self.maps)
        for i, _ in given:
            self.template[i] = 0
        self.arguments = [
            None if isinstance(a, torch.Tensor) else _Open(a) if hasattr(a, "base") else a
            for a in arguments
        ]

    def replay(self, stream, addresses) -> None:
        arguments = self.template.copy()
        for i, slot in self.pointers:
            arguments[i] = addresses[slot]
        for i, slot, known in self.maps:
            tensor_map = known.get(addresses[slot])
            if tensor_map is None:
                tensor_map = self._encode(addresses)[i]
            arguments[i] = tensor_map
        if self.rest is None:
            self.run(*self.before, stream, *arguments)
        else:
            self.run(*self.before, stream, *self.rest, arguments)

    def _encode(self, addresses) -> list:
        """The kernel's arguments with tensor maps for these addresses, which are kept: a map holds
        an address and a geometry, it owns nothing."""
        arguments = list(self.arguments)
        for i, slot in self.descriptors:
            arguments[i] = arguments[i].at(addresses[slot])
        expanded = self._expanded(arguments)[-1]
        with _making_room:  # threads that serve one layer would take the same map to be the oldest
            for i, slot, known in self.maps:
                if addresses[slot] not in known:
                    _keep(known, addresses[slot], expanded[i], MAX_MAPS)
        return expanded

    def _expanded(self, arguments):
        """A call of the C launcher: what precedes the stream, what follows it, and the kernel's
        arguments. The newer Triton passes these as one sequence at the end, the older one spreads
        them: then nothing separate follows (None)."""
        compiled, seen, stream = self.compiled, [], object()
        probe = copy.copy(compiled.run)
        probe.launch = lambda *arguments: seen.extend(arguments)
        if self.descriptors:
            from triton.backends.nvidia.driver import wrap_handle_tensordesc

            meta = compiled.metadata.tensordesc_meta
            probe.launch = wrap_handle_tensordesc(probe.launch, dict(compiled.src.signature), meta)
        head = (compiled.function, compiled.packed_metadata, None, None, None)
        probe(*self.grid, stream, *head, *arguments)
        at = next(i for i, a in enumerate(seen) if a is stream)
        before, after = seen[:at], seen[at + 1 :]
        if isinstance(after[-1], (list, tuple)):
            return before, after[:-1], list(after[-1])
        return before, None, after


def c_launcher(compiled):
    """Triton's C launcher of a kernel, from behind the wrapper that builds tensor maps."""
    launch = compiled.run.launch
    if inspect.isfunction(launch):
        return inspect.getclosurevars(launch).nonlocals["launcher"]
    return launch


class _Open:
    """A tensor descriptor whose address is still open."""

    def __init__(self, descriptor) -> None:
        self.descriptor = copy.copy(descriptor)
        self.descriptor.base = None

    def at(self, address: int):
        descriptor = copy.copy(self.descriptor)
        descriptor.base = _Address(address)
        return descriptor


class _Address:
    """As much of a tensor as the encoding of a tensor map asks for."""

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        return self.address
