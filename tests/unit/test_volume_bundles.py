"""Bundles of volumes: saved, read, verified in a clean process, and refused where they are not sound."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import keras
import nibabel as nib
import numpy as np
import pytest

from rayseg.data import phantom_volumes, synthetic
from rayseg.data.intensity import Intensity
from rayseg.data.labels import Labels
from rayseg.data.preprocess import Preprocess
from rayseg.data.volume import VolumePreprocess
from rayseg.inference.predictor import Predictor, load_any
from rayseg.inference.volume_predictor import VolumePredictor
from rayseg.models.engine import Engine
from rayseg.models.network import build_network, portable
from rayseg.models.presets import NetworkConfig
from rayseg.records import Reason, Reject
from rayseg.tracking import bundle
from rayseg.tracking.verification import PREDICTOR_MODULE

VOLUME = VolumePreprocess(
    (2.0, 1.5, 1.5), (8, 16, 16), Intensity("ct", low=-90.0, high=210.0, mean=60.0, deviation=50.0)
)
LABELS = Labels(("liver", "tumour"))
EXACT = Engine("openvino", "float32")


@pytest.fixture(scope="module")
def network() -> keras.Model:
    keras.utils.set_random_seed(3)
    strides = ((1, 1, 1), (2, 2, 2))
    config = NetworkConfig("unet3d-plain", widths=(4, 8), kernels=((3, 3, 3),) * 2, strides=strides, deep_supervision=0)
    return portable(build_network(config, (*VOLUME.patch, 1), 2))


@pytest.fixture(scope="module")
def folder(network: keras.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    example, *golden = phantom_volumes.of_bundle(VOLUME)
    bundle.save(folder, network, VOLUME, LABELS, 0.5, example, golden)
    return folder


def test_a_bundle_of_volumes_is_read_as_it_was_saved(folder: Path) -> None:
    read = bundle.load(folder)
    assert read.preprocess == VOLUME
    assert read.labels == LABELS
    description = json.loads((folder / "bundle.json").read_text())
    assert description["volume"]["spacing_mm"] == [2.0, 1.5, 1.5]
    assert "preprocess" not in description
    assert sorted(file.name for file in folder.iterdir()) == sorted(
        ["bundle.json", "example.nii.gz", "golden-1.nii.gz", "model.bin", "model.keras", "model.xml"]
    )
    assert bundle.preprocess_of(description) == VOLUME
    volume = nib.Nifti1Image.from_bytes(gzip.decompress(read.example))
    np.testing.assert_allclose(volume.header.get_zooms(), np.array([1.5, 1.5, 2.0]) * 1.15, rtol=1e-6)


def test_the_recorded_mask_is_what_keras_says(folder: Path, network: keras.Model) -> None:
    """Of the example, which is one window: Keras on the whole image, back on the slices, the most probable class."""
    predictor = load_any(folder, engine=EXACT)
    assert isinstance(predictor, VolumePredictor)
    example = predictor.segment_example()
    image = VOLUME.apply(example.slices)
    assert isinstance(image, np.ndarray)
    before = [(size - length) // 2 for size, length in zip(VOLUME.patch, image.shape, strict=False)]
    after = [size - length - first for first, size, length in zip(before, VOLUME.patch, image.shape, strict=False)]
    pads = zip(before, after, strict=True)
    made = network.predict(np.pad(image, [*pads, (0, 0)])[None], verbose=0)[0]
    made = made[tuple(slice(first, first + length) for first, length in zip(before, image.shape, strict=False))]
    grid = VOLUME.grid([slice.geometry for slice in example.slices if slice.geometry])
    assert not isinstance(grid, Reject)
    expected = np.stack(list(grid.restore([np.moveaxis(made, -1, 0)])))
    ordered = np.sort(expected, axis=1)
    sure = ordered[:, -1] - ordered[:, -2] > 1e-3
    assert sure.mean() > 0.9
    assert len(np.unique(example.mask)) > 1
    assert np.array_equal(example.mask[sure], expected.argmax(axis=1)[sure])


def test_a_clean_process_gives_the_recorded_masks(folder: Path) -> None:
    command = [sys.executable, "-m", PREDICTOR_MODULE, str(folder), "2"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    description = bundle.describe(folder)
    for key in ("digest", "example_mask_sha256", "golden_masks_sha256"):
        assert found[key] == description[key]
    assert list(found["golden_masks_sha256"]) == ["golden-1.nii.gz"]
    assert found["latency_s"] > 0


def test_the_digest_tells_what_decides_about_a_mask(folder: Path, network: keras.Model, tmp_path: Path) -> None:
    example, *golden = phantom_volumes.of_bundle(VOLUME)
    same = bundle.save(tmp_path / "same", network, VOLUME, LABELS, 0.5, example, golden)
    assert same.digest == bundle.load(folder).digest
    other = VolumePreprocess(VOLUME.spacing_mm, VOLUME.patch, VOLUME.intensity, step=0.4)
    assert bundle.save(tmp_path / "other", network, other, LABELS, 0.5, example, golden).digest != same.digest


def test_models_of_volumes_and_of_slices_are_told_apart(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="models of slices and models of volumes"):
        Predictor.load(folder, engine=EXACT)
    plain = keras.Sequential([keras.layers.Input((32, 32, 1), dtype="uint8"), keras.layers.Rescaling(1 / 255)])
    bundle.save(tmp_path, plain, Preprocess((32, 32)), Labels(), 0.5, synthetic.slice_bytes())
    assert isinstance(load_any(tmp_path, engine=EXACT), Predictor)
    with pytest.raises(ValueError, match="mirror: all"):
        load_any(tmp_path, engine=EXACT, mirror="all")
    with pytest.raises(ValueError, match="ensemble"):
        load_any(folder, tmp_path, engine=EXACT)


def test_what_cannot_be_saved(network: keras.Model, tmp_path: Path) -> None:
    example, *_ = phantom_volumes.of_bundle(VOLUME)
    with pytest.raises(ValueError, match="a model from"):
        bundle.save(tmp_path, network, VOLUME, Labels(), 0.5, example)
    with pytest.raises(ValueError, match="not_an_image"):
        bundle.save(tmp_path, network, VOLUME, LABELS, 0.5, synthetic.slice_bytes())
    with pytest.raises(ValueError, match="no readable volume"):
        bundle.save(tmp_path, network, VOLUME, LABELS, 0.5, example[:200])


def test_a_slice_alone_has_no_mask(folder: Path) -> None:
    found = load_any(folder, engine=EXACT).segment([synthetic.slice_bytes(), b"nothing"])
    assert [one.reason for one in found if isinstance(one, Reject)] == [Reason.NEEDS_NEIGHBOURS, Reason.NOT_DICOM]


def test_the_same_bytes_by_tensorflow_for_any_threads(folder: Path) -> None:
    masks = {
        threads: load_any(folder, engine=Engine("tensorflow", "float32"), threads=threads).segment_example().mask
        for threads in (1, 2)
    }
    assert masks[1].tobytes() == masks[2].tobytes()
    exact = load_any(folder, engine=EXACT).segment_example().mask
    assert np.mean(masks[1] != exact) < 2e-3


def test_phantoms_are_small_volumes_in_millimetres() -> None:
    """So large that a network's windows over them are few."""
    for patch, spacing_mm in (((8, 16, 16), (2.0, 1.5, 1.5)), ((1, 64, 48), (None, 0.7, 0.8))):
        preprocess = VolumePreprocess(spacing_mm, patch)
        assert phantom_volumes.of_bundle(preprocess) == phantom_volumes.of_bundle(preprocess)
        for recorded in phantom_volumes.of_bundle(preprocess):
            slices = bundle.read_example(recorded)
            assert not isinstance(slices, Reject)
            image = preprocess.apply(slices)
            assert isinstance(image, np.ndarray)
            assert image.shape[0] <= max(2, 2 * patch[0])
            assert image.shape[1] <= patch[1]
            assert image.shape[2] <= patch[2]
            assert image.std() > 0.5
