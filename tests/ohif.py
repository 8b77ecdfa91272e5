"""OHIF in a browser, with the series and SEG of a server at its own origin, and where it puts the voxels of a SEG."""

import subprocess
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests

VERSION = "3.13.2"
CONFIG = """window.config = {
  routerBasename: "/", extensions: [], modes: [], showStudyList: true, maxNumberOfWebWorkers: 1,
  defaultDataSourceName: "dicomweb",
  dataSources: [{
    namespace: "@ohif/extension-default.dataSourcesModule.dicomweb", sourceName: "dicomweb",
    configuration: {
      friendlyName: "server", name: "server", qidoRoot: "/dicom-web", wadoRoot: "/dicom-web",
      wadoUriRoot: "/dicom-web", imageRendering: "wadors", thumbnailRendering: "wadors", enableStudyLazyLoad: true,
      qidoSupportsIncludeField: false, supportsFuzzyMatching: false, supportsWildcard: true, singlepart: "bulkdata",
      bulkDataURI: { enabled: true, relativeResolution: "studies" },
    },
  }],
};"""
# Of every voxel that is not 0 in the label maps that it made of a SEG: where it draws it, in the patient (LPS).
POINTS = """() => {
  const { cache, metaData } = window.cornerstone, points = [];
  for (const one of window.cornerstoneTools.segmentation.state.getSegmentations())
    for (const id of one.representationData.Labelmap.imageIds) {
      const image = cache.getImage(id), values = image.voxelManager.getScalarData();
      const plane = metaData.get("imagePlaneModule", image.referencedImageId);
      for (let number = 0; number < values.length; number++)
        if (values[number]) {
          const right = (number % image.columns) * plane.columnPixelSpacing;
          const down = Math.floor(number / image.columns) * plane.rowPixelSpacing;
          points.push([0, 1, 2].map((axis) =>
            plane.imagePositionPatient[axis] + plane.rowCosines[axis] * right + plane.columnCosines[axis] * down));
        }
    }
  return points;
}"""
LOADED = """() => {
  const found = window.cornerstoneTools?.segmentation.state.getSegmentations() ?? [];
  return found.length && found.every((one) => one.representationData.Labelmap.imageIds.every(
    (id) => window.cornerstone.cache.getImage(id)));
}"""
_TYPES = {
    ".js": "text/javascript",
    ".css": "text/css",
    ".html": "text/html",
    ".wasm": "application/wasm",
    ".json": "application/json",
    ".svg": "image/svg+xml",
}


def fetched(folder: Path) -> Path | None:
    """The folder of the application, from the npm registry; None where that cannot be reached."""
    command = ["npm", "pack", "--silent", f"@ohif/app@{VERSION}"]
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=300)
    except (OSError, subprocess.SubprocessError):
        return None
    with tarfile.open(folder / f"ohif-app-{VERSION}.tgz") as packed:
        packed.extractall(folder, filter="data")
    return folder / "package" / "dist"


@contextmanager
def ohif(folder: Path, server: str, session: requests.Session) -> Iterator[str]:
    """Yields the URL of the application in `folder`, which has the server's DICOMweb beside it."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            path, status = urlsplit(self.path).path, 200
            file = folder / path.lstrip("/")
            if path.startswith("/dicom-web"):
                told = session.get(server + self.path, headers={"Accept": self.headers["Accept"]}, timeout=60)
                body = told.content.replace(server.encode(), f"http://{self.headers['Host']}".encode())
                kind, status = told.headers.get("Content-Type", ""), told.status_code
            elif path == "/app-config.js":
                body, kind = CONFIG.encode(), "text/javascript"
            else:
                file = file if file.is_file() else folder / "index.html"
                body, kind = file.read_bytes(), _TYPES.get(file.suffix, "application/octet-stream")
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
            self.end_headers()
            self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{serving.server_address[1]}"
        finally:
            serving.shutdown()
