"""Learning rates over the exact number of steps, by layer, and of an encoder that thaws later."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamtrain.config import ModelConfig, TrainConfig
from streamtrain.model.pretrained import load_model
from streamtrain.training.schedule import LRSchedule, Schedule, make_schedule

SCRATCH = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": [8] * 7,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
KINDS = ("linear", "cosine", "tri-stage", "constant")


@given(st.sampled_from(KINDS), st.integers(0, 20), st.integers(0, 40), st.integers(1, 100), st.floats(0.01, 1))
def test_every_rate_lies_between_0_and_the_peak_and_falls_after_it(
    kind: str, warmup: int, hold: int, total: int, end: float
) -> None:
    rates = [Schedule(kind, warmup, hold, total, end).at(step) for step in range(total)]
    assert all(0 < rate <= 1 for rate in rates)
    assert all(a < b for a, b in itertools.pairwise(rates[:warmup]))
    assert all(a >= b for a, b in itertools.pairwise(rates[warmup:]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_rate_is_at_its_peak_after_the_warm_up_and_at_its_end_after_the_last_step(kind: str) -> None:
    schedule = Schedule(kind, warmup_steps=10, hold_steps=20, total_steps=100, end=0.1)
    assert schedule.at(9) == schedule.at(10) == 1
    assert schedule.at(100) == pytest.approx(1 if kind == "constant" else 0.1)
    middle = {"linear": 0.55, "cosine": 0.55, "constant": 1.0}
    if kind == "tri-stage":
        assert {schedule.at(step) for step in range(10, 31)} == {1.0}
        assert schedule.at(65) == pytest.approx(0.1**0.5)  # half way down, by factors
    else:
        assert schedule.at(55) == pytest.approx(middle[kind])


def recipe(**settings: object) -> LRSchedule:
    model = load_model(ModelConfig(scratch=SCRATCH, freeze_cnn=True, mask_time_prob=0.1))
    train = TrainConfig(warmup_steps=4, schedule="constant", **settings)  # type: ignore[arg-type]
    made = make_schedule(model, train, 1e-3, 100)
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    grouped = [weight for group in made.groups for weight in group.parameters]
    assert len(grouped) == len(set(map(id, grouped))) == len(learning)  # each once
    return made


def test_all_learn_in_one_group_unless_told_otherwise() -> None:
    (group,) = recipe().groups
    assert group.peak == 1e-3


def test_the_head_has_a_rate_of_its_own() -> None:
    assert sorted(group.peak for group in recipe(head_lr=5e-3).groups) == [1e-3, 5e-3]
    assert sum(group.peak == 5e-3 for group in recipe(head_lr=5e-3).groups for _ in group.parameters) == 2


def test_each_layer_learns_at_a_share_of_the_next_ones_rate() -> None:
    """Three layers, and what lies below them."""
    peaks = sorted({group.peak for group in recipe(layer_decay=0.5, head_lr=1e-2).groups}, reverse=True)
    assert peaks == pytest.approx([1e-2, 1e-3, 5e-4, 2.5e-4, 1.25e-4])


def test_a_frozen_encoder_thaws_and_warms_up() -> None:
    made = recipe(freeze_encoder_steps=10)
    assert [group.first_step for group in made.groups] == [10, 0]
    assert [made.rates(step)[0] for step in (0, 9, 10, 11, 13, 14)] == pytest.approx([0, 0, 2.5e-4, 5e-4, 1e-3, 1e-3])
    assert [made.rates(step)[1] for step in (0, 3, 9, 10)] == pytest.approx([2.5e-4, 1e-3, 1e-3, 1e-3])
