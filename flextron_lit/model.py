"""The elastic network as a Hugging Face model: loaded, given a budget, run and saved like any other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flextron_lit import checkpoint
from flextron_lit.checkpoint import keywords
from flextron_lit.checkpoint.in_memory import Loaded, load_elastic
from flextron_lit.checkpoint.location import resolved
from flextron_lit.costs import Workload
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.elastic.generate_arguments import ended, for_compiled, named
from flextron_lit.elastic.kv_cache import check_paged
from flextron_lit.elastic.phases import phase_policy
from flextron_lit.elastic.remote_code.flextron_layers import heads_unsaid
from flextron_lit.elastic.row_budgets import by_rows
from flextron_lit.elastic.selection import Selection
from flextron_lit.files.places import SURROGATE
from flextron_lit.latency.latency_table import FOLDER as COSTS
from flextron_lit.routers.excess import FILE as EXCESS
from flextron_lit.routers.from_budget import Answer, Budget
from flextron_lit.routers.staleness import stale_files
from flextron_lit.routers.trained import FOLDER as ROUTERS
from flextron_lit.sources import resolve_model
from flextron_lit.space import SubNetwork

if TYPE_CHECKING:
    Stock = PreTrainedModel
else:
    # what a model is beside a FlextronModel comes from its config, when it is loaded
    Stock = object

ADDED = (f"{COSTS}/", f"{ROUTERS}/", SURROGATE, EXCESS)
"""How files of a Flextron checkpoint begin that belong to its network and are neither weights nor the record."""
MADE: dict[type[PreTrainedModel], type[FlextronModel]] = {}
"""Of every stock class the one that was made of it."""
TRAINED_HERE = "training in Python"
"""What stale routers say of weights that were changed through this class."""


class FlextronModel(Stock):
    """An elastic causal LM that answers budgets: `FlextronModel.from_pretrained(...)`.

    It is the stock class too (a LlamaForCausalLM, say), so whatever takes a Hugging Face model takes it. Without a
    budget it is the full network. `AutoModelForCausalLM` reads the same folder as the plain dense model.

    What is extracted or saved is of the stock class again (ours). peft puts adapters on it like on any model; see
    `elastic/adapters.py` for what narrower widths make of them.
    """

    flextron: Loaded
    """Backbone, tokenizer, record and routers that it is made of."""

    @classmethod
    def from_pretrained(  # type: ignore[override]  # a source, not only a Hub name
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        dtype: torch.dtype | str = torch.float32,
        device: torch.device | str = "cpu",
        attn_implementation: str = "sdpa",
        **options: Any,
    ) -> FlextronModel:
        """Load a network; a dense model becomes elastic with the default space.

        Args:
            pretrained_model_name_or_path: a Flextron checkpoint, a run folder that holds one, or a dense model in any
                notation.
            dtype: of the weights in memory; also its name, or `auto` for that of the file.
            device: where to put them.
            attn_implementation: `sdpa` or `eager`.
            options: Hugging Face's; `device_map` with one device and `revision` are honoured, and what asks for what
                happens anyway.

        Raises:
            ValueError: if the source does not exist, is damaged, or cannot become elastic, or an option asks for what
                this class does not do.
        """
        given = keywords.of_loading(str(pretrained_model_name_or_path), dtype, device, options)
        source = resolved(given.source)
        dtype = given.dtype or _dtype_of(source)
        loaded = load_elastic(source, attn_implementation=attn_implementation, dtype=dtype, device=given.device)
        model: Any = loaded.backbone.model
        model.__class__ = _flextron_class(type(model))
        model.flextron = loaded
        return cast(FlextronModel, model)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """For copies and pickles: the class is made, not found by its name."""
        return _blank, (self.backbone.family.model,), self.__dict__

    @property
    def backbone(self) -> ElasticBackbone:
        """The elastic network and its space."""
        return self.flextron.backbone

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer, or what was set in its place; saved with the network."""
        return self.flextron.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.flextron = replace(self.flextron, tokenizer=tokenizer)

    # --- budgets ------------------------------------------------------------------------------------------------

    @overload
    def set_budget(
        self,
        budget: Budget,
        dynamic: Literal[False] = False,
        *,
        latency: str | None = None,
        workload: Workload | None = None,
    ) -> Answer: ...
    @overload
    def set_budget(self, budget: Budget | Sequence[Budget], dynamic: Literal[True]) -> Selection: ...
    def set_budget(
        self,
        budget: Budget | Sequence[Budget],
        dynamic: bool = False,
        *,
        latency: str | None = None,
        workload: Workload | None = None,
    ) -> Answer | Selection:
        """Keep within a budget until the next call: a look-up, nothing is copied. 1.0 is the full network again.

        Args:
            budget: a ratio of the full network's cost (0.6), or as on the command line: `decode=12ms`, `90M`,
                `latency<=0.6,kv_bytes<=0.5`; with `dynamic` also one for each sequence of a batch.
            dynamic: let every token take its own widths, within the budget on average.
            latency: name of the latency table to use, where there are several; not with `dynamic`.
            workload: what FLOPs, cache and memory are counted for, where no latency table says so; not with `dynamic`.

        Returns:
            The sub-network and where it comes from; with `dynamic` what is active now: the full network if it meets
            the budget, else a policy that also counts what it chose.

        Raises:
            ValueError: if the budget cannot be read or met, or the checkpoint has nothing to answer it with.
            RuntimeError: if another thread is inside `use`, whose generations are waited for.
        """
        if dynamic:
            _refuse_given(latency=latency, workload=workload)
            selection = self._for_tokens(budget)
            self.backbone.selection.set(selection)
            return selection
        answer = self.flextron.answer(_one(budget), latency, workload or Workload())
        self.backbone.selection.set(answer.sub_network)
        return answer

    def use(self, selection: Selection) -> AbstractContextManager[None]:
        """Make a sub-network, or a policy that chooses one, active for a while; see `ActiveSelection.use`."""
        return self.backbone.use(selection)

    def generate(
        self,
        *args: Any,
        budget: Budget | Sequence[Any] | Mapping[str, Budget] | None = None,
        dynamic: bool = False,
        switch: str | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As Hugging Face's `generate`, within a budget of this call alone if one is given.

        Pipelines pass on what they do not know, so `pipeline("text-generation", model=..., tokenizer=...)` takes
        `budget` and `dynamic` too, with each call or for all.

        Args:
            args: as for the stock model.
            budget: as in `set_budget`; None keeps to what is active. By phase: `{"prompt": 1.0, "answer": 0.7}`, on one
                KV cache (`elastic/phases.py`). As a list, one for every sequence of the batch, which is split by budget
                and put together again in its order; what is shorter than the longest is padded on the right.
            dynamic: as in `set_budget`.
            switch: what ends the phase `think` of `{"think": 0.6, "answer": 1.0}`: tokens, or a text that is generated
                as the tokens that it is by itself.
            kwargs: as for the stock model.

        Generations of several threads take their turns: those without a budget run together, one with a budget has the
        network to itself. A streamer is ended also where the generation fails, so that nobody waits for the rest.

        Raises:
            ValueError: as `set_budget`, or if `dynamic` or `switch` comes without the budget that it needs.
            RuntimeError: if another thread is inside `use`.
        """
        with ended(named(args, kwargs).get("streamer")):
            if budget is None and dynamic:
                raise ValueError("dynamic has no effect without a budget: generate(..., budget=0.7, dynamic=True)")
            if isinstance(budget, list | tuple) and not dynamic:
                return by_rows(
                    partial(self.generate, switch=switch), budget, named(args, kwargs), self.generation_config
                )
            selection: Selection | None = None
            if isinstance(budget, Mapping) or switch is not None:
                _refuse_dynamic(dynamic)
                policy = phase_policy(budget, switch, self.tokenizer, self._sub_network)
                args, kwargs, selection = (), policy.told(named(args, kwargs), self.generation_config), policy
            elif budget is not None:
                selection = self._for_tokens(budget) if dynamic else self._sub_network(budget)
            with self.backbone.selection.call(selection):
                static = isinstance(self.backbone.selection.current, SubNetwork)
                added = for_compiled(args, kwargs) if static and self.backbone.compiled is not None else {}
                return cast(Any, super()).generate(*args, **{**added, **kwargs})

    def _sub_network(self, budget: Any) -> SubNetwork:
        return self.flextron.answer(_one(budget)).sub_network

    def compile_widths(self, wanted: bool = True, *, graphs: bool = False) -> None:
        """Run by code compiled for the widths in use, or, unless wanted, as before (`ElasticBackbone.compile_widths`).

        Code is made at the first pass that needs it, some seconds for each width, and kept for later processes. Budgets
        of latency then go by what was measured compiled; `generate` takes a static KV cache.
        """
        self.backbone.compile_widths(wanted, graphs=graphs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As Hugging Face's (`generate_batch` begins with it), for the full network alone.

        Raises:
            ValueError: within a budget or `use`, neither of which reaches the thread that it runs in.
        """
        check_paged(self.backbone.selection)
        return cast(Any, super()).init_continuous_batching(*args, **kwargs)

    _get_static_cache_init_shape = heads_unsaid

    def _for_tokens(self, budget: Budget | Sequence[Budget]) -> Selection:
        return self.flextron.dynamic_routing.answer(budget, self.backbone)

    # --- saving -------------------------------------------------------------------------------------------------

    def save_pretrained(  # type: ignore[override]  # Hugging Face's further options are refused, with the reason
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = checkpoint.MAX_SHARD_SIZE,
        **options: Any,
    ) -> None:
        """Write a Flextron checkpoint: weights, tokenizer, record, cost tables, routers, surrogate.

        If the weights in memory are no longer those of the checkpoint, routers and surrogate go along marked as stale.

        Args:
            save_directory: target; a checkpoint there is replaced, whole or not at all, other files stay.
            is_main_process: whether this process writes; of several, one should.
            state_dict: weights to write in the place of those in memory, where these are sharded.
            push_to_hub: refused.
            max_shard_size: of a weight file; larger networks are written in several.
            options: Hugging Face's; what asks for what happens anyway is honoured.

        Raises:
            ValueError: if it cannot be written, files of the checkpoint it was read from are damaged or gone, adapters
                are in place, or an option asks for what this class does not do.
        """
        keywords.of_saving(options, push_to_hub=push_to_hub)
        if not is_main_process:
            return
        loaded = self.flextron
        loaded.backbone.refuse_foreign()
        source = loaded.folder
        files: dict[str, Path | bytes] = {}
        if loaded.record is not None:
            files |= {name: path for name, path in checkpoint.other_files(source).items() if name.startswith(ADDED)}
            if not loaded.unchanged:
                files |= stale_files(source, loaded.backbone.space, TRAINED_HERE)
        checkpoint.write(
            Path(save_directory),
            loaded.backbone,
            loaded.tokenizer,
            order=loaded.order,
            history=loaded.history,
            files=files,
            state_dict=state_dict,
            max_shard_size=max_shard_size,
            among_others=True,
        )

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's; refuses weights of the full network alone where narrower widths have trained ones of their own.

        Raises:
            ValueError: if those are missing, as they are from the weight file of a saved folder.
        """
        own = [name for name, each in self.backbone.compensations.items() if each.requires_grad]
        missing = [name for name in own if name not in state_dict]
        if missing and not strict:
            raise ValueError(
                f"the weights lack {len(missing)} that narrower widths have of their own, {missing[0]} among them: the "
                "weight file of a folder is the full network alone; load the folder with FlextronModel.from_pretrained"
            )
        return cast(Any, super()).load_state_dict(state_dict, strict=strict, assign=assign)


def _flextron_class(stock: type[PreTrainedModel]) -> type[FlextronModel]:
    """The stock class with budgets. It keeps its name: pipelines look up by it what a model can do."""
    if stock not in MADE:
        MADE[stock] = type(
            stock.__name__, (FlextronModel, stock), {"__module__": __name__, "__doc__": FlextronModel.__doc__}
        )
    return MADE[stock]


def _blank(stock: type[PreTrainedModel]) -> FlextronModel:
    made = _flextron_class(stock)
    return made.__new__(made)


def _dtype_of(source: str) -> torch.dtype:
    """That of the weights, as the config says; float32 where it does not."""
    config = checkpoint.read_config(resolve_model(source))
    return getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")


def _one(budget: Budget | Sequence[Budget]) -> Budget:
    if not isinstance(budget, str | int | float):
        raise ValueError(
            f"one sub-network has one budget, not {budget!r}; with dynamic=True each sequence can have its own"
        )
    return budget


def _refuse_dynamic(dynamic: bool) -> None:
    if dynamic:
        raise ValueError("budgets by phase are of sub-networks; with dynamic=True give one budget, and no switch")


def _refuse_given(**options: Any) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ValueError(
            f"{given[0]} has no effect with dynamic=True: a dynamic router has a cost table of its own; leave it out"
        )
