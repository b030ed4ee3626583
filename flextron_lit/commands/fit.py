"""`python main.py fit`, `validate`, `test` and `predict`: Lightning's CLI for one stage, in a run folder."""

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from enum import Enum
from functools import reduce
from operator import getitem
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError, Namespace, set_parsing_settings
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.exceptions import SIGTERMException

import flextron_lit.data.datamodule  # noqa: F401  # importing registers the class, so that configs may use its short name
from flextron_lit import callbacks, callbacks_name
from flextron_lit import checkpoint as flextron_checkpoint
from flextron_lit.checkpoint.resume_io import BLOCKS, MEND, StreamedCheckpointIO, check_processes, read_state
from flextron_lit.checkpoint.run_config import as_begun, canonical, completed
from flextron_lit.checkpoint.run_folder import RunFolder
from flextron_lit.commands.trainer_settings import check_callbacks, check_end, check_options, check_sections
from flextron_lit.data.domain import check_names
from flextron_lit.files.damage import damage
from flextron_lit.files.ranks import is_first, lost_another, tell
from flextron_lit.files.whole_file import named
from flextron_lit.files.whole_folder import recover
from flextron_lit.stages import Stage
from flextron_lit.stages.precision import check_precision

set_parsing_settings(docstring_parse_attribute_docstrings=True)
# such as how often a Timer looks: its default is one, and a config is plain YAML
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, each: dumper.represent_data(each.value))
# a config names classes of ours and, under the same name, of the user's own module
callbacks_name.install(first=True)

ALWAYS: tuple[Callable[[], Callback], ...] = (
    callbacks.ParetoReport,
    callbacks.RouterReport,
    callbacks.TensorBoardOverview,
    callbacks.FlextronCheckpointWriter,
    callbacks.PredictionWriter,
    callbacks.ExactResume,
)
NOT_CONFIG = ("config", "run_folder", "fresh")
TERMINATED = 143
FRESH_HELP = "Delete what the run folder holds and start anew."


class StageCLI(LightningCLI):
    """`fit`, `validate`, `test` and `predict` of one stage, in a run folder that resumes."""

    def __init__(self, args: list[str] | None = None) -> None:
        with ExitStack() as self.resources, one_line():
            super().__init__(
                LightningModule,
                LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
                seed_everything_default=0,
                save_config_callback=None,
                trainer_defaults={"num_sanity_val_steps": -1, "use_distributed_sampler": False},
                args=args,
            )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, without `ckpt_path`: a run folder finds its own state, and stages hand over by `checkpoint`."""
        return {
            name: skip | {"ckpt_path", "weights_only", "return_predictions"}
            for name, skip in LightningCLI.subcommands().items()
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options of the run folder, and the tokenizer that follows the checkpoint."""
        parser.add_argument("--run_folder", type=Path, default=Path("runs/default"), help="Everything a run writes.")
        parser.add_argument("--fresh", action="store_true", help=FRESH_HELP)
        parser.link_arguments("model.init_args.checkpoint", "data.init_args.tokenizer")

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning's would let hyper-parameters of a checkpoint override config and command line."""

    def before_instantiate_classes(self) -> None:
        """Resolve what depends on the machine, then enter the run folder."""
        config = self.config[self.subcommand]
        check_sections(config)
        check_names((config.data.get("init_args") or {}).get("domains") or ())
        if config.trainer.precision is None:
            config.trainer.precision = best_precision()
        check_options(config.trainer, str(self.subcommand))
        self.folder = RunFolder(config.run_folder)
        recover(self.folder.checkpoint)
        if self.subcommand != "fit":
            self._use_trained(config)
        if config.trainer.fast_dev_run:
            # a look whether everything runs: what it leaves is no result
            self.folder = RunFolder(Path(self.resources.enter_context(TemporaryDirectory())))
        if self.subcommand != "fit":
            return
        self.resuming = not config.fresh
        if self.resuming:
            self._go_on_as_begun(config)
        if not is_first():
            # as the first says: who went on would wait for it
            if not config.fresh and self.folder.status == "finished":
                raise SystemExit(0)
            return
        self.resources.enter_context(self.folder.lock())
        status = self.folder.begin(self._resolved(self.config), fresh=config.fresh, today=self._today)
        if status == "finished":
            print(f"{self.folder.path} is finished; its checkpoint is {self.folder.checkpoint}. --fresh starts anew.")
            raise SystemExit(0)

    def _go_on_as_begun(self, config: Any) -> None:
        """Let an unfinished run of an older program keep what it did by default, and what it made be read likewise."""
        before = self.folder.config if self.folder.holds_work else None
        kept = as_begun(self._resolved(self.config), before) if before else {}
        for (*path, name), value in kept.items():
            # not by dotted names: that of a domain may have dots and blanks itself
            reduce(getitem, path, config)[name] = value
        if kept:
            names = (".".join(map(str, place)).split("init_args.")[-1] for place in kept)
            said = ", ".join(f"{name} is {then}" for name, then in zip(names, kept.values(), strict=True))
            tell(f"{self.folder.path} was begun by an older program: {said}")

    def _resolved(self, config: Namespace) -> dict[str, Any]:
        """What a run folder keeps."""
        dumped = yaml.safe_load(self.parser.dump(config, skip_none=False, skip_validation=True))[self.subcommand]
        return canonical({key: value for key, value in dumped.items() if key not in NOT_CONFIG})

    def _today(self, before: Mapping[str, Any]) -> Mapping[str, Any]:
        """The config of an older run as this program resolves it; as it is where it says what is no more."""
        self.parser.exit_on_error = False
        try:
            parsed = self.parser.parse_object(
                {"subcommand": self.subcommand, self.subcommand: deepcopy(completed(before))}
            )
        except ArgumentError:
            return before
        return self._resolved(parsed)

    def _use_trained(self, config: Any) -> None:
        """Evaluate what the run folder holds, never by accident the untrained network that the config starts from."""
        named = str(config.model.init_args.checkpoint)
        if flextron_checkpoint.is_flextron(Path(named)) and named != self.folder.started_from:
            return
        if not flextron_checkpoint.is_flextron(self.folder.checkpoint):
            raise ValueError(
                f"{self.folder.checkpoint} does not exist yet: run `fit` with the same config first, or name a "
                "Flextron checkpoint with --model.init_args.checkpoint"
            )
        self._go_on_as_begun(config)
        config.model.init_args.checkpoint = str(self.folder.checkpoint)
        config.data.init_args.tokenizer = str(self.folder.checkpoint)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Lightning's, at home in the run folder and with the callbacks that every run needs."""
        given = self._get(self.config_init, "trainer")
        chosen, plugins = (
            list(each) if isinstance(each, list | tuple) else [each] if each else []
            for each in (given.callbacks, given.plugins)
        )
        fitting = self.subcommand == "fit"
        check_precision(str(given.precision), plugins, fitting=False)
        if given.logger in (None, True) and fitting:
            kwargs["logger"] = TensorBoardLogger(
                self.folder.path, name="tensorboard", version="", default_hp_metric=False, **self._purge()
            )
        elif not fitting:
            kwargs["logger"] = False
        own = [c for c in (make() for make in ALWAYS) if not any(isinstance(other, type(c)) for other in chosen)]
        if given.enable_progress_bar in (None, True) and not any(isinstance(c, ProgressBar) for c in chosen):
            own.append(callbacks.progress_bar())
        if fitting:
            check_end(given, chosen)
            check_callbacks(chosen + own, self.model, list(self.datamodule.domains))
        trainer = super().instantiate_trainer(
            **kwargs,
            default_root_dir=self.folder.path,
            callbacks=chosen + own,
            plugins=[*plugins, StreamedCheckpointIO()],
        )
        check_precision(str(trainer.precision), (), fitting=fitting)
        return trainer

    def _purge(self) -> dict[str, Any]:
        """Make TensorBoard forget the steps that the resumed run will log again."""
        if not self._resume_from():
            return {}
        return {"purge_step": self._state()["global_step"] + 1}

    def _state(self) -> Mapping[str, Any]:
        """That of the unfinished run, without its tensors."""
        path = self.folder.resume_state
        with damage(path, MEND):
            state = read_state(path, whole=False)
            return state | {"global_step": int(state["global_step"]), "random_state": list(state["random_state"])}

    def _resume_from(self) -> Path | None:
        return self.folder.resume_state if self.resuming and self.folder.resume_state.is_file() else None

    def instantiate_classes(self) -> None:
        """As Lightning does, then hand the text to the stage: some stages make their own loaders."""
        super().instantiate_classes()
        self.datamodule = self.model.attach(self.datamodule)

    def fit(self, model: Stage, datamodule: LightningDataModule | None = None) -> None:
        """Train, resuming an unfinished run."""
        # the setter, not the argument: the stage asks for it before Lightning hands the argument on
        self.trainer.ckpt_path = self._resume_from()
        if self.trainer.ckpt_path is not None:
            self._check_processes(model)
            # the first table is there: Lightning would make another one behind a whole epoch
            self.trainer.num_sanity_val_steps = 0
        try:
            # the files that are not whole or not at all: TensorBoard's, and figures
            with named(self.folder.path):
                self.trainer.fit(model, datamodule=datamodule)
        except SIGTERMException as stop:
            # Lightning's own exit code is 0, which a supervisor would take for success; the first rank speaks for all,
            # since a launcher that sees another one fail kills it
            raise SystemExit(TERMINATED if self.trainer.is_global_zero else 0) from stop
        if self.trainer.is_global_zero:
            self._finish()

    def _check_processes(self, model: Stage) -> None:
        """Refuse, before anything is loaded, to go on with other steps than those that the run began with."""
        state, before = self._state(), self.folder.config
        assert before is not None
        # older runs did not note it
        same = before["data"]["init_args"].get("batch_size") == self.config[self.subcommand].data.init_args.batch_size
        noted = {BLOCKS: model.blocks * len(state["random_state"]) if same else 0} | dict(state)
        processes = self.trainer.world_size
        check_processes(noted, self.folder.resume_state, processes, model.blocks * processes)

    def _finish(self) -> None:
        """A run is finished when its result is there and was read back."""
        flextron_checkpoint.verify(self.folder.checkpoint)
        if self.config[self.subcommand].trainer.fast_dev_run:
            print("fast_dev_run: everything ran; nothing of it was kept")
            return
        self.folder.finish()
        print(f"finished: {self.folder.path} (tables, figure, tensorboard), checkpoint {self.folder.checkpoint}")


@contextmanager
def one_line() -> Iterator[None]:
    """What a callback finds wrong, in one line that names it.

    Raises:
        ValueError: in place of a RuntimeError that was raised in a callback's hook, or as processes waited for another
            that is no more.
    """
    try:
        yield
    except RuntimeError as error:
        if lost_another(error):
            raise ValueError(
                "another process of this run has ended or is silent, so this one stops too; the reason is in what the "
                f"other said, here it is {str(error).rpartition('] ')[2][:80]!r}; the same command resumes"
            ) from error
        frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
        calls = [frame.f_locals for frame in frames if frame.f_globals["__name__"] == call.__name__]
        callback = next((each["callback"] for each in calls if "callback" in each), None)
        if callback is None:
            raise
        raise ValueError(f"{type(callback).__name__}: {' '.join(str(error).split())}") from error


def best_precision() -> str:
    """`bf16-mixed` where the processor or GPU computes in bf16, else `32-true`."""
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    return "bf16-mixed" if torch.cpu._is_avx512_bf16_supported() else "32-true"


def command(args: Sequence[str]) -> None:
    """`python main.py fit`, `validate`, `test` and `predict`."""
    # from sys.argv, with the name of the command: a launcher of further ranks starts the same line again
    StageCLI()
