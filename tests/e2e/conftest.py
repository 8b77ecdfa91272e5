"""A PACS that tests share: Orthanc with DICOMweb, empty when a file of tests begins."""

import os
from collections.abc import Iterator

import pytest
import requests
from dicomweb_client import DICOMwebClient

from tests.orthanc import PASSWORD, USER, missing, orthanc


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of Orthanc's root."""
    why = missing()
    if why is not None:
        pytest.skip(why)
    with orthanc(tmp_path_factory.mktemp("orthanc")) as url:
        yield url


@pytest.fixture(scope="module")
def session() -> requests.Session:
    """Who may use it."""
    session = requests.Session()
    session.auth = (os.environ[USER], os.environ[PASSWORD])
    return session


@pytest.fixture(scope="module")
def client(server: str, session: requests.Session) -> DICOMwebClient:
    return DICOMwebClient(f"{server}/dicom-web", session)
