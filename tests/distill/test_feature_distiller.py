"""Which levels are compared by which loss, with what weight, when."""

import logging

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.utils.events import EventStorage
from torch.testing import assert_close

from msad_kd.config.defaults import add_msad_kd_config
from msad_kd.distill.feature_distiller import FeatureDistiller, build_adapter
from msad_kd.losses.feature import DISTILL_LOSS_REGISTRY, diagnosed
from msad_kd.losses.terms import read_losses
from msad_kd.utils.errors import InputError


def levels(first, last, channels=4, factor=1):
    return {
        f"p{s}": ShapeSpec(channels=channels, stride=factor * 2**s) for s in range(first, last + 1)
    }


STUDENT, TEACHER = levels(2, 4, factor=2), levels(3, 5)
NARROW = levels(2, 4, channels=2, factor=2)


def distiller(*entries, student=STUDENT, **options):
    module = FeatureDistiller(terms=read_losses(list(entries)), student=student, **options)
    module.needed = module.connect(TEACHER)
    return module


def pyramids(*differences):
    """Two pyramids that differ by these numbers, level by level."""
    shapes = [(2, 4, 16 >> i, 24 >> i) for i in range(3)]
    student = {f"p{i + 2}": torch.full(shape, 5.0) for i, shape in enumerate(shapes)}
    teacher = {
        f"p{i + 3}": torch.full(shape, 5.0 + differences[i]) for i, shape in enumerate(shapes)
    }
    return student, teacher


@pytest.fixture
def register():
    """register(function): a loss that is in the registry during the test."""
    names = []

    def add(function):
        names.append(function.__name__)
        DISTILL_LOSS_REGISTRY.register(function)

    yield add
    for name in names:
        DISTILL_LOSS_REGISTRY._obj_map.pop(name)


L1 = {"name": "l1", "weight": 0.6}


@pytest.mark.parametrize(
    ("entries", "expected", "needed"),
    [
        ([L1], {"l1": 0.6 * (1 + 2 + 4)}, {"p3", "p4", "p5"}),
        (
            [{**L1, "levels": ["p2"]}, {"name": "mse", "weight": 0.5, "levels": ["p4"]}],
            {"l1": 0.6 * 1, "mse": 0.5 * 16},
            {"p3", "p5"},
        ),
        (
            [{**L1, "levels": ["p2"]}, {"name": "l1", "weight": 10.0, "levels": ["p4"]}],
            {"l1": 0.6 * 1 + 10 * 4},
            {"p3", "p5"},
        ),
    ],
    ids=["all levels", "levels of a loss", "one loss twice"],
)
def test_sum_over_levels_of_the_mean(entries, expected, needed):
    module = distiller(*entries)
    losses = module(*pyramids(1.0, 2.0, 4.0), 0)
    assert_close(losses, {f"loss_kd_{k}": torch.tensor(v) for k, v in expected.items()})
    assert module.needed == needed
    assert not module.state_dict()  # none of these losses trains anything


def test_defaults_are_the_papers():
    cfg = get_cfg()
    add_msad_kd_config(cfg)
    (term,) = read_losses(cfg.KD.LOSSES)
    assert (term.name, term.weight, term.warmup_iters, term.levels) == ("l1", 0.6, 500, ())


def test_a_registered_loss_can_be_named(register):
    def largest(student, teacher, power: int = 1, **more):
        return (student - teacher).abs().max() ** power + sum(more.values())

    register(largest)
    mine = distiller({"name": "largest", "weight": 1.0, "power": 2, "anything": 5})
    assert mine(*pyramids(1.0, 2.0, 3.0), 0)["loss_kd_largest"].item() == 14.0 + 15.0


def test_a_name_that_two_losses_have_is_refused(register):
    def roi_box(student, teacher):
        return (student - teacher).sum()

    register(roi_box)
    with pytest.raises(InputError, match="'roi_box' is in two registries"):
        read_losses([{"name": "roi_box", "weight": 1.0}])


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"name": "l1"}, "'l1' needs 'weight', a number"),
        ({"weight": 1.0}, "should be a dict with a name and a weight"),
        ("l1", "should be a dict with a name and a weight"),
        ({"name": "l1", "weight": 1, "warmup_iters": -1}, "warmup_iters of 'l1' should be a whole"),
        (
            {"name": "roi_class", "weight": 1, "temperature": "high"},
            "temperature of 'roi_class' should be a number above 0.*, not 'high'",
        ),
        ({"name": "mgd", "weight": 1, "parts": 3}, "'mgd' has no field 'parts'; known: .*mask_rat"),
        ({"name": "roi_box", "weight": 1, "levels": ["p2"]}, "'roi_box' has no field 'levels'"),
        (
            {"name": "roi_class", "weight": 1, "adapter": True},
            "'roi_class' has no field 'adapter'; known: name, weight, warmup_iters, proposals",
        ),
    ],
)
def test_entries_that_cannot_be_read(entry, words):
    with pytest.raises(InputError, match=f"KD.LOSSES.*{words}"):
        read_losses([entry])


def test_a_level_without_partner_is_an_error_if_a_loss_names_it():
    with pytest.raises(InputError, match="level 'p6' of 'l1' has no partner.*p2, p3, p4"):
        distiller({**L1, "levels": ["p2", "p6"]})


def test_levels_without_partner_are_named_in_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        module = distiller(L1, student=levels(2, 6, factor=2))
    assert "p5, p6" in caplog.text
    assert module.pairs == {"p2": "p3", "p3": "p4", "p4": "p5"}


def test_unequal_shapes_name_both_levels():
    student, teacher = pyramids(1.0, 1.0, 1.0)
    teacher["p4"] = teacher["p4"][:, :3]
    with pytest.raises(InputError, match=r"level p3.*\(2, 4, 8, 12\).*p4.*\(2, 3, 8, 12\)"):
        distiller(L1)(student, teacher, 0)


def test_an_argument_that_the_loss_rejects(register):
    def picky(student, teacher, power=2):
        raise ValueError(f"power is {power}; it must be odd")

    register(picky)
    with pytest.raises(InputError, match="KD.LOSSES: 'picky' on level p2: power is 4; it must be"):
        distiller({"name": "picky", "weight": 1.0, "power": 4})(*pyramids(1.0, 1.0, 1.0), 0)


def test_an_adapter_where_the_channels_differ():
    module = distiller(L1, student={**STUDENT, "p3": ShapeSpec(channels=2, stride=16)})
    assert list(module.state_dict()) == ["adapters.p3.weight", "adapters.p3.bias"]
    with torch.no_grad():  # (a, b) becomes (a + b, 2a, 2b, 1)
        module.adapters["p3"].weight.copy_(
            torch.tensor([[1.0, 1], [2, 0], [0, 2], [0, 0]])[..., None, None]
        )
        module.adapters["p3"].bias.copy_(torch.tensor([0.0, 0, 0, 1]))
    student, teacher = pyramids(0.0, 0.0, 0.0)
    student["p3"] = torch.tensor([3.0, 4.0])[None, :, None, None].repeat(2, 1, 8, 12)
    losses = module(student, teacher, 0)  # |7 - 5|, |6 - 5|, |8 - 5|, |1 - 5|
    assert_close(losses["loss_kd_l1"], torch.tensor(0.6 * (2 + 1 + 3 + 4) / 4))
    losses["loss_kd_l1"].backward()
    assert module.adapters["p3"].weight.grad.abs().sum() > 0


def test_an_adapter_for_one_loss_which_changes_nothing_at_first():
    module = distiller({**L1, "adapter": True, "levels": ["p2"]}, {"name": "mse", "weight": 1.0})
    assert list(module.state_dict()) == ["adapters.p2.weight", "adapters.p2.bias"]
    student, teacher = pyramids(3.0, 0.0, 0.0)
    assert_close(module(student, teacher, 0)["loss_kd_l1"], torch.tensor(0.6 * 3.0))
    x = torch.randn(2, 4, 5, 6)
    assert_close(build_adapter(4, 4)(x), x)
    torch.nn.init.zeros_(module.adapters["p2"].weight)
    losses = module(student, teacher, 0)
    assert_close(losses["loss_kd_l1"], torch.tensor(0.6 * 8.0))
    assert_close(losses["loss_kd_mse"], torch.tensor(9.0))


def test_unequal_channels_without_adapter():
    words = "'l1' compares level p2 .* 2 channels, and level p3 .* with 4; .*'adapter' to auto"
    with pytest.raises(InputError, match=words):
        distiller({**L1, "adapter": False}, student=NARROW)


def test_a_loss_with_parts_trains_them_level_by_level_at_the_teachers_width():
    entry = {"name": "mgd", "weight": 1e-3, "levels": ["p2", "p4"]}
    module = distiller(entry)
    parts = {key.rsplit(".", 2)[0] for key in module.state_dict()}
    assert parts == {"parts.mgd.p2", "parts.mgd.p4"}
    module(*pyramids(1.0, 2.0, 3.0), 0)["loss_kd_mgd"].backward()
    assert all(p.grad is not None for p in module.parameters())
    narrow = distiller(entry, student=NARROW)
    assert narrow.parts["mgd"]["p2"][0].in_channels == 4
    assert "adapters.p2.weight" in narrow.state_dict()


def test_diagnostics_are_logged_by_level_in_every_period(register):
    @diagnosed(largest=lambda student, teacher, scale: scale * (student - teacher).abs().max())
    def scaled(student, teacher, scale=1.0):
        return scale * (student - teacher).abs().mean()

    register(scaled)
    entry = {"name": "scaled", "weight": 9.0, "scale": 2.0}
    module = distiller(entry, diagnostics_period=20)
    logged = []
    for iteration in (18, 19):
        with EventStorage(iteration) as storage:
            module(*pyramids(1.0, 2.0, 3.0), iteration)
        logged.append({name: value for name, (value, _) in storage.latest().items()})
    names = ("scaled", "scaled_largest")
    assert logged == [{}, {f"kd/{x}_p{s}": 2.0 * (s - 1) for s in (2, 3, 4) for x in names}]


def test_values_that_are_not_finite_are_named():
    ssim = {"name": "ssim", "weight": 1.0, "levels": ["p2"]}
    module = distiller({"name": "l1", "weight": 0.0}, ssim, {**ssim, "exponents": [1, 0, 0]})
    student, teacher = pyramids(1.0, 2.0, 3.0)
    module(student, teacher, 0)
    assert module.not_finite() == []
    student["p3"][0, 0, 0, 0] = float("nan")
    module(student, teacher, 0)
    assert module.not_finite() == ["l1_p3"]
    student["p2"][:] = float("nan")
    module(student, teacher, 0)
    assert module.not_finite() == ["l1_p2", "l1_p3", "ssim_p2"]  # two entries of one name: once
