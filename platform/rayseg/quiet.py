"""Quiet: what libraries write to a terminal whatever their log level is, TensorFlow's greetings above all."""

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from types import ModuleType

_GREETINGS = ("All log messages before absl::InitializeLog()", "oneDNN custom operations are on")


@contextlib.contextmanager
def unheard(*texts: str) -> Iterator[None]:
    """Drops lines with one of these texts that this process, its native code too, writes to file descriptor 2 within.

    Other lines come when it ends, as they were written. For moments only: what ends the process within takes its last
    lines with it, and a child that is started within writes to where nobody reads. A process with the descriptor
    closed, as some daemons have it, has no lines to drop.
    """
    try:
        kept = os.dup(2)
    except OSError:
        yield
        return
    with os.fdopen(kept, "wb") as terminal, tempfile.TemporaryFile() as written:
        _flush()
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            _flush()
            os.dup2(kept, 2)
            written.seek(0)
            dropped = [text.encode() for text in texts]
            terminal.writelines(line for line in written if not any(text in line for text in dropped))


def _flush() -> None:
    if sys.stderr is not None:
        sys.stderr.flush()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds TensorFlow, once."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The module as it is found without this, whose code runs with its greetings dropped."""
        if name != "tensorflow":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_quietly(module: ModuleType) -> None:
            with unheard(*_GREETINGS):
                run(module)

        spec.loader.exec_module = run_quietly  # type: ignore[method-assign]
        return spec


def begin() -> None:
    """From now on TensorFlow is imported quietly."""
    if "tensorflow" not in sys.modules and not any(isinstance(one, _Finder) for one in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
