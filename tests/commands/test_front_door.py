import csv
import json
import math
import random
import signal
import time
from operator import mul

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from flextron_lit import checkpoint
from flextron_lit.checkpoint.in_memory import load_elastic
from flextron_lit.losses.measured_loss import MeasuredLoss
from flextron_lit.sources import load_tokenizer
from tests.front_door import ROOT, fail, in_own_process, run, start, succeed
from tests.runs import TIMED, compared_by, equal, logged, pictures, table, weights

DEBUG = ("-c", "configs/debug.yaml")
STEPS = 40
VOCABULARY = 257


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The run folder of one undisturbed debug run, and what it printed.

    As a user starts it, so with other hashes of strings than all that is forked and compared with it.
    """
    folder = tmp_path_factory.mktemp("debug") / "run"
    done = in_own_process("fit", *DEBUG, "--run_folder", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_python_main_alone_tells_what_to_do_first():
    done = in_own_process()
    assert done.returncode == 0, done.stderr
    assert "python main.py fit -c configs/debug.yaml" in done.stdout
    assert done.stdout == succeed("--help")


def test_an_unknown_command_names_the_nearest():
    assert "unknown command 'validat'; did you mean validate?" in fail("validat")


def test_fit_shows_a_table_before_and_after(finished):
    _, printed = finished
    assert "loss at step 0, nats per token" in printed
    assert f"loss in nats per token, step 0 -> step {STEPS}" in printed


def test_training_helps_every_watched_sub_network(finished):
    folder, _ = finished
    rows = table(folder)
    loss = {(r["step"], r["sub_network"], r["domain"]): r["loss"] for r in rows}
    assert {step for step, _, _ in loss} == {0, 20, STEPS}
    names = {name for _, name, _ in loss}
    assert names == {"full", "mlp50", "mlp50-attention50", "random0.80"}
    for name in names:
        for domain in ("stories", "reports"):
            # from random weights, which know next to nothing of 257 tokens (5.5 nats), to how often each occurs (3.0)
            assert abs(loss[0, name, domain] - math.log(VOCABULARY)) < 0.5
            assert loss[STEPS, name, domain] < math.log(VOCABULARY) - 1
    with (folder / "training.csv").open() as file:
        assert [float(r["loss"]) for r in csv.DictReader(file)] == [r["loss"] for r in rows]
    assert (folder / "training.png").stat().st_size > 10_000


def test_tensorboard_has_every_step_once_under_stable_names(finished):
    scalars = logged(finished[0])
    train = {"full/loss", "sampled/loss", "full/kl_original", "sampled/kl_full", "gradient_norm"}
    for name in (*train, "learning_rate"):
        assert [step for step, _ in scalars[f"train/{name}"]] == list(range(1, STEPS + 1))
    for name in TIMED:
        assert scalars[name] == list(range(1, STEPS + 1))
    assert pictures(finished[0]) == {"val/loss against parameters": [0, 20, STEPS]}
    for name in ("full", "mlp50", "mlp50-attention50", "random0.80"):
        assert [step for step, _ in scalars[f"val/{name}/mean/loss"]] == [0, 20, STEPS]
        for domain in ("stories", "reports"):
            assert {f"val/{name}/{domain}/loss", f"val/{name}/{domain}/perplexity"} <= scalars.keys()
    final = {r["sub_network"]: [] for r in table(finished[0])}
    for row in table(finished[0]):
        if row["step"] == STEPS:
            final[row["sub_network"]].append(row["loss"])
    for name, losses in final.items():
        assert scalars[f"val/{name}/mean/loss"][-1][1] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_runs_compare_by_settings_and_final_losses(finished):
    settings, final = compared_by(finished[0])
    expected = {
        "stage": "ElasticTraining",
        "seed": 0,
        "model.optimizer": "AdamW",
        "model.optimizer.lr": 0.005,
        "model.full_weight.start": 1.0,
        "data.block_size": 64,
        "data.domains": "stories, reports",
        "trainer.max_steps": STEPS,
        "BudgetSampling.seed": 0,
    }
    assert {name: settings[name] for name in expected} == expected
    assert not [name for name in settings if "init_args" in name or "class_path" in name or "betas" in name]
    # what this run was, beside what it led to: nothing but the full network is a budget's answer here
    assert final == {"val/full/mean/loss": logged(finished[0])["val/full/mean/loss"][-1]}
    assert "stage: ElasticTraining" in (finished[0] / "tensorboard/hparams.yaml").read_text()


def test_the_checkpoint_is_a_plain_dense_model_with_its_history(finished):
    folder = finished[0] / "flextron"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(model.model.layers[0].mlp).__name__ == "LlamaMLP"
    assert torch.isfinite(model(**tokenizer("Once", return_tensors="pt")).logits).all()
    (record,) = checkpoint.read(folder).history
    assert record["stage"] == "ElasticTraining"
    assert record["steps"] == STEPS
    assert record["tokens"] == STEPS * 4 * 64
    assert record["calibration"]["tokens"] == 1024
    assert record["source"] == "random:configs/models/tiny-llama"
    assert set(record["data"]["domains"]) == {"stories", "reports"}


def test_a_finished_run_says_so_and_does_nothing(finished):
    folder, _ = finished
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}
    assert "is finished" in succeed("fit", *DEBUG, "--run_folder", folder)
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}
    assert not (folder / "resume.ckpt").exists()


def test_another_config_in_the_same_folder_is_refused(finished):
    folder, _ = finished
    message = fail("fit", *DEBUG, "--run_folder", folder, "--trainer.max_steps", 50)
    assert "trainer.max_steps: 40 -> 50" in message
    assert "--fresh" in message
    assert "Traceback" not in message


def test_the_saved_config_repeats_the_run(finished, tmp_path):
    folder, _ = finished
    succeed("fit", "-c", folder / "config.yaml", "--run_folder", tmp_path / "again")
    assert equal(weights(folder), weights(tmp_path / "again"))


def test_another_seed_gives_other_weights(finished, tmp_path):
    settings = ("--trainer.max_steps", 10, "--trainer.val_check_interval", 10)
    for name, seed in (("one", 0), ("two", 1)):
        sampling = json.dumps([{"class_path": "callbacks.BudgetSampling", "init_args": {"seed": seed}}])
        succeed("fit", *DEBUG, *settings, "--run_folder", tmp_path / name, "--trainer.callbacks", sampling)
    assert not equal(weights(tmp_path / "one"), weights(tmp_path / "two"))


@pytest.mark.parametrize("subcommand", ["validate", "test"])
def test_evaluation_uses_what_was_trained(finished, subcommand):
    folder, _ = finished
    printed = succeed(subcommand, *DEBUG, "--run_folder", folder)
    assert "nats per token" in printed
    measured = {
        (r["sub_network"], r["domain"]): r["loss"] for r in json.loads((folder / f"{subcommand}.json").read_text())
    }
    trained = {(r["sub_network"], r["domain"]): r["loss"] for r in table(folder) if r["step"] == STEPS}
    assert measured.keys() == trained.keys()
    if subcommand == "validate":
        assert measured == pytest.approx(trained, rel=1e-6)
    else:
        assert measured != trained
        loaded = load_elastic(str(folder / "flextron"))
        space = loaded.backbone.space
        networks = {
            "full": space.full(),
            "mlp50": space.uniform(mlp=0.5),
            "mlp50-attention50": space.uniform(mlp=0.5, attention=0.5),
        }
        for domain, batches in loaded.held_out("test", 512).items():
            loss = MeasuredLoss(loaded.backbone, batches)
            for name, each in networks.items():
                assert measured[name, domain] == pytest.approx(loss(each), rel=1e-5)


def test_predict_writes_a_row_a_block(finished):
    folder, _ = finished
    succeed("predict", *DEBUG, "--run_folder", folder)
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert {r["domain"] for r in rows} == {"stories", "reports"}
    assert sum(len(r["loss"]["full"]) for r in rows) == 2 * 512 // 64
    assert all(len(r["tokens"]) == len(r["loss"]["mlp50"]) for r in rows)
    # the blocks that are tested on, in which as many tokens are predicted as documents leave
    succeed("test", *DEBUG, "--run_folder", folder)
    for tested in json.loads((folder / "test.json").read_text()):
        own = [row for row in rows if row["domain"] == tested["domain"]]
        tokens = sum(sum(row["tokens"]) for row in own)
        total = sum(sum(map(mul, row["loss"][tested["sub_network"]], row["tokens"])) for row in own)
        assert tested["loss"] == pytest.approx(total / tokens, rel=1e-5)


def test_evaluating_before_training_is_refused(tmp_path):
    message = fail("validate", *DEBUG, "--run_folder", tmp_path / "none")
    assert "does not exist yet: run `fit` with the same config first" in message


def test_training_goes_on_from_a_flextron_checkpoint(finished, tmp_path):
    folder, _ = finished
    start_from = ("--model.init_args.checkpoint", folder / "flextron", "--model.init_args.space", "null")
    settings = ("--trainer.max_steps", 2, "--trainer.val_check_interval", 2)
    quiet = ("--trainer.logger", "false")
    succeed("fit", *DEBUG, *start_from, *settings, *quiet, "--run_folder", tmp_path / "more")
    assert not (tmp_path / "more/tensorboard").exists()
    before, after = checkpoint.read(folder / "flextron"), checkpoint.read(tmp_path / "more" / "flextron")
    assert after.space == before.space
    assert all(torch.equal(a, b) for a, b in zip(before.order, after.order, strict=True))
    assert [r["steps"] for r in after.history] == [STEPS, 2]
    first = {(r["sub_network"], r["domain"]): r["loss"] for r in table(tmp_path / "more") if r["step"] == 0}
    last = {(r["sub_network"], r["domain"]): r["loss"] for r in table(folder) if r["step"] == STEPS}
    assert first == pytest.approx(last, rel=1e-6)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_resumes_to_the_same_weights(finished, tmp_path, how):
    reference, _ = finished
    folder = tmp_path / "killed"
    step = random.Random(f"{how} {time.time_ns()}").randrange(2, STEPS)
    process = start("fit", *DEBUG, "--run_folder", folder)
    wait_for_step(process, folder, step)
    process.send_signal(how)
    assert process.wait(timeout=60) == (-9 if how == signal.SIGKILL else 143), f"killed at step {step}"
    assert not (folder / "flextron").exists()
    succeed("fit", *DEBUG, "--run_folder", folder)
    assert equal(weights(reference), weights(folder)), f"killed at step {step}"
    assert table(reference) == table(folder)
    assert logged(folder) == logged(reference)


def wait_for_step(process, folder, step):
    """Until the event file holds a step: the run is past it, and its last saved state is older."""
    deadline = time.time() + 120
    while time.time() < deadline:
        assert process.poll() is None, "the run ended before it could be killed"
        if (folder / "tensorboard").is_dir() and any(s >= step for s, _ in logged(folder).get("train/full/loss", [])):
            return
        time.sleep(0.02)
    pytest.fail(f"step {step} was not reached")


def test_gpt2_goes_the_same_way(tmp_path):
    dense = tmp_path / "gpt2"
    load_tokenizer(f"random:{ROOT / 'configs/models/tiny-llama'}").save_pretrained(dense)
    GPT2Config(vocab_size=257, n_embd=64, n_layer=3, n_head=4, n_positions=64).save_pretrained(dense)
    settings = ("--trainer.max_steps", 12, "--trainer.val_check_interval", 12)
    start_from = ("--model.init_args.checkpoint", f"random:{dense}")
    succeed("fit", *DEBUG, *settings, *start_from, "--run_folder", tmp_path / "run")
    rows = table(tmp_path / "run")
    loss = {(r["step"], r["sub_network"], r["domain"]): r["loss"] for r in rows}
    # from random weights, which know next to nothing of 257 tokens, towards how often each occurs
    assert all(abs(loss[0, name, domain] - math.log(VOCABULARY)) < 0.5 for _, name, domain in loss)
    assert all(loss[12, name, domain] < math.log(VOCABULARY) - 0.5 for _, name, domain in loss)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "flextron")).__name__ == "GPT2LMHeadModel"
    assert "GPT2LMHeadModel" in succeed("info", tmp_path / "run")


def test_print_config_is_complete_and_runs_nothing(tmp_path):
    printed = succeed("fit", *DEBUG, "--run_folder", tmp_path / "none", "--print_config")
    assert yaml.safe_load(printed)["model"]["init_args"]["clip_norm"] == 1.0
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model.init_args.spce", "1"), "spce"),
        (("--trainer.max_stepz", "1"), "max_stepz"),
        (("--model", "NoSuchStage"), "NoSuchStage"),
        (("-c", "configs/none.yaml"), "configs/none.yaml"),
        (("--model.init_args.full_weight.end", "0"), "full_weight must be above 0"),
        (("--model.init_args.space.mlp", "[0.5, 0.25, 1.0]"), "must ascend"),
        (("--model.init_args.checkpoint", "nowhere/at/all/here"), "nowhere/at/all/here"),
        (("--trainer.callbacks", "[]"), "BudgetSampling"),
        (("--trainer.gradient_clip_val", "1"), "set model.init_args.clip_norm"),
        (("--trainer.default_root_dir", "x"), "name the place with --run_folder"),
        (("--trainer.accumulate_grad_batches", "2"), "use model.init_args.accumulate"),
        (("--trainer.accelerator", "nonsense"), "nonsense"),
        (("--trainer.max_steps", "-1"), "nothing says how long to train"),
    ],
)
def test_a_mistake_is_one_clear_message(arguments, message, tmp_path):
    printed = fail("fit", *DEBUG, "--run_folder", tmp_path / "run", *arguments)
    assert message in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "run" / "flextron").exists()


def test_the_pipeline_runs_its_stages_and_picks_up(tmp_path):
    config = tmp_path / "pipeline.yaml"
    first = {
        "configs": [str(ROOT / "configs/debug.yaml")],
        "settings": {"trainer": {"max_steps": 4, "val_check_interval": 4}},
    }
    config.write_text(yaml.safe_dump({"run_folder": str(tmp_path / "run"), "stages": {"one": first, "two": first}}))
    printed = succeed("pipeline", "-c", config)
    assert "stage 1 of 2: one" in printed
    assert "pipeline finished: 2 of 2 stages" in printed
    assert "main.py pipeline -c" in (tmp_path / "run/report.html").read_text()
    history = checkpoint.read(tmp_path / "run" / "two" / "flextron").history
    assert [r["source"] for r in history] == ["random:configs/models/tiny-llama", str(tmp_path / "run/one/flextron")]
    again = run("pipeline", "-c", config)
    assert again.returncode == 0
    assert again.stdout.count("is finished") == 2
    assert again.stdout.count(" done ") == 2


def test_a_quick_pipeline_has_its_own_folder_and_settings(tmp_path):
    debug = {"configs": [str(ROOT / "configs/debug.yaml")], "minutes": 3, "quick_minutes": 0.5}
    steps = {
        name: {"trainer": {"max_steps": count, "val_check_interval": count}}
        for name, count in (("settings", 4), ("quick", 2))
    }
    # a class, of which the parser of the pipeline makes nothing
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01}}
    steps["settings"]["model"] = {"init_args": {"optimizer": optimizer}}
    config = tmp_path / "pipeline.yaml"
    config.write_text(yaml.safe_dump({"run_folder": str(tmp_path / "run"), "stages": {"one": debug | steps}}))
    printed = succeed("pipeline", "-c", config, "--quick")
    assert "0.5 min" in printed
    own = yaml.safe_load((tmp_path / "run-quick/one/config.yaml").read_text())["model"]["init_args"]["optimizer"]
    assert (own["class_path"], own["init_args"]["lr"]) == ("torch.optim.SGD", 0.01)
    (record,) = checkpoint.read(tmp_path / "run-quick/one/flextron").history
    assert record["steps"] == 2
    assert not (tmp_path / "run").exists()


def test_two_ranks_share_one_latency_table(tmp_path):
    """Sampling goes by the measured table, so ranks with tables of their own would train different sub-networks."""
    sampling = {"strategies": {"stratified": 1.0}, "cost": "latency"}
    profiling = {"workload": {"prompt_tokens": 8, "generated_tokens": 3}, "seconds": 0.5, "held_out": 2}
    callbacks = [
        {"class_path": "callbacks.BudgetSampling", "init_args": sampling},
        {"class_path": "callbacks.LatencyProfiling", "init_args": profiling},
    ]
    trainer = {"max_steps": 4, "val_check_interval": 4, "devices": 2, "strategy": "ddp", "callbacks": callbacks}
    done = in_own_process("fit", *DEBUG, "-c", json.dumps({"trainer": trainer}), "--run_folder", tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [p.name for p in (tmp_path / "run/flextron/costs").iterdir()] == ["latency-cpu-1x8+3-float32.json"]
    assert "latency-cpu-1x8+3-float32.json" in succeed("info", tmp_path / "run").replace("\n", "")
    shown = {name: steps for name, steps in pictures(tmp_path / "run").items() if name.startswith("latency/")}
    assert shown == {f"latency/{phase}, predicted against observed": [0] for phase in ("prefill", "decode")}
    assert logged(tmp_path / "run")["train/data_wait"] == [1, 2, 3, 4]
