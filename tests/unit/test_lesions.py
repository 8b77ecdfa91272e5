"""Lesions against SimpleITK's components, and counted by hand."""

import numpy as np
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rayseg.evaluation.lesions import Lesions, lesions

sparse = arrays(bool, (3, 8, 9), elements=st.sampled_from([True, False, False, False, False]))


def components(mask: np.ndarray) -> tuple[np.ndarray, int]:
    found = SimpleITK.GetArrayFromImage(
        SimpleITK.ConnectedComponent(SimpleITK.GetImageFromArray(mask.astype(np.uint8)), True)
    )
    return found, int(found.max())


@settings(max_examples=30, deadline=None)
@given(sparse, sparse)
def test_lesions_are_those_of_simpleitk(prediction: np.ndarray, truth: np.ndarray) -> None:
    found = lesions(prediction, truth)
    (predicted, of_prediction), (true, of_truth) = components(prediction), components(truth)
    hit = sum(bool(prediction[true == label].any()) for label in range(1, of_truth + 1))
    false = sum(not truth[predicted == label].any() for label in range(1, of_prediction + 1))
    assert found == Lesions(true=of_truth, found=hit, predicted=of_prediction, false=false)


def test_two_touching_at_a_corner_are_one_lesion_and_one_prediction_may_find_two() -> None:
    truth = np.zeros((1, 6, 8), bool)
    truth[0, 0, 0] = truth[0, 1, 1] = True  # one lesion: the pixels touch at a corner
    truth[0, 4, 0] = truth[0, 4, 3] = truth[0, 0, 7] = True  # three of a pixel
    prediction = np.zeros((1, 6, 8), bool)
    prediction[0, 4, :4] = True  # over two of them
    prediction[0, 2, 5] = True  # over none
    found = lesions(prediction, truth)
    assert found == Lesions(true=4, found=2, predicted=2, false=1)
    assert found.f1 == 2 * 2 / (2 * 2 + 1 + 2)
    # The same pixel in the next slice, shifted by one each way, is of the same lesion of a volume.
    truth = np.zeros((2, 4, 4), bool)
    truth[0, 1, 1] = truth[1, 2, 2] = True
    assert lesions(np.zeros_like(truth), truth) == Lesions(true=1)


def test_without_lesions_there_is_no_score_and_misses_and_false_alarms_score_nothing() -> None:
    empty, one = np.zeros((1, 3, 3), bool), np.eye(3, dtype=bool)[np.newaxis]
    assert lesions(empty, empty).f1 is None
    assert lesions(empty, one).f1 == 0.0
    assert lesions(one, empty) == Lesions(predicted=1, false=1)
    assert lesions(one, empty).f1 == 0.0
    assert (lesions(one, one) + lesions(one, empty)).f1 == 2 / 3
