"""Distillation losses against their formulas, padding, and maps of layers."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dqrm.compress.distill.losses import (
    DistillWeights,
    Outputs,
    attention_mse,
    distill_loss,
    hidden_mse,
    logits_mse,
    soft_cross_entropy,
)
from dqrm.compress.distill.maps import check_map, uniform_map

LENGTHS = (5, 2, 4)


def outputs(layers, seed, *, width=5, pad=0.0, classes=3):
    """Of three sentences; ``pad`` is written wherever padding is."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(LENGTHS), width, dtype=torch.int64)
    for row, length in enumerate(LENGTHS):
        mask[row, :length] = 1
    rows = len(LENGTHS)

    def padded(tensor, real):
        return torch.where(real.bool(), tensor, torch.tensor(pad))

    hidden, attentions = [], []
    for layer in range(layers + 1):
        states = torch.zeros(rows, width, 7)
        states[:, :5] = torch.randn(rows, 5, 7, generator=generator)
        hidden.append(padded(states, mask[:, :, None]))
        if layer == layers:
            break
        scores = torch.full((rows, 2, width, width), -math.inf)
        scores[..., :5, :5] = torch.randn(rows, 2, 5, 5, generator=generator)
        pairs = (mask[:, :, None] * mask[:, None, :])[:, None]
        scores = scores.masked_fill(~mask.bool()[:, None, None, :], -math.inf)
        attentions.append(padded(scores.softmax(-1).nan_to_num(), pairs))
    logits = torch.randn(rows, classes, generator=generator)
    return Outputs(logits, hidden, attentions, mask)


ALL = DistillWeights(logits=1.0, hidden=1.0, attention=1.0)


def test_a_student_that_is_the_teacher_has_no_loss():
    same = outputs(4, 0)
    for regression in (False, True):
        loss = distill_loss(same, same, ALL, range(4), regression=regression)
        assert float(loss) == 0.0
    assert float(distill_loss(outputs(4, 1), same, ALL, range(4))) > 0.1


def test_parts_are_those_of_the_formulas():
    student, teacher = outputs(2, 1), outputs(4, 2)
    layers = (1, 3)
    expected = 0.0
    for ours, theirs in ((0, 1), (1, 2), (2, 4)):
        squares = [
            float(((student.hidden[ours][b, :n] - teacher.hidden[theirs][b, :n]) ** 2).sum())
            for b, n in enumerate(LENGTHS)
        ]
        expected += sum(squares) / (7 * sum(LENGTHS))
    got = distill_loss(student, teacher, DistillWeights(logits=0, hidden=1), layers)
    assert float(got) == pytest.approx(expected, rel=1e-6)

    expected = 0.0
    for ours, theirs in ((0, 1), (1, 3)):
        difference = student.attentions[ours] - teacher.attentions[theirs]
        squares = [float((difference[b, :, :n, :n] ** 2).sum()) for b, n in enumerate(LENGTHS)]
        expected += sum(squares) / (2 * sum(n * n for n in LENGTHS))
    got = distill_loss(student, teacher, DistillWeights(logits=0, attention=1), layers)
    assert float(got) == pytest.approx(expected, rel=1e-6)

    parts = [DistillWeights(), DistillWeights(logits=0, hidden=1)]
    parts.append(DistillWeights(logits=0, attention=1))
    weighted = DistillWeights(logits=2, hidden=0.5, attention=3)
    apart = [float(distill_loss(student, teacher, part, layers)) for part in parts]
    got = float(distill_loss(student, teacher, weighted, layers))
    assert got == pytest.approx(2 * apart[0] + 0.5 * apart[1] + 3 * apart[2], rel=1e-6)


def test_soft_cross_entropy_has_the_gradient_of_the_textbook():
    for temperature in (1.0, 3.0):
        student = torch.randn(6, 4, requires_grad=True)
        teacher = torch.randn(6, 4)
        soft_cross_entropy(student, teacher, temperature).backward()
        ours, student.grad = student.grad, None
        targets = (teacher / temperature).softmax(-1)
        torch_loss = torch.nn.functional.cross_entropy(student / temperature, targets)
        (temperature**2 * torch_loss).backward()
        torch.testing.assert_close(ours, student.grad)
        by_elements = soft_cross_entropy(student, teacher, temperature, "elements")
        by_rows = soft_cross_entropy(student, teacher, temperature)
        torch.testing.assert_close(by_elements, by_rows / 4)
        assert float(by_rows.detach()) >= 0


def test_padding_takes_no_part():
    narrow, wide = outputs(2, 3), outputs(2, 3, width=8, pad=9e3)
    other_narrow, other_wide = outputs(2, 4), outputs(2, 4, width=8, pad=-7.0)
    expected = distill_loss(narrow, other_narrow, ALL, (0, 1))
    got = distill_loss(wide, other_wide, ALL, (0, 1))
    torch.testing.assert_close(got, expected)
    student = wide.hidden[0].clone().requires_grad_()
    hidden_mse(student, other_wide.hidden[0], wide.mask).backward()
    assert not student.grad[wide.mask == 0].any()
    assert student.grad[wide.mask == 1].all()


def test_the_teacher_gets_no_gradient_and_shapes_must_agree():
    student, teacher = torch.randn(3, 2, requires_grad=True), torch.randn(3, 2, requires_grad=True)
    (soft_cross_entropy(student, teacher) + logits_mse(student, teacher)).backward()
    assert student.grad is not None
    assert teacher.grad is None
    with pytest.raises(ValueError, match=r"hidden states of the student are \[3, 5, 7\], of the"):
        hidden_mse(torch.zeros(3, 5, 7), torch.zeros(3, 5, 8), torch.ones(3, 5))
    with pytest.raises(ValueError, match="attentions of the student"):
        attention_mse(torch.zeros(1, 2, 5, 5), torch.zeros(1, 4, 5, 5), torch.ones(1, 5))


def test_layers_that_tell_no_attention_are_not_passed_over():
    student, teacher = outputs(2, 1), outputs(3, 2)
    attention = DistillWeights(logits=0.0, attention=1.0)
    for short, of in ((student, "1 of 2 layers of the student"), (teacher, "2 of 3 layers of the")):
        missing = replace(short, attentions=short.attentions[1:])
        ours, theirs = (missing, teacher) if short is student else (student, missing)
        # The last of the teacher's layers is not asked for.
        with pytest.raises(ValueError, match=f"{of} .*set attention: 0"):
            distill_loss(ours, theirs, attention, (0, 1))
    unseen = replace(teacher, hidden=(), attentions=teacher.attentions[1:])
    with pytest.raises(ValueError, match="2 of 3 layers of the teacher"):
        distill_loss(student, unseen, attention, (0, 2))
    whole = replace(teacher, hidden=())
    assert float(distill_loss(student, whole, attention, (0, 2))) > 0


@given(st.integers(1, 30), st.integers(1, 30))
def test_uniform_maps_rise_to_the_last_layer(student, teacher):
    if student > teacher:
        with pytest.raises(ValueError, match="cannot be spread"):
            uniform_map(student, teacher)
        return
    layers = uniform_map(student, teacher)
    assert check_map(layers, student, teacher) == layers
    assert layers[-1] == teacher - 1
    if student == teacher:
        assert layers == tuple(range(teacher))


def test_maps_of_the_papers_and_faults():
    assert uniform_map(6, 12) == (1, 3, 5, 7, 9, 11)
    assert uniform_map(3, 6) == (1, 3, 5)
    assert uniform_map(5, 6) == (0, 1, 3, 4, 5)
    assert check_map([2, 4, 6, 8, 10], 5, 12) == (2, 4, 6, 8, 10)
    for layers, message in (
        ((0, 1), "it names 2 layers, and the student has 3"),
        ((0, 1, 6), "layer 6: there are 6, 0 to 5"),
        ((0, 2, 2), "0, 2, 2: they must rise"),
    ):
        with pytest.raises(ValueError, match=message):
            check_map(layers, 3, 6)
