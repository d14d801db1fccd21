"""python -m trainers lora --model FILE_OR_FOLDER --images FOLDER --out FOLDER: training without ComfyUI."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from .adapters.adapters import Adapters, text_adapter_settings
from .data.buckets import BucketSettings
from .data.caption_variants import (
    CAPTION_MODE_TEXT,
    TRIGGER_PLACEHOLDER,
    CaptionSettings,
    fill_trigger,
    has_trigger_placeholder,
)
from .data.encode import encode_dataset
from .data.encoded import most_common_bucket
from .data.fact_store import FACTS_FILE
from .data.images import tensor_to_image
from .data.readers import read_folder, require_captions
from .data.records import describe_colour_profiles
from .files import LoraFile, lora_metadata, write_lora
from .loop import mean_recent_loss, train
from .methods.few_step import plan_few_steps
from .methods.lora import LoraTraining
from .monitor.plots import draw_image_grid, draw_loss_plot
from .rng import make_generator
from .runs import RunFolder, check_run_name
from .settings import AdapterSettings, NoiseSettings, OptimizerSettings, RunSettings, compute_fingerprint

SETTINGS_RECORDS = (RunSettings, AdapterSettings, OptimizerSettings, NoiseSettings, CaptionSettings, BucketSettings)
EXIT_MISTAKE, EXIT_STOPPED = 2, 130  # exit codes


# -- the command line, made from the settings records ------------------------------------------------------------------


class OneLineErrorParser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message):
        self.exit(EXIT_MISTAKE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def make_argument_parser() -> OneLineErrorParser:
    top = OneLineErrorParser(
        prog="python -m trainers",
        description="Train small models on image datasets, without ComfyUI.",
        allow_abbrev=False,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="METHOD", parser_class=OneLineErrorParser)
    lora = commands.add_parser("lora", help="train a LoRA on pictures and their captions", allow_abbrev=False)
    files = lora.add_argument_group("files")
    files.add_argument(
        "--model", required=True, type=Path, help="a diffusers folder, or an SD3-shaped .safetensors checkpoint"
    )
    files.add_argument(
        "--images", required=True, type=Path, help="folder of images with captions of the same name beside them"
    )
    files.add_argument(
        "--out",
        required=True,
        type=Path,
        help="folder for the LoRA, the loss plot, the samples and what a resume needs",
    )
    files.add_argument("--name", default="lora", help="name of the run and of its files (default: %(default)s)")
    files.add_argument("--caption-extension", default=".txt", help="(default: %(default)s)")
    files.add_argument("--alpha-mask", action="store_true", help="the images' transparency says where the loss counts")
    files.add_argument("--flip", action="store_true", help="half of the steps see the pictures mirrored")
    files.add_argument("--device", default=None, help="cpu, cuda or cuda:1 (default: cuda if there is one)")
    files.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    samples = lora.add_argument_group("samples", "A sheet of the model without and with the LoRA, on the same seeds.")
    samples.add_argument("--samples", nargs="*", default=[], metavar="PROMPT")
    samples.add_argument(
        "--sample-seeds", type=parse_whole_number, default=3, help="pictures per prompt (default: %(default)s)"
    )
    samples.add_argument("--sample-steps", type=parse_whole_number, default=20, help="(default: %(default)s)")
    samples.add_argument(
        "--sample-size",
        type=parse_whole_number,
        default=0,
        help="pixels (default: the size that most images are trained at)",
    )
    samples.add_argument(
        "--sample-cfg", type=parse_number, default=None, help="guidance (default: what suits the model)"
    )
    for record in SETTINGS_RECORDS:
        add_settings_arguments(
            lora.add_argument_group(record.__name__, (record.__doc__ or record.__name__).splitlines()[0]), record
        )
    return top


def add_settings_arguments(group, record):
    for f in dataclasses.fields(record):
        meta, default = f.metadata, f.default
        about = (
            meta["hint"]
            + (f" Unit: {meta['unit']}." if meta.get("unit") else "")
            + (f" (default: {default})" if default != "" else "")
        )
        name = settings_option_name(record, f.name)
        options = dict(dest=name, default=default, help=about.replace("%", "%%"))
        if meta.get("switch"):
            group.add_argument(option_flag(name), action=argparse.BooleanOptionalAction, **options)
        elif "options" in meta:
            group.add_argument(option_flag(name), choices=meta["options"], **options)
        elif meta.get("text"):
            group.add_argument(option_flag(name), **options)
        else:
            group.add_argument(
                option_flag(name),
                type=parse_whole_number if isinstance(default, int) else parse_number,
                metavar="N",
                **options,
            )


def settings_option_name(record, name) -> str:
    """The field's name on the command line; captions were first to have a dropout."""
    return "adapter_dropout" if record is AdapterSettings and name == "dropout" else name


def option_flag(name):
    return "--" + name.replace("_", "-")


def parse_whole_number(text):
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def parse_number(text):
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def settings_from_arguments(args, record):
    return record(**{f.name: getattr(args, settings_option_name(record, f.name)) for f in dataclasses.fields(record)})


# -- what the person sees, and Ctrl-C ----------------------------------------------------------------------------------


class ConsoleOutput:
    """One line that is written over on a terminal, and a line every ten seconds elsewhere."""

    def __init__(self, stream=None):
        self.stream = stream or sys.stdout
        self.is_terminal, self.last_printed, self.line_width, self.last_text = self.stream.isatty(), -math.inf, 0, ""

    def update_line(self, text, force=False):
        if text == self.last_text or (not force and not self.is_terminal and time.monotonic() - self.last_printed < 10):
            return
        self.last_printed, self.last_text = time.monotonic(), text
        if self.is_terminal:
            self.stream.write("\r" + text.ljust(self.line_width))
            self.line_width = len(text)
        else:
            self.stream.write(text + "\n")
        self.stream.flush()

    def print_line(self, text):
        self.end_line()
        self.stream.write(text + "\n")
        self.stream.flush()

    def end_line(self):
        """Leave the line that is written over."""
        if self.is_terminal and self.line_width:
            self.stream.write("\n")
        self.line_width = 0


class InterruptHandler:
    """Ctrl-C asks to stop after the step that is under way; a second one stops at once. The previous handler comes
    back."""

    def __enter__(self):
        self.requested = False
        try:
            self.previous_handler = signal.signal(signal.SIGINT, self._ask)
        except ValueError:  # not the main thread, which gets no signals
            self.previous_handler = None
        return self

    def _ask(self, *_):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def raise_if_requested(self):
        if self.requested:
            raise KeyboardInterrupt

    def __exit__(self, *_):
        if self.previous_handler is not None:
            signal.signal(signal.SIGINT, self.previous_handler)


# -- the run -----------------------------------------------------------------------------------------------------------


@dataclass
class CommandLineJob:
    """One LoRA run: the settings, and the files it reads and writes."""

    args: argparse.Namespace
    screen: ConsoleOutput
    stop: InterruptHandler
    records: dict = field(init=False)
    sample_prompts: list[str] = field(init=False)

    def __post_init__(self):
        self.name = check_run_name(self.args.name)
        self.records = {record: settings_from_arguments(self.args, record) for record in SETTINGS_RECORDS}
        self.run, self.adapter, self.optimizing, self.noise, self.captions, self.buckets = self.records.values()
        if not self.run.batch:
            raise ValueError(
                "batch is 0, which leaves it to the planner of the ComfyUI nodes. Give --batch 1 or more here."
            )
        trigger = self.captions.trigger.strip()
        if not trigger and any(map(has_trigger_placeholder, self.args.samples)):
            raise ValueError(f"--samples says {TRIGGER_PLACEHOLDER}, and --trigger is empty. Give --trigger the word.")
        self.sample_prompts = [fill_trigger(prompt, trigger) for prompt in self.args.samples]
        if self.args.out.exists() and not self.args.out.is_dir():
            raise ValueError(f"{self.args.out} is a file. Give --out a folder.")

    def __call__(self):
        """Read, encode, train, write. From top to bottom what the command does."""
        dataset = self.read_dataset()
        engine = self.load_engine()
        rng = make_generator(self.run.seed)
        adapters = Adapters(engine.network, self.adapter, rng).to(engine.denoiser.device)
        text = self.make_text_adapters(engine, rng)
        data = self.encode_dataset(dataset, engine)
        folder = RunFolder(
            self.args.out / ".runs", self.name, self.fingerprint(engine, data), self.settings_dict(data), self.run.steps
        )
        folder.export_lora = lambda step: self.export_lora(engine, adapters, text, data, step)
        folder.notify = self.screen.print_line
        with folder.hold():
            done = folder.load_finished()
            lora, losses = done or self.train_adapters(engine, adapters, text, data, folder)
        if done:
            self.screen.print_line("this very run is finished already; nothing was trained again")
        self.write_results(lora, losses)
        if self.sample_prompts:
            self.write_sample_sheet(engine, adapters, text, lora, data)

    def read_dataset(self):
        def progress(done, total, name):
            self.stop.raise_if_requested()
            self.screen.update_line(f"reading {done}/{total} {name}")

        dataset = read_folder(
            self.args.images,
            self.args.caption_extension,
            alpha_mask=self.args.alpha_mask,
            progress=progress,
            facts_file=self.args.out / ".cache" / FACTS_FILE,
        )
        self.screen.print_line(f"{len(dataset)} images in {self.args.images}")
        used = {record.path for record in dataset}
        for path, reason in dataset.skipped:
            word = "noted" if path in used else "left out"
            self.screen.print_line(f"  {word}: {reason if path in reason else f'{path}: {reason}'}")
        for line in describe_colour_profiles(dataset):
            self.screen.print_line(f"  {line}")
        if self.captions.caption_mode == CAPTION_MODE_TEXT and not self.captions.trigger.strip():
            require_captions(dataset)  # before the model is loaded
        return dataset

    def load_engine(self):
        from .engines.diffusers import load_engine

        engine = load_engine(self.args.model, self.args.device)
        self.screen.print_line(f"{self.args.model.name}: {engine.family.architecture} on {engine.denoiser.device}")
        return engine

    def encode_dataset(self, dataset, engine):
        report = lambda done, total, what: self.screen.update_line(f"encoding {done}/{total} {what}")
        return encode_dataset(
            dataset,
            self.captions,
            self.buckets,
            self.args.flip,
            engine.vae,
            engine.text,
            self.args.out / ".cache",
            report,
            self.stop.raise_if_requested,
            seed=self.run.seed,
        )

    def make_text_adapters(self, engine, rng):
        """Adapters of the text encoders, or None when these are not trained."""
        if not self.adapter.text_encoder:
            return None
        settings = text_adapter_settings(self.adapter)
        return Adapters(engine.text.trainable_models(), settings, rng).to(engine.denoiser.device)

    def fingerprint(self, engine, data) -> str:
        """Of all that changes the result but the number of steps, so that a run can be continued to more."""
        run = {k: v for k, v in self.run.to_dict().items() if k not in ("steps", "save_every")}
        text = engine.text.identity if self.adapter.text_encoder else ""
        return compute_fingerprint(
            "lora cli 1", data.fingerprint, engine.identity, text, self.adapter, self.optimizing, self.noise, run
        )

    def settings_dict(self, data) -> dict:
        names = {"model": str(self.args.model), "images": str(self.args.images), "count": len(data)}
        return names | {record.__name__: values.to_dict() for record, values in self.records.items()}

    def train_adapters(self, engine, adapters, text, data, folder):
        encode_text = engine.encode_batch if text is not None else None
        method = LoraTraining(
            engine.denoiser,
            adapters,
            data,
            self.noise,
            engine.family.density,
            self.run.batch,
            text,
            encode_text,
            few_step=plan_few_steps(self.noise, engine.family.few_steps),
        )
        with adapters.attached(), attach_trained_text(engine, text):
            losses = train(method, self.run, self.optimizing, report=self.report_progress, store=folder)
        return folder.export_lora(self.run.steps), losses

    def sample_size(self, engine, data) -> tuple[int, int]:
        """Pixels (width, height), in whole tokens of two latent cells."""
        unit, side = engine.vae.factor * 2, self.args.sample_size or self.buckets.resolution
        bucket = None if self.args.sample_size else most_common_bucket(data)
        width, height = (max(unit, pixels // unit * unit) for pixels in bucket or (side, side))
        return width, height

    def report_progress(self, progress):
        self.screen.update_line(progress.format_line(), force=progress.step == progress.steps)
        self.stop.raise_if_requested()

    def export_lora(self, engine, adapters, text, data, step) -> LoraFile:
        tensors, _ = engine.lora_tensors(adapters, text)
        family = engine.family
        about = lora_metadata(
            title=self.name,
            base=family.base_version,
            architecture=family.architecture,
            prediction=engine.prediction,
            adapter=self.adapter,
            optimizing=self.optimizing,
            noise=self.noise,
            run=self.run,
            resolution=f"{self.buckets.resolution}x{self.buckets.resolution}",
            steps=step,
            dataset={"images": len(data), "dropout": self.captions.dropout},
        )
        return LoraFile(tensors, about, step)

    def write_results(self, lora, losses):
        path = self.args.out / f"{self.name}.safetensors"
        write_lora(path, lora)
        draw_loss_plot(losses, self.args.out / f"{self.name}-loss.png", title=f"{self.name}: training loss")
        loss = mean_recent_loss(losses)
        self.screen.print_line(f"{path}: {lora.steps} steps, loss {loss:.4f}; the curve is in {self.name}-loss.png")

    def write_sample_sheet(self, engine, adapters, text, lora, data):
        """Rows: prompt without and with the LoRA. Columns: seeds."""
        engine.load_lora(
            lora, adapters, text
        )  # this process may not have trained it, and some optimizers deliver another point
        size = self.sample_size(engine, data)
        seeds = range(self.args.sample_seeds)
        columns: list = []
        for seed in seeds:
            self.screen.update_line(f"sampling seed {seed + 1}/{len(seeds)}")
            self.stop.raise_if_requested()
            look = lambda s=seed: engine.sample(
                self.sample_prompts, s, size, self.args.sample_steps, self.args.sample_cfg
            )
            before = look()
            with adapters.attached(), attach_trained_text(engine, text):
                columns.append((before, look()))
        rows = [
            [tensor_to_image(column[with_lora][i], "sample") for column in columns]
            for i in range(len(self.sample_prompts))
            for with_lora in (0, 1)
        ]
        labels = [f"{shorten_prompt(p)}{how}" for p in self.sample_prompts for how in ("", " + LoRA")]
        path = self.args.out / f"{self.name}-samples.png"
        draw_image_grid(rows, labels, [f"seed {s}" for s in seeds]).save(path)
        self.screen.print_line(f"{path}: without and with the LoRA")


@contextlib.contextmanager
def attach_trained_text(engine, text):
    """The text encoders on their device with their adapters attached, while inside; nothing when they are not
    trained."""
    if text is None:
        yield
        return
    with engine.text.on_device(), text.attached():
        yield


def shorten_prompt(text, most=36):
    return text if len(text) <= most else text[: most - 1] + "…"


# -- main --------------------------------------------------------------------------------------------------------------


def main(argv=None) -> int:
    """0 done, 2 a mistake that was explained in one line, 130 stopped by Ctrl-C with everything saved."""
    args = make_argument_parser().parse_args(argv)
    screen = ConsoleOutput()
    try:
        with InterruptHandler() as stop:
            CommandLineJob(args, screen, stop)()
    except KeyboardInterrupt:
        screen.print_line(f"Stopped. What was done is kept in {args.out}; the same command continues from there.")
        return EXIT_STOPPED
    except (ValueError, OSError, RuntimeError) as error:
        if args.debug:
            raise
        hint = " (--debug shows where)" if type(error) is RuntimeError else ""
        screen.end_line()
        print(f"python -m trainers: {' '.join(str(error).split())}{hint}", file=sys.stderr)
        return EXIT_MISTAKE
    return 0


if __name__ == "__main__":
    sys.exit(main())
