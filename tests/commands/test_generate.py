"""`python main.py generate`: once as a user runs it, then in process, which is faster."""

import io
import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch

from flextron_lit import FlextronModel, checkpoint
from flextron_lit.commands.generate import command, raw_text
from flextron_lit.generation import call as generating
from flextron_lit.generation.call import ROUNDS
from flextron_lit.generation.speculative import speculate
from flextron_lit.routers.budget_prices import LARGEST, Priced, Prices
from flextron_lit.routers.dynamic import mean_ratio
from flextron_lit.routers.staleness import stale_files
from tests.data.chat import CHATML
from tests.front_door import in_own_process
from tests.served import dynamic_router, static_router, write

PROMPT = "Ada feeds the owl"


def history(*formats, stage="ElasticTraining"):
    domains = {f"domain{i}": {"format": each} for i, each in enumerate(formats)}
    return [{"stage": stage, "data": {"domains": domains}}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("served") / "flextron", history=history("text"))


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    return write(tmp_path_factory.mktemp("chatty") / "flextron", history=history("text"), chat_template=CHATML)


@pytest.fixture(scope="module")
def model(folder):
    return FlextronModel.from_pretrained(folder)


@pytest.fixture
def generate(folder, capsys):
    """Standard output and standard error of a command line."""

    def called(*options, checkpoint=folder, prompt=PROMPT):
        prompted = () if prompt is None else ("--prompt", prompt)
        command(["--checkpoint", str(checkpoint), *prompted, *map(str, options)])
        captured = capsys.readouterr()
        return captured.out, captured.err

    return called


def expected(model, text=PROMPT, tokens=20, **settings):
    """What the model itself goes on with."""
    inputs = model.tokenizer(text, return_tensors="pt")
    settings = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 256} | settings
    new = model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
    return model.tokenizer.decode(new, skip_special_tokens=True)


# --- the text ---------------------------------------------------------------------------------------------------


def test_the_text_alone_goes_to_standard_output(folder, model, tmp_path):
    (tmp_path / "prompt.txt").write_text(PROMPT + "\n")
    options = ("--budget", "0.6", "--prompt_file", tmp_path / "prompt.txt", "--max_new_tokens", 20, "--threads", 1)
    done = in_own_process("generate", "--checkpoint", folder, *options)
    assert (done.returncode, done.stdout) == (0, expected(model, budget=0.6) + "\n")
    budget, tokens = done.stderr.splitlines()
    assert budget.startswith("budget 0.6: a look-up in the ladder of the router for parameters; 0.")
    assert budget.endswith("of the full network's parameters")
    assert tokens.startswith(f"tokens: {len(PROMPT)} of the prompt, 20 new in ")
    assert done.stdout != expected(model) + "\n"


@pytest.mark.parametrize("budget", [(), ("--budget", "0.6"), ("--budget", "flops=0.8", "--dynamic")])
def test_what_is_streamed_is_what_the_model_says(generate, model, budget):
    settings = {"budget": budget[1], "dynamic": "--dynamic" in budget} if budget else {}
    text = expected(model, **settings)
    streamed, _ = generate(*budget, "--max_new_tokens", 20)
    assert streamed == text + "\n"
    found, said = generate(*budget, "--max_new_tokens", 20, "--json")
    assert json.loads(found)["text"] == text
    assert said == ""


@pytest.mark.parametrize("options", [(), ("--speculative", "0.6")], ids=["alone", "drafted"])
def test_words_come_one_by_one(generate, monkeypatch, options):
    written = []

    class Told(io.StringIO):
        def write(self, text):
            written.append(text)
            return len(text)

    def pieces(draw):
        written.clear()
        generate("--max_new_tokens", 60, "--temperature", 5, "--seed", draw, *options)
        return len([text for text in written if text])

    monkeypatch.setattr(sys, "stdout", Told())
    # at once it would be the text, and the line break that ends it; a text may lack the spaces that it is cut at
    assert any(pieces(draw) > 2 for draw in range(30))


def test_a_prompt_comes_from_a_file_or_standard_input_too(generate, model, monkeypatch, tmp_path):
    text = "Zwölf Eulen\nrufen"
    (tmp_path / "prompt.txt").write_bytes(f"{text}\n".encode())
    wanted = expected(model, text) + "\n"
    assert generate("--prompt_file", tmp_path / "prompt.txt", "--max_new_tokens", 20, prompt=None)[0] == wanted
    for options in (("--prompt", "-"), ("--prompt_file", "-")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{text}\n".encode())))
        assert generate(*options, "--max_new_tokens", 20, prompt=None)[0] == wanted
    assert generate("--max_new_tokens", 20)[0] != wanted


def test_beyond_rotary_positions_it_goes_on(generate, model):
    assert model.config.max_position_embeddings == 512
    found = json.loads(generate("--json", "--max_new_tokens", 2, prompt="o" * 520)[0])
    assert (found["prompt_tokens"], found["new_tokens"]) == (520, 2)


def test_tokens_are_drawn_as_asked_for(generate, model):
    def drawn(*options):
        return generate("--max_new_tokens", 20, *options)[0]

    assert drawn("--temperature", 1, "--seed", 1) == drawn("--temperature", 1, "--seed", 1)
    assert drawn("--temperature", 1) == drawn("--temperature", 1, "--seed", 0)
    assert drawn("--temperature", 1) != drawn("--temperature", 1, "--seed", 1)
    # the coldest and the narrowest draw is the likeliest token
    likeliest = expected(model) + "\n"
    assert drawn("--temperature", 1e-6) == likeliest
    assert drawn("--top_p", 1e-6) == likeliest
    assert drawn("--top_p", 1.0) not in (likeliest, drawn("--temperature", 3))


def test_what_the_models_files_say_is_told_and_not_used(generate, model, folder, tmp_path):
    own = shutil.copytree(folder, tmp_path / "own")
    said = {"do_sample": True, "num_beams": 4, "num_return_sequences": 2, "repetition_penalty": 1.9, "use_cache": False}
    said["suppress_tokens"] = list(range(200))
    (own / "generation_config.json").write_text(json.dumps({"eos_token_id": 256, "pad_token_id": 0, **said}))
    record = json.loads((own / checkpoint.RECORD).read_text())
    del record["sha256"]
    (own / checkpoint.RECORD).write_text(json.dumps(record))
    for options in ((), ("--budget", "0.6"), ("--speculative", "0.3"), ("--temperature", 1)):
        wanted, told = generate(*options, "--max_new_tokens", 8)
        text, noted = generate(*options, "--max_new_tokens", 8, checkpoint=own)
        assert text == wanted
        (note,) = [line for line in noted.splitlines() if line not in told and not line.startswith("tokens: ")]
        sampled = "" if "--temperature" in options else "do_sample true, "
        assert note == (
            "note: not asked for here, so not used of the model's own settings (generation_config.json): "
            f"{sampled}num_beams 4, use_cache false, repetition_penalty 1.9, "
            "suppress_tokens [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 1..., num_return_sequences 2"
        )
    assert json.loads(generate("--json", checkpoint=own)[0])["text"] == expected(model, tokens=100)


def test_an_answer_is_as_long_as_fits(generate, model):
    most = model.config.max_position_embeddings
    for size, tokens in ((most - 1, 1), (most - 30, 30), (10, 100)):
        found = json.loads(generate("--temperature", 1, "--json", prompt="o" * size)[0])
        assert found["prompt_tokens"] == size
        assert found["new_tokens"] <= tokens
    # unless the token that ends a text is drawn before: about one in nine answers
    lengths = (
        json.loads(generate("--temperature", 1, "--seed", draw, "--json", prompt="o" * 10)[0])["new_tokens"]
        for draw in range(20)
    )
    assert any(length > 30 for length in lengths)


# --- drafts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "draft"),
    [((), "0.8"), (("--budget", "0.6"), "0.3"), (("--budget", "flops=0.8", "--dynamic"), "0.8")],
)
def test_drafts_leave_the_text_as_it_is(generate, model, budget, draft):
    text = expected(model, **({"budget": budget[1], "dynamic": "--dynamic" in budget} if budget else {}))
    options = (*budget, "--speculative", draft, "--max_new_tokens", 20)
    streamed, said = generate(*options)
    assert streamed == text + "\n"
    assert text != expected(model, budget=draft)
    decides, drafts, drafted, tokens = said.splitlines()
    assert decides.startswith(f"budget {budget[1]}: " if budget else "the full network")
    assert drafts.startswith(f"drafts within {draft}: a look-up in the ladder of the router for parameters; 0.")
    assert tokens.startswith(f"tokens: {len(PROMPT)} of the prompt, 20 new in ")
    found = json.loads(generate(*options, "--json")[0])
    made = found["speculative"]
    assert found["text"] == text
    assert drafted == (
        f"drafted tokens: {made['drafted']}, {made['accepted']} accepted ({made['accepted'] / made['drafted']:.0%}); "
        f"{20 / made['passes']:.2f} tokens a pass of what decides"
    )
    assert made["accepted"] + made["passes"] == 20
    # at least one: what decides adds a token to those that it accepts
    assert made["tokens_per_pass"] == 20 / made["passes"] >= 1
    assert made["costs"]["parameters"] <= float(draft)


def test_as_many_tokens_are_drafted_as_asked_for_also_when_compared(generate, model, monkeypatch):
    runs = []

    def noted(backbone, **settings):
        runs.append([settings.get(name) for name in ("draft", "verifier", "draft_tokens", "min_new_tokens")])
        return speculate(backbone, **settings)

    monkeypatch.setattr(generating, "speculate", noted)
    options = ("--speculative", "0.5", "--draft_tokens", 1, "--max_new_tokens", 8, "--json")
    found = json.loads(generate(*options, "--compare")[0])
    draft, full = model.flextron.answer(0.5).sub_network, model.backbone.space.full()
    assert runs == [[draft, full, 1, None], *[[draft, full, 1, 8]] * ROUNDS]
    assert found["speculative"]["passes"] >= 4
    assert found["time_ratio"] > 0


def test_drafts_are_drawn_by_the_seed(generate):
    def drawn(seed, *options):
        return generate("--max_new_tokens", 20, "--temperature", 1, "--seed", seed, *options)[0]

    options = ("--speculative", "0.5")
    assert drawn(1, *options) == drawn(1, *options)
    assert drawn(1, *options) not in (drawn(2, *options), drawn(1))


# --- budgets ----------------------------------------------------------------------------------------------------


def test_the_costs_are_those_of_the_budget(generate, model):
    found = json.loads(generate("--budget", "0.6", "--json", "--max_new_tokens", 5)[0])
    (ratio,) = found["costs"].values()
    answer = model.flextron.answer(0.6)
    assert ratio == model.flextron.routing().tables["parameters"].ratio(answer.sub_network) <= 0.6
    assert found["how"] == answer.how
    for budget in ("0.76", "0.95"):
        found = json.loads(generate("--budget", budget, "--dynamic", "--json", "--max_new_tokens", 5)[0])
        assert found["how"] == "the dynamic router for flops"
        # all tokens that were read, as the policy itself counts them
        policy = model.flextron.dynamic_routing.answer(budget, model.backbone)
        expected(model, tokens=5, budget=budget, dynamic=True)
        policy.take()
        with model.use(policy):
            inputs = model.tokenizer(PROMPT, return_tensors="pt")
            new = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=256)
        assert found["new_tokens"] == new.shape[1] - inputs["input_ids"].shape[1]
        assert found["costs"]["flops"] == pytest.approx(mean_ratio(policy.take(), policy.table), rel=1e-6)
        assert policy.table.smallest_ratio <= found["costs"]["flops"] <= policy.table.largest_ratio
    assert generate("--max_new_tokens", 5)[1].startswith("the full network\n")
    assert "budget 1.0: the full network meets it" in generate("--budget", "1.0", "--max_new_tokens", 5)[1]


def test_a_dynamic_budget_spends_what_its_price_says(generate, tmp_path):
    def priced(backbone):
        """Prices that outweigh all logits: every token gets the least at one budget and the most at the other."""
        prices = Prices((Priced(0.75, LARGEST, 0.75, 3.0), Priced(0.95, -LARGEST, 0.95, 2.0)))
        return replace(dynamic_router(backbone), prices=prices)

    folder = write(tmp_path / "flextron", history=history("text"), routers=(static_router, priced))
    model = FlextronModel.from_pretrained(folder)
    table = model.flextron.dynamic_routing.answer("0.95", model.backbone).table
    for budget, ratio in (("0.75", table.smallest_ratio), ("0.95", table.largest_ratio)):
        options = ("--budget", budget, "--dynamic", "--json", "--max_new_tokens", 5)
        found = json.loads(generate(*options, checkpoint=folder)[0])
        assert found["costs"]["flops"] == pytest.approx(ratio, rel=1e-6)
    assert table.smallest_ratio < 0.9 * table.largest_ratio


def test_a_comparison_times_as_many_tokens_of_both(generate, model, monkeypatch):
    runs = []
    stock = FlextronModel.generate

    def noted(self, **settings):
        runs.append((self.backbone.selection.current, settings.get("min_new_tokens"), settings["max_new_tokens"]))
        return stock(self, **settings)

    monkeypatch.setattr(FlextronModel, "generate", noted)
    _, said = generate("--budget", "0.6", "--compare", "--max_new_tokens", 8)
    narrow, full = model.flextron.answer(0.6).sub_network, model.backbone.space.full()
    made, *timed = runs
    assert made == (narrow, None, 8)
    assert [selection for selection, *_ in timed] == [full, narrow, full] * ROUNDS
    assert {tokens for _, *tokens in timed for tokens in tokens} == {8}
    assert "8 tokens take" in said
    assert "of the full network's time" in said
    found = json.loads(generate("--budget", "0.8", "--dynamic", "--compare", "--json", "--max_new_tokens", 8)[0])
    assert found["time_ratio"] > 0
    assert found["full_seconds"] > 0


def test_what_a_comparison_counts_is_no_part_of_the_costs(generate):
    # drawn, so that the tokens of the comparison are others
    options = ("--budget", "0.8", "--dynamic", "--json", "--max_new_tokens", 3, "--temperature", 3)
    alone, compared = (json.loads(generate(*options, *each)[0])["costs"] for each in ((), ("--compare",)))
    assert alone == compared


def test_a_stale_router_is_one_clear_line(folder, model, generate, tmp_path):
    files = stale_files(folder, model.backbone.space, "JointTuning")
    checkpoint.extend(folder, tmp_path / "stale", files=files)
    for _ in range(2):
        _, said = generate("--budget", "0.8", "--dynamic", "--max_new_tokens", 2, checkpoint=tmp_path / "stale")
        assert said.startswith("note: the dynamic router for flops is stale: JointTuning has changed the network since")
        assert "Warning" not in said


# --- chats ------------------------------------------------------------------------------------------------------


def test_a_chat_goes_through_the_template(chatty, generate, model):
    said, noted = generate("--chat", "--max_new_tokens", 20, checkpoint=chatty)
    asked = f"<user>\n{PROMPT}{model.tokenizer.eos_token}\n<assistant>\n"
    assert said == expected(model, asked) + "\n"
    assert noted.startswith("note: the weights were trained on raw text (domain0), which weakens")
    said, noted = generate("--max_new_tokens", 20, checkpoint=chatty)
    assert said == expected(model) + "\n"
    assert "note" not in noted


@pytest.mark.parametrize(
    ("rows", "raw"),
    [
        (history("text", "chat", "jsonl"), ["domain0", "domain2"]),
        (history("chat"), []),
        (history("chat") + history("text", stage="JointTuning"), ["domain0"]),
        # these leave the weights as they are
        (history("chat") + history("text", "text", stage="StaticRouterTraining"), []),
        ([{"stage": "ElasticTraining", "data": None}], []),
        ([], []),
    ],
)
def test_raw_text_is_what_is_no_conversation(rows, raw):
    assert raw_text(rows) == raw


# --- mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--budget", "0.001"), "the smallest parameters possible is"),
        (("--budget", "quickly"), "cannot read the budget 'quickly'"),
        (("--budget", "0.6", "--dynamic"), "meets budgets of 0.750 and more, not 0.6"),
        (("--budget", "0.6", "--latency", "mine"), "no latency table 'mine'"),
        (("--budget", "0.8", "--dynamic", "--latency", "mine"), "--latency has no effect with --dynamic"),
        (("--dynamic",), "--dynamic has no effect on the full network; add a --budget"),
        (("--latency", "mine"), "--latency has no effect on the full network"),
        (("--compare",), "--compare has no effect on the full network"),
        (("--budget", "1.0", "--compare"), "--compare has no effect: this is the full network"),
        (("--draft_tokens", "2"), "--draft_tokens has no effect without --speculative"),
        (("--speculative", "0.5", "--draft_tokens", "0"), "--draft_tokens must be 1 or more, not 0"),
        (("--speculative", "0.5", "--dynamic"), "--dynamic has no effect on the full network; add a --budget"),
        (("--speculative", "0.001"), "the smallest parameters possible is"),
        (("--speculative", "1.0"), "--speculative 1.0 drafts by a sub-network that is nowhere narrower"),
        (("--budget", "0.6", "--speculative", "0.9"), "--speculative 0.9 drafts by .* nowhere narrower"),
        (("--speculative", "0.5", "--latency", "mine"), "no latency table 'mine'"),
        (("--chat",), "has no chat template"),
        (("--seed", "1"), "--seed has no effect where the likeliest token is taken"),
        (("--temperature", "0"), "--temperature must be finite and above 0, not 0.0"),
        (("--top_p", "1.5"), "--top_p must be above 0 and at most 1, not 1.5"),
        (("--max_new_tokens", "0"), "--max_new_tokens must be 1 or more, not 0"),
        (("--threads", "0"), "--threads must be 1 or more, not 0"),
        (("--device", "abacus"), "cannot use the device 'abacus'"),
        (("--prompt_file", "prompt.txt"), "either --prompt or --prompt_file"),
    ],
)
def test_a_mistake_is_one_clear_line(generate, options, message):
    with pytest.raises(ValueError, match=message):
        generate(*options)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "either --prompt or --prompt_file"),
        ("", "the prompt is empty"),
        (" \n", "the prompt is empty"),
    ],
)
def test_a_prompt_that_cannot_be_used_is_one_clear_line(generate, prompt, message):
    with pytest.raises(ValueError, match=message):
        generate(prompt=prompt)


def test_a_prompt_file_that_is_no_text_is_named(generate, tmp_path):
    (tmp_path / "prompt.bin").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match=r"prompt.bin"):
        generate("--prompt_file", tmp_path / "prompt.bin", prompt=None)
    with pytest.raises(OSError, match=r"nowhere.txt"):
        generate("--prompt_file", tmp_path / "nowhere.txt", prompt=None)


def test_a_folder_that_cannot_answer_says_why(tmp_path, generate):
    with pytest.raises(ValueError, match="there is no folder"):
        generate(checkpoint=tmp_path / "none")
    bare = write(tmp_path / "bare", routers=())
    for options, message in (
        (("--budget", "0.6"), "no router, no surrogate and no excess losses"),
        (("--budget", "0.8", "--dynamic"), "holds no dynamic router"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(*options, checkpoint=bare)


def test_precision_is_as_asked_for(generate, monkeypatch):
    kinds = []
    stock = FlextronModel.generate
    monkeypatch.setattr(
        FlextronModel, "generate", lambda self, **settings: kinds.append(self.dtype) or stock(self, **settings)
    )
    generate("--dtype", "bfloat16", "--max_new_tokens", 2)
    generate("--max_new_tokens", 2)
    assert kinds == [torch.bfloat16, torch.float32]
