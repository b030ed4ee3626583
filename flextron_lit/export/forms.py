"""The forms in which a sub-network is written: what each can hold, how it is written, and how it is read back."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from gguf import MODEL_ARCH_NAMES
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from flextron_lit.checkpoint.plain_folder import save_model, save_tokenizer
from flextron_lit.costs.workload import Dtype
from flextron_lit.elastic.remote_code.flextron_layers import OwnLayers
from flextron_lit.export import gguf_file
from flextron_lit.export.classes import in_any_class, in_own_class, in_stock_class
from flextron_lit.export.gguf_tokenizer import byte_pairs
from flextron_lit.export.small_model import SmallModel
from flextron_lit.terminal.progress import quiet_transformers

Format = Literal["hf", "stock", "remote-code", "gguf"]
FORMATS: tuple[Format, ...] = get_args(Format)
Quantization = Literal["int8", "nf4", "q8_0"]
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)
GGUF_FILE = "model.gguf"
NF4_ROWS, NF4_COLUMNS = 32, 64
CLASSES: dict[Format, Callable[[SmallModel], PreTrainedModel]] = {
    "hf": in_any_class,
    "stock": in_stock_class,
    "remote-code": in_own_class,
}


@dataclass(frozen=True)
class Form:
    """What the files are to be like.

    Raises:
        ValueError: for a quantisation that the format does not have.
    """

    format: Format = "hf"
    """`hf` is the stock class where one holds the sub-network, else `remote-code`."""
    dtype: Dtype = "float32"
    """Of weights that are not quantised."""
    quantize: Quantization | None = None
    """`int8` and `nf4` are those of bitsandbytes, `q8_0` is that of GGUF."""

    def __post_init__(self) -> None:
        if self.format == "gguf" and self.quantize in ("int8", "nf4"):
            raise ValueError(
                f"--quantize {self.quantize} is of bitsandbytes, which llama.cpp does not read; a GGUF file takes "
                "q8_0, and llama.cpp's own llama-quantize makes smaller ones of it"
            )
        if self.format != "gguf" and self.quantize == "q8_0":
            raise ValueError("--quantize q8_0 is of GGUF, which is --format gguf; for transformers take int8 or nf4")

    @property
    def numbers(self) -> str:
        """How the weights are stored, in words."""
        quantised = {"int8": "int8 (bitsandbytes)", "nf4": "NF4 (bitsandbytes)", "q8_0": "Q8_0"}
        return f"{quantised[self.quantize]}, the rest in {self.dtype}" if self.quantize else self.dtype


class HuggingFaceFolder:
    """A folder that `from_pretrained` reads: refused when it is made, written and read back afterwards.

    Args:
        small: the sub-network.
        tokenizer: its tokenizer.
        form: what it is to be like.

    Raises:
        ValueError: if the class that was asked for cannot hold it.
    """

    library = "transformers"
    """What reads it, as the Hub calls it."""

    def __init__(self, small: SmallModel, tokenizer: PreTrainedTokenizerBase, form: Form) -> None:
        self.model = CLASSES[form.format](small)
        if form.quantize == "nf4":
            _refuse_odd_sizes(small.model)
        self.tokenizer, self.form = tokenizer, form
        self.device = small.model.device
        self.own = isinstance(self.model, OwnLayers)
        where = "a class of its own that lies beside the weights" if self.own else "as transformers has it"
        self.what = f"{type(self.model).__name__}, {where}"
        """Class or architecture, in words."""

    def write(self, folder: Path) -> None:
        """Weights, not quantised yet, config, tokenizer, and the class if it is not a stock one."""
        save_model(folder, self.model.to(getattr(torch, self.form.dtype)))
        save_tokenizer(folder, self.tokenizer)

    def read(self, folder: Path) -> PreTrainedModel:
        """The model that the folder holds, through the class itself: nothing in the folder is run.

        What is not quantised computes in float32.
        """
        return self._load(folder, dtype=torch.float32)

    def quantise(self, folder: Path) -> None:
        """Load with bitsandbytes, and save that instead.

        Raises:
            ValueError: if bitsandbytes cannot.
        """
        dtype = getattr(torch, self.form.dtype)
        if self.form.quantize == "int8":
            config = BitsAndBytesConfig(load_in_8bit=True)
        else:
            config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        model = self._load(folder, quantization_config=config, device_map={"": self.device}, dtype=dtype)
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        save_model(folder, model)

    def loading(self, name: str) -> str:
        """How to load a folder of that name, as markdown: Python code."""
        trust = ", trust_remote_code=True" if self.own else ""
        options = trust + (', device_map="auto"' if self.form.quantize else f", dtype=torch.{self.form.dtype}")
        # the release that this was run with: older ones may not know per_layer_config
        transformers = '"transformers>=5.23"' if self.own else "transformers"
        needs = f"pip install torch {transformers}" + (" bitsandbytes accelerate" if self.form.quantize else "")
        said = "; the folder's own two Python files are run, so read them first" if self.own else ""
        imports = "" if self.form.quantize else "import torch\n"
        return (
            f"`{needs}`{said}:\n\n```python\n{imports}from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{name}"{options})\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})\n'
            'inputs = tokenizer("Once upon a time", return_tensors="pt").to(model.device)\n'
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))\n```"
        )

    def _load(self, folder: Path, **settings: Any) -> PreTrainedModel:
        # bitsandbytes says once a call that it casts inputs to float16, which is how int8 works
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        with quiet_transformers():
            model = type(self.model).from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, attn_implementation="sdpa", **settings
            )
        if "device_map" not in settings and not getattr(model, "is_quantized", False):
            torch.nn.Module.to(model, self.device)
        return model.eval()


def _refuse_odd_sizes(model: PreTrainedModel) -> None:
    """NF4 in bitsandbytes 0.50 fails on processors with AVX512-BF16 unless sizes are whole blocks.

    Raises:
        ValueError: naming the first matrix whose are not.
    """
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head:
            rows, columns = module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1]
            if rows % NF4_ROWS or columns % NF4_COLUMNS:
                raise ValueError(
                    f"--quantize nf4 needs matrices of a multiple of {NF4_ROWS} x {NF4_COLUMNS}, but {name} is "
                    f"{rows} x {columns}; take int8, or a sub-network of other widths"
                )


class GGUFFolder:
    """A folder with a GGUF file, for llama.cpp and what is built on it: made, written and read as `HuggingFaceFolder`.

    Args:
        small: the sub-network.
        tokenizer: its tokenizer.
        form: what it is to be like.
        name: what the model is called.

    Raises:
        ValueError: if llama.cpp has nothing that computes it, or no such tokenizer.
    """

    library = "gguf"

    def __init__(self, small: SmallModel, tokenizer: PreTrainedTokenizerBase, form: Form, name: str) -> None:
        self.small, self.form, self.name = small, form, name
        self.what = f"GGUF, architecture `{MODEL_ARCH_NAMES[gguf_file.architecture(small)]}`"
        self.tokenizer = byte_pairs(tokenizer, small.dense.vocab_size)

    def write(self, folder: Path) -> None:
        """The one file."""
        self._write(folder, self.form.dtype)

    def read(self, folder: Path) -> PreTrainedModel:
        """The network with the weights of the file."""
        return gguf_file.read_back(folder / GGUF_FILE, self.small)

    def quantise(self, folder: Path) -> None:
        """Write it again, in blocks of 8 bits."""
        self._write(folder, "q8_0")

    def loading(self, name: str) -> str:
        """A command of llama.cpp."""
        return f'With llama.cpp:\n\n```bash\nllama-completion -m {name}/{GGUF_FILE} -p "Once upon a time" -n 40\n```'

    def _write(self, folder: Path, stored: str) -> None:
        gguf_file.write(folder / GGUF_FILE, self.small, self.tokenizer, name=self.name, stored=stored)


WrittenForm = HuggingFaceFolder | GGUFFolder


def in_form(small: SmallModel, tokenizer: PreTrainedTokenizerBase, form: Form, name: str) -> WrittenForm:
    """A sub-network in a form, and called by a name.

    Raises:
        ValueError: if the form cannot hold it; the message says why.
    """
    if form.format == "gguf":
        return GGUFFolder(small, tokenizer, form, name)
    return HuggingFaceFolder(small, tokenizer, form)
