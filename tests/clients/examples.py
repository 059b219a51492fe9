"""Run examples in one process, as their users would. Arguments: files. Prints what each printed, as JSON."""

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path

found = {}
for path in sys.argv[1:]:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        runpy.run_path(path, run_name="__main__")
    found[Path(path).name] = output.getvalue()
print(json.dumps(found))
