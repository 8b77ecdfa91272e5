#!/usr/bin/env bash
# Ray: a list of exceptions in .rayignore, which git reads as "only these", uploads a working_dir without any file.
#
# Versions: ray 2.60.0, git 2.39, Python 3.11.
# Ray documents .rayignore as a file in the syntax of .gitignore. There `/*` means everything in the folder, and `!/jobs`
# takes that folder out of it. Ray asks the same patterns about the folder itself, as `.`; `/*` matches that, and nothing
# below it is looked at. No warning is given: the job starts in an empty folder. With `!/.` added, both read alike.
#
# Output seen:
#   git keeps: jobs/train.py
#   Ray's task sees, with /* and !/jobs: []
#   Ray's task sees, with !/. added: ['jobs']
# Exits 1 where Ray takes the files of the first list.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "ray[default]==2.60.0"
cat > "$folder/seen.py" <<'PYTHON'
import os
import subprocess
import sys
from pathlib import Path

import ray

root = Path(sys.argv[1])
seen = {}
for name, more in (("with /* and !/jobs", ""), ("with !/. added", "!/.\n")):
    code = root / name.replace("/", "").replace(" ", "-").replace("*", "").replace("!", "")
    (code / "jobs").mkdir(parents=True)
    (code / "jobs" / "train.py").write_text("print('trains')\n")
    (code / "data.bin").write_bytes(b"not code")
    (code / ".rayignore").write_text(f"/*\n!/jobs\n{more}")
    if not more:
        (code / ".gitignore").write_text("/*\n!/jobs\n")
        subprocess.run(["git", "init", "--quiet", str(code)], check=True)
        listed = ["git", "-C", str(code), "ls-files", "--others", "--exclude-standard"]
        print("git keeps:", subprocess.run(listed, capture_output=True, text=True, check=True).stdout.strip())
        (code / ".gitignore").unlink()
    ray.init("local", num_cpus=1, logging_level="ERROR", runtime_env={"working_dir": str(code)}, include_dashboard=False)
    files = ray.remote(lambda: sorted(one for one in os.listdir(".") if not one.startswith(".")))
    seen[name] = ray.get(files.remote())
    ray.shutdown()
    print(f"Ray's task sees, {name}: {seen[name]}")
sys.exit(0 if list(seen.values()) == [[], ["jobs"]] else 1)
PYTHON
export RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=disabled
cd "$folder"
"$folder/venv/bin/python" "$folder/seen.py" "$folder" 2>"$folder/log" || { tail -n 5 "$folder/log"; exit 1; }
