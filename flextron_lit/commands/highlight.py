"""`python main.py highlight`: where a dynamic router's compute goes in a text."""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from flextron_lit.checkpoint.in_memory import Loaded, load_elastic
from flextron_lit.commands.options import CommandLine, place_of
from flextron_lit.files.whole_file import write_page
from flextron_lit.report.spending.page import page
from flextron_lit.report.spending.routed_text import route_text
from flextron_lit.report.spending.shown_texts import TOKENS, texts_of
from flextron_lit.report.spending.token_groups import ALL, Group, groups_of, summary
from flextron_lit.routers.dynamic import DynamicPolicy
from flextron_lit.terminal.console import show, table


def policy_for(loaded: Loaded, budget: str) -> DynamicPolicy:
    """What chooses for a budget.

    Raises:
        ValueError: if it cannot be read or met, or the full network meets it.
    """
    selection = loaded.dynamic_routing.answer(budget, loaded.backbone)
    if not isinstance(selection, DynamicPolicy):
        raise ValueError(f"the full network meets the budget {budget}: every token gets all of it; ask for less than 1")
    return selection


def shown(groups: Sequence[Group], cost: str) -> Table:
    """Means over groups of tokens, for people."""
    rows = [group.cells()[:-1] for group in groups if group.domain == ALL]
    columns = ("tokens", "count", cost, "MLP width", "attention width", "loss of the next token")
    return table(columns, rows, left=["tokens"])


def command(args: Sequence[str]) -> None:
    """A text shaded by what a dynamic router spends on each token, as a web page, and which tokens get most.

    Example: main.py highlight --checkpoint runs/quickstart/dynamic_router --budget 0.7 --text README.md
    """
    parser = CommandLine.on_checkpoint(command)
    text = "Mean cost of a token as a ratio of the full network's (0.7), or with its name or unit (flops=0.7)."
    parser.add_argument("--budget", type=str, required=True, help=text)
    text = "A text, as for evaluate. Default: validation documents of the training text."
    parser.add_text(text, f"Of the file, or of each validation domain ({TOKENS}).")
    parser.add_device()
    parser.add_argument("--output", type=Path, default=Path("compute.html"), help="Where to write the page.")
    options = parser.parse_args(list(args))
    folder, device = place_of(options)
    loaded = load_elastic(str(folder), device=device)
    policy = policy_for(loaded, options.budget)
    cost, router = policy.table.name, f"dynamic router at {options.budget}"
    batches = texts_of(loaded, options.text, options.tokens)
    texts = {name: route_text(loaded.backbone, policy, loaded.tokenizer, each) for name, each in batches.items()}
    groups = groups_of(texts)
    excerpts = {name: text.excerpt(options.tokens or TOKENS) for name, text in texts.items()}
    write_page(options.output, page(excerpts, groups, router, cost))
    show(shown(groups, cost), summary(groups, f"the {router}", cost), f"wrote {options.output}")
