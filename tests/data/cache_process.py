"""Run by test_cache.py in a process of its own: tokenises a domain beside another process, or is killed half-way.

python cache_process.py beside FOLDER RANK     waits for the other rank in FOLDER, logs there what it tokenises
python cache_process.py killed BATCHES         is killed by SIGKILL before that batch
"""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from flextron_lit.data import TextDomain, tokenized
from flextron_lit.sources import load_tokenizer

TOKENIZER = load_tokenizer("random:" + str(Path(__file__).parents[2] / "configs/models/tiny-llama"))
DOMAIN = TextDomain(source="generated:60,0")


def digests(held_out=0.1):
    made = tokenized.tokenized("tales", DOMAIN, TOKENIZER, held_out=held_out, seed=0)
    contents = {split: (stream.tokens, stream.starts) for split, stream in made.streams.items()}
    return {k: [hashlib.sha256(part.tobytes()).hexdigest() for part in parts] for k, parts in contents.items()}


def beside(folder, rank):
    write = tokenized._write

    def logged(target, *arguments):
        with (folder / "log").open("a") as file:
            file.write(f"{target.name}\n")
        # the other one comes to the lock in the meantime
        time.sleep(0.5)
        write(target, *arguments)

    tokenized._write = logged
    (folder / f"ready.{rank}").touch()
    while len(list(folder.glob("ready.*"))) < 2:
        time.sleep(0.01)
    print(json.dumps({"together": digests(), "alone": digests(0.2 + 0.1 * rank)}))


def killed(before):
    encode, batches = tokenized.encode, iter(range(10**6))

    def deadly(*given):
        if next(batches) == before:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(*given)

    tokenized.encode, tokenized.BATCH_DOCUMENTS = deadly, 8
    digests()


if __name__ == "__main__":
    if sys.argv[1] == "beside":
        beside(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        killed(int(sys.argv[2]))
