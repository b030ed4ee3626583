"""`python main.py generate`: text from a checkpoint within a budget, as it comes."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from flextron_lit.checkpoint.folder import TRAIN_WEIGHTS
from flextron_lit.commands.options import CommandLine, place_of, refuse_below_one, refuse_compiled
from flextron_lit.costs.budget import HELP
from flextron_lit.files.whole_file import json_text
from flextron_lit.generation.answer import Report
from flextron_lit.generation.call import ROUNDS, Chosen, chosen, compare, drafter, generate, notes_told, settings_for
from flextron_lit.generation.own_settings import unused
from flextron_lit.generation.prompt import NEW_TOKENS, Inputs, encoded, prompt_of, room
from flextron_lit.generation.speculative import DRAFT_TOKENS
from flextron_lit.model import FlextronModel
from flextron_lit.terminal.console import end_with_the_reader, show

WRITTEN = 40
"""Characters of a setting that nobody asked for."""


def raw_text(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the domains that are no conversations among those that a checkpoint's weights were trained on."""
    trained = [row.get("data") or {} for row in history if row.get("stage") in TRAIN_WEIGHTS]
    domains = {name: domain for data in trained for name, domain in data.get("domains", {}).items()}
    return [name for name, domain in domains.items() if domain.get("format") != "chat"]


def choices(model: FlextronModel, options: Any) -> tuple[Chosen, Chosen | None]:
    """What decides and what drafts, if anything does, within a command line's budgets.

    Raises:
        ValueError: for a budget that cannot be met or read, or an option that has no effect on what it gets.
    """
    with notes_told(say):
        choice = chosen(model, options.budget, dynamic=options.dynamic, latency=options.latency)
        draft = None
        if options.speculative is not None:
            draft = drafter(model, options.speculative, choice.selection, latency=options.latency)
    if options.compare and draft is None and choice.selection == model.backbone.space.full():
        raise ValueError("--compare has no effect: this is the full network; ask for a --budget that it does not meet")
    return choice, draft


def report(model: FlextronModel, inputs: Inputs, options: Any) -> Report:
    """Generate what a command line asks for; the text is told as it comes, unless it is to be part of JSON.

    Raises:
        ValueError: for a budget that cannot be met or read, or a prompt and answer that are too long.
    """
    prompt_tokens = inputs["input_ids"].shape[1]
    most = room(prompt_tokens, model.config, options.max_new_tokens)
    choice, draft = choices(model, options)
    by = None
    if draft is not None:
        by = {"draft": draft.selection, "draft_tokens": options.draft_tokens or DRAFT_TOKENS}
    settings = settings_for(model.tokenizer, most, options.temperature, options.top_p)
    left_out = unused(model, settings)
    if left_out:
        said = ", ".join(f"{name} {short_json(value)}" for name, value in left_out.items())
        say(f"note: not asked for here, so not used of the model's own settings (generation_config.json): {said}")
    streamer = None if options.json else TextStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
    torch.manual_seed(options.seed or 0)
    made = generate(model, inputs, choice.selection, settings, streamer, by)
    # before a comparison adds to what a policy counted
    spent = choice.spent()
    timed = compare(model, inputs, choice.selection, settings, made.tokens, by) if options.compare else None
    return Report(choice, spent, prompt_tokens, made, draft, timed)


def short_json(value: Any) -> str:
    """A setting in a line; those that are long, such as lists of tokens, by their beginning."""
    text = json.dumps(value, default=vars)
    return text if len(text) <= WRITTEN else f"{text[:WRITTEN]}..."


def say(line: str) -> None:
    """Tell something beside the text, which alone goes to standard output."""
    print(line, file=sys.stderr)


# --- the command ------------------------------------------------------------------------------------------------


def parser() -> CommandLine:
    """Of the command line."""
    made = CommandLine.on_checkpoint(command)
    made.add_argument("--budget", type=str, help=f"{HELP} Default: the full network.")
    made.add_argument("--dynamic", action="store_true", help="Every token takes its own widths, within it on average.")
    text = (
        "A sub-network within this budget drafts, what --budget gets decides: the same text in float32, faster only "
        "where drafts are cheap and mostly right (--compare tells). With --temperature or --top_p it differs from "
        "one without drafts, but is drawn from the same distribution."
    )
    made.add_argument("--speculative", type=str, metavar="BUDGET", help=text)
    made.add_argument("--draft_tokens", type=int, help=f"Most tokens drafted at once ({DRAFT_TOKENS}).")
    made.add_argument("--prompt", type=str, help="What to go on from; - reads standard input.")
    made.add_argument("--prompt_file", type=Path, help="A file to read it from, or -.")
    made.add_argument("--chat", action="store_true", help="The prompt is a user's message to a chat model.")
    made.add_argument("--max_new_tokens", type=int, help=f"Most tokens of the answer ({NEW_TOKENS}, if they fit).")
    text = "Draw tokens, at this temperature; without it and --top_p the likeliest is taken."
    made.add_argument("--temperature", type=float, help=text)
    text = "Draw from the fewest tokens whose probabilities add up to this: above 0, at most 1; for example 0.9."
    made.add_argument("--top_p", type=float, help=text)
    made.add_argument("--seed", type=int, help="Random seed of drawing tokens (0).")
    made.add_loading()
    made.add_compile()
    made.add_argument("--threads", type=int, help="Threads on a CPU; by default as many as torch takes.")
    text = f"Then time the same number of tokens against the full network, {ROUNDS} rounds."
    made.add_argument("--compare", action="store_true", help=text)
    made.add_json()
    return made


def check(options: Any) -> None:
    """Refuse options that are out of range, or have no effect beside the others.

    Raises:
        ValueError: naming one.
    """
    refuse_below_one(options, "max_new_tokens", "threads", "draft_tokens")
    if options.temperature is not None and not 0 < options.temperature < math.inf:
        raise ValueError(
            f"--temperature must be finite and above 0, not {options.temperature}; leave it out for the likeliest token"
        )
    if options.top_p is not None and not 0 < options.top_p <= 1:
        raise ValueError(f"--top_p must be above 0 and at most 1, not {options.top_p}")
    refuse_compiled(options, "dynamic", "speculative")
    _check_effects(options)


def _check_effects(options: Any) -> None:
    if options.seed is not None and options.temperature is None and options.top_p is None:
        raise ValueError("--seed has no effect where the likeliest token is taken; add --temperature or --top_p")
    if options.dynamic and options.budget is None:
        raise ValueError("--dynamic has no effect on the full network; add a --budget")
    if options.speculative is not None:
        return
    if options.draft_tokens is not None:
        raise ValueError("--draft_tokens has no effect without --speculative")
    if options.budget is None:
        for name in ("latency", "compare"):
            if options[name]:
                raise ValueError(f"--{name} has no effect on the full network; add a --budget")
    if options.dynamic and options.latency is not None:
        raise ValueError("--latency has no effect with --dynamic: a dynamic router has a cost table of its own")


def command(args: Sequence[str]) -> None:
    """Text from a checkpoint within a budget, told as it comes; costs and speed go to standard error.

    Example: main.py generate --checkpoint runs/quickstart/static_router --budget 0.7 --prompt "The President"
    """
    end_with_the_reader()
    options = parser().parse_args(list(args))
    check(options)
    prompt = prompt_of(options.prompt, options.prompt_file)
    folder, device = place_of(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    model = FlextronModel.from_pretrained(folder, dtype=getattr(torch, options.dtype), device=device)
    model.compile_widths(options.compile)
    begins = model.flextron.prompts_begin
    inputs = encoded(model.tokenizer, model.config, prompt, chat=options.chat, special_tokens=begins)
    raw = raw_text(model.flextron.history)
    if options.chat and raw:
        say(f"note: the weights were trained on raw text ({', '.join(raw)}), which weakens how a chat model answers")
    found = report(model, {name: tensor.to(model.device) for name, tensor in inputs.items()}, options)
    if options.json:
        show(json_text(found.to_json()).rstrip())
        return
    for line in found.lines():
        say(line)
