"""Diffusion, mlm and clm: what is replaced, predicted, weighted and normalised."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot

from stackwise.config import ConfigError, ObjectiveConfig, StackWiseConfig
from stackwise.objectives import (
    CLMObjective,
    DiffusionObjective,
    MaskPlan,
    MaskSampler,
    MLMObjective,
    build_objective,
)

PAD, EOS, MASK = 0, 1, 2
SPECIAL = (PAD, EOS, MASK)
VOCAB = 24
PLAN = MaskPlan(0.15, 0.9)
OBJECTIVES = [
    DiffusionObjective(MASK),
    DiffusionObjective(MASK, sampler=MaskSampler(count="fixed")),
    DiffusionObjective(MASK, shift=True),
    MLMObjective(MASK, VOCAB, SPECIAL),
    MLMObjective(MASK, VOCAB, SPECIAL, sampler=MaskSampler(count="fixed"), shift=True),
]
IDS = ["diffusion", "diffusion-fixed", "diffusion-shift", "mlm", "mlm-fixed-shift"]


class FakeTokenizer:
    vocab_size, mask_id, pad_id, eos_id, special_ids = VOCAB, MASK, PAD, EOS, SPECIAL


def copy_loss(corrupted) -> float:
    """Loss per predicted token of a model that puts all its mass on the token it reads."""
    logits = 30.0 * one_hot(corrupted.input_ids.flatten()[corrupted.rows], VOCAB).float()
    return cross_entropy(logits, corrupted.targets).item()


def test_a_model_that_copies_its_input_gains_nothing(text_batch):
    batch = text_batch(32)
    corrupted = DiffusionObjective(MASK).corrupt(batch, PLAN, seed=0, draw=0)
    assert copy_loss(corrupted) == pytest.approx(30.0, abs=1e-3)  # worse than log(vocab) = 3.2
    leaky = type(corrupted)(**{**vars(corrupted), "input_ids": batch.input_ids})
    assert copy_loss(leaky) < 1e-6  # the same rows with the answer left in


def test_every_masked_input_is_mask_and_nothing_else_changes(text_batch):
    batch = text_batch(16)
    corrupted = DiffusionObjective(MASK).corrupt(batch, PLAN, seed=0, draw=0)
    changed = (corrupted.input_ids != batch.input_ids).flatten()
    assert torch.equal(changed.nonzero()[:, 0], corrupted.rows)
    assert (corrupted.input_ids.flatten()[corrupted.rows] == MASK).all()
    assert torch.equal(corrupted.targets, batch.input_ids.flatten()[corrupted.rows])
    assert 0 < corrupted.rows.numel() < batch.maskable.sum()


@pytest.mark.parametrize("objective", OBJECTIVES, ids=IDS)
def test_padding_and_special_tokens_are_never_touched(objective, text_batch):
    batch = text_batch(64)
    for draw in range(5):
        corrupted = objective.corrupt(batch, MaskPlan(0.9, 1.0), seed=0, draw=draw)
        fixed = ~batch.maskable
        assert fixed.sum() == 64 * 8  # two EOS and six of padding in every row
        assert torch.equal(corrupted.input_ids[fixed], batch.input_ids[fixed])
        assert not torch.isin(corrupted.targets, torch.tensor(SPECIAL)).any()


@pytest.mark.parametrize("objective", OBJECTIVES, ids=IDS)
def test_masks_follow_the_row_not_its_place_and_differ_between_draws(objective, text_batch):
    batch = text_batch(8)
    order = torch.tensor([6, 1, 3])
    part = type(batch)(
        input_ids=batch.input_ids[order],
        maskable=batch.maskable[order],
        position_ids=batch.position_ids[order],
        cu_seqlens=batch.cu_seqlens[: 3 * 3 + 1],
        max_seqlen=batch.max_seqlen,
        row_ids=batch.row_ids[order],
    )
    whole = objective.corrupt(batch, PLAN, seed=0, draw=0, stratify=False)
    again = objective.corrupt(part, PLAN, seed=0, draw=0, stratify=False)
    assert torch.equal(again.input_ids, whole.input_ids[order])
    assert torch.equal(again.t, whole.t[order])
    other = objective.corrupt(batch, PLAN, seed=0, draw=1, stratify=False)
    assert ((other.input_ids != whole.input_ids).sum(1) > 0).all()
    masked = whole.input_ids != batch.input_ids
    assert len({tuple(row.tolist()) for row in masked}) == 8


@pytest.mark.parametrize("objective", OBJECTIVES, ids=IDS)
def test_rows_ascend_and_are_unique(objective, text_batch):
    corrupted = objective.corrupt(text_batch(16), PLAN, seed=0, draw=0)
    assert (corrupted.rows.diff() > 0).all()
    assert corrupted.rows.dtype == torch.int64


def test_diffusion_weights_and_normaliser(text_batch):
    batch = text_batch(16)
    plain = DiffusionObjective(MASK).corrupt(batch, PLAN, seed=0, draw=0)
    weighted = DiffusionObjective(MASK, weighting="inverse_t").corrupt(batch, PLAN, seed=0, draw=0)
    assert plain.weights is None
    assert plain.normalizer == weighted.normalizer == int(batch.maskable.sum())
    assert torch.equal(plain.rows, weighted.rows)
    expected = 1 / weighted.t[weighted.rows // batch.input_ids.shape[1]]
    assert torch.allclose(weighted.weights, expected, rtol=1e-6)


def test_inverse_t_with_a_fixed_count_uses_the_realised_rate(text_batch):
    batch = text_batch(16)
    objective = DiffusionObjective(MASK, sampler=MaskSampler(count="fixed"), weighting="inverse_t")
    corrupted = objective.corrupt(batch, MaskPlan(0.0, 1.0), seed=0, draw=0)
    row = corrupted.rows // batch.input_ids.shape[1]
    masked = torch.bincount(row, minlength=16)
    maskable = batch.maskable.sum(1)
    assert torch.equal(masked, torch.round(corrupted.t.double() * maskable).long())
    assert torch.allclose(corrupted.weights, (maskable / masked)[row].float())
    # Weighted counts: every row with a mask sums to its number of maskable tokens.
    sums = torch.zeros(16).index_add(0, row, corrupted.weights)
    assert torch.allclose(sums[masked > 0], maskable[masked > 0].float())


def test_inverse_t_weights_sum_to_the_tokens_on_average(text_batch):
    batch = text_batch(64)
    objective = DiffusionObjective(MASK, weighting="inverse_t")
    totals = torch.stack(
        [
            objective.corrupt(batch, MaskPlan(0.05, 1.0), seed=0, draw=d).weights.sum()
            for d in range(200)
        ]
    )
    error = totals.mean() - int(batch.maskable.sum())
    assert error.abs() < 4 * totals.std() / 200**0.5


def test_rate_never_falls_below_one_thousandth(text_batch):
    corrupted = DiffusionObjective(MASK, weighting="inverse_t").corrupt(
        text_batch(256), MaskPlan(0.0, 0.0), seed=0, draw=0
    )
    assert (corrupted.t == 1e-3).all()


def test_a_batch_without_a_mask_gives_no_rows_and_zero_loss(make_batch):
    batch = make_batch([[[5, 6]], [[7]]], 4)
    corrupted = DiffusionObjective(MASK).corrupt(batch, MaskPlan(0.0, 0.0), seed=0, draw=0)
    assert corrupted.rows.shape == corrupted.targets.shape == (0,)
    assert corrupted.normalizer == 3
    loss = cross_entropy(torch.zeros(0, VOCAB), corrupted.targets, reduction="sum")
    assert loss.item() / corrupted.normalizer == 0


def test_nothing_maskable_at_all(make_batch):
    batch = make_batch([[[EOS]], [[EOS, EOS]]], 4)
    for objective in [*OBJECTIVES, CLMObjective(EOS)]:
        corrupted = objective.corrupt(batch, MaskPlan(1.0, 1.0), seed=0, draw=0)
        assert corrupted.rows.numel() == 0
        assert corrupted.normalizer == 1
        assert torch.equal(corrupted.input_ids, batch.input_ids)


def test_shift_predicts_from_the_position_before_within_the_document(make_batch):
    batch = make_batch([[[5, 6, 7, EOS], [8, 9]], [[10, 11, 12]]], 8)
    corrupted = DiffusionObjective(MASK, shift=True).corrupt(
        batch, MaskPlan(1.0, 1.0), seed=0, draw=0
    )
    assert corrupted.targets.tolist() == [6, 7, 9, 11, 12]
    assert corrupted.rows.tolist() == [0, 1, 4, 8, 9]
    assert corrupted.normalizer == 5
    first = batch.position_ids == 0
    assert torch.equal(corrupted.input_ids[first], batch.input_ids[first])
    assert (corrupted.input_ids.flatten()[corrupted.rows + 1] == MASK).all()


def test_mlm_shares_are_80_10_10(text_batch):
    batch = text_batch(3000)
    corrupted = MLMObjective(MASK, VOCAB, SPECIAL).corrupt(
        batch, MaskPlan(0.15, 0.15), seed=0, draw=0
    )
    n = corrupted.rows.numel()
    after = corrupted.input_ids.flatten()[corrupted.rows]
    maskable = int(batch.maskable.sum())
    assert corrupted.normalizer == n
    assert n / maskable == pytest.approx(0.15, abs=4 * (0.15 * 0.85 / maskable) ** 0.5)
    ordinary = VOCAB - len(SPECIAL)
    sigma = (0.8 * 0.2 / n) ** 0.5
    assert (after == MASK).double().mean().item() == pytest.approx(0.8, abs=4 * sigma)
    same = (after == corrupted.targets).double().mean().item()
    assert same == pytest.approx(0.1 + 0.1 / ordinary, abs=4 * sigma)
    replaced = after[(after != MASK) & (after != corrupted.targets)]
    assert set(replaced.tolist()) == set(range(3, VOCAB))


def test_mlm_random_tokens_are_never_special():
    everything = MLMObjective(MASK, 6, (0, 4), mask_share=0.0, random_share=1.0)
    assert everything._ordinary.tolist() == [1, 3, 5]
    with pytest.raises(ValueError, match="no token that is not special"):
        MLMObjective(2, 3, (0, 1, 2))


def test_clm_predicts_within_documents_and_leaves_the_input(make_batch):
    batch = make_batch([[[5, 6, 7, EOS], [8, 9]], [[10, EOS], [11]]], 8)
    corrupted = CLMObjective(EOS).corrupt(batch, MaskPlan(0, 0), seed=0, draw=0)
    assert corrupted.input_ids is batch.input_ids
    assert corrupted.rows.tolist() == [0, 1, 2, 4, 8]
    assert corrupted.targets.tolist() == [6, 7, EOS, 9, EOS]
    assert corrupted.normalizer == 5
    assert corrupted.weights is None


def test_clm_does_not_predict_padding_that_is_eos(make_batch):
    batch = make_batch([[[5, 6, EOS]]], 8, pad=EOS)
    corrupted = CLMObjective(EOS).corrupt(batch, MaskPlan(0, 0), seed=0, draw=0)
    assert corrupted.targets.tolist() == [6, EOS]
    assert CLMObjective(None).corrupt(batch, MaskPlan(0, 0), seed=0, draw=0).targets.tolist() == [6]


def config_for(**options) -> StackWiseConfig:
    return StackWiseConfig(objective=ObjectiveConfig(**options))


def test_build_objective_carries_every_option():
    diffusion = build_objective(
        config_for(weighting="inverse_t", count="fixed", t_sampling="uniform"), FakeTokenizer()
    )
    assert isinstance(diffusion, DiffusionObjective)
    assert diffusion.sampler == MaskSampler("fixed", "uniform")
    assert (diffusion.weighting, diffusion.mask_id, diffusion.shift) == ("inverse_t", MASK, False)
    mlm = build_objective(config_for(type="mlm", mlm_mask=0.7, mlm_random=0.2), FakeTokenizer())
    assert isinstance(mlm, MLMObjective)
    assert (mlm.mask_share, mlm.random_share) == (0.7, 0.2)
    clm = build_objective(config_for(type="clm"), FakeTokenizer())
    assert isinstance(clm, CLMObjective)
    assert clm.shift
    assert clm.eos_id == EOS


def test_shift_comes_from_the_config_then_from_the_model():
    assert build_objective(config_for(), FakeTokenizer(), shift=True).shift
    assert not build_objective(config_for(shift=False), FakeTokenizer(), shift=True).shift
    assert build_objective(config_for(shift=True), FakeTokenizer()).shift


def test_build_objective_refuses_what_cannot_work():
    tokenizer = FakeTokenizer()
    tokenizer.mask_id = None
    with pytest.raises(ConfigError, match=r"data\.special_mask_id"):
        build_objective(config_for(), tokenizer)
    build_objective(config_for(type="clm"), tokenizer)
    with pytest.raises(ConfigError, match=r"objective\.shift must be true"):
        build_objective(config_for(type="clm", shift=False), FakeTokenizer())
