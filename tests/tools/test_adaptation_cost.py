"""The adaptation cost: known costs, invariances, and orders worked out by hand."""

import adaptation_cost as tool
import pytest
import torch
from adaptation_cost import adaptation_cost, greedy_order

from msad_kd.utils.errors import InputError

IMAGES, ROWS = 50, 40


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def counts(images, rows):
    return torch.full((images,), rows)


def noise(channels):
    return torch.randn(IMAGES * ROWS, channels)


def cost(source, target, **options):
    return adaptation_cost({"p3": (source, target, counts(IMAGES, ROWS))}, **options)


def rotation(channels):
    return torch.linalg.qr(torch.randn(channels, channels))[0]


def spectrum(channels):
    """Features whose directions have standard deviations from 1 down to 1/100, and an offset."""
    scales = torch.logspace(0, -2, channels)
    return noise(channels) * scales @ rotation(channels) + 3 * torch.randn(channels)


def test_a_chain_of_models_has_its_known_costs_and_order():
    """Each model knows the first n of 16 independent facts, in a basis of its own."""
    known, facts = {"student": 4, "weak": 8, "middle": 12, "strong": 16}, noise(16)
    models = {name: facts[:, :n] @ rotation(n) + 5 for name, n in known.items()}
    costs = {a: {b: cost(x, y).value for b, y in models.items()} for a, x in models.items()}
    for a in known:
        for b in known:
            # What b knows and a does not, as a share of what b knows.
            assert costs[a][b] == pytest.approx(max(0, 1 - known[a] / known[b]), abs=0.02), (a, b)
    assert greedy_order(costs, "student", "strong") == (["weak", "middle", "strong"], {})


def test_a_model_costs_nothing_to_itself():
    x = spectrum(24)
    twins, constant = torch.cat((x, 2 * x[:, :3] - 1), 1), torch.full((len(x), 1), 0.1)
    for features in (x, twins, torch.cat((x, constant), 1), x * 1e-6, x + 1000):
        assert cost(features, features).value < 1e-6


def test_an_affine_change_of_the_source_changes_nothing():
    source = spectrum(24)
    target = source @ torch.randn(24, 20) + 2 * noise(20)
    expected = cost(source, target).value
    assert 0.05 < expected < 0.95
    for _ in range(3):
        scales = torch.logspace(0, -2.95, 24)  # condition number 900
        changed = source @ (rotation(24) * scales @ rotation(24)) + 10 * torch.randn(24)
        assert cost(changed, target).value == pytest.approx(expected, abs=1e-4)


def test_unrelated_and_constant_sources_cost_one():
    assert cost(noise(8), noise(8)).value == pytest.approx(1, abs=0.02)
    assert cost(torch.ones(IMAGES * ROWS, 8), noise(8)).value == pytest.approx(1, abs=0.02)


def test_levels_are_averaged():
    signal = noise(6)
    noisy = signal + 0.5 * noise(6)  # variance 1 of the signal, 0.25 of noise: 0.25 / 1.25 remain
    rows = counts(IMAGES, ROWS)
    result = adaptation_cost({"p3": (signal, noisy, rows), "p4": (signal, noise(6), rows)})
    assert result.levels == pytest.approx({"p3": 0.2, "p4": 1.0}, abs=0.02)
    assert result.value == pytest.approx(sum(result.levels.values()) / 2)
    assert result.low < result.value < result.high < result.low + 0.05


def test_the_interval_is_over_images():
    """Images that differ make it wide; as many rows of similar images do not."""
    signal = noise(6)
    one_in_two = torch.tensor([0.1, 1.0]).repeat(IMAGES // 2).repeat_interleave(ROWS)[:, None]
    mixed = cost(signal, signal + one_in_two * noise(6))
    alike = cost(signal, signal + 0.7 * noise(6))
    assert mixed.low < mixed.value < mixed.high
    assert mixed.high - mixed.low > 4 * (alike.high - alike.low)
    again = cost(signal, signal + one_in_two * noise(6), seed=1)
    assert again.low != mixed.low


def test_blocks_of_rows_give_the_same_cost(monkeypatch):
    source, target = spectrum(12), noise(5)
    whole = cost(source, target)
    monkeypatch.setattr("adaptation_cost.ROWS_AT_ONCE", 33)
    in_blocks = cost(source, target)
    assert (in_blocks.value, in_blocks.low) == pytest.approx((whole.value, whole.low), abs=1e-12)


def test_a_line_through_three_points():
    target = torch.tensor([[1.0, 0.0], [3.0, 0.0], [5.0, 3.0]])
    fitted = tool.fit_affine(torch.tensor([[0.0], [1.0], [2.0]]), target)
    # y = 2 x + 1, and the least squares line through (0, 0), (1, 0), (2, 3).
    expected = torch.tensor([[7.0, 4.0]], dtype=torch.float64)
    assert torch.allclose(fitted(torch.tensor([[3.0]])), expected, atol=1e-6)


def test_errors_of_each_image():
    fitted = tool.AffineMap(*(torch.tensor(x).double() for x in ([0.0], [[1.0]], [2.0])))
    source = torch.tensor([[0.0], [1.0], [5.0]])  # mapped to 2, 3, 7
    target = torch.tensor([[2.0], [5.0], [6.0]])
    errors = tool.image_errors(fitted, source, target, torch.tensor([2, 1]))
    assert errors.tolist() == [[4.0, 9.0], [1.0, 16.0]]


@pytest.mark.parametrize(
    ("source", "target", "counts", "message"),
    [
        (torch.zeros(8, 1), torch.zeros(8, 1), counts(4, 2), "five images.*there are 4"),
        (torch.zeros(20, 9), torch.zeros(20, 1), counts(5, 4), "level p3: .*map from 9 channels"),
        (torch.randn(50, 2), torch.ones(50, 3), counts(5, 10), "level p3: the target is the same"),
    ],
)
def test_unusable_features(source, target, counts, message):
    with pytest.raises(InputError, match=message):
        adaptation_cost({"p3": (source, target, counts)})


def test_how_many_rows_are_enough():
    enough = [tool.enough_rows(counts(10, 4), channels) for channels in (16, 17)]
    assert enough == [True, False]  # eight images, 32 rows


# COSTS[a][b] is C(a->b). C is the strongest.
COSTS = {
    "student": {"A": 0.3, "B": 0.5, "C": 0.8, "D": 0.9, "E": 0.4},
    "A": {"B": 0.2, "C": 0.6, "D": 0.1, "E": 0.3},
    "B": {"A": 0.0, "C": 0.1, "D": 0.1, "E": 0.1},
    "C": {"A": 0.1, "B": 0.1, "D": 0.1, "E": 0.1},
    "D": {"A": 0.1, "B": 0.1, "C": 0.01, "E": 0.1},
    "E": {"A": 0.1, "B": 0.2, "C": 0.3, "D": 0.1},
}


def test_an_order_worked_out_by_hand():
    """Before C: D is cheapest (0.01) but farther from the student; of A, B and E, it is B (0.1).

    Before B: A and E cost the same (0.2), so the name decides. E is then not closer than A.
    """
    order, excluded = greedy_order(COSTS, "student", "C")
    assert order == ["A", "B", "C"]
    assert excluded.keys() == {"D", "E"}
    assert "not closer to the student than A: C(student->D) = 0.9000" in excluded["D"]
    assert "C(student->A) = 0.3000" in excluded["E"]
    cheaper = {**COSTS, "E": {**COSTS["E"], "B": 0.15}}
    assert greedy_order(cheaper, "student", "C")[0] == ["A", "E", "B", "C"]
    # The strongest may be the closest.
    order, excluded = greedy_order(COSTS, "student", "A")
    assert order == ["A"] and set(excluded) == {"B", "C", "D", "E"}
