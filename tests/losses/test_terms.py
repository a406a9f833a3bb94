"""KD.LOSSES: the warm-up of a weight, and how fields are checked against the loss's signature."""

import pytest

from msad_kd.losses import DISTILL_LOSS_REGISTRY, LossTerm, read_losses
from msad_kd.utils.errors import InputError


def test_the_weight_rises_linearly_during_the_warm_up():
    term = LossTerm("l1", weight=2.0, warmup_iters=4)
    assert [term.warmup_weight(i) for i in range(6)] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]
    assert LossTerm("l1", weight=2.0).warmup_weight(0) == 2.0


def test_numbers_that_yaml_reads_as_text():
    entry = {"name": "ssim", "weight": "5e-7", "exponents": ["5e-1", 1, 0], "levels": ["p2"]}
    (term,) = read_losses([entry])
    assert (term.weight, term.levels, term.arguments) == (5e-7, ("p2",), {"exponents": [0.5, 1, 0]})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "sssim"}, "no loss 'sssim'; known: .*; did you mean ssim"),
        ({"weigth": 2}, "'ssim' has no field 'weigth'; known: .*; did you mean weight"),
        ({"weight": True}, "weight of 'ssim' should be a number, not True"),
        ({"rescale": 3}, "rescale of 'ssim' should be a text, not 3"),
        ({"window_size": 7.5}, "window_size of 'ssim' should be a whole number, not 7.5"),
        ({"exponents": [1, 1]}, r"exponents of 'ssim' should be a list of 3 numbers, not \[1, 1\]"),
        ({"levels": [2]}, r"levels of 'ssim' should be a list of texts, not \[2\]"),
        ({"adapter": 1}, "adapter of 'ssim' should be auto, true or false, not 1"),
    ],
)
def test_fields_that_a_loss_refuses(fields, words):
    with pytest.raises(InputError, match=f"KD.LOSSES: .*{words}"):
        read_losses([{"name": "ssim", "weight": 1.0, **fields}])


def test_a_users_loss_without_annotations():
    def scaled(student, teacher, scale=2, mode="a", **others):
        return scale

    DISTILL_LOSS_REGISTRY.register(scaled)
    try:
        entry = {"name": "scaled", "weight": 1, "scale": 0.5, "mode": None, "other": "1e2"}
        assert read_losses([entry])[0].arguments == {"scale": 0.5, "mode": None, "other": 100.0}
        with pytest.raises(InputError, match="scale of 'scaled' should be a number, not 'big'"):
            read_losses([{**entry, "scale": "big"}])
    finally:
        DISTILL_LOSS_REGISTRY._obj_map.pop("scaled")
