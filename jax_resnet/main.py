"""The command: `python -m jax_resnet.main --config configs/resnet20_digits.py`.

--config.KEY=VALUE changes a value of the config; jax_resnet/config/defaults.py has them all.
"""

import gc
import re
import signal
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from jax_resnet.commands.ending import hush, lacking, leave, print_plainly
from jax_resnet.commands.status import fail
from jax_resnet.config import parse_flags, validate
from jax_resnet.errors import Interrupted, UserError

config_flags.DEFINE_config_file("config", None, "The config file, with `:argument` where it takes one.")
flags.DEFINE_string("workdir", None, "Where the run is kept. Default: runs/CONFIG/DATA-seedN.")
flags.DEFINE_enum("mode", "train", ["train", "eval"], "eval: evaluate a checkpoint of the workdir.")
flags.DEFINE_string("checkpoint", "best", "With --mode=eval: best, latest, a step, or init (of init_from).")
FLAGS = flags.FLAGS


def run() -> None:
    """Train or evaluate as the flags say. Raises UserError for a user's mistake."""
    if FLAGS.config is None and not (FLAGS.mode == "eval" and FLAGS.workdir):
        raise UserError("--config is missing: give a file, for example --config configs/resnet20_digits.py")
    if FLAGS.config is not None:
        validate(FLAGS.config)
    workdir = FLAGS.workdir or default_workdir()
    from jax_resnet.runtime.distributed import join_job  # loads JAX, for which a mistyped flag should not wait

    join_job()
    if FLAGS.mode == "eval":
        from jax_resnet.training.evaluate import evaluate_checkpoint

        evaluate_checkpoint(workdir, config=FLAGS.config, which=FLAGS.checkpoint)
    else:
        from jax_resnet.commands.host import command_host
        from jax_resnet.training.loop import train

        with command_host() as host:
            train(FLAGS.config, workdir, host=host)


def default_workdir() -> Path:
    """Return runs/CONFIG/DATA-seedN, the same for the same command."""
    file, _, argument = config_flags.get_config_filename(FLAGS["config"]).partition(":")
    kind, colon, path = FLAGS.config.data.name.partition(":")
    is_path = colon and kind in ("npz", "folder", "prepared")
    data = Path(path).expanduser().resolve().stem if is_path else FLAGS.config.data.name
    config, data = (re.sub(r"[^\w.]+", "_", text).strip("._") for text in (f"{Path(file).stem}-{argument}", data))
    return Path("runs") / config / f"{data}-seed{FLAGS.config.seed}"


def main(_: list[str]) -> int:
    """Run the command; a user's mistake is one line on stderr and status 2, a signal 128 + its number."""
    hush()
    print_plainly()
    try:
        run()
    except (KeyboardInterrupt, Interrupted) as e:
        print(e if isinstance(e, Interrupted) else "interrupted", file=sys.stderr)
        return leave(128 + (e.signum if isinstance(e, Interrupted) else signal.SIGINT))
    except Exception as e:
        return leave(fail(e if isinstance(e, UserError) else lacking(e)))
    return leave(0)


def _parse(argv: list[str]) -> list[str]:
    logging.set_verbosity(logging.ERROR)  # until the flags are parsed
    gc.set_threshold(100_000)  # by Python's 700 a tenth of a start is a search for garbage among what JAX traces
    try:
        return parse_flags(argv)
    except UserError as e:
        sys.exit(fail(e))


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
