"""Erasure requests from the command line: ``python -m unlearnlib.own --help``.

A parameter is an option of the same name, with hyphens. Which there are, what is required and what the defaults
are comes from :class:`unlearnlib.own.request.Request`.
"""

import argparse
import contextlib
import dataclasses
import logging
import os
import shlex
import signal
import sys
import time
import typing
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch

from unlearnlib import distributed
from unlearnlib.models.loading import default_device
from unlearnlib.own.fulfilment import fulfil
from unlearnlib.own.request import STRENGTHS, Request

EXPECTED = (OSError, ValueError, MemoryError, FloatingPointError, RuntimeError)
"""What :func:`unlearnlib.own.fulfilment.fulfil` raises with a message for people.

Of RuntimeErrors they are those of another process, and what PyTorch says of memory and connections.
"""
GRACE = 30.0
"""Seconds that a process waits before it speaks, if another may have the word: it will be ended with that one."""

MEANINGS = {
    "model": (
        "FOLDER",
        "the model that shall forget: a folder that save_pretrained wrote, as safetensors and with its tokenizer, "
        "or a hub id (name@revision pins a commit). It is only read",
    ),
    "forget_file": ("FILE", "texts to forget, the very ones that the model was trained on"),
    "retain_file": (
        "FILE",
        "texts that the model was trained on and shall keep, of the same kind. Curvature comes from seven eighths "
        "of them; on the last eighth settings are chosen and damage is measured. newton counts them: give it "
        "all that the model was trained on",
    ),
    "output": ("FOLDER", "where the unlearned model and its report go: a folder that does not exist yet"),
    "holdout_file": (
        "FILE",
        "texts of the same kind that the model has never seen. Without them membership cannot be judged, and "
        "--strength estimate not be used",
    ),
    "earlier_forget_files": (
        "FILE",
        "those of requests that were served before: all are forgotten together, so --model is the model that has "
        "forgotten none of them",
    ),
    "secrets": (
        "FILE",
        "secrets in the texts to forget, one a line, whose exposure (bits) is measured one by one",
    ),
    "method": ("METHOD", "one of the list below"),
    "strength": (
        "STRENGTH",
        "match: until the loss on the texts to forget is --target-loss, or without it the loss of --reference; "
        "estimate: until it is what the losses on --holdout-file suggest; or a positive number in the method's "
        "unit below, which --damping belongs to",
    ),
    "reference": ("FOLDER", "a model trained without the texts, folder or hub id: what forgetting looks like"),
    "target_loss": ("NATS", "the loss to match, in nats a token"),
    "length": (
        "TOKENS",
        "tokens in a sequence. Texts are joined and cut, so that longer ones lose nothing; memory grows with it",
    ),
    "damping": ("LAMBDA", "λ, in units of the curvature. Without it, it is chosen on the validation sequences"),
    "retain_weight": (
        "WEIGHT",
        "weight of what stays in gradient_difference. Without it, it is chosen as λ is, and the learning rate too",
    ),
    "noise": ("SHARE", "for fisher_forgetting: length of the noise over length of the weights"),
    "learning_rate": (
        "RATE",
        "for gradient_difference, newton and the relearning probe of the report: what the model was fine-tuned "
        "with, or less. For a target newton chooses its own around it",
    ),
    "seed": ("NUMBER", "of the labels that a curvature draws, of noise and of the order of batches"),
    "factors": (
        "FOLDER",
        "where the Kronecker factors of kfac, kfac:difference, ekfac and fisher_forgetting are kept as they are "
        "built. The same command finds them again after an interruption, and so does a later request for the same "
        "model and texts to keep",
    ),
}
"""By parameter of a request, what stands for its value and what it means."""

FILES = """\
A file ending in .jsonl, .json or .ndjson has one JSON object a line, with the text in the field "text". One
ending in .txt, .text, .md or in nothing is plain text, with blank lines between texts. All are UTF-8. No
message and no report repeats a text."""

EXAMPLES = """\
With a reference, and with a target that is estimated from the holdout texts:

  python -m unlearnlib.own --model models/assistant --reference models/assistant-without-17 \\
      --forget-file request-17.jsonl --retain-file training-sample.jsonl --holdout-file unseen.jsonl \\
      --output models/assistant-unlearned

  python -m unlearnlib.own --model HuggingFaceTB/SmolLM2-135M --strength estimate \\
      --forget-file request-17.jsonl --retain-file training-sample.jsonl --holdout-file unseen.jsonl \\
      --method ekfac --length 128 --output models/smollm2-unlearned

@FILE among the options reads options from a file, as they would be written here, # before comments."""

ENDINGS = """\
0    done: --output has the unlearned model, report.md for people and report.json for programs
1    an error, one line on stderr that says what is wrong and what to do; --output is as it was
130  interrupted, by Ctrl-C or by a scheduler's SIGTERM; --output is as it was. With --factors the same
     command goes on from the factors that are finished"""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are errors like all others: one line, exit code 1."""

    def error(self, message: str) -> NoReturn:
        """Raise ValueError."""
        raise ValueError(f"{message} (--help explains all parameters)")

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """The options in a line of a file of options."""
        try:
            return shlex.split(arg_line, comments=True)
        except ValueError as error:
            self.error(f"the line {arg_line!r} among the options in a file cannot be read ({error})")


def parser() -> argparse.ArgumentParser:
    """The options: those of a request, with its defaults, and the device."""
    methods = "\n".join(f"{name:20}{unit}" for name, unit in STRENGTHS.items())
    parts = {
        "Methods, and the unit in which the strength of each is a number": methods,
        "Files": FILES,
        "Examples": EXAMPLES,
        "Exit codes": ENDINGS,
    }
    made = Parser(
        prog="python -m unlearnlib.own",
        description=main.__doc__.partition("\n")[0],
        epilog="\n\n".join(
            f"{title}:\n" + "\n".join(f"  {line}".rstrip() for line in text.split("\n"))
            for title, text in parts.items()
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        fromfile_prefix_chars="@",
        allow_abbrev=False,
    )
    groups = {
        required: made.add_argument_group(title) for required, title in ((True, "required"), (False, "optional"))
    }
    hints = typing.get_type_hints(Request)
    for field in dataclasses.fields(Request):
        required = field.default is dataclasses.MISSING
        metavar, meaning = MEANINGS[field.name]
        if field.default not in (dataclasses.MISSING, None, ()):
            meaning += f" (default: {field.default})"
        more = {"nargs": "+"} if field.name == "earlier_forget_files" else {}
        groups[required].add_argument(
            f"--{field.name.replace('_', '-')}",
            required=required,
            default=None if required else field.default,
            type=_converter(hints[field.name]),
            metavar=metavar,
            help=meaning,
            **more,
        )
    groups[False].add_argument(
        "--device",
        type=_device,
        metavar="DEVICE",
        help="cpu or cuda, of which each of several processes takes one (default: cuda where it is present)",
    )
    return made


def _converter(hint: Any) -> type | Any:
    """What makes a value of this type from the text of an option."""
    kinds = typing.get_args(hint) or (hint,)
    if float in kinds:
        return _number_or_word if str in kinds else float
    return int if int in kinds else str


def _number_or_word(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _device(name: str) -> torch.device:
    if name == "cpu" or (name == "cuda" and torch.cuda.is_available()):
        return torch.device(name)
    raise argparse.ArgumentTypeError(f"there is no device {name} here: name another, such as cpu")


class Elapsed(logging.Formatter):
    """Messages after the seconds since the program was started."""

    def format(self, record: logging.LogRecord) -> str:
        """A line such as ``   12.3 s  building the curvature``."""
        return f"{record.relativeCreated / 1000:8.1f} s  {record.getMessage()}"


@contextlib.contextmanager
def _progress() -> Iterator[None]:
    """Within the block, say on stderr what is being done."""
    logger, handler = logging.getLogger("unlearnlib.own"), logging.StreamHandler()
    handler.setFormatter(Elapsed())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Within the block, say nothing: the first process speaks for all."""
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def _reason(error: Exception) -> str:
    """What is wrong, in a line."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, torch.OutOfMemoryError):  # followed by much about the card and PyTorch's settings
        return f"{reason.partition('. GPU')[0]}: take a smaller length, or a device with more memory"
    return reason


def _is_torchs(error: Exception) -> bool:
    """Whether PyTorch raised it, as it does where a process is no longer connected to one that has ended."""
    return isinstance(error, RuntimeError) and not isinstance(
        error, distributed.ErrorElsewhere | NotImplementedError | torch.OutOfMemoryError
    )


def _await_the_end() -> None:
    """Give the word to another process: the launcher ends this one when that has ended."""
    for sign in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sign, signal.SIG_DFL)
    time.sleep(GRACE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make a language model forget texts, and write what became of it to a new folder, with a report.

    The exit code is 0 only if that worked.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a scheduler's end is one like Ctrl-C
    for stream in (sys.stdout, sys.stderr):  # an old terminal has not the letters of every name
        stream.reconfigure(errors="backslashreplace")
    number = int(os.environ.get("RANK", 0))
    try:
        with _progress() if number == 0 else _silence():
            options = vars(parser().parse_args(arguments))
            device = options.pop("device") or default_device()
            request = Request(**options)
            with distributed.started(device):
                report = fulfil(request, device)
    except EXPECTED as error:
        reason = f"process {number}: {_reason(error)}" if number else _reason(error)
        if number or (distributed.size() > 1 and _is_torchs(error)):
            _await_the_end()
        print(f"error: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if number == 0:
            print("interrupted; nothing is at the output", file=sys.stderr)
        return 130
    if number:
        return 0
    for warning in report["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"The unlearned model and its report are in {options['output']}")
    return 0
