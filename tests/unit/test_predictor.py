import base64
import io
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pydicom
import pytest
from PIL import Image

from rayseg.data import synthetic
from rayseg.data.conformal import VolumeErrors
from rayseg.data.labels import Labels
from rayseg.data.preprocess import Preprocess, Window
from rayseg.data.range import Known, Range
from rayseg.dicom.reading import Slice, read_slice
from rayseg.dicom.segmentation import decode
from rayseg.inference import predictor as predictor_module
from rayseg.inference.predictor import Prediction, Predictor, mask_png
from rayseg.inference.series import Task, segment_series
from rayseg.models import engine
from rayseg.records import Reason, Reject
from rayseg.tracking import bundle
from rayseg.tracking.registry import ModelVersion

UNITS = Window(center=128, width=256)  # stored value v of 0..255 becomes v


def network(size: int) -> keras.Model:
    """With a group normalisation, whose sums TensorFlow orders by the batch's size."""
    keras.utils.set_random_seed(7)
    layers = keras.layers
    return keras.Sequential(
        [
            layers.Input((size, size, 1), dtype="uint8"),
            layers.Rescaling(1 / 255),
            layers.Conv2D(16, 3, padding="same", use_bias=False),
            layers.GroupNormalization(4),
            layers.Activation("relu"),
            layers.MaxPool2D(),
            layers.Conv2DTranspose(16, 2, strides=2),
            layers.GroupNormalization(4),
            layers.Conv2D(1, 3, padding="same", activation="sigmoid"),
        ]
    )


def identity(size: tuple[int, int]) -> keras.Model:
    """The probability is the input's value / 255."""
    return keras.Sequential([keras.layers.Input((*size, 1), dtype="uint8"), keras.layers.Rescaling(1 / 255)])


def of_model(model: keras.Model, preprocess: Preprocess, threshold: float = 0.5) -> Predictor:
    return of_labels(model, preprocess, Labels(), threshold)


def of_labels(
    model: keras.Model, preprocess: Preprocess, labels: Labels, threshold: float = 0.5, precision: str = "float32"
) -> Predictor:
    converted = engine.convert(model)
    made = bundle.Bundle(converted, preprocess, labels, threshold, "", b"")
    return Predictor([made], [engine.compile_openvino(converted, precision, threads=2)])


def bands(size: tuple[int, int]) -> keras.Model:
    """Softmax over background and two classes: dark is background, middle the first class, bright the second."""
    inputs = keras.Input((*size, 1), dtype="uint8")
    logits = keras.layers.Conv2D(3, 1, name="logits")(keras.layers.Rescaling(1 / 255)(inputs))
    model = keras.Model(inputs, keras.layers.Softmax()(logits))
    low, high = 100.5 / 255, 180.5 / 255  # where the lines 60 (low - v), 0 and 60 (v - high) cross
    weights = [np.array([[[[-60, 0, 60]]]], np.float32), np.array([60 * low, 0, -60 * high], np.float32)]
    model.get_layer("logits").set_weights(weights)
    return model


def plain(stored: np.ndarray) -> Slice:
    return Slice(stored, 1.0, 0.0, None)


@dataclass(frozen=True)
class Trained:
    """A network whose probabilities lie around the threshold, so that a change in the last bit shows somewhere."""

    model: keras.Model
    preprocess: Preprocess
    threshold: float


@pytest.fixture(scope="module")
def network_64() -> Trained:
    model, preprocess = network(64), Preprocess(size=(64, 64))
    images = np.stack([preprocess.apply(slice) for slice in slices()])
    return Trained(model, preprocess, float(np.median(model.predict(images, verbose=0))))


@pytest.fixture(scope="module", params=["openvino screened", "openvino bfloat16", "tensorflow float32"])
def trained(request: pytest.FixtureRequest, network_64: Trained) -> Predictor:
    name, precision = request.param.split()
    converted = engine.convert(network_64.model)
    made = bundle.Bundle(converted, network_64.preprocess, Labels(), network_64.threshold, "", b"")
    if name == "openvino":
        return Predictor([made], [engine.compile_openvino(converted, precision, threads=2)])
    return Predictor([made], [engine.compile_tensorflow(network_64.model, precision)])


def slices() -> list[Slice]:
    """Twelve different slices of several sizes."""
    generator = np.random.default_rng(3)
    shapes = [(64, 64), (48, 64), (100, 70), (64, 64)] * 3
    smooth = [
        np.kron(generator.integers(0, 4000, (shape[0] // 4 + 1, shape[1] // 4 + 1)), np.ones((4, 4)))
        for shape in shapes
    ]
    return [plain(image[: shape[0], : shape[1]].astype(np.int16)) for image, shape in zip(smooth, shapes, strict=True)]


def test_a_mask_does_not_depend_on_its_company(trained: Predictor) -> None:
    inputs = slices()
    alone = [trained.predict([slice])[0] for slice in inputs]
    assert all(0 < mask.mean() < 1 for mask in alone)
    generator = np.random.default_rng(11)
    for size in (1, 2, 3, 5, 8, 12):
        chosen = generator.integers(0, len(inputs), size)  # with repetitions
        together = trained.predict([inputs[index] for index in chosen])
        for index, mask in zip(chosen, together, strict=True):
            assert mask.tobytes() == alone[index].tobytes()
            assert mask.shape == inputs[index].stored.shape
            assert mask.dtype == np.uint8


def test_a_mask_does_not_depend_on_who_else_is_calling(trained: Predictor) -> None:
    inputs = slices()
    alone = [mask.tobytes() for mask in trained.predict(inputs)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda slice: trained.predict([slice])[0].tobytes(), inputs * 3))
    assert together == alone * 3


@pytest.mark.parametrize("precision", ["float32", "screened", "bfloat16"])
def test_a_mask_is_what_keras_says(network_64: Trained, precision: str) -> None:
    inputs = [slice for slice in slices() if slice.stored.shape == (64, 64)]
    images = np.stack([network_64.preprocess.apply(slice) for slice in inputs])
    probabilities = network_64.model.predict(images, verbose=0)[..., 0]
    predictor = of_labels(network_64.model, network_64.preprocess, Labels(), network_64.threshold, precision)
    off = 0.05 if precision == "bfloat16" else 1e-4
    for mask, expected in zip(predictor.predict(inputs), probabilities, strict=True):
        sure = np.abs(expected - network_64.threshold) > off
        assert sure.mean() > (0.3 if precision == "bfloat16" else 0.99)
        assert np.array_equal(mask[sure], expected[sure] >= network_64.threshold)


def test_slices_with_nothing_are_screened_in_bfloat16_alone(network_64: Trained) -> None:
    """The probabilities tell by which precision they were made; a slice where something shows has float32's."""
    by_precision = {
        precision: of_labels(network_64.model, network_64.preprocess, Labels(), 0.5, precision)
        for precision in ("float32", "screened", "bfloat16")
    }
    if "bfloat16" not in by_precision["screened"].engine:
        pytest.skip("this processor has no bfloat16")
    (slice, *_) = slices()
    for threshold, like in ((1.2, "bfloat16"), (network_64.threshold, "float32")):  # no probability is 1.1
        found = {}
        for precision, predictor in by_precision.items():
            predictor.threshold = threshold
            judged = predictor.judge_stack([slice])
            assert not isinstance(judged, Reject)
            found[precision] = judged.probabilities_KHW
            assert np.array_equal(judged.mask, found[precision][0] >= threshold)
        assert not np.array_equal(found["float32"], found["bfloat16"])
        assert np.array_equal(found["screened"], found[like])


def test_mirror_images_and_models_are_averaged(network_64: Trained) -> None:
    """Against Keras on each mirror image by itself, and on two networks of different sizes and thresholds."""
    other, small = network(32), Preprocess(size=(32, 32))
    (slice, *_) = [slice for slice in slices() if slice.stored.shape == (64, 64)]
    predictor = Predictor(
        [
            bundle.Bundle(engine.convert(model), preprocess, Labels(), threshold, "", b"")
            for model, preprocess, threshold in (
                (network_64.model, network_64.preprocess, 0.3),
                (other, small, 0.5),
            )
        ],
        [engine.compile_openvino(engine.convert(model), "float32") for model in (network_64.model, other)],
        "both",
    )
    assert predictor.threshold == pytest.approx(0.4)
    expected = []
    for model, preprocess in ((network_64.model, network_64.preprocess), (other, small)):
        image = preprocess.apply(slice)
        flips = [image, image[::-1], image[:, ::-1], image[::-1, ::-1]]
        first, rows, columns, both = model.predict(np.stack(flips), verbose=0)[..., 0]
        mean = (first + rows[::-1] + columns[:, ::-1] + both[::-1, ::-1]) / 4
        expected.append(preprocess.restore(mean.astype(np.float32), *slice.shape))
    judged = predictor.judge_stack([slice])
    assert not isinstance(judged, Reject)
    np.testing.assert_allclose(judged.probabilities_KHW[0], np.mean(expected, axis=0), atol=1e-5)
    # The members of an ensemble are its models, by the threshold of all of them.
    assert len(judged.members) == 2
    for mask, probability in zip(judged.members, expected, strict=True):
        assert np.mean(mask != (probability >= 0.4)) < 2e-3


def test_the_members_of_one_model_are_its_mirror_images(network_64: Trained) -> None:
    slice, model, preprocess = slices()[2], network_64.model, network_64.preprocess
    made, threshold = engine.convert(model), network_64.threshold
    bundles = [bundle.Bundle(made, preprocess, Labels(), threshold, "", b"")]
    compiled = [engine.compile_openvino(made, "screened")]
    judged = Predictor(bundles, compiled, "columns").judge_stack([slice])
    assert not isinstance(judged, Reject)
    image = preprocess.apply(slice)
    plain, mirrored = model.predict(np.stack([image, image[:, ::-1]]), verbose=0)[..., 0]
    for mask, probability in zip(judged.members, (plain, mirrored[:, ::-1]), strict=True):
        assert mask.any()
        assert (
            np.mean(mask != (preprocess.restore(np.ascontiguousarray(probability), *slice.shape) >= threshold)) < 2e-3
        )
    alone = Predictor(bundles, compiled).judge_stack([slice])
    assert not isinstance(alone, Reject)
    assert list(alone.members) == []
    nothing = Predictor(bundles, compiled, "both").judge_stack([slice], threshold=0.999)
    assert not isinstance(nothing, Reject)
    assert [mask.any() for mask in nothing.members] == [False] * 4


def test_several_are_not_judged_by_what_validation_was_like_for_the_first() -> None:
    one = engine.Network(b"", b"")
    known = Range(modalities=("CT",), pieces=3, entropy_bits=0.2, volume_ml=9.0)
    bundles = [
        bundle.Bundle(one, Preprocess(size=(64, 64)), Labels(), 0.5, "", b"", known, VolumeErrors((1.0, 1.0), (19, 19)))
    ]
    compiled = [engine.Compiled(np.asarray, None, "none")]
    assert Predictor(bundles, compiled).known == Known(known, VolumeErrors((1.0, 1.0), (19, 19)))
    for several in (Predictor(bundles * 2, compiled * 2), Predictor(bundles, compiled, "columns")):
        assert several.known == Known(Range(modalities=("CT",), volume_ml=9.0))
    theirs = Known(Range(pairwise_dice=0.7), VolumeErrors((2.0, 2.0), (20, 20)))
    assert Predictor(bundles * 2, compiled * 2, known=theirs).known == theirs


def test_models_of_other_classes_are_no_ensemble() -> None:
    made = [
        bundle.Bundle(engine.Network(b"", b""), Preprocess(size=(64, 64)), Labels((name,)), 0.5, "", b"")
        for name in ("bleed", "tumor")
    ]
    compiled = engine.Compiled(np.asarray, None, "none")
    with pytest.raises(ValueError, match=r"ensemble: .* \['bleed'\] and \['tumor'\]"):
        Predictor(made, [compiled, compiled])


def test_importing_openvino_tells_nobody(tmp_path: Path) -> None:
    script = (
        "import sys; from rayseg.models import engine; engine._openvino(); "
        "assert not any(name.startswith('openvino_telemetry.') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | {"HOME": str(tmp_path)})
    assert not list(tmp_path.iterdir())


def test_the_threshold_itself_is_foreground() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    predictor = of_model(identity((16, 16)), Preprocess((16, 16), UNITS, None), threshold=float(np.float32(100 / 255)))
    (mask,) = predictor.predict([plain(ramp)])
    assert np.array_equal(mask, ramp >= 100)


@pytest.mark.parametrize("shape", [(96, 64), (40, 120), (33, 57), (256, 256)])
def test_the_mask_lies_on_the_native_grid(shape: tuple[int, int]) -> None:
    """A bright rectangle comes back where it was, give or take the pixels that the scaling mixes."""
    rows, columns = shape
    stored = np.zeros(shape, np.uint8)
    stored[rows // 4 : rows // 2, columns // 3 : columns // 3 * 2] = 255
    (mask,) = of_model(identity((64, 64)), Preprocess((64, 64), UNITS, None)).predict([plain(stored)])
    assert mask.shape == shape
    expected = stored > 0
    shrinking = max(1.0, rows / 64, columns / 64)
    edge = 2 * (rows // 4 + columns // 3)
    assert np.count_nonzero(mask != expected) <= edge * shrinking / 2
    for axis in (0, 1):  # and is not shifted
        assert np.argwhere(mask)[:, axis].mean() == pytest.approx(np.argwhere(expected)[:, axis].mean(), abs=0.51)


def test_of_several_classes_the_most_probable_one_is_the_label() -> None:
    labels, preprocess = Labels(("first", "second")), Preprocess((16, 16), UNITS, None)
    predictor = of_labels(bands((16, 16)), preprocess, labels)
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    (mask,) = predictor.predict([plain(ramp)])
    assert mask.dtype == np.uint8
    assert np.array_equal(mask, np.where(ramp <= 100, 0, np.where(ramp <= 180, 1, 2)))
    # On a larger grid: the probabilities are scaled, not the labels, of which a mean would be another class.
    edge = np.zeros((64, 64), np.uint8)
    edge[:, 32:] = 255
    (mask,) = predictor.predict([plain(edge)])
    assert mask.shape == (64, 64)
    assert set(np.unique(mask)) == {0, 2}
    assert np.array_equal(mask == 2, edge == 255)


@pytest.mark.parametrize("profile", ["seg", "seg-labelmap"])
def test_an_archives_segmentation_has_a_segment_a_class(tmp_path: Path, profile: str) -> None:
    labels, preprocess = Labels(("first", "second")), Preprocess((64, 64), Window(40, 80), None)
    predictor = of_labels(bands((64, 64)), preprocess, labels)
    data = synthetic.slice_bytes(0, 64)
    (tmp_path / "1.dcm").write_bytes(data)
    version = ModelVersion("m", "1", "models:/m/1", "r", "d")
    task = Task(str(tmp_path / "out"), version, "c", (profile,))  # type: ignore[arg-type]
    row = segment_series(
        predictor, task, series_key="s", patient_key="p", uris=[str(tmp_path / "1.dcm")], frames=[None]
    )
    [file] = row["outputs"]
    encoded = Path(file["uri"]).read_bytes()
    segments = pydicom.dcmread(io.BytesIO(encoded)).SegmentSequence
    assert [item.SegmentLabel for item in segments if item.SegmentNumber] == ["first", "second"]
    (found,) = predictor.segment([data])
    assert isinstance(found, Prediction)
    assert set(np.unique(found.mask)) == {0, 1, 2}
    (mask,) = decode(encoded).values()
    assert np.array_equal(mask, found.mask)
    assert row["foreground_pixels"] == np.count_nonzero(found.mask)


def test_each_object_ends_as_a_prediction_or_a_reject_in_its_place(trained: Predictor) -> None:
    good = [synthetic.slice_bytes(seed, 64) for seed in (0, 1)]
    results = trained.segment([good[0], b"no image", b"", good[1]])
    assert [type(result) for result in results] == [Prediction, Reject, Reject, Prediction]
    assert [result.reason for result in results if isinstance(result, Reject)] == [
        Reason.NOT_DICOM,
        Reason.EMPTY_OBJECT,
    ]
    for blob, result in zip(good, (results[0], results[3]), strict=True):
        slice = read_slice(blob)
        assert isinstance(slice, Slice)
        assert isinstance(result, Prediction)
        assert result.mask.tobytes() == trained.predict([slice])[0].tobytes()
        assert np.array_equal(result.slice.stored, slice.stored)
    assert trained.segment([]) == []


def test_mlflow_gets_a_row_for_each_row(tmp_path: Path) -> None:
    example = synthetic.slice_bytes(0, 64)
    bundle.save(tmp_path, network(32), Preprocess(size=(32, 32)), Labels(), 0.5, example)
    model = predictor_module._load_pyfunc(str(tmp_path))
    found = model.predict(pd.DataFrame({"dicom": [example, b"no image"]}))
    mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(found["mask_png"][0]))))
    (expected,) = Predictor.load(tmp_path).segment([example])
    assert isinstance(expected, Prediction)
    assert np.array_equal(mask, expected.mask)
    assert found["foreground_pixels"][0] == np.count_nonzero(expected.mask) > 0
    assert found["reason"].to_list() == [None, "not_dicom"]
    assert found["mask_png"][1] is None


def test_a_mask_png_holds_the_labels_themselves() -> None:
    mask = np.arange(12, dtype=np.uint8).reshape(3, 4)
    image = Image.open(io.BytesIO(mask_png(mask)))
    assert image.mode == "L"
    assert np.array_equal(np.asarray(image), mask)


def test_a_series_own_slices_are_at_work_at_once_and_come_in_order() -> None:
    together = threading.Barrier(2, timeout=60)

    def forward(images_NHWC: np.ndarray) -> np.ndarray:
        if images_NHWC.max() == 7:
            raise ZeroDivisionError
        together.wait()  # alone it would wait in vain
        return images_NHWC / np.float32(255)

    made = bundle.Bundle(engine.convert(identity((8, 8))), Preprocess((8, 8), UNITS, None), Labels(), 0.5, "", b"")
    predictor = Predictor([made], [engine.Compiled(forward, None, "of the test")], threads=2)
    values = [250, 7, 40, 200, 90]
    stacks = [[plain(np.full((8, 8), value, np.uint8))] for value in values]
    judged = list(predictor.judge_stacks(stacks))
    found = [result.reason if isinstance(result, Reject) else result.mask.any() for result in judged]
    assert found == [True, Reason.INTERNAL, False, True, False]
    assert [result.slice for result in judged if not isinstance(result, Reject)] == [
        stack[0] for stack, value in zip(stacks, values, strict=True) if value != 7
    ]
