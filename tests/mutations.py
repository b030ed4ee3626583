"""What can happen to a file that was written well: hypothesis strategies of what it holds then."""

import io
import json
from copy import deepcopy

import torch
import yaml
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save


def nested(depth):
    made = []
    for _ in range(depth):
        made = [made]
    return made


JUNK = [None, True, False, 0, -1, 1, 2, 7, 10**9, 10**18, -(10**18), 10**400, 0.5, -0.5, 1e308, -1e308]
JUNK += [float("nan"), float("inf"), -float("inf"), "", "x", "\0", "../../outside", "/etc/passwd", "ä" * 300, "\ud800"]
JUNK += ["1e999", "nan", [], {}, [[]], [None], [1, 2], {"a": 1}, {"": []}, nested(60), "!!python/object:x", {"x": {}}]


def nodes(tree, place=()):
    """All places of a tree."""
    yield place
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, inner in children:
        yield from nodes(inner, (*place, key))


def at(tree, place):
    for key in place:
        tree = tree[key]
    return tree


@st.composite
def changed(draw, tree):
    """The same with one to three things changed."""
    tree = deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        places = [*nodes(tree)]
        place = places[draw(st.integers(0, len(places) - 1))]
        if not place:
            if draw(st.integers(0, 9)) == 0:
                tree = deepcopy(draw(st.sampled_from(JUNK)))
            continue
        above, key = at(tree, place[:-1]), place[-1]
        how = draw(st.sampled_from(["delete", "junk", "junk", "junk", "swap", "more", "rename", "sign"]))
        if how == "delete":
            del above[key]
        elif how == "junk":
            above[key] = deepcopy(draw(st.sampled_from(JUNK)))
        elif how == "swap":
            above[key] = deepcopy(at(tree, draw(st.sampled_from(places))))
        elif how == "more" and isinstance(above, list):
            above.insert(key, deepcopy(above[key]))
        elif how == "rename" and isinstance(above, dict):
            above[draw(st.sampled_from(["", "x", "../../outside", *map(str, above)]))] = above.pop(key)
        elif how == "sign" and isinstance(above[key], int | float):
            above[key] = -above[key]
    return tree


@st.composite
def bytes_changed(draw, content):
    """Bits, pieces, ends."""
    ways = ["flip", "flip", "cut", "drop", "insert", "repeat", "zeros", "empty", "bom", "utf16", "latin", "deep"]
    how = draw(st.sampled_from(ways))
    place = draw(st.integers(0, max(len(content) - 1, 0)))
    length = draw(st.integers(1, 64))
    if how == "flip":
        made = bytearray(content)
        for _ in range(draw(st.integers(1, 8))):
            made[draw(st.integers(0, len(made) - 1))] ^= 1 << draw(st.integers(0, 7))
        return bytes(made)
    if how == "deep":
        return draw(st.sampled_from([b"[", b'{"a":', b"- ", b"&a [*a, ", b"[{"])) * 100_000
    return {
        "cut": content[:place],
        "drop": content[:place] + content[place + length :],
        "insert": content[:place] + draw(st.binary(min_size=1, max_size=16)) + content[place:],
        "repeat": content[:place] + content[place : place + length] * 2 + content[place + length :],
        "zeros": content[:place] + bytes(length) + content[place + length :],
        "empty": b"",
        "bom": b"\xef\xbb\xbf" + content,
        "utf16": b"\xff\xfe" + content[:2000].decode("latin-1").encode("utf-16-le"),
        "latin": content[:place] + "ä\udcff".encode("latin-1", "surrogateescape") + content[place:],
    }[how]


@st.composite
def header_changed(draw, content):
    """A safetensors file with another header."""
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(draw(changed(json.loads(content[8 : 8 + length])))).encode()
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


@st.composite
def tensors_changed(draw, path):
    """A well-formed safetensors file of other tensors, or which says something else."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        about = dict(file.metadata() or {})
    if "flextron" in about and draw(st.booleans()):
        return save(tensors, {"flextron": json.dumps(draw(changed(json.loads(about["flextron"]))))})
    name = draw(st.sampled_from(sorted(tensors)))
    tensor = tensors.pop(name)
    whole = tensor.flatten()
    ways = {
        "gone": {},
        "renamed": {f"{name}.x": tensor},
        "flat": {name: whole},
        "more": {name: torch.cat([tensor, tensor]) if tensor.dim() else whole},
        "empty": {name: whole[:0]},
        "wide": {name: torch.zeros(0, 10**9)},
        "nan": {name: torch.full_like(tensor.float(), float("nan"))},
        "huge": {name: torch.full_like(tensor.double(), 1e300)},
        "large": {name: torch.full_like(tensor.long(), 2**62)},
        "negative": {name: -tensor.float()},
        "type": {name: tensor.to(torch.int8)},
    }
    return save(tensors | ways[draw(st.sampled_from(sorted(ways)))], about)


@st.composite
def mutated(draw, path):
    """What a file holds after something happened to it; None where there is a folder in its place."""
    content = path.read_bytes()
    how = draw(st.integers(0, 19))
    if how == 0:
        return None
    if how < 8:
        return draw(bytes_changed(content))
    if path.suffix == ".safetensors":
        return draw(tensors_changed(path) if how < 14 else header_changed(content))
    if path.suffix == ".ckpt":
        made = io.BytesIO()
        torch.save(draw(changed(torch.load(path, weights_only=True))), made)
        return made.getvalue()
    if path.suffix == ".yaml":
        tree = draw(changed(yaml.safe_load(content)))
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode("utf-8", "surrogatepass")
    return json.dumps(draw(changed(json.loads(content)))).encode()
