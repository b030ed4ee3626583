"""Snippets of Python, each in a process of its own where nothing of ours is imported yet.

Every process is forked from one that has loaded the big libraries, which takes seconds.
"""

import json
import subprocess
import sys

from tests.front_door import ENVIRONMENT

SERVER = """
import json, os, sys
import lightning.pytorch.cli, lightning.pytorch.loggers, matplotlib.figure, torch.utils.tensorboard, transformers

assert not {"flextron_lit", "callbacks"} & {name.partition(".")[0] for name in sys.modules}
libraries = [entry for entry in sys.path if entry]
given = json.load(sys.stdin)
for name, (folder, path, code) in given["snippets"].items():
    child = os.fork()
    if not child:
        sys.stdout = open(os.path.join(given["output"], name), "w")
        os.chdir(folder)
        sys.path[:] = ["", *path, *libraries]
        try:
            exec(code, {"__name__": "__main__"})
        except BaseException as error:
            print(f"{type(error).__name__}: {error}")
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
"""


def run(snippets, output):
    """What each snippet prints, or the error that ended it.

    Args:
        snippets: by name: the folder it runs in, further entries of the path, and the code.
        output: an empty folder.
    """
    given = {name: (str(folder), list(map(str, path)), code) for name, (folder, path, code) in snippets.items()}
    done = subprocess.run(
        [sys.executable, "-c", SERVER],
        cwd=output,
        env=ENVIRONMENT,
        input=json.dumps({"output": str(output), "snippets": given}),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return {name: (output / name).read_text().strip() for name in snippets}
