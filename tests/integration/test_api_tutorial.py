"""The tutorial of the HTTP service does what it says, command by command."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"(?:<!-- ([^>]*) -->\n)?```(\w+)\n(.*?)```\n", re.DOTALL)


def test_the_tutorial_does_what_it_says(api: Any, tmp_path: Path) -> None:
    blocks = _BLOCK.findall((ROOT / "docs/tutorial-http.md").read_text())
    # The results of the first two steps.
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith("EVALSTORE_")},
        "PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}",
        "EVALSTORE_DATABASE_URL": api.database_url,
        "EVALSTORE_REDIS_URL": api.redis_url,
        "EVALSTORE_API_URL": api.url,
        "EVALSTORE_READ_API_KEYS": "read-key-0001",
        "EVALSTORE_WRITE_API_KEYS": "write-key-0001",
    }
    assert [note for note, language, _ in blocks[:2]] == ["runs on in the background", "takes up what evalstore up left"]
    shown = ""
    performed = 0
    for _, language, text in blocks[2:]:
        if language == "sh":
            done = subprocess.run(["bash", "-ec", text], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            shown = done.stdout.strip()
            performed += 1
        else:
            anything = ".*".join(map(re.escape, text.strip().split("…")))
            assert re.fullmatch(anything, shown, re.DOTALL), f"should print\n{text}\nand prints\n{shown}"
    assert performed >= 8
