"""The processes that test_faults.py kills: the real inference service over the real NATS and S3 servers.

This process only imports what is slow to import, then forks a service for each line on its standard input, which is the
service's environment as JSON, and answers with its process id.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import services.inference.model  # noqa: F401  (slow to import)
from services.core import runtime
from services.inference.__main__ import main
from services.inference.config import InferenceSettings

if __name__ == "__main__":
    print("ready", flush=True)
    for line in sys.stdin:
        environment = json.loads(line)
        child = os.fork()
        if not child:
            os.environ.update(environment)
            os._exit(runtime.run("inference", InferenceSettings, main))
        print(child, flush=True)
        if "CODEGRAFT_TEST_BESIDE" not in environment:  # the next one takes the place of this one
            os.waitpid(child, 0)
