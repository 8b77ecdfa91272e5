"""A CT of 512 x 512 x 1,000 becomes a prepared volume in less than 2 GB, whatever its masks come as."""

import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest

from rayseg import work
from rayseg.data import synthetic
from rayseg.data.catalog import CatalogConfig, catalog
from rayseg.data.layouts import Layout

SLICES, SIZE = 1000, 512
LIMIT_MIB = 2000

# In a process of its own, as a task of Ray has it: what it holds at most is told at the end.
TASK = """
import sys
from pathlib import Path
import numpy as np
from rayseg import snapshots, storage
from rayseg.data import accepted, chunks
from rayseg.data.labels import Labels
from rayseg.data.shards import planned
from rayseg.data.volume import VolumePreprocess
from rayseg.data.volume_samples import VolumeMaking, write_volumes
folder = Path(sys.argv[1])
with snapshots.reading(str(folder / "manifest.parquet"), "test") as uri:
    units = accepted.write(Path(uri), folder / "rows")
(task,) = planned(units, np.zeros(1, np.int8), ["train"], None, 256)
making = VolumeMaking(VolumePreprocess((1, 0.7, 0.7), (64, 128, 128)), Labels(names=("organ",)))
(told,) = write_volumes(task, str(folder / "rows"), str(folder / "set"), making)
assert not told["rejects"], told["rejects"]
(row,) = told["table"].to_pylist()
(line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]  # ru_maxrss begins with the parent's
peak_kib = int(line.split()[1])
print(*row["shape"], row["foreground_voxels"], peak_kib // 1024)
"""


def archive(folder: Path) -> int:
    """A series with a label volume; its voxels of foreground."""
    dataset = pydicom.dcmread(pydicom.filebase.DicomBytesIO(synthetic.slice_bytes(size=SIZE)))
    dataset.PixelSpacing, dataset.ImageOrientationPatient = [0.7, 0.7], [1, 0, 0, 0, 1, 0]
    dataset.SliceThickness = 1
    rows, columns = np.mgrid[:SIZE, :SIZE]
    noise = np.random.default_rng(0).integers(0, 200, (SIZE, SIZE), np.uint16)
    labels = np.zeros((SIZE, SIZE, SLICES), np.uint8)
    (folder / "images").mkdir()
    for number in range(SLICES):
        radius = 60 + number // 10
        inside = (rows - 256) ** 2 + (columns - 200) ** 2 < radius**2
        labels[..., number] = inside.T
        dataset.PixelData = (noise + 900 + 300 * inside).astype(np.uint16).tobytes()
        dataset.BitsAllocated = dataset.BitsStored = 16
        dataset.HighBit, dataset.PixelRepresentation = 15, 0
        dataset.ImagePositionPatient = [0, 0, number]
        dataset.InstanceNumber = number + 1
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"2.25.{number + 1}"
        dataset.save_as(folder / "images" / f"{number:04d}.dcm")
    affine = np.diag([-0.7, -0.7, 1, 1])
    nibabel.save(nibabel.Nifti1Image(labels, affine), folder / "images.nii.gz")
    return int(np.count_nonzero(labels))


@pytest.mark.slow
def test_a_thousand_slices_fit_into_two_gigabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "FEW", SLICES)  # no Ray for the catalog
    foreground = archive(tmp_path)
    layout = Layout(images="{series}/*.dcm", masks="{series}.nii.gz")
    catalog(CatalogConfig(source=str(tmp_path), output=str(tmp_path / "manifest.parquet"), layout=layout))
    done = subprocess.run([sys.executable, "-c", TASK, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    *shape, voxels, peak_mib = map(int, done.stdout.split())
    assert shape == [SLICES, SIZE, SIZE]
    assert voxels == foreground
    assert peak_mib < LIMIT_MIB
