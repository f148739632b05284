import numpy as np
import pytest
import torch

from timm_spinal.evaluation.predictions import Predictions, calibration, class_accuracy, read_predictions


def test_predictions_come_back_as_they_were(tmp_path):
    logits, target = torch.tensor([[2., 0., 0.], [0., 0., 3.], [1., 4., 0.]]), torch.tensor([0, 1, 1])
    predictions = Predictions()
    predictions.add(logits[:2], target[:2])
    predictions.add(logits[2:], target[2:])
    predictions.write(tmp_path)
    kept = read_predictions(tmp_path)
    assert kept['prediction'].tolist() == [0, 2, 1] and kept['target'].tolist() == [0, 1, 1]
    assert kept['confidence'].tolist() == pytest.approx(logits.softmax(1).max(1).values.tolist())
    assert class_accuracy(kept['prediction'], kept['target'], 0) == 100.
    assert class_accuracy(kept['prediction'], kept['target'], 1) == 50.
    assert np.isnan(class_accuracy(kept['prediction'], kept['target'], 2))
    assert read_predictions(tmp_path / 'none') is None


def test_calibration_by_hand():
    # half of the images at 0.95 are right, all of those at 0.72
    confidence = np.array([0.95, 0.95, 0.72, 0.72])
    correct = np.array([True, False, True, True])
    sure, right, error = calibration(confidence, correct, bins=10)
    assert right[9] == 0.5 and right[7] == 1. and np.isnan(right[0])
    assert sure[9] == pytest.approx(0.95)
    assert error == pytest.approx(0.5 * 0.45 + 0.5 * 0.28)


def test_calibration_at_the_edges_of_bins():
    """A confidence between two bins counts in the upper one, and 1 in the last."""
    sure, right, error = calibration(np.array([0.5, 1., 0.25]), np.array([True, True, False]), bins=4)
    assert np.isnan(sure[0]) and sure[1:].tolist() == [0.25, 0.5, 1.]
    assert right[1:].tolist() == [0., 1., 1.] and error == pytest.approx((0.25 + 0.5 + 0.) / 3)
