"""The application as `serve deploy` has it: the ingress is a deployment, behind Ray's proxies."""

import io
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from ray import serve

from rayseg.data.synthetic import slice_bytes
from rayseg.inference.predictor import Predictor
from rayseg.records import Reject
from serving import app
from tests import bundles
from tests.ports import free_port

pytestmark = [pytest.mark.ray]


@pytest.fixture
def proxied(ray_cluster: None) -> Iterator[str]:
    """The address that Ray's proxy listens at."""
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


def test_a_deployed_application_answers_straight_and_through_the_store(proxied: str, tmp_path: Path):
    tracking_uri = f"sqlite:///{tmp_path}/mlflow.db"
    bundle = bundles.write_bundle(tmp_path / "bundle", 140)
    version = bundles.register(tracking_uri, "tiny", bundle)
    built = app.application({"tracking_uri": tracking_uri, "model_uri": version.uri, "behind_proxy": True})
    serve.run(built, name=app.APP_NAME, route_prefix="/")
    predictor = Predictor.load(bundle)
    small, large = slice_bytes(3, 64), slice_bytes(3, 1300)
    assert len(small) < 3 * 2**20 < len(large)
    for body in (small, large):
        headers = {"content-type": "application/dicom", "accept": "image/png"}
        answer = httpx.post(f"{proxied}/v1/segment", content=body, headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-model-version"] == version.version
        (made,) = predictor.segment([body])
        assert not isinstance(made, Reject)
        assert np.asarray(Image.open(io.BytesIO(answer.content))).tobytes() == made.mask.tobytes()


def test_replicas_that_the_cluster_could_never_hold_are_refused(ray_cluster: None, tmp_path: Path):
    tracking_uri = f"sqlite:///{tmp_path}/mlflow.db"
    version = bundles.register(tracking_uri, "tiny", bundles.write_bundle(tmp_path / "bundle", 140))
    wanted = {"tracking_uri": tracking_uri, "model_uri": version.uri, "behind_proxy": True, "gpus_per_replica": 1}
    with pytest.raises(ValueError, match=r"^serve\.gpus_per_replica: needs 1 CPU \+ 1 GPU .* no node has any"):
        app.application(wanted)
