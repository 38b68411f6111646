import shutil
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from consolidate.estimation import squares_kernel
from consolidate.estimation.fisher_diagonal import FisherDiagonal, fisher_diagonal
from consolidate.estimation.squares_kernel import add_squares, using_kernel
from consolidate.runtime.compiler import compiled
from formats.errors import UsageError
from support.elsewhere import second_device
from support.modules import assert_close, cut, tiny
from support.squares import check_sums_and_traces

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler"
)


@pytest.fixture(scope="module", autouse=True)
def own_libraries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compile to a folder of this file, and forget what is loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("libraries")))
        squares_kernel._compiled.cache_clear()
        yield


@pytest.fixture
def loaded_anew() -> Iterator[None]:
    """Load the kernel again in the test, and after it."""
    squares_kernel._compiled.cache_clear()
    yield
    squares_kernel._compiled.cache_clear()


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def change(monkeypatch: pytest.MonkeyPatch, old: str, new: str) -> None:
    """Compile the kernel with a change."""

    def changed(source: str):
        assert old in source
        return compiled(source.replace(old, new))

    monkeypatch.setattr(squares_kernel, "compiled", changed)


def fail(text: str) -> None:
    pytest.fail(text)


@pytest.mark.parametrize("layout", ["rows", "positions", "apart"])
@pytest.mark.parametrize(
    ("examples", "positions", "rows", "columns"),
    [
        (1, 1, 1, 1),
        (3, 5, 7, 9),
        (33, 16, 64, 100),
        (70, 31, 6, 640),
        (5, 40, 30, 65),
        (2, 257, 27, 33),
        (2, 513, 13, 64),
        (2, 33, 700, 3),
        (2, 6, 1400, 800),  # several blocks
    ],
)
@pytest.mark.usefixtures("threads")
def test_sums_and_traces(examples, positions, rows, columns, layout):
    check_sums_and_traces(examples, positions, rows, columns, layout)


def convolved(*layers: nn.Module, shape: tuple[int, ...]) -> tuple[nn.Module, list]:
    torch.manual_seed(0)
    model = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3))
    x = torch.randn(9, *shape)
    model(x)
    return model, cut(x, torch.arange(9) % 3, 4)


def measured(model: nn.Module, batches: list, **options) -> FisherDiagonal:
    return fisher_diagonal(model, batches, "softmax", estimator="empirical", **options)


MODELS: dict[str, Callable[[], tuple[nn.Module, list]]] = {
    "plain": lambda: convolved(nn.Conv2d(3, 8, 3), shape=(3, 9, 7)),
    "padded, strided": lambda: convolved(nn.Conv2d(3, 20, 7, 2, 3), shape=(3, 15, 12)),
    "dilated": lambda: convolved(nn.Conv2d(5, 17, 3, 2, 2, 3), shape=(5, 19, 21)),
    "unlike sides": lambda: convolved(
        nn.Conv2d(8, 9, (3, 5), (2, 1), (0, 2), (1, 2)), shape=(8, 30, 31)
    ),
    "zeros on one side": lambda: convolved(
        nn.ZeroPad2d((0, 2, 1, 0)), nn.Conv2d(2, 3, 4), shape=(2, 7, 8)
    ),
    "pointwise": lambda: convolved(nn.Conv2d(40, 3, 1), shape=(40, 5, 6)),
    "one dimension": lambda: convolved(nn.Conv1d(6, 9, 5, 2, 3, 2), shape=(6, 50)),
    "three dimensions": lambda: convolved(nn.Conv3d(2, 3, 2), shape=(2, 4, 5, 6)),
    "groups": lambda: convolved(nn.Conv2d(4, 8, 3, groups=2), shape=(4, 9, 7)),
    "channels last": lambda: (
        (made := convolved(nn.Conv2d(3, 8, 3), shape=(3, 9, 7)))[0].to(
            memory_format=torch.channels_last
        ),
        made[1],
    ),
    "transposed": lambda: convolved(nn.ConvTranspose2d(4, 6, 3, 2, 1), shape=(4, 6, 5)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("threads")
def test_convolutions(name):
    model, batches = MODELS[name]()
    found = measured(model, batches, kernel=True, note=fail)
    expected = measured(model.double(), batches, accumulate_dtype=torch.float64)
    assert found.methods == expected.methods
    for key, value in expected.items():
        torch.testing.assert_close(found[key].double(), value, rtol=1e-4, atol=1e-5 * value.max())


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_transformers(name):
    model, _, _, likelihood = tiny(name)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, (4, 6), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    labels = ids[:, 0] % 3 if name == "bert" else ids
    results = {
        kernel: fisher_diagonal(
            model, [(inputs, labels)], likelihood, estimator="mc", kernel=kernel, note=fail
        )
        for kernel in (False, True)
    }
    assert results[True].methods == results[False].methods
    assert "rule" in results[True].methods.values()
    assert any(not torch.equal(results[True][k], v) for k, v in results[False].items())
    assert_close(results[True], results[False], 1e-4)


def test_it_is_in_use_for_the_block_alone():
    one = torch.ones(1, 1)
    with using_kernel(CPU, fail):
        assert squares_kernel.fits(one)
        assert not squares_kernel.fits(one, one.double())
        assert not squares_kernel.fits(one.to("meta"))
    assert not squares_kernel.fits(one)


def test_another_thread_does_not_use_it():
    found: list[bool] = []
    with using_kernel(CPU, fail):
        other = threading.Thread(target=lambda: found.append(squares_kernel.fits(torch.ones(1))))
        other.start()
        other.join()
    assert found == [False]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_torchs_default_dtype_does_not_matter(dtype):
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with using_kernel(CPU, fail):
            assert squares_kernel.fits(torch.ones(1, dtype=torch.float32))
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    ("total", "g", "a"),
    [
        ((6, 8), (2, 7, 6), (2, 9, 8)),  # positions
        ((6, 8), (2, 7, 5), (2, 7, 8)),  # rows
        ((6, 8), (2, 7, 6), (2, 7, 9)),  # columns
        ((6, 8), (3, 7, 6), (2, 7, 8)),  # examples
        ((6, 8), (2, 0, 6), (2, 0, 8)),  # nothing
    ],
)
def test_shapes_that_do_not_fit_are_refused(total, g, a):
    with using_kernel(CPU, fail), pytest.raises(RuntimeError, match="of sums"):
        add_squares(torch.zeros(total), torch.ones(g), torch.ones(a), torch.zeros(g[0]))


def test_more_positions_than_a_convolution_has_are_refused():
    sums, g, a = torch.zeros(2, 9), torch.ones(1, 16, 2), torch.ones(1, 1, 5, 6)
    shape = {"grid": (4, 4), "kernel": (3, 3), "stride": (1, 1), "dilation": (1, 1)}
    with using_kernel(CPU, fail), pytest.raises(RuntimeError, match=r"4, 4.*do not fit into 5 × 6"):
        squares_kernel.add_squares_of_convolution(sums, g, a, torch.zeros(1), zeros=(), **shape)


@pytest.mark.parametrize("positions", [9, 12, 300])
def test_a_hook_that_changes_a_later_batchs_shape_falls_back(positions):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Flatten(), nn.Linear(256, 3))
    model[0].register_forward_hook(lambda module, args, output: output[:, :8])
    batches = [(torch.randn(4, count, 32), torch.arange(4) % 3) for count in (8, positions)]
    notes: list[str] = []
    found = measured(model, batches, kernel=True, note=notes.append)
    assert "the gradients of 0 cannot be computed (RuntimeError: " in notes[0]
    assert_close(found, measured(model, batches), 1e-4)


def assert_plain(found: FisherDiagonal, model: nn.Module, batches: list) -> None:
    """Hold a pass against one that was not asked for the kernel, bit for bit."""
    expected = measured(model, batches)
    assert found.methods == expected.methods
    for name, value in expected.items():
        assert torch.equal(found[name], value)


@pytest.mark.usefixtures("loaded_anew")
def test_a_missing_compiler_leaves_a_line_and_the_plain_path(monkeypatch):
    model, batches = MODELS["plain"]()
    notes: list[str] = []
    monkeypatch.setenv("CC", "no-such-compiler")
    found = measured(model, batches, kernel=True, note=notes.append)
    (note,) = notes
    why = "no-such-compiler does not exist: set CC to a C compiler"
    assert note == f"the kernel cannot be used ({why}): continuing without it"
    assert_plain(found, model, batches)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("AT(row) += c[r][0] * c[r][0];", "AT(row) += c[r][0];"),  # of many positions
        ("squares[r][0] += c[r][0] * c[r][0];", ""),  # of few
        ("c[r][1] += more[r][1];", ""),  # of more than a run
        ("squares += c[r][0] * c[r][0]", "squares += c[r][0]"),  # traces
        ("run % seen->runs_in_row * seen->next_run + at", "at"),  # convolutions
        ("copy_tile(at, to_next_row, edge", "copy_tile(edge, to_next_row, edge"),  # edges
    ],
)
@pytest.mark.usefixtures("loaded_anew")
def test_a_wrong_kernel_leaves_a_line_and_the_plain_path(monkeypatch, right, wrong):
    change(monkeypatch, right, wrong)
    model, batches = MODELS["plain"]()
    notes: list[str] = []
    found = measured(model, batches, kernel=True, note=notes.append)
    (note,) = notes
    assert "it differs from sums in float64" in note
    assert_plain(found, model, batches)


@pytest.mark.usefixtures("loaded_anew")
def test_the_first_batch_guards_it_too(monkeypatch):
    change(monkeypatch, "AT(row) += c[r][0] * c[r][0];", "AT(row) += c[r][0];")
    monkeypatch.setattr(squares_kernel, "_verify", lambda device: None)
    model, batches = MODELS["plain"]()
    notes: list[str] = []
    found = measured(model, batches, kernel=True, note=notes.append)
    assert any("by rule, the gradients of 0 differ from single examples" in n for n in notes)
    assert found.methods["0.weight"] == "module"
    assert_close(found, measured(model, batches), 1e-4)


@pytest.mark.usefixtures("loaded_anew")
def test_memory_that_runs_out_splits_the_batch(monkeypatch):
    change(monkeypatch, "if (!packed_a)", "if (free(0), examples > 2)")
    monkeypatch.setattr(squares_kernel, "_verify", lambda device: None)
    model, batches = MODELS["plain"]()
    notes: list[str] = []
    found = measured(model, batches, kernel=True, note=notes.append)
    assert "out of memory with 4 examples: continuing with 2" in notes
    assert_close(found, measured(model, batches), 1e-4)


def test_batched_has_no_squares_of_examples():
    model, batches = MODELS["plain"]()
    with pytest.raises(UsageError, match="kernel cannot be combined with the estimator batched"):
        fisher_diagonal(model, batches, "softmax", estimator="batched", kernel=True)


def test_float64_is_not_for_it():
    model, batches = MODELS["plain"]()
    notes: list[str] = []
    measured(model, batches, kernel=True, accumulate_dtype=torch.float64, note=notes.append)
    expected = "the kernel is for float32 on a CPU or CUDA, not for float64 on cpu: "
    assert notes == [expected + "continuing without it"]


def test_another_device(monkeypatch):
    """CUDA has a kernel of its own, others have none."""
    model, batches = MODELS["plain"]()
    notes: list[str] = []
    expected = measured(model, batches)
    with second_device(monkeypatch) as device:
        there = [(x.to(device), y.to(device)) for x, y in batches]
        found = measured(model.to(device), there, kernel=True, note=notes.append)
        assert_close({name: value.cpu() for name, value in found.items()}, expected, 1e-4)
    if device.type in squares_kernel.DEVICES:
        assert notes == []
    else:
        assert f"not for float32 on {device.type}" in notes[0]


def test_a_kernel_that_fails_leaves_a_line(monkeypatch):
    """As Triton's does where it is missing, or has no device."""
    monkeypatch.setattr(squares_kernel, "_add", lambda *_: {}["no device"])
    notes: list[str] = []
    model, batches = MODELS["plain"]()
    found = measured(model, batches, kernel=True, note=notes.append)
    assert notes == ["the kernel cannot be used (KeyError('no device')): continuing without it"]
    assert_plain(found, model, batches)
