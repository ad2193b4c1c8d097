from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from distml.errors import UsageError
from distml.spec.loader import load_spec


@pytest.fixture
def fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Write a spec, load it, and return the one line it is refused with, the file called `job.yaml`."""
    monkeypatch.chdir(tmp_path)

    def fail(text: str | bytes, overrides: object = ()) -> str:
        Path("job.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(UsageError) as caught:
            load_spec("job.yaml", overrides)
        message = str(caught.value)
        assert "\n" not in message
        return message

    return fail
