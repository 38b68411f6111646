"""Per-example gradients of a batch, in factored forms, and the sums of their squares.

Functions that add squares to a total also return their sum for each example, its share of the
trace; a negative number marks an example that was not measured.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations_with_replacement, product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from consolidate.estimation import squares_kernel

FEW_POSITIONS = 4  # up to here Σ_b (Σ_t g_t a_tᵀ)² is one product over pairs of positions
PATCHED_POSITIONS = 255  # up to here what a convolution's kernel sees is copied, for products
GROUPED_POSITIONS = 512  # up to here several examples are the groups of one convolution
THIN = 64  # rows or columns below which addmm_ may add term by term, with larger rounding errors
SMALL = 1 << 18  # elements of a gradient up to which several are computed in one call
CHUNK = 16  # the number of these; a multiple of MEASURED
BLOCK = 1 << 20  # elements of a larger one that are computed, squared and added while in the cache
MEASURED = 4  # of many positions every fourth example's gradient is summed for the spread,
ALL_MEASURED = 1 << 14  # unless it has no more elements than that


class Outer(NamedTuple):
    """Gradients that are products, Σ_t g_t a_tᵀ, or the transposes of such."""

    g: Tensor  # (B, T, m), the gradients at a layer's outputs
    a: Tensor  # (B, T, n), its inputs
    transposed: bool = False

    def add_to(self, gradient: Tensor, example: int) -> None:
        """Add one example's gradient to a tensor, (m, n) or (m, …)."""
        left, right = self._factors()
        gradient.view(len(gradient), -1).addmm_(left[example].T, right[example])

    def add_squares(self, total: Tensor, first: int = 0) -> Tensor:
        """Add Σ_b (Σ_t g_t a_tᵀ)² to total, (m, n) or (m, …); return Σ_mn for each b, (B,)."""
        if self.few:
            pairs = pairs_of(self.g, 2)
            return self.add_product(total, pairs, pairs.sum(1))
        total = total.flatten(1)
        left, right = self._factors()
        traces, measured = _to_measure(right, total, first)
        if squares_kernel.fits(total, left, right):
            squares_kernel.add_squares(total, left, right, traces)
            return traces
        numbers = range(len(right))[measured]
        if total.numel() <= SMALL:
            scratch = right.new_empty(min(CHUNK, len(right)), *total.shape)
            for start in range(0, len(right), CHUNK):
                some = slice(start, start + CHUNK)
                squares = scratch[: len(right[some])]
                torch.bmm(left[some].mT, right[some], out=squares).square_()
                total += squares.sum(0)
                traces[some][measured] = squares[measured].flatten(1).sum(1)
            return traces
        height = max(1, BLOCK // right.shape[-1])
        scratch = right.new_empty(min(height, len(total)), right.shape[-1])
        for block, rows in zip(left.split(height, -1), total.split(height), strict=True):
            gradient = scratch[: len(rows)]
            for example, (one, other) in enumerate(zip(block, right, strict=True)):
                torch.mm(one.T, other, out=gradient)
                rows.addcmul_(gradient, gradient)
                if example in numbers:
                    traces[example] += square(gradient)
        return traces

    @property
    def few(self) -> bool:
        """Whether there are few enough positions to put their pairs into one product."""
        return self.g.shape[1] <= FEW_POSITIONS

    def add_product(self, total: Tensor, pairs: Tensor, sums: Tensor) -> Tensor:
        """Add Σ_b Σ_{s≤t} pairs_st (a_s a_t)ᵀ to total.

        Args:
            total: (m, n) or (m, …).
            pairs: g_s g_t, twice where s ≠ t, or a sum of such over other g, (B · pairs, m).
            sums: Σ_m pairs, (B · pairs,).

        Returns:
            The sum of each example's term, (B,).
        """
        left, right = pairs, pairs_of(self.a)
        traces = _over_pairs(sums * right.sum(1), self.a.shape[0])
        if self.transposed:
            left, right = right, left
        total = total.view(total.shape[0], -1)
        if min(total.shape) < THIN:
            total += left.T @ right
        else:
            total.addmm_(left.T, right)
        return traces

    def take_rows(self, example: int, rows: Tensor) -> Tensor:
        """Return those rows of one example's gradient, and set them to zero in it."""
        left, right = self._factors()
        columns = left[example][:, rows]
        left[example][:, rows] = 0
        return columns.T @ right[example]

    def _factors(self) -> tuple[Tensor, Tensor]:
        return (self.a, self.g) if self.transposed else (self.g, self.a)


class Summed(NamedTuple):
    """Gradients that are sums over a few positions, Σ_t g_t: products with inputs of 1."""

    g: Tensor  # (B, T, m)

    def add_to(self, gradient: Tensor, example: int) -> None:
        """Add one example's gradient to a tensor, (m,)."""
        gradient += self.g[example].sum(0)

    def add_squares(self, total: Tensor, first: int = 0) -> Tensor:
        """Add Σ_b (Σ_t g_t)² to total, (m,); return Σ_m for each b, (B,)."""
        pairs = pairs_of(self.g, 2)
        return self.add_product(total, pairs, pairs.sum(1))

    def add_product(self, total: Tensor, pairs: Tensor, sums: Tensor) -> Tensor:
        """Add Σ_b Σ_{s≤t} pairs_st to total, (m,); return Σ_m of each example's term, (B,)."""
        total += pairs.sum(0)
        return _over_pairs(sums, self.g.shape[0])


class Rows(NamedTuple):
    """Gradients that touch a few rows of a table, Σ_t values_t at row ids_t."""

    ids: Tensor  # (B, T)
    values: Tensor  # (B, T, n)

    def add_to(self, gradient: Tensor, example: int) -> None:
        """Add one example's gradient to a tensor, (rows, n)."""
        gradient.index_add_(0, self.ids[example], self.values[example])

    def add_squares(self, total: Tensor, first: int = 0) -> Tensor:
        """Add Σ_b (Σ_t values_t at ids_t)² to total, (rows, n); return each example's sum, (B,)."""
        offsets = torch.arange(len(self.ids), device=self.ids.device)[:, None] * len(total)
        keys, places = (self.ids + offsets).unique(return_inverse=True)
        sums = self.values.new_zeros(len(keys), self.values.shape[-1])
        sums.index_add_(0, places.flatten(), self.values.flatten(0, 1))
        total.index_add_(0, keys % len(total), sums.square_())
        return sums.new_zeros(len(self.ids)).index_add_(0, keys // len(total), sums.sum(-1))

    def of(self, example: int) -> tuple[Tensor, Tensor]:
        """Return the rows one example touches and its gradient there."""
        rows, places = self.ids[example].unique(return_inverse=True)
        values = self.values[example]
        return rows, values.new_zeros(len(rows), values.shape[-1]).index_add_(0, places, values)


class Convolved(NamedTuple):
    """Gradients of a convolution's kernel, (m, n / groups, *kernel)."""

    g: Tensor  # (B, T, m)
    a: Tensor  # (B, n, *in)
    grid: torch.Size  # of the T positions
    zeros: list[int]  # around a, as functional.pad takes them
    kernel: torch.Size
    stride: Sequence[int]
    dilation: Sequence[int]
    groups: int

    @property
    def few(self) -> bool:
        """Whether there are few enough positions to put their pairs into one product."""
        return self.groups == 1 and self.g.shape[1] <= FEW_POSITIONS

    @property
    def patched(self) -> bool:
        """Whether gradients are products of g and copies of what the kernel sees.

        Products of few positions each are faster than convolutions. With many positions they are
        not, and the copies are large.
        """
        return self.groups == 1 and self.g.shape[1] <= PATCHED_POSITIONS

    def of(self, examples: slice) -> Tensor:
        """Return the gradients of some examples, (B, *kernel), as the groups of a convolution."""
        g, a = self.g[examples], self._padded(self.a[examples])
        size, rank = len(g), len(self.grid)
        gradients = torch.ops.aten.convolution_backward(
            g.mT.reshape(1, -1, *self.grid),
            a.reshape(1, -1, *a.shape[2:]),
            g.new_empty(1).expand(size * self.kernel[0], *self.kernel[1:]),
            None,
            self.stride,
            [0] * rank,
            self.dilation,
            False,
            [0] * rank,
            size * self.groups,
            [False, True, False],
        )[1]
        return gradients.reshape(size, *self.kernel)

    def patches(self, examples: slice) -> Tensor:
        """Return what the kernel sees at each position, (B, T, n × kernel), without groups."""
        padded = self._padded(self.a[examples])
        windows = self._windows(padded).movedim(1, len(self.grid) + 1)  # (B, *grid, n, *kernel)
        return windows.reshape(len(padded), self.g.shape[1], -1)

    def _padded(self, a: Tensor) -> Tensor:
        return functional.pad(a, self.zeros) if any(self.zeros) else a

    def _windows(self, padded: Tensor) -> Tensor:
        """Return what the kernel sees at each position as a view, (B, n, *grid, *kernel)."""
        for axis, (size, step, gap) in enumerate(
            zip(self.kernel[2:], self.stride, self.dilation, strict=True), 2
        ):
            padded = padded.unfold(axis, (size - 1) * gap + 1, step)[..., ::gap]
        return padded

    def add_to(self, gradient: Tensor, example: int) -> None:
        """Add one example's gradient to a tensor."""
        gradient += self.of(slice(example, example + 1))[0]

    def add_squares(self, total: Tensor, first: int = 0) -> Tensor:
        """Add Σ_b gradient² to total, (m, n / groups, *kernel); return each example's sum, (B,)."""
        if self.few:
            pairs = pairs_of(self.g, 2)
            return self.add_product(total, pairs, pairs.sum(1))
        if self.groups == 1 and len(self.grid) < 3 and squares_kernel.fits(total, self.g, self.a):
            traces, _ = _to_measure(self.g, total, first)
            with _channels_last(total) as sums:
                squares_kernel.add_squares_of_convolution(
                    *(sums, self.g, self.a, traces),
                    grid=self.grid,
                    zeros=self.zeros,
                    kernel=self.kernel[2:],
                    stride=self.stride,
                    dilation=self.dilation,
                )
            return traces
        if self.patched:
            found = []
            with _channels_last(total) as sums:
                for start in range(0, len(self.g), CHUNK):  # Patches of all would be large.
                    some = slice(start, start + CHUNK)
                    outer = Outer(self.g[some], self._channels_last_patches(some))
                    found.append(outer.add_squares(sums, first))
            return torch.cat(found)
        traces, measured = _to_measure(self.g, total, first)
        numbers = range(len(self.g))[measured]
        # Small ones together; with many positions each is large enough for a call.
        few = self.g.shape[1] <= GROUPED_POSITIONS
        chunk = max(1, BLOCK // (2 * total.numel())) if few else 1
        for start in range(0, len(self.g), chunk):
            for example, gradient in enumerate(self.of(slice(start, start + chunk)), start):
                total.addcmul_(gradient, gradient)
                if example in numbers:
                    traces[example] = square(gradient)
        return traces

    def add_product(self, total: Tensor, pairs: Tensor, sums: Tensor) -> Tensor:
        """Add such squares from pairs of few positions, as Outer.add_product does."""
        if not any(self.zeros):
            with _channels_last(total) as squares:
                outer = Outer(self.g, self._channels_last_patches(slice(None)))
                return outer.add_product(squares, pairs, sums)
        size, count = self.g.shape[:2]
        numbers = {pair: i for i, pair in enumerate(combinations_with_replacement(range(count), 2))}
        pairs, sums = pairs.view(size, len(numbers), -1), sums.view(size, -1)
        traces = sums.new_zeros(size)
        for offset, positions, a in self._at_offsets():
            which = [numbers[pair] for pair in combinations_with_replacement(positions, 2)]
            left, scales, right = pairs, sums, pairs_of(a)
            if len(which) < len(numbers):
                chosen = torch.tensor(which, device=pairs.device)
                left, scales = pairs.index_select(1, chosen), sums.index_select(1, chosen)
            total[:, :, *offset] += left.flatten(0, 1).T @ right
            traces += (scales * right.sum(1).view(size, -1)).sum(1)
        return traces

    def _channels_last_patches(self, examples: slice) -> Tensor:
        """Return what the kernel sees at each position, (B, T, kernel × n), which copies faster."""
        rank = len(self.grid)
        a = self._padded(self.a[examples])
        if self.kernel[2:].numel() > 1:
            a = a.movedim(1, -1).contiguous().movedim(-1, 1)
        return self._windows(a).movedim(1, -1).flatten(rank + 1).flatten(1, rank)

    def _at_offsets(self) -> Iterator[tuple[tuple[Any, ...], list[int], Tensor]]:
        """Yield the kernel's offsets, which positions see inputs there, and these, (B, …, n)."""
        last = self.a.movedim(1, -1).contiguous()
        for terms in product(*(self._along(axis) for axis in range(len(self.grid)))):
            positions = [0]
            for length, (_, seeing, _) in zip(self.grid, terms, strict=True):
                positions = [at * length + i for at in positions for i in range(length)[seeing]]
            seen = (slice(None), *(inputs for _, _, inputs in terms))
            offset = tuple(number for number, _, _ in terms)
            yield offset, positions, last[seen].flatten(1, len(self.grid))

    def _along(self, axis: int) -> Iterator[tuple[int, slice, slice]]:
        """Yield offsets along an axis, the positions that see inputs there, and these inputs."""
        stride, size, positions = self.stride[axis], self.a.shape[2 + axis], self.grid[axis]
        before = self.zeros[-2 * (axis + 1)]
        for offset in range(self.kernel[2 + axis]):
            start = offset * self.dilation[axis] - before  # the input that position 0 sees
            low = max(0, -(start // stride))
            high = min(positions, (size - 1 - start) // stride + 1)
            if low < high:
                inputs = slice(start + low * stride, start + (high - 1) * stride + 1, stride)
                yield offset, slice(low, high), inputs


class Whole(NamedTuple):
    """Explicit gradients, for parameters that are small enough."""

    gradients: Tensor  # (B, …)

    def add_to(self, gradient: Tensor, example: int) -> None:
        """Add one example's gradient to a tensor."""
        gradient += self.gradients[example]

    def add_squares(self, total: Tensor, first: int = 0) -> Tensor:
        """Add Σ_b gradients² to total; return each example's sum, (B,)."""
        squares = self.gradients.square()
        total += squares.sum(0)
        return squares.reshape(len(squares), -1).sum(1)


class Pulled(Whole):
    """Explicit gradients of one use of a parameter; those of several uses can be added early."""


Gradients = Outer | Summed | Convolved | Rows | Whole

Rule = Callable[[Any, Tensor, Tensor], dict[str, Gradients]]
"""From a layer, its inputs and the gradients at its outputs to its parameters' gradients."""


def _to_measure(batch: Tensor, total: Tensor, first: int) -> tuple[Tensor, slice]:
    """Return initial traces, 0 for examples to measure and negative for others, and their slice."""
    measured = slice(None) if total.numel() <= ALL_MEASURED else slice(first, None, MEASURED)
    traces = batch.new_full((len(batch),), -1)
    traces[measured] = 0
    return traces, measured


@contextmanager
def _channels_last(total: Tensor) -> Iterator[Tensor]:
    """Yield a sum (m, kernel × n) to add to, for a total (m, n, *kernel)."""
    last = total.movedim(1, -1)
    if last.is_contiguous():
        yield last.flatten(1)
    else:
        sums = torch.zeros(last.shape, dtype=total.dtype, device=total.device)
        yield sums.flatten(1)
        total += sums.movedim(-1, 1)


def square(gradient: Tensor) -> Tensor:
    """Return Σ gradient², 0-dimensional, in one pass over it."""
    values = gradient.flatten()
    return torch.dot(values, values)


def add_squares_of_sums(
    total: Tensor, uses: Sequence[Gradients], examples: int, first: int = 0
) -> Tensor:
    """Add Σ_b (Σ_uses gradient)² of a parameter used several times; return each example's, (B,)."""
    traces = []
    match uses:
        case [use]:
            return use.add_squares(total, first)
        case [Outer(transposed=False) as head, Rows() as table] if not head.few:
            # An embedding tied to the head: it adds to few of the rows.
            head = head._replace(g=head.g.contiguous())
            for example in range(examples):
                rows, values = table.of(example)
                values += head.take_rows(example, rows)
                total.index_add_(0, rows, values.square_())
                traces.append(values.sum())
            others = head.add_squares(total, first)
            return torch.where(others < 0, others, others + torch.stack(traces))
        case _:
            scratch = torch.empty_like(total)
            for example in range(examples):
                scratch.zero_()
                for use in uses:
                    use.add_to(scratch, example)
                total.addcmul_(scratch, scratch)
                traces.append(square(scratch))
            return torch.stack(traces)


def add_pairs(total: Tensor, g: Tensor) -> None:
    """Add g_s g_t for each pair of positions of g (B, T, m), twice where s ≠ t, to such a sum."""
    if g.shape[1] == 1:
        g = g.squeeze(1)
        total.addcmul_(g, g)
    else:
        total += pairs_of(g, 2)


def pairs_of(x: Tensor, weight: int = 1) -> Tensor:
    """Return x_s x_t, weighted where s ≠ t, for s ≤ t of x (B, T, n): (B · pairs, n), in order."""
    if x.shape[1] == 1:
        return x.squeeze(1).square()
    s, t = torch.triu_indices(x.shape[1], x.shape[1], device=x.device)
    pairs = x.index_select(1, s).mul_(x.index_select(1, t))
    if weight != 1:
        pairs *= torch.where(s == t, 1, weight)[:, None]
    return pairs.flatten(0, 1)


def _over_pairs(values: Tensor, examples: int) -> Tensor:
    """Return the sums over each example's pairs, (B,), of values (B · pairs,)."""
    return values if values.shape[0] == examples else values.view(examples, -1).sum(1)
