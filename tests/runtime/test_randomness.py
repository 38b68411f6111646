import torch

from consolidate.runtime.randomness import uniforms

MASK = 2**64 - 1


def splitmix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def by_python_integers(seed: int, stream: int, sample: int, example: int, position: int) -> float:
    key = splitmix(seed & MASK)
    for word in (stream, sample, example, position):
        key = splitmix((key + (word + 1) * 0x9E3779B97F4A7C15) & MASK)
    return ((key >> 12) + 0.5) / 2**52


def test_the_numbers_are_splitmix64s():
    for seed in (0, 1, -1, 2**63, 2**64 + 5, -(2**70)):
        for stream, sample in ((0, 0), (3, 11)):
            found = uniforms(seed, torch.tensor([0, 7, 2**40]), 4, sample, stream=stream)
            expected = [
                [by_python_integers(seed, stream, sample, example, t) for t in range(4)]
                for example in (0, 7, 2**40)
            ]
            assert found.tolist() == expected


def test_the_numbers_never_change():
    # What was sampled once must come again in every later version.
    assert uniforms(0, torch.tensor([0, 1]), 2).tolist() == [
        [0.12964561829974752, 0.049920065672091396],
        [0.5914494981991621, 0.29252335542281827],
    ]


def test_a_number_depends_on_its_own_place_only():
    whole = uniforms(5, torch.arange(100), 20, 2)
    assert torch.equal(uniforms(5, torch.tensor([63]), 20, 2), whole[63:64])
    assert torch.equal(uniforms(5, torch.arange(99, -1, -1), 20, 2), whole.flip(0))
    assert torch.equal(uniforms(5, torch.arange(100), 7, 2), whole[:, :7])
    assert torch.equal(uniforms(5, torch.arange(100, dtype=torch.int32), 20, 2), whole)
    assert torch.equal(uniforms(5 + 2**64, torch.arange(100), 20, 2), whole)


def test_they_are_uniform_and_strictly_inside():
    u = uniforms(1, torch.arange(1000), 1000).flatten()
    assert u.dtype == torch.float64
    assert u.min() > 0
    assert u.max() < 1
    assert len(u.unique()) == len(u)
    counts = torch.histc(u, bins=1000, min=0, max=1)
    chi_squared = ((counts - 1000) ** 2 / 1000).sum().item()
    assert abs(chi_squared - 999) < 4 * (2 * 999) ** 0.5
    # The lowest bits that a double can hold are as even as the highest.
    low = (u * 2**52).long() % 1024
    chi_squared = ((low.bincount(minlength=1024) - 1e6 / 1024) ** 2 / (1e6 / 1024)).sum().item()
    assert abs(chi_squared - 1023) < 4 * (2 * 1023) ** 0.5


def test_neighbours_are_independent():
    examples = torch.arange(300)
    u = uniforms(9, examples, 300)
    others = {
        "next position": (u[:, :-1], u[:, 1:]),
        "next example": (u[:-1], u[1:]),
        "example and position swapped": (u, u.T),
        "next sample": (u, uniforms(9, examples, 300, 1)),
        "next stream": (u, uniforms(9, examples, 300, stream=1)),
        "sample and stream swapped": (
            uniforms(9, examples, 300, 1, stream=2),
            uniforms(9, examples, 300, 2, stream=1),
        ),
        "next seed": (u, uniforms(10, examples, 300)),
        "previous seed": (u, uniforms(8, examples, 300)),
    }
    for name, (a, b) in others.items():
        off_diagonal = a != b
        a, b = a[off_diagonal] - 0.5, b[off_diagonal] - 0.5
        assert len(a) > 0.99 * 300 * 299, name
        assert abs((a * b).mean().item() * 12) < 4.5 / len(a) ** 0.5, name
