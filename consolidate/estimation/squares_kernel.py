"""Sums of squares of products by a kernel that is made for the processor when it is asked for.

In C for a CPU, in Triton for CUDA. It is in use within `using_kernel`, for float32.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.resources import files

import torch
from torch import Tensor
from torch.nn import functional

from consolidate.runtime.compiler import CompilerError, compiled

LONG = ctypes.c_long
DEVICES = ("cpu", "cuda")
BEHIND = 16  # floats behind what it reads, which it may read too
WRONG = 1e-5  # difference from float64 above which it is not used, relative to the largest element
SHAPES = ((37, 7, 30, 70), (3, 40, 30, 70), (2, 300, 30, 70))
"""Of what is compared when it is loaded: examples, positions, rows and columns of a gradient."""

_device: ContextVar[str | None] = ContextVar("device", default=None)


class _Seen(ctypes.Structure):
    """What a layer sees at the positions of an example, as in `squares.c`."""

    _fields_ = (
        *((name, LONG) for name in ("next_example", "next_down", "next_across")),
        *((name, ctypes.c_int) for name in ("height", "width", "run", "runs_in_row")),
        *((name, LONG) for name in ("next_row", "next_run")),
    )


@contextmanager
def using_kernel(device: torch.device, note: Callable[[str], None] | None) -> Iterator[None]:
    """Use the kernel of a device for a block; where it fails or is wrong, say so and do not."""
    token = _device.set(device.type)
    try:
        try:
            _verify(device)
        except Exception as error:  # Whatever a compiler raises.
            _device.set(None)
            if note is not None:
                reason = str(error) if isinstance(error, CompilerError) else repr(error)
                note(f"the kernel cannot be used ({reason}): continuing without it")
        yield
    finally:
        _device.reset(token)


def fits(*tensors: Tensor) -> bool:
    """Return whether the kernel is in use, and takes these tensors."""
    device = _device.get()
    return device is not None and all(
        tensor.dtype == torch.float32 and tensor.device.type == device for tensor in tensors
    )


def add_squares(total: Tensor, g: Tensor, a: Tensor, traces: Tensor) -> None:
    """Add Σ_b (Σ_t g_bt a_btᵀ)² to total, and what each example adds to its trace.

    Args:
        total: (m, n), with neighbouring columns next to each other.
        g: (B, T, m).
        a: (B, T, n).
        traces: (B,); those that are negative stay as they are.

    Raises:
        RuntimeError: Their shapes do not fit together.
    """
    if a.stride(2) != 1:
        a = a.contiguous()
    _check(total, g, (len(a), a.shape[1], a.shape[2]))
    seen = _Seen(a.stride(0), 0, a.stride(1), 1, a.shape[1], a.shape[2], 1, 0, 0)
    _add(total, g, a, seen, traces)


def add_squares_of_convolution(
    total: Tensor,
    g: Tensor,
    a: Tensor,
    traces: Tensor,
    *,
    grid: Sequence[int],
    zeros: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> None:
    """Add the squares of a convolution's gradients, without a copy of what it sees.

    Args:
        total: (m, *kernel × n).
        g: (B, T, m).
        a: (B, n, *in), of one or two dimensions.
        traces: As for `add_squares`.
        grid: Of the T positions.
        zeros: Around `a`, as functional.pad takes them.
        kernel: The sizes of the kernel.
        stride: Of the kernel.
        dilation: Of the kernel.

    Raises:
        RuntimeError: Their shapes do not fit together.
    """
    if a.ndim == 3:
        a, zeros = a.unsqueeze(2), [*zeros, 0, 0]
        grid, kernel, stride, dilation = (1, *grid), (1, *kernel), (1, *stride), (1, *dilation)
    left, right, top, bottom = zeros or (0, 0, 0, 0)
    size, channels, height, width = a.shape
    height, width = height + top + bottom, width + left + right
    _check(total, g, (size, grid[0] * grid[1], kernel[0] * kernel[1] * channels))
    for axis, side in enumerate((height, width)):
        if (grid[axis] - 1) * stride[axis] + (kernel[axis] - 1) * dilation[axis] + 1 > side:
            raise RuntimeError(f"{grid} positions do not fit into {height} × {width} inputs")
    empty = a.new_zeros if any(zeros) else a.new_empty
    padded = empty(size * height * width * channels + BEHIND)
    last = padded[:-BEHIND].view(size, height, width, channels)
    last[:, top : height - bottom, left : width - right] = a.movedim(1, -1)
    row, (down, across), (below, beside) = width * channels, stride, dilation
    seen = _Seen(
        *(height * row, down * row, across * channels, *grid),
        *((kernel[1] * channels, 1) if beside == 1 else (channels, kernel[1])),
        *(below * row, beside * channels),
    )
    _add(total, g, padded, seen, traces)


def _check(total: Tensor, g: Tensor, seen: tuple[int, int, int]) -> None:
    """Refuse what would be read or written beside the tensors: a kernel does not look.

    Args:
        total: The sums.
        g: The gradients.
        seen: Examples, positions and columns of what the layer sees.
    """
    expected = (*seen[:2], len(total)), (len(total), seen[2])
    if (g.shape, total.shape) != expected or not g.numel() or total.stride(1) != 1:
        raise RuntimeError(f"gradients {[*g.shape]} of sums {[*total.shape]} for inputs {[*seen]}")


def _add(total: Tensor, g: Tensor, a: Tensor, seen: _Seen, traces: Tensor) -> None:
    assert fits(total, g, a)
    if total.device.type == "cpu":
        _add_in_c(total, g, a, seen, traces)
    else:
        from consolidate.estimation.squares_in_triton import add_squares

        add_squares(total, g, a, tuple(getattr(seen, field[0]) for field in seen._fields_), traces)


def _add_in_c(total: Tensor, g: Tensor, a: Tensor, seen: _Seen, traces: Tensor) -> None:
    threads = torch.get_num_threads()
    found = torch.where(traces < 0, -1.0, 0.0).double().repeat(threads, 1)
    if _compiled().add_squares(
        *(total.data_ptr(), total.stride(0), g.data_ptr(), (LONG * 3)(*g.stride()), a.data_ptr()),
        *(ctypes.byref(seen), len(g), *total.shape, found.data_ptr(), threads),
    ):
        raise MemoryError("out of memory in the kernel of squares")
    traces += torch.where(traces < 0, 0.0, found.sum(0))


@cache
def _compiled() -> ctypes.CDLL:
    """Compile and load the kernel.

    Raises:
        CompilerError: That failed.
    """
    source = files("consolidate.estimation").joinpath("squares.c").read_text(encoding="utf-8")
    library = compiled(source)
    pointer, number = ctypes.c_void_p, ctypes.c_int
    library.add_squares.argtypes = [
        *(pointer, LONG, pointer, pointer, pointer, pointer),
        *(number, number, number, pointer, number),
    ]
    library.add_squares.restype = number
    return library


def _verify(device: torch.device) -> None:
    """Compare the kernel with sums in float64: few positions and many, odd shapes, a convolution.

    Raises:
        CompilerError: They differ, or there is no kernel. Triton's compiler raises other errors.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        numbers = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        return numbers.to(device)

    for examples, positions, rows, columns in SHAPES:
        g, a = random(examples, rows, positions).mT, random(examples, positions, columns)
        expected = (g.mT.double() @ a.double()).square()
        total, traces = a.new_zeros(rows, columns), a.new_zeros(examples)
        add_squares(total, g, a, traces)
        _compare(total, expected.sum(0))
        _compare(traces, expected.sum((1, 2)))
    g, a = random(3, 5, 9).mT, random(3, 7, 5, 6)  # 3 × 3 positions
    padded = functional.pad(a, (1, 2, 0, 3)).double()
    windows = padded.unfold(2, 3, 2).unfold(3, 5, 2)[..., ::2]  # (3, 7, 3, 3, 3, 3)
    seen = windows.movedim(1, -1).reshape(3, 9, -1)
    total = a.new_zeros(5, seen.shape[-1])
    add_squares_of_convolution(
        *(total, g, a, a.new_zeros(3)),
        grid=(3, 3),
        zeros=(1, 2, 0, 3),
        kernel=(3, 3),
        stride=(2, 2),
        dilation=(1, 2),
    )
    _compare(total, (g.mT.double() @ seen).square().sum(0))


def _compare(found: Tensor, expected: Tensor) -> None:
    difference = ((found - expected).abs().max() / expected.max()).item()
    if not difference <= WRONG:
        raise CompilerError(f"it differs from sums in float64 by {difference:.1g} of the largest")
