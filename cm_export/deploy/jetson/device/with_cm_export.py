"""Build one engine with cm-export's own builder, which checks the network and the engine; passes its result on.

python3 device/with_cm_export.py JOB.json        exit code 1 and one line when it refuses
"""

import json
import subprocess
import sys


def main(file):
    command = [sys.executable, "-m", "cm_export.backends.tensorrt.builder", file]
    # An open stdin tells the builder that somebody still waits for it.
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, universal_newlines=True)
    last = {}
    for line in child.stdout:
        print(line, end="", flush=True)
        last = json.loads(line)
    code = child.wait()
    if "result" in last and code == 0:
        return 0
    print(f"[E] {last.get('error', f'the builder ended with code {code}')}", file=sys.stderr)
    return 137 if code == -9 else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
